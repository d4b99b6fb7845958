"""Tiny random models of many architectures, saved with transformers: what quantization meets that it was not written for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB = 263  # the byte-level tokenizer's, and a few more
WIDE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": VOCAB,
    "n_positions": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
MLA |= {"moe_intermediate_size": 32, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
MLA |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
_OSS: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "layer_types": ["sliding_attention", "full_attention"],
}
_FOUR: dict[str, Any] = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
_GEMMA: dict[str, Any] = {**WIDE, **_FOUR, "head_dim": 16, "vocab_size_per_layer_input": VOCAB, "hidden_size_per_layer_input": 16}
_GEMMA_3N: dict[str, Any] = {"intermediate_size": [96] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0], "laurel_rank": 16}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

# By transformers' model type; each brings something that Llama has not.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": WIDE,
    "qwen2": WIDE,  # biases of q, k and v
    "qwen3": {**WIDE, "head_dim": 16},  # norms of q and k
    "gemma2": {**WIDE, "head_dim": 16},  # norms that multiply with 1 + weight, norms behind the linears, capped logits
    "phi3": WIDE,  # q, k, v fused, gate and up fused
    "phi": WIDE,  # layer norms, attention and MLP side by side, biases everywhere
    "gpt2": _GPT,  # weights stored transposed
    "gpt_neox": {key: value for key, value in WIDE.items() if key != "num_key_value_heads"},  # q, k, v interleaved by head
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": VOCAB},  # positions by ALiBi
    "opt": {**{key: value for key, value in WIDE.items() if key != "intermediate_size"}, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "cohere": WIDE,  # one norm for attention and MLP, tied head
    "olmo2": WIDE,  # norms behind the linears alone
    "mixtral": {**WIDE, "num_local_experts": 4, "num_experts_per_tok": 2},  # experts in one tensor, several in the checkpoint
    "qwen2_moe": {**WIDE, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "deepseek_v3": {**WIDE, **MLA},  # low ranks between the linears, the first block dense
    "gpt_oss": {**WIDE, **_OSS},  # experts transposed, in one tensor in the checkpoint too
    "lfm2": {**WIDE, "layer_types": ["conv", "full_attention"]},  # blocks of two kinds
    "exaone": WIDE,  # calls itself a Llama, and has other names in its checkpoint
    "gemma4_text": {**_GEMMA, "global_head_dim": 16},  # blocks that read the keys and values of those before, and something of each token
    "gemma3n_text": {**_GEMMA, **_GEMMA_3N},  # and hidden states of four streams, the streams in front
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": VOCAB, "state_size": 8},  # no attention
}
ARCHITECTURES = {name: sizes for name, sizes in ARCHITECTURES.items() if name in transformers.CONFIG_MAPPING}  # of an older transformers


def make(model_type: str, folder: Path, *, seed: int = 0, **changes: Any) -> Any:
    """Save a model whose every parameter is random, with `changes` to its config; gives it, in float32."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **{**ARCHITECTURES.get(model_type, WIDE), **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder)
    return model
