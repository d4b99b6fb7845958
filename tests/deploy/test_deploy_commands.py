"""Every command of docs/deploy.md is run here, but those whose line says what they need that is not here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")


def commands() -> tuple[list[str], list[str]]:
    """To be run, and in need of something: those of a block after a line `# needs ...`."""
    runs, needy = [], []
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        needs = False
        for line in block.splitlines():
            needs = needs or line.startswith("# needs ")
            if not line.startswith("#"):
                (needy if needs else runs).append(line)
    return runs, needy


def test_what_is_in_need_is_what_cannot_be_here() -> None:
    runs, needy = commands()
    assert len(runs) >= 4
    for command in needy:
        assert (
            command.removeprefix("MODEL_PATH=Qwen/Qwen2.5-0.5B-Instruct ").startswith(("docker ", "kubectl apply ", "serve run "))
            or "localhost" in command
            or "127.0.0.1" in command
        )


def with_marks(command: str) -> Any:
    return pytest.param(command, id=command[:40], marks=[pytest.mark.long] if " kernels compile " in command else [])


@pytest.mark.parametrize("command", [with_marks(command) for command in commands()[0]])
def test_the_command_works(command: str, tmp_path: Path) -> None:
    words = shlex.split(command)
    if words[0] != "octavo" and shutil.which(words[0]) is None:
        pytest.skip(f"{words[0]} is not installed")
    if words[0] == "octavo":
        words[:1] = [sys.executable, "-m", "octavo"]
    for name in ("docker", "deploy"):
        (tmp_path / name).symlink_to(ROOT / name)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"(?:docker|deploy)/[\w./-]*\w", PAGE)
    assert len(named) > 8
    assert [name for name in named if not (ROOT / name).exists()] == []
