"""LinearSpec and LinearKernel: what one linear layer is, and what a way to compute it must offer. Knows no checkpoint format and no device.

A scheme (what the bits mean) turns checkpoint tensors into a spec and a canonical weight; `select_kernel` then walks the
platform's ordered list of kernels and takes the first that does not refuse. N schemes and M kernels are N + M pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

AxisRole = Literal["out", "in", "group", "expert", "none"]


@dataclass(frozen=True)
class Axis:
    """One axis of a stored tensor: what it runs along, and at which multiple of elements it may be cut."""

    role: AxisRole
    granularity: int = 1


@dataclass(frozen=True)
class WeightSpec:
    """One tensor a scheme wants for a linear: name within the module, shape, dtype, axes. Enough to slice it, whatever the format."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    axes: tuple[Axis, ...]
    required: bool = True


@dataclass(frozen=True)
class LinearSpec:
    """y[M, out_features] = x[M, in_features] @ W.T (+ bias). `parts` are the rows of each fused piece (q, k, v), in order."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    weight_dtype: torch.dtype
    device: torch.device
    activation_dtype: torch.dtype
    scheme: str = "unquantized"
    parts: tuple[int, ...] = field(default=())


class LinearKernel(ABC):
    """One way to compute a linear on one kind of device, holding its weights in its own layout."""

    name: ClassVar[str]
    is_reference: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def refuses(spec: LinearSpec) -> str | None:
        """Why this kernel cannot compute `spec` here, for people to read; None when it can."""

    @abstractmethod
    def __init__(self, spec: LinearSpec, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Take over a weight [out, in]; the kernel repacks it once and keeps no reference to the original."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """out[M, out_features] = x[M, in_features] @ W.T + bias, both in the spec's activation dtype."""

    @abstractmethod
    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """W[indices] in the activation dtype, [len(indices), in_features]: lets an embedding and a tied head share one copy."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Bytes the weights take as held."""


@dataclass(frozen=True)
class Selection:
    """A kernel and the reasons for which those before it in the list refused."""

    kernel: type[LinearKernel]
    refusals: tuple[tuple[str, str], ...]


def select_kernel(spec: LinearSpec, kernels: tuple[type[LinearKernel], ...]) -> Selection:
    """The first kernel of an ordered list that does not refuse. Raises ValueError with every reason when all do."""
    refusals: list[tuple[str, str]] = []
    for kernel in kernels:
        reason = kernel.refuses(spec)
        if reason is None:
            return Selection(kernel, tuple(refusals))
        refusals.append((kernel.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise ValueError(f"no kernel takes {spec.name} ({spec.out_features} x {spec.in_features}, {spec.scheme}): {reasons}")
