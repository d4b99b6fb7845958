"""QuantScheme: what every checkpoint format answers. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ...kernels.grouped_linear import GroupedWeight
from ..linear import Axis, LinearWeights, WeightForm, WeightSpec
from ..linear_format import LinearFormat


@dataclass(frozen=True)
class Module:
    """One unfused linear of a checkpoint, whole."""

    format: LinearFormat
    in_features: int
    out_features: int
    has_bias: bool
    weight_dtype: torch.dtype  # of dense weights and biases


@dataclass(frozen=True)
class Slice:
    """The part of a module that one rank holds: output features out_start..out_stop and inputs in_start..in_stop."""

    out_start: int
    out_stop: int
    in_start: int
    in_stop: int

    @classmethod
    def whole(cls, module: Module) -> Slice:
        return cls(0, module.out_features, 0, module.in_features)

    @property
    def out_features(self) -> int:
        return self.out_stop - self.out_start

    @property
    def in_features(self) -> int:
        return self.in_stop - self.in_start

    def groups_of_columns(self, group_size: int) -> torch.Tensor:
        """int64 [in_features]: each column's group, counted from the slice's first one."""
        return torch.arange(self.in_start, self.in_stop) // group_size - self.in_start // group_size


class QuantScheme(Protocol):
    """One checkpoint format: which tensors a module has, and what their bits mean."""

    def form(self, module: Module) -> WeightForm:
        """What a kernel will have to multiply."""
        ...

    def create_weights(self, module: Module) -> tuple[WeightSpec, ...]:
        """The module's tensors, whole, and how their axes may be cut."""
        ...

    def to_canonical(self, tensors: Mapping[str, torch.Tensor], module: Module, part: Slice) -> LinearWeights:
        """The canonical form of a slice, from tensors cut to it. Raises ValueError naming the tensor for values that cannot be right.

        Matrices may be meta tensors, where no more than the form is wanted: then the config is taken at its word.
        """
        ...


def bias_spec(module: Module) -> tuple[WeightSpec, ...]:
    """The bias, where the module has one."""
    return (WeightSpec("bias", (module.out_features,), module.weight_dtype, (Axis("out"),)),) if module.has_bias else ()


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself. Raises ValueError when it holds a NaN or an infinity; of a meta tensor nothing is known."""
    if tensor.is_meta:
        return tensor
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} of {tensor.numel()} values that are NaN or infinite: the checkpoint is damaged, download it again"
        )
    return tensor


def check_scales(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself. Raises ValueError as check_finite does, and when every scale is 0, which makes every weight 0. One group may be."""
    check_finite(name, tensor)
    if not tensor.is_meta and not bool((tensor != 0).any()):
        raise ValueError(f"{name} is 0 in all of its {tensor.numel()} values: the checkpoint is damaged, download it again")
    return tensor


def contradicted_symmetry(weights: LinearWeights, stored: LinearFormat) -> str | None:
    """What is wrong with a config that calls these weights symmetric; None when their zero points are the middle of the codes.

    For formats that store zero points though they be symmetric.
    """
    weight = weights.weight
    if not stored.symmetric or "symmetric" not in stored.said or not isinstance(weight, GroupedWeight):
        return None
    middle = 1 << (stored.bits - 1)
    if weight.zeros is not None and weight.zeros.is_meta:
        return None
    low, high = (weight.zero, weight.zero) if weight.zeros is None else (int(weight.zeros.min()), int(weight.zeros.max()))
    if low == high == middle:
        return None
    found = f"are all {low}" if low == high else f"lie between {low} and {high}"
    return f"{stored.said['symmetric']} calls the weights symmetric, but their zero points {found} where all would be {middle}"
