"""x @ W.T with quantized weights in groups along K: the one canonical form, and its float reference. Knows no checkpoint format.

    w[n, k] = scale[n, k // g] * (code[n, k] - zero[n, k // g])          integer zero points, or one constant zero
    w[n, k] = scale[n, k // g] * code[n, k] + offset[n, k // g]          float offsets (GGUF's Q4_1, K-quants)

Scales and offsets may have two levels (GGUF's K-quants): small integers times a float that `G / S` groups share. With a permutation,
column k of the codes multiplies input permutation[k] (GPTQ's act-order: columns sorted by group once, at load).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

CODE_DTYPES = (torch.uint8, torch.int8, torch.float8_e4m3fn)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class GroupedWeight:
    """W [N, K] in G groups of `group_size` along K, `G * group_size == K`. See the file's head for what the fields mean.

    codes        [N, K] uint8 (0 to 2**bits - 1), int8, or float8_e4m3fn
    scale        [N, G] float16, bfloat16 or float32; with super_scale uint8 or int8
    zero         the zero point of every group, where `zeros` is None
    zeros        [N, G] uint8 zero points
    offset       [N, G] like scale; with super_offset uint8. Never together with zeros or a zero other than 0
    super_scale, super_offset  [N, S] float16, bfloat16 or float32, S divides G
    permutation  [K] int64
    """

    codes: Tensor
    bits: int
    group_size: int
    scale: Tensor
    zero: int = 0
    zeros: Tensor | None = None
    offset: Tensor | None = None
    super_scale: Tensor | None = None
    super_offset: Tensor | None = None
    permutation: Tensor | None = None

    def __post_init__(self) -> None:
        n, k = self.codes.shape
        if self.codes.dtype not in CODE_DTYPES:
            raise ValueError(f"codes must be uint8, int8 or float8_e4m3fn, not {self.codes.dtype}")
        if self.group_size < 1 or k % self.group_size:
            raise ValueError(f"{k} inputs are not a whole number of groups of {self.group_size}")
        groups = (n, k // self.group_size)
        for name, tensor in (("scale", self.scale), ("zeros", self.zeros), ("offset", self.offset)):
            if tensor is not None and tuple(tensor.shape) != groups:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, wanted {groups}")
        two_level = self.super_scale is not None
        if two_level == (self.scale.dtype in SCALE_DTYPES):
            raise ValueError(f"a scale of dtype {self.scale.dtype} does not go {'with' if two_level else 'without'} super_scale")
        for name, tensor in (("super_scale", self.super_scale), ("super_offset", self.super_offset)):
            if tensor is not None and (tensor.shape[0] != n or groups[1] % tensor.shape[1]):
                raise ValueError(f"{name} is {tuple(tensor.shape)} for {groups} groups")
        if self.offset is not None and (self.zeros is not None or self.zero):
            raise ValueError("a weight has zero points or offsets, not both")
        if self.permutation is not None and (self.permutation.shape != (k,) or self.permutation.dtype != torch.int64):
            raise ValueError(f"permutation must be int64 [{k}], not {self.permutation.dtype} {tuple(self.permutation.shape)}")

    @property
    def out_features(self) -> int:
        return self.codes.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes.shape[1]

    @property
    def num_groups(self) -> int:
        return self.scale.shape[1]

    def _tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def take(self, rows: Tensor) -> GroupedWeight:
        """Some rows of W, by int64 [R] indices."""
        over_rows = {name: tensor for name, tensor in self._tensors().items() if name != "permutation"}
        codes = over_rows.pop("codes").view(torch.uint8)[rows].view(self.codes.dtype)  # not every torch indexes fp8
        return replace(self, codes=codes, **{name: tensor[rows] for name, tensor in over_rows.items()})  # type: ignore[arg-type]

    def to(self, device: torch.device) -> GroupedWeight:
        """The same on a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})  # type: ignore[arg-type]


def _spread(small: Tensor, over: Tensor | None) -> Tensor:
    """[N, G] floats of a scale or an offset, both levels multiplied."""
    value = small.float()
    return value if over is None else value * over.float().repeat_interleave(small.shape[1] // over.shape[1], dim=1)


def dequantize(weight: GroupedWeight, dtype: torch.dtype = torch.float32) -> Tensor:
    """W [N, K] in the order of the inputs, computed in `dtype` (float32 or float64)."""
    g = weight.group_size
    scale = _spread(weight.scale, weight.super_scale).to(dtype).repeat_interleave(g, dim=1)
    codes = weight.codes.float().to(dtype)
    if weight.offset is not None:
        values = codes * scale + _spread(weight.offset, weight.super_offset).to(dtype).repeat_interleave(g, dim=1)
    elif weight.zeros is not None:
        values = (codes - weight.zeros.to(dtype).repeat_interleave(g, dim=1)) * scale
    else:
        values = (codes - weight.zero) * scale
    if weight.permutation is None:
        return values
    return torch.empty_like(values).index_copy_(1, weight.permutation, values)


def reference(x: Tensor, weight: GroupedWeight, bias: Tensor | None, out: Tensor) -> Tensor:
    """out[M, N] = x[M, K] @ W.T + bias in float32, whatever the device: what every kernel is held against."""
    return out.copy_(torch.nn.functional.linear(x.float(), dequantize(weight), None if bias is None else bias.float()))


def regroup(weight: GroupedWeight, group_size: int) -> GroupedWeight:
    """The same weight in smaller groups: `group_size` divides the present one. Nothing is rounded."""
    if weight.group_size % group_size:
        raise ValueError(f"groups of {weight.group_size} cannot be cut into groups of {group_size}")
    times = weight.group_size // group_size

    def repeated(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.repeat_interleave(times, dim=1)

    scale = weight.scale.repeat_interleave(times, dim=1)
    return replace(weight, group_size=group_size, scale=scale, zeros=repeated(weight.zeros), offset=repeated(weight.offset))


def from_group_of_column(
    codes: Tensor, group_of_column: Tensor, *, bits: int, scale: Tensor, zero: int = 0, zeros: Tensor | None = None
) -> GroupedWeight:
    """A weight whose columns belong to groups in any way: `group_of_column` int64 [K] indexes the columns of scale [N, G] and zeros.

    Columns are sorted by group where they are scattered, groups cut to a common size where they differ (a ragged last group, a cut
    through a group). Groups without a column are dropped.
    """
    k = codes.shape[1]
    permutation = None
    if bool((group_of_column[1:] < group_of_column[:-1]).any()):
        permutation = torch.argsort(group_of_column, stable=True)
        codes, group_of_column = codes[:, permutation], group_of_column[permutation]
    used, counts = torch.unique_consecutive(group_of_column, return_counts=True)
    group_size = math.gcd(k, *counts.tolist())
    index = used.repeat_interleave(counts // group_size)
    return GroupedWeight(
        codes,
        bits,
        group_size,
        scale[:, index],
        zero=zero,
        zeros=None if zeros is None else zeros[:, index],
        permutation=permutation,
    )


def concatenate(parts: list[GroupedWeight]) -> GroupedWeight | None:
    """Weights over the same inputs as one, along N; None when their forms differ, so that they must be multiplied one by one."""
    first = parts[0]
    size = math.gcd(*(part.group_size for part in parts))
    if any(part.group_size != size and part.super_scale is not None for part in parts):
        return None
    parts = [part if part.group_size == size else regroup(part, size) for part in parts]

    def same(part: GroupedWeight) -> bool:
        for name in ("codes", "scale", "zeros", "offset", "super_scale", "super_offset"):
            mine, other = getattr(first, name), getattr(part, name)
            if (mine is None) != (other is None) or (mine is not None and mine.dtype != other.dtype):
                return False
        return (first.bits, first.zero) == (part.bits, part.zero) and _same_order(first.permutation, part.permutation)

    if not all(same(part) for part in parts):
        return None

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(first.codes.dtype)
    scale = joined("scale")
    assert scale is not None
    return GroupedWeight(
        codes,
        first.bits,
        size,
        scale,
        zero=first.zero,
        zeros=joined("zeros"),
        offset=joined("offset"),
        super_scale=joined("super_scale"),
        super_offset=joined("super_offset"),
        permutation=first.permutation,
    )


def _same_order(a: Tensor | None, b: Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
