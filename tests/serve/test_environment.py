"""Flags from the environment, and the entry point of images that takes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from octavo import __main__ as command
from octavo.serve.arguments import serve_parser
from octavo.serve.environment import PLAIN, flags_from


def test_the_guides_variables() -> None:
    assert flags_from({"MODEL_PATH": "org/model", "TP_SIZE": "1", "PATH": "a:b"}, []) == ["--model-path=org/model", "--tp-size=1"]


def test_every_flag_is_a_variable() -> None:
    flags = {flag for action in serve_parser("")._actions for flag in action.option_strings if flag.startswith("--")}
    assert {"--" + name.lower().replace("_", "-") for name in PLAIN} <= flags
    environment = {"OCTAVO_MEM_FRACTION_STATIC": "0.5", "OCTAVO_LOG_REQUESTS": "true", "OCTAVO_SHUTDOWN_TIMEOUT": "7"}
    assert flags_from(environment, []) == ["--log-requests", "--mem-fraction-static=0.5", "--shutdown-timeout=7"]
    assert flags_from({"OCTAVO_LOG_REQUESTS": "0", "OCTAVO_ENABLE_METRICS": "false"}, []) == ["--disable-metrics"]


@pytest.mark.parametrize("words", [["x"], ["--model-path", "org/other"], ["--model=org/other", "--port", "1"], ["--seed", "1", "x"]])
def test_arguments_win(words: list[str]) -> None:
    assert flags_from({"MODEL_PATH": "org/model", "OCTAVO_HOST": "::"}, words) == ["--host=::"]
    assert flags_from({"PORT": "9", "OCTAVO_PORT": "9"}, ["--port=8"]) == []


def test_what_kubernetes_says_of_a_service_called_octavo() -> None:
    told = {
        "OCTAVO_SERVICE_HOST": "10.0.0.1",
        "OCTAVO_SERVICE_PORT": "30000",
        "OCTAVO_SERVICE_PORT_HTTP": "30000",
        "OCTAVO_PORT": "tcp://10.0.0.1:30000",
        "OCTAVO_PORT_30000_TCP": "tcp://10.0.0.1:30000",
        "OCTAVO_PORT_30000_TCP_ADDR": "10.0.0.1",
    }
    assert flags_from(told, []) == []
    others = {"OCTAVO_API_KEY": "secret", "OCTAVO_CACHE_DIR": "c", "MODEL_PATH": ""}
    assert flags_from({"OCTAVO_PORT": "30001", **others}, []) == ["--port=30001"]


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"OCTAVO_QUANTISATION": "fp8"}, "the variable OCTAVO_QUANTISATION is no flag; did you mean OCTAVO_QUANTIZATION?"),
        ({"OCTAVO_XYZZY": "1"}, "the variable OCTAVO_XYZZY is no flag: unset it"),
        ({"OCTAVO_LOG_REQUESTS": "perhaps"}, "the variable OCTAVO_LOG_REQUESTS is 'perhaps': give true or false"),
        ({"PORT": "1", "OCTAVO_PORT": "2"}, "the variables OCTAVO_PORT and PORT contradict each other: unset one"),
        ({"PORT": "abc"}, "in the variable PORT: --port 'abc' is not valid: give a whole number"),
        ({"TP_SIZE": "four"}, "in the variable TP_SIZE: --tp-size 'four' is not valid"),
    ],
)
def test_what_cannot_be(environment: dict[str, str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(command._contained([], environment))
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


def test_other_commands_take_no_flags_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "_run", lambda words: seen.append(words) or 0)
    assert command._contained(["quantize", "--out", "x"], {"OCTAVO_XYZZY": "1"}) == 0
    assert command._contained(["serve", "--port", "1"], {"MODEL_PATH": "m"}) == 0
    assert command._contained(["m2"], {"LOG_LEVEL": "error"}) == 0
    assert seen == [["quantize", "--out", "x"], ["serve", "--model-path=m", "--port", "1"], ["serve", "--log-level=error", "m2"]]


def test_a_command_that_is_mistyped_is_no_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command._contained(["doctr"], {}) == 2
    assert "did you mean doctor?" in capsys.readouterr().err
    assert command._contained(["--version"], {}) == 0
    assert capsys.readouterr().out.startswith("octavo ")
    seen: list[list[str]] = []
    monkeypatch.setattr(command, "_run", lambda words: seen.append(words) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doctr").mkdir()
    assert command._contained(["doctr"], {}) == 0
    assert seen == [["serve", "doctr"]]


def test_variables_without_the_prefix_are_told() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")
    assert [name for name in PLAIN if f"`{name}`" not in page] == []


def test_the_entry_point_runs() -> None:
    environment = {**os.environ, "MODEL_PATH": "/nowhere/at/all"}
    run = "import sys; from octavo.__main__ import container; sys.exit(container())"
    done = subprocess.run([sys.executable, "-c", run], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "/nowhere/at/all" in done.stderr
    assert "Traceback" not in done.stderr
