"""Configs in Hugging Face terms: from config.json as it is, and from GGUF metadata and shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.hf_config import read_config, read_generation_config
from octavo.quant.checkpoint.resolve import ModelFiles, resolve_model

HIDDEN, FFN, HEADS, KV_HEADS, HEAD_DIM, VOCAB, LAYERS = 64, 96, 4, 2, 128, 40, 3


def hf_folder(folder: Path, config: str, generation: str | None = None) -> ModelFiles:
    (folder / "config.json").write_text(config)
    if generation is not None:
        (folder / "generation_config.json").write_text(generation)
    save_file({"t": torch.zeros(1)}, folder / "model.safetensors")
    return resolve_model(str(folder))


def gguf_file(
    path: Path, architecture: str = "llama", extra: Callable[[Any], None] | None = None, *, bias: bool = False, output: bool = False
) -> ModelFiles:
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_context_length(131072)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(500000.0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "blk.0.attn_q.weight": (HEADS * HEAD_DIM, HIDDEN), "blk.0.ffn_up.weight": (FFN, HIDDEN)}
    if bias:
        shapes["blk.0.attn_q.bias"] = (HEADS * HEAD_DIM,)
    if output:
        shapes["output.weight"] = (VOCAB, HIDDEN)
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    if extra is not None:
        extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path))


def test_config_json_is_given_as_it_is(tmp_path: Path) -> None:
    files = hf_folder(tmp_path, '{"model_type": "x", "anything": [1]}')
    assert read_config(files) == {"model_type": "x", "anything": [1]}
    assert read_generation_config(files) == {}


def test_both_spellings_of_rope(tmp_path: Path) -> None:
    old = read_config(hf_folder(tmp_path, json.dumps({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}})))
    assert old["rope_parameters"] == {"rope_theta": 1e6, "rope_type": "linear", "type": "linear", "factor": 2.0}
    new = read_config(hf_folder(tmp_path, json.dumps({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}})))
    assert (new["rope_theta"], new["rope_scaling"]) == (1e4, {"rope_type": "yarn", "factor": 4.0})
    plain = read_config(hf_folder(tmp_path, json.dumps({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})))
    assert (plain["rope_theta"], plain["rope_scaling"]) == (1e4, None)


def test_generation_config_json(tmp_path: Path) -> None:
    assert read_generation_config(hf_folder(tmp_path, "{}", '{"eos_token_id": [1, 2], "top_p": 0.9}')) == {
        "eos_token_id": [1, 2],
        "top_p": 0.9,
    }


@pytest.mark.parametrize(
    ("content", "told"),
    [('{"a": 1,\n "b": }', r"config\.json.*line 2, column 7"), ("[]", "a JSON list"), ('{"a": "\udcff"}', "cannot be read")],
)
def test_invalid_json_names_file_and_place(tmp_path: Path, content: str, told: str) -> None:
    files = hf_folder(tmp_path, "{}")
    (tmp_path / "config.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=told):
        read_config(files)


def test_embedded_model() -> None:
    config = read_config(resolve_model(None))
    expected = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "max_position_embeddings": 8192,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: config[key] for key in expected} == expected
    assert read_generation_config(resolve_model(None)) == {"eos_token_id": [2], "bos_token_id": 1}


def test_transformers_accepts_the_built_config() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(**read_config(resolve_model(None)))
    assert (config.hidden_size, config.head_dim, config.rope_parameters["rope_theta"]) == (576, 64, 100000.0)


def test_head_dim_comes_from_the_shapes(tmp_path: Path) -> None:
    config = read_config(gguf_file(tmp_path / "m.gguf"))
    assert (config["head_dim"], config["num_key_value_heads"], config["num_hidden_layers"]) == (HEAD_DIM, KV_HEADS, LAYERS)
    assert (config["vocab_size"], config["hidden_size"], config["intermediate_size"]) == (VOCAB, HIDDEN, FFN)
    assert "partial_rotary_factor" not in config


def test_flags_from_tensors_and_metadata(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_sliding_window(1024)
        writer.add_rope_dimension_count(HEAD_DIM // 2)

    config = read_config(gguf_file(tmp_path / "m.gguf", "qwen2", extra, bias=True, output=True))
    assert (config["architectures"], config["model_type"]) == (["Qwen2ForCausalLM"], "qwen2")
    assert (config["attention_bias"], config["tie_word_embeddings"], config["mlp_bias"]) == (True, False, False)
    assert (config["sliding_window"], config["partial_rotary_factor"]) == (1024, 0.5)


def test_yarn_and_linear_scaling(tmp_path: Path) -> None:
    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32768)

    def linear(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(8.0)

    def longrope(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_factor(8.0)

    assert read_config(gguf_file(tmp_path / "y.gguf", "qwen3", yarn))["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32768,
    }
    assert read_config(gguf_file(tmp_path / "l.gguf", "llama", linear))["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    with pytest.raises(CheckpointError, match="'longrope' is not supported"):
        read_config(gguf_file(tmp_path / "r.gguf", "llama", longrope))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_rope_is_recovered_from_its_table(tmp_path: Path, factor: float) -> None:
    """The table as transformers computes it for the very settings that must come back."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(
        hidden_size=HIDDEN, head_dim=HEAD_DIM, max_position_embeddings=131072, rope_parameters={**settings, "rope_theta": 5e5}
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / 500000.0 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    table = (plain / scaled).numpy().astype(np.float32)

    read = read_config(gguf_file(tmp_path / "m.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", table)))
    assert read["rope_scaling"] == settings
    assert read["rope_parameters"] == {**settings, "rope_theta": 500000.0}

    table[20] *= 1.5
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not Llama 3's"):
        read_config(gguf_file(tmp_path / "bad.gguf", extra=lambda writer: writer.add_tensor("rope_freqs.weight", table)))


def test_end_tokens_and_sampling(tmp_path: Path) -> None:
    def extra(writer: Any) -> None:
        writer.add_eot_token_id(7)
        writer.add_uint32("tokenizer.ggml.eom_token_id", 2)
        writer.add_float32("general.sampling.temp", 0.6)
        writer.add_int32("general.sampling.top_k", 20)

    assert read_generation_config(gguf_file(tmp_path / "m.gguf", extra=extra)) == {
        "eos_token_id": [2, 7],
        "bos_token_id": 1,
        "temperature": 0.6,
        "top_k": 20,
    }


def test_incomplete_metadata_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_head_count([4, 4, 2])
    writer.add_tensor("token_embd.weight", np.zeros((VOCAB, HIDDEN), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match=r"llama\.attention\.head_count=\[4, 4, 2\]"):
        read_config(resolve_model(str(path)))
