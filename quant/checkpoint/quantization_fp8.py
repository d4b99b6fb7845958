"""The config keys of native FP8 (`quant_method: fp8`), as vLLM, SGLang, DeepSeek and transformers write them. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..linear_format import DENSE, ActivationFormat, LinearFormat
from .quantization_base import KVCacheFormat, QuantizationConfig
from .quantization_fields import Fields
from .quantization_matching import is_lm_head, is_named


@dataclass(frozen=True)
class Fp8Config(QuantizationConfig):
    default: LinearFormat
    ignored: tuple[str, ...]

    def _stored(self, module: str) -> LinearFormat:
        return DENSE if is_lm_head(module) or is_named(module, self.ignored) else self.default

    def _formats(self) -> tuple[LinearFormat, ...]:
        return (self.default,)


def read_fp8(fields: Fields) -> Fp8Config:
    """Blocks when `weight_block_size` is given, else one scale a tensor. The LM head stays dense, as every writer leaves it.

    Dynamic activations are quantized per token (per 1 x block columns beside blocks): what vLLM and SGLang do where their kernels can,
    and never coarser than the one scale per tensor they fall back to. `ignored_layers` and `modules_to_not_convert` name modules by path,
    or by a prefix or suffix of whole path components, or by the merged linear (qkv_proj, gate_up_proj) around them.
    """
    fields.choice("fmt", ("e4m3", "float8_e4m3fn"), default="e4m3")
    fields.choice("scale_fmt", ("float", "ue8m0"), default="float")
    fields.choice("expert_dtype", ("fp8",), default="fp8")
    fields.refuse("modules_to_convert", "only linears can be FP8")
    block = read_block(fields, "weight_block_size")
    static = fields.choice("activation_scheme", ("dynamic", "static"), default="dynamic") == "static"
    if block is not None and static:
        raise fields.fault("activation_scheme", f"contradicts weight_block_size={list(block)}: blocks go with dynamic activations alone")
    if block is not None:
        activation = ActivationFormat("fp8_e4m3", "group", dynamic=True, group_size=block[1])
    else:
        activation = ActivationFormat("fp8_e4m3", "tensor" if static else "token", dynamic=not static)
    stored = LinearFormat("fp8", 8, "tensor" if block is None else "block", block=block, activation=activation)
    return Fp8Config("fp8", fields.source, _kv_cache(fields), stored, fields.names("ignored_layers", "modules_to_not_convert"))


def _kv_cache(fields: Fields) -> KVCacheFormat | None:
    """AutoFP8 writes `kv_cache_scheme: "static"`; `kv_cache_quant_algo` is ModelOpt's key. Both mean one static scale a tensor."""
    static = fields.choice("kv_cache_scheme", ("static", "none"), default="none") == "static"
    fp8 = fields.choice("kv_cache_quant_algo", ("fp8", "none"), default="none") == "fp8"
    return KVCacheFormat("fp8_e4m3", "tensor", dynamic=False) if static or fp8 else None


def read_block(fields: Fields, key: str) -> tuple[int, int] | None:
    """A block's rows and columns, written [128, 128] or "128x128"; None when the key is absent."""
    value = fields.values.get(key)
    if value is None:
        return None
    sizes = [int(size) if size.isdecimal() else 0 for size in value.split("x")] if isinstance(value, str) else value
    numbers = isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes)
    if not numbers:
        raise fields.fault(key, "is no block: it must be two positive numbers, such as [128, 128]")
    return sizes[0], sizes[1]
