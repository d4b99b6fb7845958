"""How much each token and each output of a linear counts: against hooks on transformers' own model; and what becomes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from octavo.calibration import importance
from octavo.calibration.importance import Importance, find_importance
from octavo.calibration.moments import Collector
from octavo.calibration.sites import Site
from octavo.calibration.work import WorkFolder

from .architectures import MLA, VOCAB, make
from .test_float_model import opened

TOKENS = torch.randint(3, VOCAB, (3, 20), generator=torch.Generator().manual_seed(5))


def by_hooks(folder: Path, modules: type[nn.Module], seed: int) -> dict[str, Tensor]:
    """Gradients [S, T, N] by module path, of a loss of tokens drawn as `find_importance` draws them."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, modules) and name != "lm_head":
            module.register_full_backward_hook(
                lambda _, given, gives, name=name: seen.setdefault(name, []).append(gives[0].reshape(TOKENS.shape[1], -1))
            )
    draw = torch.Generator().manual_seed(seed)
    for row in TOKENS:
        logits = model(row[None]).logits[0]
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
    return {name: torch.stack(rows) for name, rows in seen.items()}


@pytest.mark.parametrize("most", [2048, 40])
@pytest.mark.parametrize(("name", "linears"), [("llama", 7), ("gpt2", 4)])
def test_it_is_the_gradient_by_what_a_linear_gives(
    name: str, linears: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importance, "_MOST_OUTPUTS", most)
    make(name, tmp_path)
    model = opened(tmp_path)
    found = find_importance(model, TOKENS, seed=7)
    kind: Any = nn.Linear if name == "llama" else type(model.blocks[0].attn.c_attn)
    expected = by_hooks(tmp_path, kind, seed=7)
    assert [len(block.tokens) for block in found] == [linears] * len(model.blocks)
    for index, block in enumerate(found):
        assert list(block.outputs) == list(block.tokens)
        for site, sizes in block.tokens.items():
            gradient = expected[model.block_prefix(index) + str(site)].double()
            size = gradient.norm(dim=2)
            torch.testing.assert_close(sizes.double(), size / size.mean(), rtol=2e-3, atol=1e-4)
            outputs = torch.einsum("stn,stm->nm", gradient / size[..., None], gradient)
            outputs /= outputs.diagonal().mean()
            at = 0
            for part in block.outputs[site]:
                assert len(part) <= most
                rows = slice(at, at + len(part))
                torch.testing.assert_close(part.double(), outputs[rows, rows], rtol=2e-3, atol=1e-3)
                at = rows.stop
            assert at == len(outputs)
    assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())


def test_experts_are_left_out_and_what_every_token_passes_is_not(tmp_path: Path) -> None:
    make("mixtral", tmp_path)
    found = find_importance(opened(tmp_path), TOKENS, seed=0)
    for block in found:
        assert any("q_proj" in str(site) for site in block.tokens)
        assert not any(site.expert is not None for site in [*block.tokens, *block.outputs])


def test_a_row_counts_as_much_as_it_is_important() -> None:
    draw = torch.Generator().manual_seed(0)
    x, sizes = torch.randn(4, 6, 8, generator=draw), torch.rand(4, 6, generator=draw)
    block = nn.ModuleDict({"a": nn.Linear(8, 3), "b": nn.Linear(8, 5), "c": nn.Linear(8, 2), "d": nn.Linear(8, 2)}).requires_grad_(False)
    sites = [Site(f"{name}.weight") for name in "abcd"]
    collector = Collector(sites, {sites[0]: sizes, sites[1]: 1 - sizes})
    with collector.collecting(block):
        for chunk in (x[:3], x[3:]):  # not all at once
            for linear in block.values():
                linear(chunk)
    for site, weights in ((sites[0], sizes), (sites[1], 1 - sizes), (sites[2], torch.ones(4, 6))):
        rows = x.double().flatten(0, 1)
        expected = rows.t() @ (rows * weights.double().flatten()[:, None]) / 24
        torch.testing.assert_close(collector.of(site, 8).hessian, expected.float(), rtol=1e-5, atol=1e-6)
    assert collector.groups(sites) == [[sites[0]], [sites[1]], [sites[2], sites[3]]]


def test_it_comes_back_from_the_work_folder(tmp_path: Path) -> None:
    def half(size: int) -> Tensor:
        return torch.rand(size, size).half()

    a, b = Site("a.weight"), Site("b", None, True)
    first = Importance({a: torch.rand(2, 3), b: torch.rand(2, 3)}, {a: [half(4)], b: [half(5), half(4)]})
    blocks = [first, Importance(), Importance({a: torch.rand(2, 3)}, {a: [half(4)]})]
    WorkFolder(tmp_path / "work", {}, resume=False).save_importance(blocks)
    work = WorkFolder(tmp_path / "work", {}, resume=True)
    for index, block in enumerate(blocks):
        found = work.load_importance(index)
        assert list(found.tokens) == list(block.tokens)
        assert all(torch.equal(found.tokens[site], block.tokens[site]) for site in block.tokens)
        for site, parts in block.outputs.items():
            assert all(torch.equal(one, part) for one, part in zip(found.outputs[site], parts, strict=True))


def test_what_only_chooses_has_no_gradient(tmp_path: Path) -> None:
    """An indexer gives what tokens attention looks at, and the answer hangs on nothing of it smoothly."""
    make("deepseek_v32", tmp_path, **MLA)
    model = opened(tmp_path)
    for block in find_importance(model, TOKENS, seed=7):
        names = {str(site) for site in block.tokens}
        assert "self_attn.o_proj" in names
        assert not any("indexer" in name for name in names)
