"""How a command ends whose user leaves: who stops reading what it prints, and who presses Ctrl-C before it has begun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from octavo.serve.exit_code import exit_code_of

COMMANDS = [
    ["octavo", "--help"],
    ["octavo", "doctor", "--json"],
    ["octavo", "serve", "--help"],
    ["octavo", "eval", "--help"],
    ["octavo", "bench", "serving", "--help"],
    ["octavo.serve", "--help"],
    ["octavo.launch_server", "--help"],
]


def _ended_without_a_reader(*command: str, buffered: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a module with a pipe as its output that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {} if buffered else {"PYTHONUNBUFFERED": "1"}
    try:
        return subprocess.run(
            [sys.executable, "-m", *command], stdout=writer, stderr=subprocess.PIPE, text=True, check=False, timeout=60, env=environment
        )
    finally:
        os.close(writer)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_nobody_reads(command):
    ended = _ended_without_a_reader(*command)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_nobody_reads_what_is_written_at_once():
    ended = _ended_without_a_reader("octavo", "--version", buffered=False)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_another_pipe_that_breaks_is_an_error():
    with pytest.raises(BrokenPipeError):
        exit_code_of(lambda: _raise(BrokenPipeError()))


def _raise(error: BaseException) -> int:
    raise error


def test_what_a_command_gives_and_raises_is_left_alone():
    assert exit_code_of(lambda: 3) == 3
    with pytest.raises(SystemExit, match="2"):
        exit_code_of(lambda: _raise(SystemExit(2)))
    assert exit_code_of(lambda: _raise(KeyboardInterrupt())) == 130


def test_output_may_be_closed():
    ended = subprocess.run(["sh", "-c", '"$0" -m octavo --version >&-', sys.executable], check=False, capture_output=True, timeout=20)
    assert (ended.returncode, ended.stderr) == (0, b"")


# The module whose import comes late, when the command has begun: there the test waits to be interrupted.
STOP_AT = """
import sys, time
class Wait:
    def find_spec(self, name, path=None, target=None):
        if name == NAME:
            print("waiting", flush=True)
            time.sleep(60)
sys.meta_path.insert(0, Wait())
from octavo.__main__ import main
sys.exit(main(ARGV))
"""


@pytest.mark.parametrize(
    ("argv", "module", "code"),
    [
        (["serve"], "fastapi", 130),
        (["serve"], "octavo.runtime.process", 0),  # from here on the server ends as it is told to
        (["serve", "--explain-quant"], "torch", 130),
        (["doctor"], "torch", 130),
        (["eval", "--text", "x"], "octavo.runtime.engine", 130),
    ],
)
def test_ctrl_c_while_it_starts(argv, module, code):
    script = f"NAME, ARGV = {module!r}, {argv!r}{STOP_AT}"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as popen:
        assert popen.stdout is not None
        assert popen.stdout.readline() == "waiting\n"
        time.sleep(0.05)
        popen.send_signal(signal.SIGINT)
        assert popen.wait(10) == code
        assert "Traceback" not in popen.communicate()[1]
