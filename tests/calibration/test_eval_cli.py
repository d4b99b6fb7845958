"""Proves the `octavo eval` command: what it prints and writes, and what a wrong command line is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import octavo
from octavo.__main__ import main as octavo_command
from octavo.calibration.eval_cli import main

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness. " * 2
FAST = ["--device", "cpu", "--num-threads", "2", "--seqlen", "64"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "dickens.txt"
    file.write_text(TEXT, encoding="utf-8")
    return file


def test_one_model(tiny: tuple[Path, Any], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert octavo_command(["eval", "--model-path", str(tiny[0]), "--text", str(text), *FAST]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    expected = octavo.evaluate(str(tiny[0]), text=TEXT, seqlen=64, engine_options={"device": "cpu"}, show_progress=False)
    assert rows["perplexity"] == f"{expected.perplexity:.4f}"
    assert rows["tokens"].split() == ["evaluated", str(expected.num_tokens)]
    assert rows["text"].startswith("dickens.txt")
    assert rows["windows"].startswith("4 x 64 tokens, stride 64; no BOS")
    assert "KL(ref" not in rows


def test_against_a_reference(tiny: tuple[Path, Any], other: tuple[Path, Any], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = text.parent / "out.json"
    argv = ["--model-path", str(tiny[0]), "--reference", str(other[0]), "--text", str(text), "--stride", "32", "--max-windows", "3"]
    assert main([*argv, "--add-bos", "yes", "--output-json", str(report), *FAST]) == 0
    out = capsys.readouterr().out
    for words in (
        "reference",
        "ratio",
        "KL(ref || model)",
        "nats a token",
        "top-1 agreement",
        "stride 32; BOS 256 once",
        f"wrote {report}",
    ):
        assert words in out
    found = json.loads(report.read_text())
    assert found["num_tokens"] == 127
    assert found["kl_max"] >= found["kl_p99"] >= found["kl_mean"] > 0
    assert f"mean {found['kl_mean']:.3g}" in out
    assert found["reference"]["path"] == str(other[0])


def test_engine_flags_reach_the_model_and_not_the_reference(tiny: tuple[Path, Any], text: Path) -> None:
    report = text.parent / "out.json"
    model = str(tiny[0])
    argv = ["--model-path", model, "--reference", model, "--text", str(text), "--max-tokens", "40", "--output-json", str(report)]
    assert main([*argv, *FAST, "--dtype", "bfloat16", "--kv-cache-dtype", "fp8", "--reference-dtype", "float16"]) == 0
    found = json.loads(report.read_text())
    assert (found["model"]["dtype"], found["model"]["kv_cache_dtype"]) == ("bfloat16", "fp8_e4m3")
    assert (found["reference"]["dtype"], found["reference"]["kv_cache_dtype"]) == ("float16", "float16")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--seqlen", "1"], "1 is not valid: give at least 2"),
        (["--seqlen", "many"], "'many' is not a whole number"),
        (["--max-tokens", "9", "--max-windows", "1"], "not allowed with argument"),
        (["--add-bos", "maybe"], "invalid choice: 'maybe'"),
        (["--no-such-flag"], "unknown flag --no-such-flag; --help lists the flags"),
        (["--modle-path=x"], "unknown flag --modle-path; did you mean --model-path?"),
        (["stray"], "unexpected argument stray; --help lists the flags"),
        (["--text"], "--text: expected one argument"),
    ],
)
def test_wrong_flags_end_with_two(text: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--text", str(text), *argv])
    assert end.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("octavo eval: ")
    assert words in told


@pytest.mark.parametrize(("argv", "words"), [([], "--text FILE is missing: give"), (["--txt", "a"], "did you mean --text?")])
def test_a_text_must_be_given(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--text", "no-such-file.txt"], "no-such-file.txt: No such file"),
        (["--seqlen", "600"], "seqlen 600 is beyond the context length"),
        (["--stride", "65", "--seqlen", "64"], "stride 65 is not valid: give 1 to 64"),
        (["--output-json", "no/such/folder.json"], "cannot write no/such/folder.json"),
        (["--dtype", "float33"], "--dtype 'float33' is not valid"),
        (["--model-path", "no/such/model/there"], "no such file or folder"),
        (["--output-json", "."], "cannot write .: it is a folder"),
        (["--linear-backend", "magic"], "--linear-backend 'magic' is not valid"),
        (["--seqlen", "64", "--reference", "no/such/model/there"], "the reference: model 'no/such/model/there'"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_line(
    without_weights: Path, text: Path, argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model-path", str(without_weights), "--text", str(text), "--device", "cpu", *argv]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("octavo eval: ")
    assert words in told


def test_a_text_that_is_not_utf8(tiny: tuple[Path, Any], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text.write_bytes(b"caf\xe9 au lait")
    assert main(["--model-path", str(tiny[0]), "--text", str(text)]) == 2
    assert "is not UTF-8" in capsys.readouterr().err


def test_help_offers_what_the_engine_has(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0
    told = capsys.readouterr().out
    assert "--kv-cache-dtype" in told
    assert ("--quantization" in told) == ("quantization" in octavo.Engine.options())
