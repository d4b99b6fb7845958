"""Blocks that run in bfloat16 where that is faster: what is found of them stays float32, and what comes of it hardly changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from octavo.calibration import devices, quantize_run
from octavo.calibration.devices import exact_products, quick_products
from octavo.calibration.importance import find_importance
from octavo.calibration.kv_ranges import KVRanges
from octavo.calibration.moments import Collector
from octavo.calibration.plan import probe_inputs
from octavo.calibration.quantize_run import quantize
from octavo.calibration.sites import find_sites
from octavo.calibration.walk import survey

from .architectures import ARCHITECTURES, VOCAB, make
from .test_float_model import opened
from .test_quantize import FAST, digests, llama, text, with_tokenizer

__all__ = ["llama", "text"]

CPU = torch.device("cpu")
TOKENS = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def _quick(_exact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_quick_halves", lambda device: True)


def test_products_are_of_halves_inside_and_exact_again_in_that() -> None:
    a, b = torch.randn(2, 8, 8).unbind()
    with quick_products(CPU):
        torch.testing.assert_close(a @ b, a.bfloat16() @ b.bfloat16(), rtol=0, atol=0)
        with exact_products(CPU):
            torch.testing.assert_close(a @ b, (a.double() @ b.double()).float())


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_runs_so_with_the_same_sites(name: str, tmp_path: Path) -> None:
    make(name, tmp_path)
    model = opened(tmp_path)
    assert survey(model, probe_inputs(model), KVRanges()).runs_quick


def test_a_block_that_knows_one_dtype_runs_exactly(
    text: Path,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward = nn.Linear.forward

    def picky(self: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        out = forward(self, x)
        if out.dtype != torch.float32:
            raise RuntimeError("expected float32")
        return out

    options: dict[str, Any] = {**FAST, "method": "auto", "calibration": str(text)}
    quantize(str(llama), tmp_path / "quick", **options)
    monkeypatch.setattr(nn.Linear, "forward", picky)
    quantize(str(llama), tmp_path / "picky", **options)
    monkeypatch.setattr(devices, "has_quick_halves", lambda device: False)
    quantize(str(llama), tmp_path / "exact", **options)
    assert digests(tmp_path / "picky") == digests(tmp_path / "exact") != digests(tmp_path / "quick")


def test_moments_are_sums_in_float32(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = opened(tmp_path)
    block = model.load_block(0)
    inputs = quantize_run.Inputs(model, TOKENS, quick=True)
    model.is_quick = True
    hidden = quantize_run.Hidden((*TOKENS.shape, *model.hidden_shape))
    inputs.start(hidden)
    sites = find_sites(block, lambda: inputs.run_chunk(0, 0, block, hidden))
    collector, rows = Collector(sites), {}
    with collector.collecting(block):
        block.mlp.down_proj.register_forward_pre_hook(lambda _, args: rows.update(x=args[0].flatten(0, 1)))
        out = inputs.run_chunk(0, 0, block, hidden)
    assert out.dtype == torch.float32
    assert rows["x"].dtype == torch.bfloat16  # it did run so
    down = next(site for site in sites if "down_proj" in site.parameter)
    x = rows["x"].double()
    torch.testing.assert_close(collector.of(down, x.shape[1]).hessian.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    assert len(collector.groups(sites)) == 4  # q, k and v share an input as they do in float32, gate and up too


def test_gradients_hardly_differ(tmp_path: Path) -> None:
    make("llama", tmp_path)
    model = opened(tmp_path)
    exact = find_importance(model, TOKENS, seed=7)
    model.is_quick = True
    quick = find_importance(model, TOKENS, seed=7)
    for a, b in zip(exact, quick, strict=True):
        for site, sizes in a.tokens.items():
            assert not torch.equal(sizes, b.tokens[site])
            assert float((sizes - b.tokens[site]).abs().mean()) < 0.03


@pytest.mark.parametrize("method", ["gptq", "auto", "best"])
def test_quality_is_the_same(method: str, text: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {**FAST, "method": method, "calibration": str(text)}
    quick_run = quantize(str(llama), tmp_path / "quick", **options)
    monkeypatch.setattr(devices, "has_quick_halves", lambda device: False)
    exact_run = quantize(str(llama), tmp_path / "exact", **options)
    assert (quick_run.device, exact_run.device) == ("cpu, blocks in bfloat16", "cpu")
    quick, exact = quick_run.quality, exact_run.quality
    assert quick.original_perplexity == exact.original_perplexity  # measured in float32 either way
    assert quick.kl_mean < 1.3 * exact.kl_mean  # of few tokens: it was less, too


@pytest.mark.parametrize(
    "options", [{"method": "gptq", "bits": 8, "group_size": 16, "format": "gptq"}, {"method": "fp8"}, {"method": "int8"}]
)
def test_eight_bits_are_solved_for_exactly(
    options: dict[str, Any], text: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options |= {"samples": 8, "seqlen": 32, "measure_speed": False, "calibration": str(text)}
    quantize(str(llama), tmp_path / "quick", **options)
    monkeypatch.setattr(devices, "has_quick_halves", lambda device: False)
    quantize(str(llama), tmp_path / "exact", **options)
    assert digests(tmp_path / "quick") == digests(tmp_path / "exact")


def test_a_model_in_biases_and_layer_norms(text: Path, tmp_path: Path) -> None:
    model = with_tokenizer("gpt_neox", tmp_path / "model")
    quantize(str(model), tmp_path / "out", **FAST, method="auto", calibration=str(text))
