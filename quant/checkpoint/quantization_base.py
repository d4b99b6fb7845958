"""QuantizationConfig: what every checkpoint config answers, how one linear is stored. Knows layouts' shapes and no config's keys."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..linear_format import LinearFormat
from .errors import CheckpointError
from .quantization_shapes import refuse_other_shapes
from .reader import TensorInfo


@dataclass(frozen=True)
class KVCacheFormat:
    """How a checkpoint wants keys and values cached. Static scales are tensors of the checkpoint; "head" has one for each KV head."""

    dtype: Literal["fp8_e4m3", "int8"]
    granularity: Literal["tensor", "head"]
    dynamic: bool


@dataclass(frozen=True)
class QuantizationConfig(ABC):
    """What a checkpoint says about its quantization. Everything that can be checked without a module is checked when it is read."""

    method: str  # "awq", "gptq", "compressed-tensors", "fp8" or "modelopt"
    source: Path  # the file it was read from
    kv_cache: KVCacheFormat | None

    def for_linear(
        self, module: str, *, in_features: int, out_features: int, tensors: Mapping[str, TensorInfo] | None = None
    ) -> LinearFormat:
        """How one unfused module is stored, such as "model.layers.0.self_attn.q_proj" or "lm_head"; DENSE when it is not quantized.

        `tensors` are the checkpoint's, where they are known. Raises CheckpointError when their shapes are those of other bits or another
        group size than the config's, and when the layout cannot hold a weight of that shape.
        """
        stored = self._stored(module)
        refuse_other_shapes(stored, module, tensors or {}, in_features=in_features, out_features=out_features)
        problem = _misfit(stored, in_features, out_features)
        if problem:
            raise CheckpointError(f"{self.source}: {module} ({out_features} x {in_features}) cannot be {stored.describe()}: {problem}")
        return stored

    @property
    def weight_types(self) -> frozenset[str]:
        """Types of the quantized weights, such as {"int4"} or {"fp8"}; empty when no linear is quantized."""
        return frozenset(stored.weight_type for stored in self._formats()) - {"dense"}

    @abstractmethod
    def _stored(self, module: str) -> LinearFormat:
        """The format that the rules give a module, before its shape is looked at."""

    @abstractmethod
    def _formats(self) -> tuple[LinearFormat, ...]:
        """Every format that `_stored` may return, but DENSE."""


def _misfit(stored: LinearFormat, in_features: int, out_features: int) -> str:
    """Why a weight of that shape cannot be stored so; "" when it can.

    GPTQ's last group, and the last rows and columns of FP8 blocks, may be short: their scales are counted rounded up.
    """
    group_size = stored.group_size
    if stored.layout in ("awq", "pack-quantized") and group_size is not None and in_features % group_size:
        fitting = [size for size in (128, 64, 32, 16) if in_features % size == 0]
        remedy = f"quantize with group_size {fitting[0]}" if fitting else "quantize it per channel or leave the module dense"
        return f"group_size={group_size} does not divide its {in_features} input features: {remedy}"
    if stored.layout == "awq" and out_features % 8:
        return f"AWQ packs 8 output features in one word, and {out_features} is no multiple of 8: leave the module dense"
    if stored.layout == "gptq" and stored.bits == 3 and (in_features % 32 or out_features % 32):
        return "GPTQ packs 32 values of 3 bits in 3 words, so both sizes must be multiples of 32: quantize to 4 bits"
    if stored.layout == "modelopt-fp8" and stored.block is not None:
        rows, columns = stored.block
        if out_features % rows or in_features % columns:
            return f"ModelOpt stores whole blocks of {rows}x{columns}: leave the module dense"
    return ""
