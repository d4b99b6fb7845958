"""`optimum-cli octavo quantize`, as optimum finds and runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .architectures import make
from .conftest import _write_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    _write_tokenizer(folder, adds_bos=False, swapped=False)
    return folder


def optimum_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def test_it_quantizes(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} are {i + i}.\n" for i in range(200)))
    flags = ["--model-path", str(llama), "--out", str(tmp_path / "out"), "--method", "rtn", "--group-size", "16", "--skip-speed"]
    done = optimum_cli("octavo", "quantize", *flags, "--calibration", str(text), "--samples", "4", "--seqlen", "32")
    assert done.returncode == 0, done.stderr
    assert "14 quantized" in done.stdout
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize(
    ("flags", "told"), [(["--out", "x", "--method", "best-of-all"], "best-of-all"), (["--method", "rtn"], "--out DIR is missing")]
)
def test_what_is_wrong_is_said(flags: list[str], told: str) -> None:
    done = optimum_cli("octavo", "quantize", *flags)
    assert done.returncode == 2
    assert told in done.stderr.splitlines()[-1]
