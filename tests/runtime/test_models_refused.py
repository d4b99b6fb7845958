"""What the model code does not take is refused with a text that names the key, the value and what would do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.runtime.models.config import FAMILIES, UnsupportedModel

from .tiny_models import CASES, LLAMA3, THETA, edit_config, load, make_model, save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_model(make_model(CASES["llama"]), tmp_path)


def test_an_architecture_that_is_not_implemented_lists_those_that_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="GPTNeoXForCausalLM is not supported") as error:
        load(edit_config(folder, architectures=["GPTNeoXForCausalLM"]))
    assert all(name in str(error.value) for name in FAMILIES)
    with pytest.raises(UnsupportedModel, match=r"none \(model_type 'llama'\)"):
        load(edit_config(folder, architectures=None))


def test_a_rope_type_that_is_not_implemented_lists_those_that_are(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="'longrope' is not supported; supported are default, linear, dynamic, llama3, yarn"):
        load(edit_config(folder, rope_parameters={**THETA, "rope_type": "longrope"}))


@pytest.mark.parametrize(
    ("rope", "missing"),
    [
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({key: value for key, value in LLAMA3.items() if key != "low_freq_factor"}, "low_freq_factor"),
        ({**LLAMA3, "factor": "eight"}, "factor"),
    ],
)
def test_a_rope_scaling_that_lacks_a_number_names_it(folder: Path, rope: dict[str, Any], missing: str) -> None:
    with pytest.raises(ValueError, match=rf"rope scaling '{rope['rope_type']}' needs a number '{missing}' above 0"):
        load(edit_config(folder, rope_parameters={**THETA, **rope}))


def test_another_activation_is_refused_by_name(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="hidden_act 'gelu' is not supported: the Llama family uses silu"):
        load(edit_config(folder, hidden_act="gelu"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_size", None, "hidden_size=None in the model's config must be a whole number"),
        ("num_hidden_layers", 0, "num_hidden_layers=0"),
        ("num_attention_heads", "4", "num_attention_heads='4'"),
        ("num_key_value_heads", 3, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
    ],
)
def test_a_damaged_config_names_the_key_and_the_value(folder: Path, key: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(edit_config(folder, **{key: value}))


def test_a_tensor_of_another_shape_names_both_shapes(folder: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"'model.layers.0.mlp.gate_proj.weight' .* has shape \(88, 64\), the config asks for \(90, 64\)"
    ):
        load(edit_config(folder, intermediate_size=90))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


def test_a_missing_tensor_is_named_with_its_like(folder: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    with pytest.raises(CheckpointError, match=rf"no tensor '{name}' .* there is model.layers.0.self_attn.k_proj.weight"):
        load(rewrite(folder, lambda tensors: tensors.pop(name)))


def test_a_config_with_more_layers_than_the_weights_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'model.layers.2.input_layernorm.weight'"):
        load(edit_config(folder, num_hidden_layers=3))


def test_integer_weights_are_refused_and_not_rounded(folder: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=rf"'{name}' in .* holds int8 where its format has floating point"):
        load(rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)})))


def test_tensors_that_the_model_has_no_place_for_are_refused(folder: Path) -> None:
    extra = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors holds tensors .* no place for: model\.layers\.0\.self_attn\.q_proj\.bias\."
    ):
        load(rewrite(folder, lambda tensors: tensors.update(extra)))


def test_a_norm_that_is_no_number_is_refused(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'model\.norm\.weight' in .*model\.safetensors holds NaN or infinity"):
        load(rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan)))


def test_tensors_without_effect_are_passed_over(folder: Path) -> None:
    load(rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})))


def test_a_context_beyond_the_models_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="--context-length 513 is beyond the model's 512 positions: give at most 512"):
        load(folder, context_length=513)
    assert load(folder, context_length=100).context_length == 100
