"""Static scales of keys and values in a checkpoint, under the names that exporters give them. Knows no page and no code.

ModelOpt writes `<attention>.k_proj.k_scale` and `v_proj.v_scale`, llm-compressor `<attention>.k_scale` and `v_scale`; older files have
`k_proj.output_scale` and `v_proj.output_scale`, or one `kv_scale` for both. A number is its code times the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...quant.checkpoint.errors import CheckpointError
from ..weights import WeightSource

_NAMES = (
    ("k_proj.k_scale", "v_proj.v_scale"),
    ("k_scale", "v_scale"),
    ("k_proj.output_scale", "v_proj.output_scale"),
    ("kv_scale", "kv_scale"),
)
_SUFFIXES = tuple(f".self_attn.{name}" for name in dict.fromkeys(name for pair in _NAMES for name in pair))


@dataclass(frozen=True)
class KVScales:
    """One layer's scales, each float32 [num_kv_heads]."""

    k: torch.Tensor
    v: torch.Tensor


def read_kv_scales(source: WeightSource, attention: str, num_kv_heads: int) -> KVScales | None:
    """The scales of the layer whose attention has the prefix `attention` ("model.layers.0.self_attn"); None when there are none.

    A scale is one number, or one for each key-value head: [num_kv_heads] or [num_kv_heads, 1, 1]. Raises CheckpointError for another
    shape, for a scale that is not a number above 0, and for keys' scales without the values' or the other way round.
    """
    for names in _NAMES:
        k_name, v_name = (f"{attention}.{name}" for name in names)
        found = source.has(k_name), source.has(v_name)
        if all(found):
            return KVScales(*(_read(source, name, num_kv_heads) for name in (k_name, v_name)))
        if any(found):
            there, missing = (k_name, v_name) if found[0] else (v_name, k_name)
            raise CheckpointError(f"the checkpoint has {there!r} and no {missing!r}: keys and values need a scale each")
    return None


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of that name is read by `read_kv_scales` alone: unread, it is of no interest with a plain KV cache."""
    return name.endswith(_SUFFIXES)


def _read(source: WeightSource, name: str, num_kv_heads: int) -> torch.Tensor:
    fault: CheckpointError | None = None
    for shape in ((), (1,), (num_kv_heads,), (num_kv_heads, 1, 1)):
        try:
            scale = source.read(name, shape, torch.float32).flatten().expand(num_kv_heads).contiguous()
        except CheckpointError as error:
            fault = error
            continue
        wrong = [value for value in scale.tolist() if not 0 < value < math.inf]
        if wrong:
            raise CheckpointError(f"tensor {name!r} holds {wrong[0]:g}: the scale of a KV cache must be a number above 0")
        return scale.to(source.device)
    raise CheckpointError(
        f"tensor {name!r} must be a floating-point scale of the KV cache: one number, or one for each of {num_kv_heads} key-value heads"
    ) from fault
