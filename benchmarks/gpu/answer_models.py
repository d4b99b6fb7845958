"""The models whose answers are compared: small random ones of each family, made where they are wanted, some of them quantized there.

Needs transformers; what is not there is told by the caller.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama, one key head": ("LlamaConfig", {"num_key_value_heads": 1, "tie_word_embeddings": True, "attention_bias": True}),
    "llama, heads of 128": ("LlamaConfig", {"head_dim": 128}),
    "mistral, a window of 48": ("MistralConfig", {"sliding_window": 48}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 64}),
}
SIZES: Mapping[str, Any] = {
    "vocab_size": 1003, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.08,
}  # fmt: skip
# Of those that are quantized first, on the GPU and on the CPU, which is to take seconds.
_QUANTIZED_SIZES = {
    **SIZES, "vocab_size": 263, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_key_value_heads": 4,
    "head_dim": 32,
}  # fmt: skip
_WORDS = 900  # in the text that quantization is calibrated on


@dataclass(frozen=True)
class Asked:
    """A model and how it is run. `recipe` are the fields of a Recipe that quantizes it first, `options` EngineConfig's.

    `path`: a model that is there already, in place of a random one of the family's kind and of these sizes.
    """

    name: str
    family: str = "llama"
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    recipe: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)
    path: Path | None = None


def _asked() -> tuple[Asked, ...]:
    found = [Asked(f"{family}, bf16", family) for family in FAMILIES]
    found += [Asked("llama, fp16", dtype="float16"), Asked("llama, deterministic", options={"deterministic": True})]
    found += [Asked(f"llama, {kind} at load", options={"quantization": kind}) for kind in ("fp8", "int8", "int4")]
    found += [Asked(f"llama, {kind} KV", options={"kv_cache_dtype": kind}) for kind in ("fp8_e4m3", "int8")]
    recipes: dict[str, dict[str, Any]] = {
        "AWQ": {"method": "awq", "format": "awq", "effort": "fast"},
        "GPTQ": {"method": "gptq", "format": "gptq", "effort": "fast"},
        "W4A16 tuned": {"method": "auto", "format": "compressed-tensors"},
        "FP8 in blocks": {"method": "fp8", "weight_scales": "block"},
        "FP8, static, fp8 KV": {"method": "fp8", "activations": "static", "kv_cache": "fp8"},
        "W8A8": {"method": "int8"},
    }
    return (*found, *(Asked(f"llama, {name}", recipe=recipe, sizes=_QUANTIZED_SIZES) for name, recipe in recipes.items()))


ASKED = _asked()


def of_path(path: Path) -> tuple[Asked, ...]:
    """A model of somebody's own: as it is, with an fp8 cache and, where it is dense, quantized while it loads."""
    plain = [Asked(path.name, path=path), Asked(f"{path.name}, fp8 KV", path=path, options={"kv_cache_dtype": "fp8_e4m3"})]
    kinds = () if _is_quantized(path) else ("fp8", "int8", "int4")
    return (*plain, *(Asked(f"{path.name}, {kind} at load", path=path, options={"quantization": kind}) for kind in kinds))


def _is_quantized(path: Path) -> bool:
    from octavo.quant.checkpoint.hf_config import read_config
    from octavo.quant.checkpoint.resolve import resolve_model

    return path.suffix == ".gguf" or "quantization_config" in read_config(resolve_model(str(path), needs_weights=False))


def write_model(asked: Asked, folder: Path) -> None:
    """Random weights, norms and biases among them, and a tokenizer of bytes. Raises ModuleNotFoundError without transformers."""
    import tokenizers
    import transformers

    class_name, changes = FAMILIES[asked.family]
    config = getattr(transformers, class_name)(**{**asked.sizes, **changes})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.1 * torch.randn(parameter.shape))
    model.to(getattr(torch, asked.dtype)).save_pretrained(folder)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


@dataclass(frozen=True)
class Made:
    """What quantizing cost, in nats a token, and the seconds that it took."""

    kl: float
    seconds: float


def quantize_model(asked: Asked, source: Path, out: Path, device: Literal["cpu", "cuda"]) -> Made:
    """The model as its recipe asks, made on a device. Raises what `octavo.quantize` raises."""
    from octavo.calibration.quantize_run import quantize

    assert asked.recipe is not None
    chooser = random.Random(0)
    text = source.parent / "calibration.txt"
    text.write_text(" ".join(_word(chooser) for _ in range(_WORDS)), encoding="utf-8")
    recipe = {"calibration": str(text), "samples": 16, "seqlen": 128, **asked.recipe}
    with torch.inference_mode(False):  # solving wants gradients
        result = quantize(str(source), out, device=device, measure_speed=False, **recipe)
    return Made(result.quality.kl_mean, sum(result.seconds.values()))


def _word(chooser: random.Random) -> str:
    return "".join(chooser.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(chooser.randrange(1, 9)))
