"""FloatModel against transformers' own model, over architectures that it knows nothing of; sites and folds found in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from octavo.calibration import walk
from octavo.calibration.float_model import FloatModel, UnknownArchitectureError
from octavo.calibration.folds import Fold, find_folds
from octavo.calibration.kv_ranges import KVRanges
from octavo.calibration.plan import probe_inputs
from octavo.calibration.sites import Site, find_sites, watching
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import resolve_model

from .architectures import ARCHITECTURES, VOCAB, make


def opened(folder: Path) -> FloatModel:
    model = FloatModel(AutoConfig.from_pretrained(folder), open_reader(resolve_model(str(folder))))
    model.load_outer()
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    made = {}
    for name in ARCHITECTURES:
        folder = tmp_path_factory.mktemp(name)
        made[name] = (folder, make(name, folder))
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_block_by_block_equals_the_whole_model(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, reference = folders[name]
    model = opened(folder)
    tokens = torch.randint(3, VOCAB, (3, 21), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        hidden, calls = model.calls(tokens)
        for index, call in enumerate(calls):
            hidden = call.run(model.load_block(index), hidden)
            model.free_block(index)
        found = model.logits(tokens, hidden)
        expected = reference(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(parameter.is_meta for block in model.blocks for parameter in block.parameters())
    model.free_outer()
    assert all(parameter.is_meta for parameter in model.module.parameters())
    model.load_outer()
    assert torch.equal(model.logits(tokens, hidden), found)


def test_the_head_is_left_out_where_only_inputs_are_wanted(folders: dict[str, tuple[Path, Any]]) -> None:
    model = opened(folders["llama"][0])
    seen: list[torch.Size] = []
    model.module.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.calls(torch.randint(3, VOCAB, (3, 21)))
    assert (3, 1, VOCAB) in seen
    assert all(shape[1] == 1 for shape in seen)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_go_back_under_the_names_they_had(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    folder, _ = folders[name]
    model = opened(folder)
    reader = open_reader(resolve_model(str(folder)))
    names = set()
    for index in range(len(model.blocks)):
        block = model.load_block(index)
        prefix = model.block_prefix(index)
        restored = model.names.restore(model.module, {prefix + key: value for key, value in block.state_dict().items()})
        for source, value in restored.items():
            assert torch.equal(value, reader.read(source)), source
        names |= set(restored)
    assert names == {source for source, target in model.names.targets.items() if target.startswith(model.blocks_path + ".")}


def block_of(name: str, folders: dict[str, tuple[Path, Any]], index: int = 1) -> tuple[Any, Any]:
    model = opened(folders[name][0])
    tokens = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))
    first, calls = model.calls(tokens)
    hidden = torch.randn(first.shape, generator=torch.Generator().manual_seed(2))
    block = model.load_block(index)
    return block, lambda: calls[index].run(block, hidden)


def found_folds(name: str, folders: dict[str, tuple[Path, Any]]) -> tuple[Any, Any, list[Site], list[Fold]]:
    block, run = block_of(name, folders)
    sites = find_sites(block, run)
    return block, run, sites, find_folds(block, sites, run)


def test_parameters_that_are_parts_of_one_tensor_are_told_apart() -> None:
    """As they come where a checkpoint has one tensor for several linears: each begins where the one before it ends."""
    memory = torch.randn(8 * 16 + 5 * 16 + 3 * 4 * 16)
    first, second, experts = memory[:128].view(8, 16), memory[128:208].view(5, 16), memory[208:].view(3, 4, 16)

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.experts = nn.Parameter(first), nn.Parameter(second), nn.Parameter(experts)

    block, x, seen = Cut(), torch.randn(7, 16), list[tuple[Site, int]]()

    def run() -> torch.Tensor:
        nn.functional.linear(x, block.second)
        x @ block.experts[2].t()
        return nn.functional.linear(x, block.first)

    with watching(block, lambda site, y: seen.append((site, y.shape[1])), outputs=True):
        run()
    assert seen == [(Site("second"), 5), (Site("experts", 2), 4), (Site("first"), 8)]
    assert find_sites(block, run) == [Site("second"), *(Site("experts", expert) for expert in range(3)), Site("first")]
    for site, whole in ((Site("second"), second), (Site("experts", 2), experts[2]), (Site("first"), first)):
        assert torch.equal(site.weight(block), whole)


FEEDERS = {
    "llama": ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"],
    "gemma2": ["input_layernorm", "pre_feedforward_layernorm", "self_attn.v_proj", "mlp.up_proj"],
    "phi3": ["input_layernorm", "post_attention_layernorm", "self_attn.qkv_proj", "mlp.gate_up_proj"],
    "phi": ["input_layernorm", "self_attn.v_proj"],
    "opt": ["self_attn_layer_norm", "final_layer_norm", "self_attn.v_proj", "fc1"],
    "cohere": ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"],
    "olmo2": ["self_attn.v_proj", "mlp.up_proj"],
    "mixtral": ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj"],
    "mamba": ["norm"],
}


@pytest.mark.parametrize("name", FEEDERS)
def test_feeders_are_found(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    *_, folds = found_folds(name, folders)
    assert [fold.feeder.removesuffix(".weight") for fold in folds] == FEEDERS[name]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fold_changes_nothing_that_is_computed(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    block, run, _, folds = found_folds(name, folders)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    with torch.no_grad():
        expected = run()
        for fold in folds:
            fold.apply(block, torch.rand(fold.num_factors, generator=torch.Generator().manual_seed(3)) + 0.5)
        found = run()
    torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    if folds:
        assert any(not torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_what_blocks_leave_for_others_is_counted(folders: dict[str, tuple[Path, Any]]) -> None:
    model = opened(folders["gemma4_text"][0])
    found = walk.survey(model, probe_inputs(model), KVRanges())
    assert found.left == 2 * 2 * 2 * 16  # of two kinds of attention, keys and values, two heads of 16
    assert found.shapes.keys() >= {f"model.layers.{index}.self_attn.v_proj" for index in (0, 1)}
    assert not any(f"model.layers.{index}.self_attn.v_proj" in found.shapes for index in (2, 3))


def test_what_other_blocks_read_is_not_rescaled() -> None:
    """A value that goes to the block's own output, where it could be divided out, and to later blocks, where it could not."""

    class Leaving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.o = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x: torch.Tensor, board: dict[str, Any]) -> torch.Tensor:
            board["values"] = (self.v(x),)
            out: torch.Tensor = self.o(board["values"][0])
            return out

    block, x, board = Leaving(), torch.randn(1, 9, 8), dict[str, Any]()
    sites = [Site("v.weight"), Site("o.weight")]
    assert [fold.feeder for fold in find_folds(block, sites, lambda: block(x, {}))] == ["v.weight"]
    assert not find_folds(block, sites, lambda: walk._with_board(block(x, board), board))


def test_looking_for_folds_leaves_every_bit(folders: dict[str, tuple[Path, Any]]) -> None:
    block, run = block_of("mixtral", folders)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    find_folds(block, find_sites(block, run), run)
    assert all(torch.equal(before[key], value) for key, value in block.state_dict().items())


def test_a_folded_norm_is_exact_in_the_dtype_it_is_written_in(folders: dict[str, tuple[Path, Any]]) -> None:
    block, run, _, folds = found_folds("gemma2", folders)
    fold = next(fold for fold in folds if fold.kind == "norm plus one")
    with torch.no_grad():
        expected = run()
        fold.apply(block, torch.rand(fold.num_factors, generator=torch.Generator().manual_seed(3)) + 0.5, stored=torch.bfloat16)
        norm = block.get_parameter(fold.feeder)
        assert torch.equal(norm, norm.bfloat16().float())
        torch.testing.assert_close(run(), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_heads_that_share_keys_share_factors(folders: dict[str, tuple[Path, Any]]) -> None:
    *_, folds = found_folds("llama", folders)
    fold = next(fold for fold in folds if fold.feeder == "self_attn.v_proj.weight")
    assert fold.num_factors == 32  # two heads of 16
    heads = torch.arange(32).view(2, 1, 16).expand(2, 2, 16).flatten()
    assert torch.equal(fold.source, heads)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "mixtral", "granite" if "granite" in ARCHITECTURES else "phi3"])
def test_a_site_multiplies_its_input_with_its_weight(name: str, folders: dict[str, tuple[Path, Any]]) -> None:
    """Changing one row of W by what x is orthogonal to must change nothing; here: y seen from outside is x @ W.T."""
    block, run = block_of(name, folders)
    seen: list[tuple[Site, torch.Tensor]] = []
    with watching(block, lambda site, x: seen.append((site, x.clone()))), torch.no_grad():
        run()
    assert seen
    for site, x in seen:
        weight = site.weight(block)
        assert weight.shape[1] == x.shape[-1], site


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    class Bare(torch.nn.Module):
        pass

    from octavo.calibration.float_model import _find_blocks

    with pytest.raises(UnknownArchitectureError, match="no list of blocks"):
        _find_blocks(Bare())
