"""`octavo quantize` as a user meets it: what it prints, which code it ends with, what lies in the folder afterwards."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

import octavo
from octavo.__main__ import main
from octavo.calibration import quantize_cli, quantize_run, work
from octavo.calibration.quantize_flags import _share, _size

from .architectures import make
from .conftest import _write_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make("llama", folder)
    _write_tokenizer(folder, adds_bos=False, swapped=False)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("".join(f"{i} times {i} is {i * i}.\n" for i in range(400)))
    return file


def flags(llama: Path, text: Path, out: Path, *more: str) -> list[str]:
    small = ["--samples", "8", "--seqlen", "32", "--group-size", "16", "--skip-speed"]
    return ["quantize", "--model-path", str(llama), "--out", str(out), "--calibration", str(text), *small, *more]


def test_a_run_prints_a_table_and_writes_reports(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(flags(llama, text, out, "--method", "gptq", "--format", "gptq")) == 0
    assert "peak memory       about" in caplog.text  # the plan, before the work
    printed = capsys.readouterr().out
    for part in ("14 quantized", "perplexity", "KL(original || quantized)", "read back", f"octavo serve --model-path {out}", "peak memory"):
        assert part in printed
    report = json.loads((out / "report.json").read_text())
    assert report["format"] == 1
    assert report["octavo"] == octavo.__version__
    assert report["sha256"] == {"model.safetensors": hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()}
    assert report["quality"]["kl_mean"] > 0
    assert len(report["modules"]) == 14
    assert all(note["largest_weight"] > 0 and note["largest_input"] > 0 for note in report["modules"].values())
    page = (out / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "model.layers.1.mlp.down_proj" in page
    assert "http" not in page.replace("http://www.w3.org", "")  # it needs no other file
    card = (out / "README.md").read_text()
    assert r"| KL(original \|\| quantized) | " in card  # a row of two cells
    assert "octavo serve" in card
    assert "vllm serve" not in card  # groups of 16 are not for it
    assert '"method": "gptq"' in card


def test_a_gate_that_does_not_hold_ends_with_3(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn", "--max-kl", "1e-9")) == 3
    printed = capsys.readouterr()
    assert "the quality gate does not hold: KL is" in printed.err
    assert "the quality gate is judged on 31 tokens only, which says little" in printed.out
    assert (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize("name", ["gpt2", "granitemoe"])
def test_what_no_engine_reads_is_told_before_the_work(name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(name, tmp_path / "model", **({"num_local_experts": 4, "num_experts_per_tok": 2} if name == "granitemoe" else {}))
    _write_tokenizer(tmp_path / "model", adds_bos=False, swapped=False)
    told = {"gpt2": "weights that are stored transposed", "granitemoe": "experts that are one tensor in the checkpoint"}[name]
    assert main(flags(tmp_path / "model", text, tmp_path / "out", "--method", "rtn", "--dry-run")) == 0
    assert f"note              the original has {told}: no engine is known" in capsys.readouterr().out
    assert main(flags(tmp_path / "model", text, tmp_path / "out", "--method", "rtn")) == 0
    assert f"the original has {told}: no engine is known" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "report.json").read_text())["engines"] == []


def test_commands_of_other_engines_say_that_they_are_a_guess(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("gpt_neox", tmp_path / "model")
    _write_tokenizer(tmp_path / "model", adds_bos=False, swapped=False)
    assert main(flags(tmp_path / "model", text, tmp_path / "out", "--method", "rtn", "--group-size", "32")) == 0
    assert f"vllm serve {tmp_path / 'out'}  # if it has this architecture" in capsys.readouterr().out


def test_more_memory_than_allowed_is_told(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn", "--max-memory", "1MiB")) == 0
    assert "more than the 1.0 MiB that --max-memory allowed" in capsys.readouterr().out


def test_an_out_below_a_file(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(llama, text, text / "below" / "out", "--method", "rtn")) == 2
    assert f"{text / 'below' / 'out'} cannot be made: {text} is a file" in capsys.readouterr().err


def test_a_dry_run_looks_at_out(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(flags(llama, text, tmp_path, "--dry-run")) == 2
    assert "is not empty (notes.txt)" in capsys.readouterr().err


def test_quality_on_the_text_of_the_calibration_is_told(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = "which is calibrated on too: that flatters"
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn", "--eval", str(text))) == 0
    assert told in capsys.readouterr().out
    (tmp_path / "other.txt").write_text(text.read_text())
    assert main(flags(llama, text, tmp_path / "out", "--eval", str(tmp_path / "other.txt"), "--dry-run")) == 2  # not empty
    assert main(flags(llama, text, tmp_path / "more", "--eval", str(tmp_path / "other.txt"), "--dry-run")) == 0
    assert told not in capsys.readouterr().out


def test_a_disk_that_fills_up(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "some/source")

    monkeypatch.setattr(quantize_run, "copy_tokenizer", full)
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn")) == 1
    error = capsys.readouterr().err
    assert f"the disk of {tmp_path / 'out'} is full: make room there, and give the same command with --resume to go on" in error
    assert "some/source" not in error
    monkeypatch.undo()
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn", "--resume")) == 0


@pytest.mark.parametrize(
    ("number", "told"), [(28, "the disk of {out} is full: make room there"), (27, "a file in {out} is larger than this process may write")]
)
def test_a_disk_that_fills_up_while_tensors_are_written(
    number: int, told: str, llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: no (os error {number})")

    monkeypatch.setattr(work, "save_file", full)
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn")) == 1
    error = capsys.readouterr().err
    assert told.format(out=tmp_path / "out") in error
    assert "give the same command with --resume to go on" in error
    monkeypatch.undo()
    assert main(flags(llama, text, tmp_path / "out", "--method", "rtn", "--resume")) == 0


def test_a_cache_in_fp8_is_measured_and_told(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {}
    for name, more in (("plain", []), ("cached", ["--kv-cache", "fp8"])):
        command = flags(llama, text, tmp_path / name, "--method", "rtn", "--format", "compressed-tensors", *more)
        assert main(command) == 0
        found[name] = json.loads((tmp_path / name / "report.json").read_text())["quality"], capsys.readouterr().out
    assert (found["plain"][0]["kv_cache"], found["cached"][0]["kv_cache"]) == (None, "fp8")
    assert found["cached"][0]["kl_mean"] != found["plain"][0]["kl_mean"]
    assert "quality is measured with such a cache" in found["cached"][1]
    assert f"octavo serve --model-path {tmp_path / 'cached'} --kv-cache-dtype fp8_e4m3" in found["cached"][1]
    assert "KV cache" not in found["plain"][1]


def test_more_samples_than_are_used_ask_for_no_more_text(llama: Path, text: Path, tmp_path: Path) -> None:
    many = ["--samples", "100000", "--seqlen", "32", "--dry-run"]
    assert main(flags(llama, text, tmp_path / "out", *many)) == 0


def test_a_dry_run_tells_and_writes_nothing(llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags(llama, text, tmp_path / "out", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert "14 linears: 4 bits, asymmetric, groups of 16; method auto, written as awq" in printed
    assert "peak memory" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--methd", "awq"], "unknown flag --methd; did you mean --method?"),
        (["--method", "awk"], "did you mean awq?"),
        (["some/model"], "unexpected argument some/model; did you mean --model-path some/model?"),
        (["--seed", "99999999999999999999", "--dry-run"], "seed 99999999999999999999 is not valid: give a number from 0 to"),
        (["--group-size", "x"], "'x' is no group size"),
        (["--max-memory", "lots"], "'lots' is no size"),
        (["--max-ppl-increase", "a bit"], "is no share"),
        (["--max-ppl-increase", "5"], "'5' would be 500%: give 5% or 0.05"),
        (["--report", "no/such/folder/r.html"], "cannot write report no"),
        (["--report", "/"], "cannot write report /: that is a folder"),
        (["--calibration", "missing.txt"], "calibration 'missing.txt': there is no such file"),
        (["--calibration", "missing.txt", "--dry-run"], "calibration 'missing.txt': there is no such file"),
        (["--calibration", "/"], "calibration '/' is a folder"),
        (["--eval", "missing.txt", "--dry-run"], "there is no file missing.txt"),
        (["--samples", "4000", "--seqlen", "128", "--dry-run"], "which makes"),
        (["--method", "fp8", "--bits", "4", "--group-size", "auto"], "method fp8 makes weights of 8 bits, not 4: leave --bits out"),
        (["--eval", "missing.txt"], "there is no file missing.txt"),
        (["--samples", "4000", "--seqlen", "128"], "which makes"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    more: list[str], told: str, llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(flags(llama, text, tmp_path / "out", *more))
    except SystemExit as ended:
        code = int(ended.code or 0)
    error = capsys.readouterr().err
    assert code == 2
    assert told in error
    assert "Traceback" not in error


def test_without_out(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["quantize"])
    assert ended.value.code == 2
    assert "--out DIR is missing" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_says_how_to_go_on(number: signal.Signals, llama: Path, text: Path, tmp_path: Path) -> None:
    """A run with many samples is stopped once its first block is on disk, and goes on."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "octavo", *flags(llama, text, out, "--method", "best")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    limit = time.monotonic() + 120
    while not (out / ".quantize" / "default" / "block-00000.safetensors").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.002)
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number, error
    assert "with --resume to go on" in error
    assert "Traceback" not in error
    assert main(flags(llama, text, out, "--method", "best", "--resume")) == 0


def test_ctrl_c_inside_of_c_code_is_told_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise TypeError("could not determine the shape of object type") from None

    monkeypatch.setattr(quantize_cli, "quantize", interrupted)
    assert main(["quantize", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "octavo quantize: stopped\n"
    (tmp_path / "out" / ".quantize").mkdir(parents=True)
    assert main(["quantize", "--out", str(tmp_path / "out")]) == 130
    assert "--resume to go on" in capsys.readouterr().err


@pytest.mark.needs_embedded_model
def test_a_gguf_file_is_planned_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "210 linears" in printed
    assert "note              the original, a GGUF file, was quantized before (Q4_" in printed


def test_sizes_and_shares() -> None:
    assert [_size(text) for text in ("8GiB", "8G", "512MiB", "1000", "1.5K")] == [8 << 30, 8 << 30, 512 << 20, 1000, 1536]
    assert [_share(text) for text in ("3%", "0.03", "12.5 %")] == [0.03, 0.03, 0.125]
