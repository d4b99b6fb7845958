"""Proves that a start knows whether its CPU kernels have been compiled before, so that it announces the wait only where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo.runtime import start
from octavo.runtime.config import EngineConfig


def test_an_empty_cache_folder_has_no_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "not-made-yet"):
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(folder))
        assert not start._has_compiled_kernels()


@pytest.mark.needs_embedded_model
def test_a_cache_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    """A file stands in its way: root, who may run these tests, may write to any folder."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "file" / "cache")}
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    told = [line for line in done.stderr.splitlines() if " INFO " not in line]
    assert done.returncode == 1
    assert len(told) == 1
    assert told[0].startswith("octavo serve: compiled CPU kernels cannot be kept in ")
    assert told[0].endswith("set OCTAVO_CACHE_DIR to a folder that can be written to, or mount a volume there")


@pytest.mark.needs_embedded_model
def test_a_queue_of_one_is_enough_to_start() -> None:
    config = EngineConfig(max_running_requests=1, max_queued_requests=1, max_total_tokens=4096)
    assert not start.load_core(config, show_progress=False).has_work


def test_compiled_kernels_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    (tmp_path / "cpu_1234").mkdir()
    (tmp_path / "cpu_1234" / "linear.multiply-12.py311.1.nbc").touch()
    assert start._has_compiled_kernels()
