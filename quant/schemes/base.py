"""QuantScheme: what every checkpoint format answers. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

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
        """The canonical form of a slice, from tensors cut to it. Raises ValueError naming the tensor for values that cannot be right."""
        ...


def bias_spec(module: Module) -> tuple[WeightSpec, ...]:
    """The bias, where the module has one."""
    return (WeightSpec("bias", (module.out_features,), module.weight_dtype, (Axis("out"),)),) if module.has_bias else ()


def check_finite(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` itself. Raises ValueError when it holds a NaN or an infinity."""
    bad = int((~torch.isfinite(tensor.float())).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} of {tensor.numel()} values that are NaN or infinite: the checkpoint is damaged, download it again"
        )
    return tensor
