"""What /openapi.json says is what the server does: schemathesis, which makes requests out of it, finds nothing else."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from .conftest import Served

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("schemathesis") is None, reason="schemathesis is not installed: pip install schemathesis"),
]


def test_schemathesis_finds_nothing(shared_server: Served) -> None:
    command = [
        sys.executable,
        "-c",
        "from schemathesis.cli import schemathesis; schemathesis()",
        "run",
        f"{shared_server.url}/openapi.json",
    ]
    # The schema says types; ranges, and what goes with what, are told by the 400 of a request.
    flags = ["--phases", "coverage,fuzzing", "--max-time", "60", "--continue-on-failure", "--exclude-checks", "positive_data_acceptance"]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
