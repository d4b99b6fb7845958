"""Log lines: their form, the rotated file that two processes share, and a disk that is full."""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo.runtime import logs
from octavo.runtime.logs import LogSettings, set_up_logging

logger = logging.getLogger("octavo.test")


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("octavo")
    before = root.handlers[:], root.level, own.level
    yield
    for handler in root.handlers:
        if handler not in before[0]:
            with contextlib.suppress(OSError):  # of what could not be written before
                handler.close()
    root.handlers[:], root.level = before[0], before[1]
    own.setLevel(before[2])


def test_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "server.log"
    set_up_logging(LogSettings(format="json", file=str(file)), rotates=True)
    logger.info("one\nline: %s", "größer")
    logger.debug("not told")
    try:
        raise ValueError("no")
    except ValueError:
        logger.exception("failed")
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [(line["level"], line["logger"], line["message"]) for line in lines] == [
        ("info", "octavo.test", "one\nline: größer"),
        ("error", "octavo.test", "failed"),
    ]
    assert lines[0]["time"].endswith("Z")
    assert "ValueError: no" in lines[1]["exception"]
    assert len(capsys.readouterr().err.splitlines()) == 2  # on stderr too


def test_another_process_follows_a_rotation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "server.log"
    monkeypatch.setattr(logs, "_MAX_BYTES", 2000)
    set_up_logging(LogSettings(file=str(file)), rotates=True)
    follower = (
        "import logging, sys\nfrom octavo.runtime.logs import LogSettings, set_up_logging\n"
        f"set_up_logging(LogSettings(file={str(file)!r}), rotates=False)\n"
        "for line in sys.stdin:\n    logging.getLogger('octavo.engine').info('engine %s', line.strip())\n    print(flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", follower], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        for i in range(60):
            logger.info("server %d", i)
            other.stdin.write(f"{i}\n")
            other.stdin.flush()
            other.stdout.readline()
        other.stdin.close()
    files = sorted(tmp_path.iterdir())
    assert len(files) > 2
    told = "".join(path.read_text() for path in files)
    assert all(f"server {i}\n" in told for i in range(60))
    assert all(f"engine {i}\n" in told for i in range(60))


def test_a_full_disk_is_told_and_survived(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_logging(LogSettings(file="/dev/full"), rotates=False)
    for _ in range(3):
        logger.info("still here")
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if "cannot be written" in line] == [
        "the log file /dev/full cannot be written ([Errno 28] No space left on device): lines are lost there"
    ]
    assert sum("still here" in line for line in told) == 3
