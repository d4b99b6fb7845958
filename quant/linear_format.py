"""LinearFormat: how a checkpoint stores one linear, as plain data. Knows no tensor and no kernel.

Checkpoint configs are read into these (quant/checkpoint/quantization_config.py); schemes (quant/schemes/) know what each layout's
bits mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Layout = Literal["dense", "awq", "gptq", "pack-quantized", "float-quantized", "int-quantized", "fp8", "modelopt-fp8", "gguf", "load-time"]
Granularity = Literal["tensor", "channel", "group", "block", "token"]


@dataclass(frozen=True)
class ActivationFormat:
    """How a linear's input is quantized before it is multiplied. `group_size` belongs to granularity "group" alone."""

    dtype: Literal["int8", "int16", "fp8_e4m3"]  # int16: as wide as 32-bit sums with int8 weights allow
    granularity: Granularity  # "tensor", "token" or "group"
    dynamic: bool
    group_size: int | None = None
    symmetric: bool = True

    def describe(self) -> str:
        """For people: "int8 per token, dynamic"."""
        size = f" of {self.group_size}" if self.group_size is not None else ""
        return f"{self.dtype} per {self.granularity}{size}, {'dynamic' if self.dynamic else 'static'}"


@dataclass(frozen=True)
class LinearFormat:
    """One linear's storage. `group_size` None: one scale for all of K; `block` is (rows, columns) of granularity "block"."""

    layout: Layout
    bits: int
    granularity: Granularity
    group_size: int | None = None
    block: tuple[int, int] | None = None
    symmetric: bool = True
    act_order: bool = False  # columns may belong to any group, as g_idx says
    zero_offset: int = 0  # added to stored zero points: 1 for GPTQ's first format
    activation: ActivationFormat | None = None
    gguf_type: str | None = None  # "Q4_1", "Q6_K", ... of layout "gguf"
    padded_words: bool = False  # 3-bit codes of layout "pack-quantized" lie ten to a word, and in no stream of bits
    # For messages: where the config says bits, group_size and symmetric, as "config.json: quantization_config.bits=4".
    said: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def weight_type(self) -> str:
        """Kind and width of the stored weights: "int4", "fp8"; "dense", and "gguf" whatever its type."""
        if self.layout in ("dense", "gguf"):
            return self.layout
        is_fp8 = self.layout in ("float-quantized", "fp8", "modelopt-fp8") or (
            self.layout == "load-time" and self.activation is not None and self.activation.dtype == "fp8_e4m3"
        )
        return f"fp{self.bits}" if is_fp8 else f"int{self.bits}"

    def describe(self) -> str:
        """For people: "awq int4, groups of 64, asymmetric"."""
        if self.layout == "dense":
            return "dense"
        if self.layout == "gguf":
            return f"gguf {self.gguf_type}"
        where = {
            "tensor": "per tensor",
            "channel": "per channel",
            "group": f"groups of {self.group_size}",
            "block": f"blocks of {'x'.join(map(str, self.block or ()))}",
            "token": "per token",
        }[self.granularity]
        parts = [f"{self.layout} {self.weight_type}", where]
        if not self.symmetric:
            parts.append("asymmetric")
        if self.act_order:
            parts.append("act-order")
        if self.activation is not None:
            parts.append(f"activations {self.activation.describe()}")
        return ", ".join(parts)


DENSE = LinearFormat("dense", 16, "tensor")
