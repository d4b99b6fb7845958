"""What benchmarks/gpu/run.py asks of whole models and of older GPUs' code, on a GPU that is interpreted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.benchmarks.gpu import answers, correctness
from octavo.benchmarks.gpu.answer_models import ASKED, SIZES, Asked, of_path, write_model
from octavo.benchmarks.gpu.answers import Talk
from octavo.benchmarks.gpu.cases import GroupedCase, LinearCase
from octavo.benchmarks.gpu.checks import Place
from octavo.benchmarks.gpu.command import main
from octavo.kernels.gpu import paged_attention
from octavo.kernels.gpu.device import DEVICES
from octavo.runtime.outputs import TokenLogprob

from ..kernels.gpu.interpreter import mend

mend()
H100 = Place(torch.device("cpu"), DEVICES[90])
SMALL = {**SIZES, "vocab_size": 263, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "initializer_range": 0.2}
TALK = Talk(prompts=(1, 20), answer=3)
ONE = Asked("small", sizes=SMALL)


def ask(*asked: Asked, out: Path, parts: tuple[str, ...] = ("answers",), talk: Talk = TALK) -> tuple[int, dict[str, Any]]:
    code = main([*parts, "--out", str(out)], place=H100, asked=asked, talk=talk)
    return code, json.loads((out / "results.json").read_text())["answers"]


def test_answers_are_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = ask(ONE, out=tmp_path, parts=("answers", "report"))
    assert code == 0, capsys.readouterr().out
    assert found["small"]["tokens"] == 12, "three tokens after two prompts, twice"
    assert found["small"]["kernels"] == {"torch_matmul": 6}
    assert 0 < found["small"]["error"] < 0.05
    assert "| small | 0.0" in (tmp_path / "README.md").read_text()
    monkeypatch.setattr(answers, "_compared", None)
    assert ask(ONE, out=tmp_path)[0] == 0, "what is known is not asked again"
    assert "1 models right" in capsys.readouterr().out


def test_a_wrong_kernel_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    attend = paged_attention.attend

    def colder(q: torch.Tensor, *args: Any, **options: Any) -> None:
        attend(q * 0.5, *args, **options)

    monkeypatch.setattr(paged_attention, "attend", colder)
    code, found = ask(ONE, out=tmp_path)
    assert code == 1
    assert "log-probabilities are" in found["small"]["fault"]
    assert "WRONG small" in capsys.readouterr().out


@pytest.mark.long
def test_every_format_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that quantize too, and the GPU's own way to compute them."""
    sizes = {**SMALL, "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
    asked = [replace(one, sizes=sizes) for one in ASKED]
    code, found = ask(*asked, out=tmp_path, talk=Talk(prompts=(1, 40), answer=3))
    assert code == 0, capsys.readouterr().out
    assert found.keys() == {one.name for one in ASKED}
    kernels = {kernel for one in found.values() for kernel in one["kernels"]}
    assert {"torch_matmul", "triton_fp8", "triton_int8", "triton_weight_only"} <= kernels


def _entry(token: int, logprob: float, best: float) -> TokenLogprob:
    return TokenLogprob(token, logprob, ((0, best),))


def test_what_is_judged_wrong() -> None:
    said = [answers._Said((5, 6), (1, 2), (-1.0, -2.0, -3.0))]
    exact = [[_entry(6, -1.0, -0.5), _entry(1, -2.0, -2.0), _entry(2, -3.0, -3.0)]]
    near = [[_entry(6, -1.01, -0.5), _entry(1, -2.0, -2.0), _entry(2, -3.0, -3.0)]]
    figures = answers._judged(said, exact, near)
    assert (figures["error"], figures["tokens"], figures["others"], figures["worst_loss"]) == (0.0, 2, 0, 0.0)
    assert figures["rounding"] == pytest.approx(0.01 / 3**0.5)
    off = [answers._Said((5, 6), (1, 2), (-1.0, -2.0, -3.1))]
    with pytest.raises(AssertionError, match=r"log-probabilities are 0.0577 off, rounding alone makes 0.0058"):
        answers._judged(off, exact, near)
    worse = [[_entry(6, -1.0, -0.5), _entry(1, -2.0, -2.0), _entry(2, -3.0, -2.9)]]
    with pytest.raises(AssertionError, match=r"a token 0.1000 nats below the CPU's best"):
        answers._judged(said, worse, [[*near[0][:2], _entry(2, -3.0, -2.9)]])
    only_answers = [answers._Said((5, 6), (1, 2), (-2.0, -3.0))]
    assert answers._judged(only_answers, exact, near)["error"] == 0.0


def test_what_is_not_the_same_again_is_not_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter([[answers._Said((5,), (1, 2), (-1.0, -2.0))], [answers._Said((5,), (1, 2), (-1.0, -2.1))]] * 2)
    monkeypatch.setattr(answers, "_answers", lambda *args, **options: next(told))
    no_engine: Any = None
    assert len(answers._said(no_engine, [(5,)], Talk(answer=2), is_exact=False)) == 2
    with pytest.raises(AssertionError, match="other log-probabilities alone"):
        answers._said(no_engine, [(5,)], Talk(answer=2), is_exact=True)


def test_a_model_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(ONE, tmp_path / "mine")
    names = [one.name for one in of_path(tmp_path / "mine")]
    assert names == ["mine", "mine, fp8 KV", "mine, fp8 at load", "mine, int8 at load", "mine, int4 at load"]
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    (tmp_path / "mine" / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert [one.name for one in of_path(tmp_path / "mine")] == names[:2]
    assert main(["answers", "--model", "nowhere"], place=H100) == 2
    assert "--model nowhere is not there" in capsys.readouterr().err


def test_older_gpus_are_taken_at_their_own_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def few(arch: int, *, quick: bool) -> list[Any]:
        asked.append(arch)
        return [GroupedCase("w4a16", 3, 40, 256, 64), LinearCase("triton_fp8", "fp8", 8, 3, 40, 200, inputs="token")]

    monkeypatch.setattr(correctness, "cases_of", few)
    assert main(["older", "--out", str(tmp_path)], place=H100) == 0
    told = capsys.readouterr().out
    assert "correctness: as sm_80: 1 right, 0 wrong, 1 refused" in told
    assert "correctness: as sm_89: 2 right, 0 wrong, 0 refused" in told
    assert asked == [80, 89]
    found = json.loads((tmp_path / "results.json").read_text())["correctness"]
    assert all(name.startswith(("as sm_80: ", "as sm_89: ")) for name in found)


def test_code_of_an_older_gpu_is_assembled_for_the_one_at_hand() -> None:
    """In the process that checks it: matrix instructions of sm_80, in a file for sm_90."""
    script = (
        "from octavo.benchmarks.gpu.correctness import _begin\n"
        "from octavo.kernels.gpu import catalogue\n"
        "from octavo.kernels.gpu.ahead import target\n"
        "from octavo.kernels.gpu.config import entries\n"
        "from octavo.kernels.gpu.device import nearest, pretend\n"
        "_begin(80)\n"
        "with target(90) as compiler, pretend(80):\n"
        "    catalogue.OPERATIONS['int8'].build(entries(80, 'int8')[-1][1], 512, 256, 1024, nearest(80))()\n"
        "(kernel,) = compiler.compiled.values()\n"
        "text = kernel.binary.asm['ptx']\n"
        "print('.target sm_90a' in text, 'mma.sync' in text, 'wgmma' in text, len(kernel.binary.asm['cubin']) > 0)\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "True True False True\n", done.stderr[-2000:]
