"""The Llama family against transformers: the same logits for every position, whatever the chunks, the pages and the neighbours."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from octavo.runtime.models.config import ModelConfig

from .tiny_models import (
    CASES,
    MIXED,
    THETA,
    YARN,
    OneSequence,
    assert_close,
    assert_same_logits,
    cast,
    edit_config,
    expected_logits,
    llama,
    load,
    make_model,
    roped,
    run,
    save_model,
    sequence,
)

# --- the same logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_transformers_in_float32(name: str, tmp_path: Path) -> None:
    model = make_model(CASES[name])
    folder = save_model(model, tmp_path)
    for page_size in (1, 16, 64):
        assert_same_logits(load(folder, page_size=page_size), model)


def test_a_prompt_alone_has_the_bits_it_has_among_others(tmp_path: Path) -> None:
    model = make_model(CASES["llama"])
    runner = load(save_model(model, tmp_path))
    alone = [run(runner, [item])[0] for item in MIXED]
    for found, item in zip(alone, MIXED, strict=True):
        assert_close(found, expected_logits(model, item.tokens), 3e-5)


def test_dynamic_rope_beyond_the_original_context_is_that_of_decoding_token_by_token(tmp_path: Path) -> None:
    original, length = 32, 80
    case = llama(max_position_embeddings=original, rope_parameters={**THETA, "rope_type": "dynamic", "factor": 3.0})
    model = make_model(case)
    runner = load(save_model(model, tmp_path))
    assert runner.context_length == 3 * original
    tokens = sequence(length, chunk=1, decode=0).tokens
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"  # of an older transformers
    cache = {name: transformers.DynamicCache(config=model.config)}
    steps = []
    with torch.no_grad():
        for token in tokens:
            steps.append(model(torch.tensor([[token]]), **cache, use_cache=True).logits[0, -1])
    chunks = (1, 7, 64, length)
    for found in run(runner, [OneSequence(tokens, length, chunk) for chunk in chunks] + [OneSequence(tokens, 20, 20)]):
        assert_close(found, torch.stack(steps), 3e-5)


@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "llama-biases"), ("bfloat16", "qwen3"), ("float16", "qwen2")])
def test_half_precision_errs_no_more_than_twice_transformers(dtype: str, name: str, tmp_path: Path) -> None:
    """Against float32 on the same (rounded) weights. Activations here are float32, keys and values in the weights' dtype."""
    model = make_model(replace(CASES[name], dtype=dtype))
    folder = save_model(model, tmp_path, dtype)
    runner = load(folder)
    assert runner.dtype == runner.pool.dtype == getattr(torch, dtype)
    expected = [expected_logits(model, item.tokens) for item in MIXED]
    cast(model, getattr(torch, dtype))
    theirs = [(expected_logits(model, item.tokens) - right).abs() for item, right in zip(MIXED, expected, strict=True)]
    ours = [(found - right).abs() for found, right in zip(run(runner, MIXED), expected, strict=True)]
    assert torch.cat(ours).mean() <= 2 * torch.cat(theirs).mean()
    assert torch.cat(ours).max() <= 2 * torch.cat(theirs).max()


def test_a_config_that_names_no_dtype_leaves_it_to_the_files(tmp_path: Path) -> None:
    folder = edit_config(save_model(make_model(CASES["llama"]), tmp_path, "bfloat16"), dtype=None, torch_dtype=None)
    assert load(folder).dtype == torch.bfloat16


def test_a_dtype_that_was_asked_for_replaces_the_stored_one(tmp_path: Path) -> None:
    model = make_model(replace(CASES["llama"], dtype="float16"))
    runner = load(save_model(model, tmp_path, "float16"), dtype="float32")
    assert runner.dtype == torch.float32
    assert_same_logits(runner, model)


def test_sharded_safetensors_load_the_same(tmp_path: Path) -> None:
    model = make_model(CASES["llama-biases"])
    folder = save_model(model, tmp_path, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    assert_same_logits(load(folder), model)


# --- configs as they are found ----------------------------------------------------------------------------------------


def old_spelling(config: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 wrote rope_theta, rope_scaling and torch_dtype, and no layer types."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    config.pop("layer_types", None)
    return config


@pytest.mark.parametrize("name", ["rope-default", "rope-llama3", "rope-yarn", "qwen2-window", "qwen2-window-off", "mistral-window"])
def test_configs_in_the_old_spelling_mean_the_same(name: str, tmp_path: Path) -> None:
    model = make_model(CASES[name])
    if name.startswith("qwen2-window"):
        model.config.sliding_window = 13  # transformers 5 clears it when it is off; version 4 wrote it all the same
    folder = save_model(model, tmp_path)
    path = folder / "config.json"
    path.write_text(json.dumps(old_spelling(json.loads(path.read_text()))))
    assert_same_logits(load(folder), model)


def test_a_yarn_config_without_a_factor_takes_the_ratio_of_the_contexts(tmp_path: Path) -> None:
    model = make_model(roped(**YARN))
    folder = save_model(model, tmp_path)
    edit_config(folder, rope_parameters={**THETA, **YARN, "factor": None})
    assert_same_logits(load(folder), model)  # 512 positions of an original 128 are a factor of 4


def test_the_original_context_of_dynamic_scaling_is_the_models_own(tmp_path: Path) -> None:
    """transformers takes max_position_embeddings, whatever else the scaling says."""
    model = make_model(CASES["rope-dynamic-within"])
    folder = save_model(model, tmp_path)
    rope = {**THETA, "rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    assert_same_logits(load(edit_config(folder, rope_parameters=rope)), model)


@pytest.mark.parametrize("config_class", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config"])
def test_keys_that_a_config_leaves_out_have_the_familys_defaults(config_class: str) -> None:
    theirs = getattr(transformers, config_class)()
    architecture = config_class.replace("Config", "ForCausalLM")
    counts = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    ours = ModelConfig.from_hf({"architectures": [architecture], **{key: getattr(theirs, key) for key in counts}})
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert ours.max_position == theirs.max_position_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.sliding_windows[0] == (theirs.sliding_window if config_class == "MistralConfig" else None)


def test_qwen_windows_begin_where_transformers_begins_them_when_nothing_is_said() -> None:
    options = {"use_sliding_window": True, "num_hidden_layers": 30}
    theirs = transformers.Qwen2Config(**options)
    counts = {key: getattr(theirs, key) for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    ours = ModelConfig.from_hf({"architectures": ["Qwen2ForCausalLM"], **counts, **options})
    windows = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    assert ours.sliding_windows == windows
    assert set(windows) == {None, 4096}
