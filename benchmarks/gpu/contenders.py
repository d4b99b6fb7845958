"""What is timed against what: for each format of weights our kernels as the engine runs them, torch's, and other people's.

All contenders of a format multiply the same inputs with weights of one kind. Those that quantize inputs do it in their own time, but for
the ones that say "alone".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.gpu import scaled_linear
from octavo.kernels.gpu.workspace import workspace_of
from octavo.kernels.grouped_linear import GroupedWeight, dequantize
from octavo.kernels.quantize_rows import QuantizedRows, reference
from octavo.kernels.scaled_linear import ScaledWeight
from octavo.quant.linear import LinearKernel, LinearSpec, LinearWeights, WeightForm
from octavo.quant.linear_format import ActivationFormat
from octavo.quant.platforms import kernels_for_platform

from .checks import Place
from .clock import ROTATED_BYTES
from .data import FP8
from .peers import Peer

_META = torch.device("meta")
_GROUP = 128
BF16, FP16 = torch.bfloat16, torch.float16
TOKEN_FP8 = ActivationFormat("fp8_e4m3", "token", dynamic=True)
TOKEN_INT8 = ActivationFormat("int8", "token", dynamic=True)
GROUP_FP8 = ActivationFormat("fp8_e4m3", "group", dynamic=True, group_size=_GROUP)

DENSE = "bf16"  # the name of torch's bfloat16 product, which every format is timed beside


@dataclass(frozen=True, eq=False)
class Contender:
    """One way to multiply: `copies` of call(prepared x, out), `prepare` what is not timed; a call that returns a tensor leaves `out` alone.

    `weight_bytes` are those of one copy.
    """

    name: str
    dtype: torch.dtype
    weight_bytes: int
    dense: Callable[[], Tensor]  # the weights that it multiplies with, float32 [N, K]
    copies: tuple[Callable[[Any, Tensor], object], ...]
    prepare: Callable[[Tensor], Any] = lambda x: x
    rounds_inputs: bool = False


@dataclass(frozen=True)
class Shape:
    """A linear of a model, [n, k]."""

    name: str
    n: int
    k: int

    @property
    def label(self) -> str:
        return f"{self.name} {self.n}x{self.k}"


SHAPES = (
    Shape("8B qkv", 6144, 4096),
    Shape("8B o", 4096, 4096),
    Shape("8B gate_up", 28672, 4096),
    Shape("8B down", 4096, 14336),
    Shape("70B qkv", 10240, 8192),
    Shape("70B o", 8192, 8192),
    Shape("70B gate_up", 57344, 8192),
    Shape("70B down", 8192, 28672),
)
ROWS = (1, 4, 16, 64, 128, 256, 512, 4096)


@dataclass(frozen=True)
class Field:
    """What builds contenders: a shape, a place and the peers at hand."""

    shape: Shape
    place: Place
    peers: tuple[Peer, ...] = ()

    def num_copies(self, weight_bytes: int) -> int:
        """Enough to pass through ROTATED_BYTES."""
        return max(2, -(-ROTATED_BYTES // weight_bytes)) if self.place.is_gpu else 1

    def codes(self, bits: int) -> Tensor:
        """Random integers [N, K], uint8."""
        return torch.randint(0, 1 << bits, (self.shape.n, self.shape.k), dtype=torch.uint8, device=self.place.device)

    def normal(self, dtype: torch.dtype) -> Tensor:
        """Random numbers [N, K] of a normal distribution; for fp8 scaled to its range."""
        out = torch.empty(self.shape.n, self.shape.k, dtype=dtype, device=self.place.device)
        for part in torch.split(out, 4096):
            values = torch.randn(part.shape, device=self.place.device)
            part.copy_((values * 100).clamp(-448, 448) if dtype == FP8 else values * 0.02)
        return out

    def scales(self, groups: int, dtype: torch.dtype) -> Tensor:
        return (torch.rand(self.shape.n, groups, device=self.place.device) / 1000 + 1e-4).to(dtype)


def dense(field: Field, dtype: torch.dtype = BF16) -> Iterator[Contender]:
    """torch.mm of weights as they are."""
    weight_bytes = 2 * field.shape.n * field.shape.k
    weights = [field.normal(dtype) for _ in range(field.num_copies(weight_bytes))]

    def call(weight: Tensor, x: Tensor, out: Tensor) -> None:
        torch.mm(x, weight.t(), out=out)

    name = DENSE if dtype == BF16 else "fp16"
    yield Contender(name, dtype, weight_bytes, weights[0].float, tuple(partial(call, weight) for weight in weights))


def fp8(field: Field) -> Iterator[Contender]:
    """fp8 weights per channel, fp8 inputs per token."""
    n, k = field.shape.n, field.shape.k
    form = WeightForm("fp8", 8, activation=TOKEN_FP8)
    weights = [GroupedWeight(field.normal(FP8), 8, k, field.scales(1, torch.float32)) for _ in range(field.num_copies(n * k))]
    yield from _registered(field, "octavo", "triton_fp8", form, weights)
    yield from _registered(field, "_scaled_mm", "torch_scaled_mm", form, weights)
    yield _fp8_alone(field, weights)
    yield _torch_alone(weights)
    yield _torch_per_tensor(weights)


def fp8_blocks(field: Field) -> Iterator[Contender]:
    """fp8 weights in blocks of 128 x 128, fp8 inputs in groups of 128."""
    n, k = field.shape.n, field.shape.k

    def weight() -> GroupedWeight:
        scale = field.scales(k // _GROUP, torch.float32)[::_GROUP].repeat_interleave(_GROUP, 0)[:n]
        return GroupedWeight(field.normal(FP8), 8, _GROUP, scale.contiguous())

    weights = [weight() for _ in range(field.num_copies(n * k))]
    yield from _registered(field, "octavo", "triton_fp8", WeightForm("fp8", 8, _GROUP, activation=GROUP_FP8), weights)


def int8(field: Field) -> Iterator[Contender]:
    """int8 weights per channel, int8 inputs per token."""
    n, k = field.shape.n, field.shape.k

    def weight() -> GroupedWeight:
        return GroupedWeight((field.codes(8) ^ 128).view(torch.int8), 8, k, field.scales(1, torch.float32))

    weights = [weight() for _ in range(field.num_copies(n * k))]
    yield from _registered(field, "octavo", "triton_int8", WeightForm("integer", 8, activation=TOKEN_INT8), weights)


def w8a16_fp8(field: Field) -> Iterator[Contender]:
    """fp8 weights per channel, inputs as they are."""
    n, k = field.shape.n, field.shape.k
    weights = [GroupedWeight(field.normal(FP8), 8, k, field.scales(1, torch.float32)) for _ in range(field.num_copies(n * k))]
    yield from _registered(field, "octavo", "triton_weight_only", WeightForm("fp8", 8), weights)


def w4a16(field: Field) -> Iterator[Contender]:
    """int4 weights in groups of 128: with zero points as of AWQ in bfloat16, symmetric as of GPTQ in float16; and everybody else's."""
    n, k = field.shape.n, field.shape.k
    packed_bytes = n * k // 2 + 4 * n * k // _GROUP

    def weight(*, symmetric: bool, dtype: torch.dtype) -> GroupedWeight:
        scale = field.scales(k // _GROUP, dtype)
        if symmetric:
            return GroupedWeight(field.codes(4), 4, _GROUP, scale, zero=8)
        zeros = torch.randint(0, 16, scale.shape, dtype=torch.uint8, device=scale.device)
        return GroupedWeight(field.codes(4), 4, _GROUP, scale, zeros=zeros)

    form = WeightForm("integer", 4, _GROUP, symmetric=False)
    copies = range(field.num_copies(packed_bytes))
    weights = [weight(symmetric=False, dtype=BF16) for _ in copies]
    yield from _registered(field, "octavo", "triton_weight_only", form, weights)
    yield from _registered(field, "octavo w4a8", "triton_w4a8_fp8", form, weights, rounds=True)
    yield from _registered(field, "int4pack", "torch_int4pack", form, weights)
    del weights
    weights = [weight(symmetric=True, dtype=FP16) for _ in copies]
    form = replace(form, symmetric=True)
    yield from _registered(field, "octavo fp16", "triton_weight_only", form, weights, dtype=FP16)
    yield from _registered(field, "autoawq", "autoawq_kernels", form, weights, dtype=FP16)
    for peer in field.peers:
        yield Contender(peer.name, FP16, packed_bytes, partial(dequantize, weights[0]), tuple(peer.linears(weights)))
    yield from dense(field, FP16)


FORMATS: dict[str, Callable[[Field], Iterator[Contender]]] = {
    "fp8": fp8, "w4a16": w4a16, "w8a16_fp8": w8a16_fp8, "fp8_blocks": fp8_blocks, "int8": int8,
}  # fmt: skip


def _registered(
    field: Field, name: str, kernel_name: str, form: WeightForm, weights: list[GroupedWeight], *, dtype: torch.dtype = BF16,
    rounds: bool = False,
) -> Iterator[Contender]:  # fmt: skip
    """A LinearKernel of the platform's list, one for each copy of the weights; nothing where it refuses them."""
    shape, place = field.shape, field.place
    kernel_type = next(kernel for kernel in kernels_for_platform(f"sm_{place.facts.arch}") if kernel.name == kernel_name)
    spec = LinearSpec(name, shape.k, shape.n, False, dtype, place.device, dtype, form)
    if not place.is_gpu and kernel_name in ("torch_int4pack", "autoawq_kernels"):
        return
    with place.pretended():
        if kernel_type.refuses(spec if place.is_gpu else replace(spec, device=_META)) is not None:
            return
        kernels = [kernel_type(spec, LinearWeights(weight)) for weight in weights]

    def call(kernel: LinearKernel, x: Tensor, out: Tensor) -> None:
        kernel(x, out=out)

    yield Contender(
        name, dtype, kernels[0].weight_bytes, partial(dequantize, weights[0]), tuple(partial(call, kernel) for kernel in kernels),
        rounds_inputs=rounds or form.activation is not None,
    )  # fmt: skip


def _quantized(x: Tensor) -> QuantizedRows:
    rows = QuantizedRows.empty(x.shape[0], x.shape[1], FP8, device=x.device)
    return reference(x, rows)


def _fp8_alone(field: Field, weights: list[GroupedWeight]) -> Contender:
    """Our product of inputs that were quantized before."""
    workspace, k, facts = workspace_of(field.place.device), field.shape.k, field.place.facts
    packed = [scaled_linear.pack(ScaledWeight(weight.codes, weight.scale, 1, k)) for weight in weights]

    def call(weight: scaled_linear.Packed, x: QuantizedRows, out: Tensor) -> None:
        scaled_linear.launch(x.codes, x.scales, k, weight, None, out, device=facts, workspace=workspace)()

    copies = tuple(partial(call, weight) for weight in packed)
    return Contender(
        "octavo alone", BF16, packed[0].nbytes, partial(dequantize, weights[0]), copies, prepare=_quantized, rounds_inputs=True
    )


def _torch_alone(weights: list[GroupedWeight]) -> Contender:
    """torch._scaled_mm with one scale a row and a channel, of inputs that were quantized before."""

    def call(weight: GroupedWeight, scale: Tensor, x: QuantizedRows, out: Tensor) -> None:
        torch._scaled_mm(x.codes, weight.codes.t(), x.scales, scale, out_dtype=BF16, use_fast_accum=True, out=out)

    copies = tuple(partial(call, weight, weight.scale.t().contiguous()) for weight in weights)
    dense = partial(dequantize, weights[0])
    return Contender("_scaled_mm alone", BF16, weights[0].nbytes, dense, copies, prepare=_quantized, rounds_inputs=True)


def _torch_per_tensor(weights: list[GroupedWeight]) -> Contender:
    """torch._scaled_mm with one scale for all weights and one for all inputs, which were quantized before."""
    scale = torch.full((1,), 1e-3, device=weights[0].codes.device)

    def prepare(x: Tensor) -> tuple[Tensor, Tensor]:
        x_scale = (x.float().abs().max() / 448).reshape(1)
        return (x.float() / x_scale).to(FP8), x_scale

    def call(weight: GroupedWeight, x: tuple[Tensor, Tensor], out: Tensor) -> None:
        torch._scaled_mm(x[0], weight.codes.t(), x[1], scale, out_dtype=BF16, use_fast_accum=True, out=out)

    copies = tuple(partial(call, weight) for weight in weights)
    name, weight_bytes = "_scaled_mm per tensor alone", weights[0].codes.nbytes
    return Contender(name, BF16, weight_bytes, lambda: weights[0].codes.float() * scale, copies, prepare=prepare, rounds_inputs=True)
