"""LinearSpec and LinearKernel: what one linear layer is, and what a way to compute it must offer. Knows no checkpoint format and no device.

A scheme (what the bits mean) turns checkpoint tensors into LinearWeights in one canonical form; `select_kernel` then walks the
platform's ordered list of kernels and takes the first that does not refuse. N schemes and M kernels are N + M pieces.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..kernels.grouped_linear import GroupedWeight, dequantize
from ..kernels.quantize_rows import QuantizedRows
from .linear_format import ActivationFormat

AxisRole = Literal["out", "in", "group", "expert", "none"]


@dataclass(frozen=True)
class Axis:
    """One axis of a stored tensor: what it runs along, and how many logical elements how many stored ones hold.

    `stored` elements hold `values` logical ones (3-bit words: 3 hold 32). A cut must fall between such units; where the axis
    `straddles` (scales of groups and blocks) a cut may fall anywhere, and both sides get the element that it falls into. The last
    unit may be short: 40 values of 3 bits take 4 words.
    """

    role: AxisRole
    values: int = 1
    stored: int = 1
    straddles: bool = False

    def cut(self, start: int, stop: int, total: int) -> tuple[int, int]:
        """Stored range of logical start..stop of `total`. Raises ValueError where the cut falls inside a unit."""
        if not self.straddles:
            for edge in (start, stop):
                if edge % self.values and edge != total:
                    raise ValueError(f"a cut at {edge} of {total} falls inside a unit of {self.values}")
        return start // self.values * self.stored, -(-stop * self.stored // self.values)


@dataclass(frozen=True)
class WeightSpec:
    """One tensor a scheme wants for a module: name, whole shape, dtype, axes. Enough to slice it, whatever the format.

    `dtype` None takes any floating point. `aliases` are other names for it; a scalar's shape is (), and (1,) is taken for it too.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | None
    axes: tuple[Axis, ...]
    required: bool = True
    aliases: tuple[str, ...] = ()


def legal_cuts(weights: tuple[WeightSpec, ...], role: AxisRole, total: int) -> list[int]:
    """Into how many equal parts a module's tensors can be cut along "out" or "in", of `total` features."""
    roles = (role, "group") if role == "in" else (role,)
    axes = [axis for weight in weights for axis in weight.axes if axis.role in roles and not axis.straddles]
    small = [count for count in range(1, math.isqrt(total) + 1) if total % count == 0]
    return [
        count for count in sorted({*small, *(total // count for count in small)}) if all(total // count % axis.values == 0 for axis in axes)
    ]


@dataclass(frozen=True, eq=False)
class LinearWeights:
    """One module's weights in canonical form: `weight` [out, in] dense or grouped, bias [out], static scale of the input float32 [1]."""

    weight: torch.Tensor | GroupedWeight
    bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.out_features if isinstance(self.weight, GroupedWeight) else self.weight.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the weight alone."""
        return self.weight.nbytes

    def to(self, device: torch.device) -> LinearWeights:
        """The same on a device."""
        bias, scale = (None if tensor is None else tensor.to(device) for tensor in (self.bias, self.input_scale))
        return LinearWeights(self.weight.to(device), bias, scale)

    def take(self, rows: torch.Tensor) -> LinearWeights:
        """Some output features, by int64 [R] indices."""
        weight = self.weight.take(rows) if isinstance(self.weight, GroupedWeight) else self.weight[rows]
        return LinearWeights(weight, None if self.bias is None else self.bias[rows], self.input_scale)

    def dense(self) -> torch.Tensor:
        """The weight in float32."""
        return dequantize(self.weight) if isinstance(self.weight, GroupedWeight) else self.weight.float()


@dataclass(frozen=True)
class WeightForm:
    """What a kernel has to multiply, whatever the checkpoint's layout was. `group_size` None: one scale for all inputs."""

    kind: Literal["dense", "integer", "fp8"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    act_order: bool = False
    activation: ActivationFormat | None = None

    def describe(self) -> str:
        """For people: "int4 in groups of 64"."""
        if self.kind == "dense":
            return "dense"
        text = f"{'fp' if self.kind == 'fp8' else 'int'}{self.bits} " + (
            "per channel" if self.group_size is None else f"in groups of {self.group_size}"
        )
        return text if self.activation is None else f"{text}, inputs {self.activation.describe()}"


@dataclass(frozen=True)
class LinearSpec:
    """y[M, out_features] = x[M, in_features] @ W.T (+ bias). `scheme` is the checkpoint's format, for people."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool
    weight_dtype: torch.dtype
    device: torch.device
    activation_dtype: torch.dtype
    form: WeightForm
    scheme: str = "dense"
    deterministic: bool = False  # a row's bits must not depend on how many rows there are


@dataclass(frozen=True, eq=False)
class InputCodes:
    """How a kernel's inputs are rounded: codes of `dtype`, a scale for each `group` inputs of a token or one static scale for all."""

    dtype: torch.dtype
    group: int
    static_scale: torch.Tensor | None


class LinearKernel(ABC):
    """One way to compute a linear on one kind of device, holding its weights in its own layout."""

    name: ClassVar[str]
    is_reference: ClassVar[bool] = False
    can_be_captured: ClassVar[bool] = True  # in a CUDA graph
    repeats: ClassVar[bool] = True  # can give a row the same bits however many rows there are, when the spec asks for it

    @staticmethod
    @abstractmethod
    def takes(form: WeightForm) -> bool:
        """Whether this kernel is made for such weights at all, on its own device."""

    @staticmethod
    @abstractmethod
    def refuses(spec: LinearSpec) -> str | None:
        """Why this kernel cannot compute `spec` here, for people to read; None when it can."""

    @abstractmethod
    def __init__(self, spec: LinearSpec, weights: LinearWeights) -> None:
        """Take over the weights; the kernel repacks them once and keeps no reference to the originals."""

    @abstractmethod
    def __call__(self, x: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        """out[M, out_features] = x[M, in_features] @ W.T + bias, both in the spec's activation dtype; rows of `out` may be strided."""

    @property
    def input_codes(self) -> InputCodes | None:
        """What `multiply_codes` takes; None: this kernel takes numbers, and rounds them itself if it does."""
        return None

    def room(self, num_rows: int) -> QuantizedRows:
        """Where that many rows of codes go; valid until the next call of any kernel on the device."""
        raise TypeError(f"{self.name} takes no codes")

    def multiply_codes(self, rows: QuantizedRows, *, out: torch.Tensor) -> torch.Tensor:
        """As a call, with inputs that whoever made them has rounded as `input_codes` says, into `room`."""
        raise TypeError(f"{self.name} takes no codes")

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


class NoKernel(ValueError):
    """No kernel, or not the one that was asked for, computes a layer; the text has every reason."""


def select_kernel(spec: LinearSpec, kernels: tuple[type[LinearKernel], ...], *, backend: str | None = None) -> Selection:
    """The first kernel of an ordered list that does not refuse. Raises NoKernel with every reason when all do.

    `backend` names the one to take for the weights that it is made for. Raises NoKernel with its reason when it refuses them.
    """
    layer = f"{spec.name} ({spec.out_features} x {spec.in_features}, {spec.scheme})"
    if backend is not None:
        forced = next((kernel for kernel in kernels if kernel.name == backend and kernel.takes(spec.form)), None)
        if forced is not None:
            reason = _refusal(forced, spec)
            if reason is not None:
                raise NoKernel(f"--linear-backend {backend} cannot compute {layer}: {reason}. Leave the option out to have one chosen")
            return Selection(forced, ())
    refusals: list[tuple[str, str]] = []
    for kernel in kernels:
        reason = _refusal(kernel, spec)
        if reason is None:
            return Selection(kernel, tuple(refusals))
        refusals.append((kernel.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refusals)
    raise NoKernel(f"no kernel takes {layer}: {reasons}")


def _refusal(kernel: type[LinearKernel], spec: LinearSpec) -> str | None:
    if spec.deterministic and not kernel.repeats:
        return "gives a row other bits when there are other rows, which --deterministic rules out"
    return kernel.refuses(spec)
