"""GGUF tensor names in Hugging Face terms, by architecture. Tables alone: reads no file and knows no model code."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class GgufArchitecture:
    """How one GGUF architecture maps to Hugging Face. `permuted` says whether the converter interleaves the rows of q and k."""

    hf_class: str
    model_type: str
    permuted: bool


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("LlamaForCausalLM", "llama", permuted=True),
    "mistral3": GgufArchitecture("Ministral3ForCausalLM", "ministral3", permuted=True),
    "qwen2": GgufArchitecture("Qwen2ForCausalLM", "qwen2", permuted=False),
    "qwen3": GgufArchitecture("Qwen3ForCausalLM", "qwen3", permuted=False),
}

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Tables of rotary frequencies: no parameters of a Hugging Face model, the config carries what they say.
ROPE_TABLE = "rope_freqs.weight"
_DERIVED = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|rope_freqs)\.weight|rope_factors_(long|short)\.weight")
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"([a-z_]+)\.(weight|bias)")


def is_derived(gguf_name: str) -> bool:
    """True for tables that the config already describes and that no layer holds."""
    return _DERIVED.fullmatch(gguf_name) is not None


def hf_name(gguf_name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor of the Llama family, or None when there is none."""
    block = _BLOCK_NAME.fullmatch(gguf_name)
    if block is not None:
        part = _BLOCK.get(block[2])
        return f"model.layers.{block[1]}.{part}.{block[3]}" if part else None
    outer = _OUTER_NAME.fullmatch(gguf_name)
    part = _OUTER.get(outer[1]) if outer is not None else None
    return f"{part}.{outer[2]}" if outer is not None and part else None


def heads_to_unpermute(gguf_name: str, architecture: str, num_heads: int, num_kv_heads: int) -> int | None:
    """The number of heads whose rows the converter interleaved in this tensor, or None when its rows are in order."""
    block = _BLOCK_NAME.fullmatch(gguf_name)
    if block is None or not ARCHITECTURES[architecture].permuted:
        return None
    return {"attn_q": num_heads, "attn_k": num_kv_heads}.get(block[2])
