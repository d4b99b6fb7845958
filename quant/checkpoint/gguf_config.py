"""A Hugging Face config built from GGUF metadata and tensor shapes. Knows no model code and reads no weights but the rotary table."""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import CheckpointError
from .gguf_header import GgufHeader
from .gguf_names import ARCHITECTURES, ROPE_TABLE

_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty"}
# Llama 3.1, 3.2 and 3.3 all stretch the frequencies between the same two wavelengths of the same original context;
# a GGUF keeps only the resulting table.
_LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def check_architecture(header: GgufHeader) -> None:
    """Raises CheckpointError when the file is a part of a split model, holds experts, or is of an unknown architecture."""
    path, name = header.path, header.architecture
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise CheckpointError(f"{path} is one part of a split model: merge the parts with `llama-gguf-split --merge` first")
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: architecture {name!r} is not supported in GGUF. Supported: {', '.join(ARCHITECTURES)}")
    if header.value("expert_count", 0):
        raise CheckpointError(f"{path}: {name} with {header.value('expert_count')} experts is not supported in GGUF: use its safetensors")


def head_counts(header: GgufHeader) -> tuple[int, int]:
    """Attention heads and key/value heads. Raises CheckpointError when they are missing or differ from layer to layer."""
    counts = []
    heads = header.value("attention.head_count")
    for key, value in (("head_count", heads), ("head_count_kv", header.value("attention.head_count_kv", heads))):
        distinct = set(value) if isinstance(value, list) else {value}
        count = distinct.pop() if len(distinct) == 1 else None
        if not isinstance(count, int):
            raise CheckpointError(f"{header.path}: {header.architecture}.attention.{key}={value!r}, but one number is needed")
        counts.append(count)
    return counts[0], counts[1]


def gguf_config(header: GgufHeader) -> dict[str, Any]:
    """The config.json that the model had before it was converted. Raises CheckpointError where the file does not tell."""
    check_architecture(header)
    mapped = ARCHITECTURES[header.architecture]
    num_heads, num_kv_heads = head_counts(header)
    vocab_size, hidden_size = _shape(header, "token_embd.weight")
    head_dim = _shape(header, "blk.0.attn_q.weight")[0] // num_heads
    rotary_dim = header.value("rope.dimension_count", head_dim)
    config: dict[str, Any] = {
        "architectures": [mapped.hf_class],
        "model_type": mapped.model_type,
        "hidden_act": "silu",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": _shape(header, "blk.0.ffn_up.weight")[0],
        "num_hidden_layers": _required(header, "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": _rounded(_required(header, "attention.layer_norm_rms_epsilon")),
        "max_position_embeddings": _required(header, "context_length"),
        "rope_theta": _rounded(header.value("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(header, head_dim),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in header.tensors,
        "sliding_window": header.value("attention.sliding_window") or None,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "bfloat16",
    }
    if rotary_dim != head_dim:
        config["partial_rotary_factor"] = rotary_dim / head_dim
    return config


def gguf_generation_config(header: GgufHeader) -> dict[str, Any]:
    """End tokens (of text, of turn and of message) and the sampling that the file recommends, in generation_config.json's terms."""
    ends = (header.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot", "eom"))
    config: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(token for token in ends if token is not None))}
    bos = header.metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None:
        config["bos_token_id"] = bos
    for theirs, ours in _SAMPLING.items():
        value = header.metadata.get(f"general.sampling.{theirs}")
        if value is not None:
            config[ours] = _rounded(value) if isinstance(value, float) else value
    return config


def _required(header: GgufHeader, key: str) -> Any:
    value = header.value(key)
    if value is None:
        raise CheckpointError(f"{header.path} lacks the metadata {header.architecture}.{key}: convert the model again")
    return value


def _shape(header: GgufHeader, tensor: str) -> tuple[int, ...]:
    entry = header.tensors.get(tensor)
    if entry is None or len(entry.shape) != 2:
        raise CheckpointError(f"{header.path} lacks the matrix {tensor!r}: it is no whole {header.architecture} model. Download it again")
    return entry.shape


def _rounded(value: float) -> float:
    """A float32 as the decimal number it was written from: 9.999999747378752e-06 is 1e-05."""
    return float(str(np.float32(value)))


def _rope_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any] | None:
    if ROPE_TABLE in header.tensors:
        return _llama3_scaling(header, head_dim)
    kind = header.value("rope.scaling.type", "none")
    legacy = header.value("rope.scale_linear")
    if kind == "none":
        return {"rope_type": "linear", "factor": _rounded(legacy)} if legacy not in (None, 1.0) else None
    factor = _rounded(_required(header, "rope.scaling.factor"))
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn":
        raise CheckpointError(
            f"{header.path}: rope scaling {kind!r} is not supported in GGUF. Supported: none, linear, yarn, llama3 tables"
        )
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = header.value("rope.scaling.original_context_length")
    if original is not None:
        scaling["original_max_position_embeddings"] = original
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = header.value(f"rope.scaling.{theirs}")
        if value is not None:
            scaling[ours] = _rounded(value)
    multiplier = header.value("rope.scaling.yarn_log_multiplier")
    if multiplier:
        scaling["mscale"] = scaling["mscale_all_dim"] = _rounded(multiplier)
    temperature = header.value("attention.temperature_scale")
    if temperature:
        scaling["llama_4_scaling_beta"] = _rounded(temperature)
    return scaling


def _llama3_scaling(header: GgufHeader, head_dim: int) -> dict[str, Any]:
    """Recover Llama 3's settings from its table of divisors, and prove them against it."""
    entry = header.tensors[ROPE_TABLE]
    table = np.fromfile(header.path, dtype=np.float32, count=entry.nbytes // 4, offset=entry.offset)
    factor = _rounded(float(np.max(table)))
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3_ROPE}
    theta = float(header.value("rope.freq_base", 10000.0))
    if entry.type.name != "F32" or not np.allclose(table, _llama3_table(theta, head_dim, factor), rtol=1e-4):
        raise CheckpointError(
            f"{header.path}: its {ROPE_TABLE} is not Llama 3's for rope_theta={theta:g} and factor={factor:g}, and a GGUF does not say "
            "how else it was made: use the model's safetensors"
        )
    return scaling


def _llama3_table(theta: float, head_dim: int, factor: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What each rotary frequency is divided by: 1 for short wavelengths, `factor` for long ones, a smooth blend between."""
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = _LLAMA3_ROPE["low_freq_factor"], _LLAMA3_ROPE["high_freq_factor"]
    smooth = (_LLAMA3_ROPE["original_max_position_embeddings"] / wavelengths - low) / (high - low)
    return 1 / (np.clip(smooth, 0, 1) * (1 - 1 / factor) + 1 / factor)
