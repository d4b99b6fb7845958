"""Look: which quantized format tensors are in, by their names, types and shapes alone. Knows no config and reads no tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..schemes.words import num_words
from .reader import TensorInfo

PACKINGS = {
    "gptq": "GPTQ packs along the inputs: qweight is [in*bits/32, out]",
    "awq": "AWQ along the outputs: qweight is [in, out*bits/32]",
}
_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_BITS = (4, 8)


@dataclass(frozen=True)
class Look:
    """What the first quantized module of a checkpoint looks like; `packing` where words of several codes tell it: "gptq" or "awq"."""

    module: str
    file: Path
    tensors: str  # for people: "qweight [64, 512] and scales [8, 512]"
    format: str  # for people: "GPTQ, 4 bits, group_size 64"
    packing: str | None = None


def look_at(tensors: Mapping[str, TensorInfo]) -> Look | None:
    """The first module whose tensors only a quantized checkpoint has; None when all are dense."""
    for name, info in tensors.items():
        module, _, last = name.rpartition(".")
        scale = _first(tensors, module, "weight_scale", "weight_scale_inv")
        if last == "qweight":
            return _words(module, info, tensors)
        if last == "weight_packed":
            packed = "compressed-tensors, pack-quantized" if info.stored == "I32" else "compressed-tensors"
            return Look(module, info.file, _shown(info, scale), packed)
        if last == "weight" and scale is not None and info.stored == "I8":
            return Look(module, info.file, _shown(info, scale), "compressed-tensors, int-quantized")
        if last == "weight" and scale is not None and info.stored.startswith("F8_"):
            return Look(module, info.file, _shown(info, scale), _fp8(info, scale))
    return None


def _first(tensors: Mapping[str, TensorInfo], module: str, *names: str) -> TensorInfo | None:
    return next((tensors[f"{module}.{name}"] for name in names if f"{module}.{name}" in tensors), None)


def _shown(*infos: TensorInfo | None) -> str:
    """ "weight [64, 64] of F8_E4M3 and weight_scale [64, 1] of F32"."""
    return " and ".join(f"{info.name.rpartition('.')[2]} {list(info.shape)} of {info.stored}" for info in infos if info is not None)


def _words(module: str, codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> Look:
    """GPTQ or AWQ: scales have an element for each output, so the width of qweight tells along what it is packed."""
    scales, zeros = _first(tensors, module, "scales"), _first(tensors, module, "qzeros")
    shown = _shown(codes, scales)
    if scales is None or codes.stored not in ("I32", "U32") or len(codes.shape) != 2 or len(scales.shape) != 2:
        return Look(module, codes.file, shown, "GPTQ or AWQ")
    groups, outputs = scales.shape
    width = zeros.shape[1] if zeros is not None and len(zeros.shape) == 2 else None
    if codes.shape[1] == outputs:
        bits = [count for count in _GPTQ_BITS if width == num_words(outputs, count)]
        inputs = codes.shape[0] * 32 // bits[0] if len(bits) == 1 else None
        return Look(module, codes.file, shown, _named("GPTQ", bits, inputs, groups), "gptq")
    bits = [count for count in _AWQ_BITS if codes.shape[1] == num_words(outputs, count)]
    if not bits:
        return Look(module, codes.file, shown, "GPTQ or AWQ")
    return Look(module, codes.file, shown, _named("AWQ", bits, codes.shape[0], groups), "awq")


def _named(name: str, bits: list[int], inputs: int | None, groups: int) -> str:
    """ "GPTQ, 4 bits, group_size 64", as far as the shapes tell."""
    parts = [name, *(f"{count} bits" for count in bits if len(bits) == 1)]
    if inputs is not None and groups and inputs % groups == 0:
        parts.append(f"group_size {inputs // groups}")
    return ", ".join(parts)


def _fp8(weight: TensorInfo, scale: TensorInfo) -> str:
    """FP8 by the place and the shape of its scales, as quant/schemes/fp8.py lists its kinds."""
    rows = weight.shape[0] if weight.shape else 0
    if scale.name.endswith("_inv"):
        return "fp8 as DeepSeek and transformers write it (quant_method fp8)"
    if scale.shape == (rows, 1):
        return "fp8, compressed-tensors float-quantized per channel"
    if scale.shape == (rows,) or len(scale.shape) == 4:
        return "fp8 as ModelOpt writes it (quant_method modelopt)"
    if len(scale.shape) == 2:
        return "fp8 in blocks, compressed-tensors float-quantized"
    return "fp8 with one scale a tensor (compressed-tensors float-quantized, quant_method fp8 or modelopt)"
