"""Runs one case and judges it against float64 from the same codes. Draws no timings.

Every output lies between guard bands and is poisoned; inputs lie among NaN; a second run must give the same bits, and on a GPU so must
the replay of a captured graph. The counters of split-K must be back at zero.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import Any

import torch
from torch import Tensor

from octavo.kernels import quantize_rows as rows_contract
from octavo.kernels.gpu import dense_linear, grouped_format, grouped_linear, quantize_rows, scaled_linear
from octavo.kernels.gpu.config import Tile, tile_for
from octavo.kernels.gpu.device import FIXED_ROWS, Device, device_of, pretend
from octavo.kernels.gpu.launch import Launch
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.grouped_linear import GroupedWeight, dequantize
from octavo.kernels.scaled_linear import reference as scaled_reference
from octavo.quant.linear import LinearKernel, LinearSpec, LinearWeights, WeightForm
from octavo.quant.linear_format import ActivationFormat
from octavo.quant.platforms import kernels_for_platform
from octavo.quant.reference_kernel import FloatReference

from . import data
from .cases import DenseCase, DequantizeCase, GroupedCase, LinearCase, Named, RowsCase, ScaledCase
from .data import DTYPES, FP8, generator
from .guarded import Guarded

EPS = 1e-5
_META = torch.device("meta")
# What one rounding to a dtype may change, relative; for rows of float32 the whole computation's error.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
_ROW_ROUNDING = ROUNDING | {torch.float32: 2e-6}
# Errors of sums, relative to the sum of magnitudes and to the norm of the result. Tensor cores keep fewer bits of fp8 products.
_INTERPRETED, _FLOAT_SUMS, _FP8_SUMS = (1e-6, 1e-4), (1e-4, 1e-3), (2.0**-10, 8e-3)
# Of whole linears, relative to the result's norm: inputs left alone, rounded as the reference rounds them, rounded though it does not.
_LINEAR_NORM = {"plain": 1e-2, "rounded": 1e-2, "more": 5e-2}


class Refused(Exception):
    """The kernel of a case is not for this place; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where cases run: a GPU, or the CPU under Triton's interpreter with the facts of a GPU."""

    device: torch.device
    facts: Device

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def pretended(self) -> Iterator[None]:
        """Within it the device is the GPU whose facts these are: the CPU, or a GPU that is taken for an older one."""
        with contextlib.nullcontext() if self.is_gpu and self.facts == device_of(self.device) else pretend(self.facts):
            yield


def check(case: Named, place: Place, *, tile: Tile | None = None) -> float:
    """The greatest error as a part of what is allowed; `tile` in place of the table's.

    Raises AssertionError with what is wrong; Refused where the case's kernel does not run here.
    """
    return check_case(case, place, tile)


@singledispatch
def check_case(case: Named, place: Place, tile: Tile | None) -> float:
    raise TypeError(f"no check for {type(case).__name__}")


@check_case.register
def _(case: ScaledCase, place: Place, tile: Tile | None) -> float:
    m, n, k, group, x_group = case.m, case.n, case.k, case.group or case.k, case.x_group or case.k
    dtype = torch.int8 if case.op.startswith("int8") else FP8
    weight = data.scaled_weight(n, k, dtype, case.w_rows or n, group, place.device)
    packed = scaled_linear.pack(weight)
    x = data.codes8(m, k, dtype, 2)
    x_scale = data.scales(*((1, 1) if case.static else (m, -(-k // x_group))), seed=m + n).to(place.device)
    bias = data.bias(n, DTYPES[case.out], place.device) if case.bias else None
    out, workspace = Guarded((m, n), DTYPES[case.out], stride=n + 16, device=place.device), Workspace(place.device)
    padded = data.padded(x, scaled_linear.padded_inputs(k)).to(place.device)
    facts = replace(place.facts, num_sms=case.sms) if case.sms else place.facts
    launched = scaled_linear._launch(
        tile or tile_for(facts, packed.op, m), padded, x_scale, x_group, packed, bias, out.tensor, device=facts,
        workspace=workspace,
    )  # fmt: skip
    run_twice(launched, [out], place)
    assert int(workspace.arrived.abs().sum()) == 0, "counters of split-K were left above zero"
    x = x.to(place.device)
    exact = scaled_reference(x, x_scale, x_group, weight, bias, torch.empty(m, n, dtype=torch.float64, device=place.device))
    absolute = replace(weight, codes=weight.codes.double().abs().clamp(max=127 if dtype == torch.int8 else 448).to(dtype))
    size = scaled_reference(x.double().abs().clamp(max=448), x_scale, x_group, absolute, None, torch.empty_like(exact))
    return _judge(out.tensor, exact, size, _sums(place, is_fp8=dtype == FP8))


@check_case.register
def _(case: GroupedCase, place: Place, tile: Tile | None) -> float:
    m, n, k = case.m, case.n, case.k
    weight = grouped_weight_of(case)
    x, x_scale, out_dtype = torch.randn(m, k, generator=generator(m)), None, DTYPES[case.dtype]
    if case.fp8_inputs:
        x_scale = torch.rand(m, 1, generator=generator(m + 1)).to(place.device)
        codes = (x * 100).clamp(-448, 448).to(FP8)
        x = torch.cat([codes.view(torch.uint8), torch.full((m, 16), 0x7F, dtype=torch.uint8)], 1).to(place.device).view(FP8)[:, :k]
    else:
        x = data.among_nan(x, out_dtype, place.device)
    bias = data.bias(n, out_dtype, place.device) if case.bias else None
    out, workspace = Guarded((m, n), out_dtype, stride=n + 16, device=place.device), Workspace(place.device)
    packed = grouped_format.pack(weight.to(place.device))
    ordered = x if packed.permutation is None else x.index_select(1, packed.permutation)
    tile = tile or tile_for(place.facts, grouped_linear.op_of(packed, x.dtype), m)
    launched = grouped_linear._launch(tile, ordered, packed, bias, out.tensor, device=place.facts, workspace=workspace, x_scale=x_scale)
    run_twice(launched, [out], place)
    assert int(workspace.arrived.abs().sum()) == 0, "counters of split-K were left above zero"
    inputs = x.double() if x_scale is None else x.double() * x_scale.double()
    dense = dequantize(data.one_level(weight).to(place.device), torch.float64)
    exact = inputs @ dense.T + (0 if bias is None else bias.double())
    sums = _sums(place, is_fp8=case.fp8_inputs)
    if packed.scale_rule == "column":  # weights are scaled before they are multiplied, and rounded then
        sums = (sums[0] + 2 * ROUNDING[out_dtype], sums[1] + ROUNDING[out_dtype])
    return _judge(out.tensor, exact, inputs.abs() @ dense.abs().T + exact.abs(), sums)


@check_case.register
def _(case: DenseCase, place: Place, tile: Tile | None) -> float:
    m, n, k, dtype = case.m, case.n, case.k, DTYPES[case.dtype]
    facts = replace(place.facts, fixed_rows=FIXED_ROWS)
    x, w = (data.among_nan(torch.randn(rows, k, generator=generator(rows + k)), dtype, place.device) for rows in (m, n))
    bias = data.bias(n, dtype, place.device) if case.bias else None
    out, workspace = Guarded((m, n), dtype, stride=n + 16, device=place.device), Workspace(place.device)
    tile = tile or tile_for(facts, dense_linear.OP, m)
    run_twice(dense_linear.launch_tile(tile, x, w, bias, out.tensor, device=facts, workspace=workspace), [out], place)
    assert int(workspace.arrived.abs().sum()) == 0, "counters of split-K were left above zero"
    if place.is_gpu:  # the interpreter's products depend on a row's place in its tile
        alone = torch.empty_like(out.tensor[-1:])
        dense_linear.launch_tile(tile, x[-1:], w, bias, alone, device=facts, workspace=workspace)()
        assert torch.equal(alone, out.tensor[-1:]), "a row has other bits when it is alone"
    exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
    return _judge(out.tensor, exact, x.double().abs() @ w.double().abs().T + exact.abs(), _sums(place, is_fp8=False))


@check_case.register
def _(case: DequantizeCase, place: Place, tile: Tile | None) -> float:
    weight = data.fp8_weight(case.n, case.k, case.group or case.k) if case.is_fp8 else grouped_weight_of(case)
    out = Guarded((case.n, case.k), DTYPES[case.dtype], stride=case.k + 8, device=place.device)
    run_twice(grouped_linear.dequantize(grouped_format.pack(weight.to(place.device)), out.tensor), [out], place)
    exact = dequantize(data.one_level(weight), torch.float64).to(place.device)
    taken = torch.tensor([case.n - 1, 0, 0], device=place.device)
    rows = grouped_format.rows(grouped_format.pack(weight.to(place.device)), taken)
    assert torch.allclose(rows.double(), exact[taken], rtol=1e-6, atol=1e-6), "rows() differs from the weight"
    return _judge(out.tensor, exact, exact.abs(), (0.0 if weight.offset is None else 1e-6, 1e-4))


def grouped_weight_of(case: GroupedCase | DequantizeCase) -> GroupedWeight:
    """The random weight of a case, on the CPU."""
    group = case.group or case.k
    if case.is_fp8:
        return data.fp8_weight(case.n, case.k, group)
    scale_dtype = DTYPES[case.scales] if isinstance(case, GroupedCase) else torch.float16
    return data.grouped_weight(case.n, case.k, case.bits, group, case.added, act_order=case.act_order, scale_dtype=scale_dtype)


@check_case.register
def _(case: RowsCase, place: Place, tile: Tile | None) -> float:
    """Codes and scales are bit for bit what torch makes of the values; these are right, and need not be stored to be rounded."""
    m, k, dtype = case.m, case.k, DTYPES[case.dtype]
    codes = FP8 if case.codes == "fp8" else torch.int8
    x, residual, weight = data.row_inputs(case.source, m, k, dtype, place.device)
    exact, wanted_residual = exact_rows(case.source, x, residual, weight)
    static = (exact.abs().median() / rows_contract.LIMITS[codes]).float().reshape(1) if case.static else None
    kept = Guarded((m, k), dtype, stride=k + 5, device=place.device)
    found = []
    for values in [None] if case.source == "plain" else [kept.tensor, None]:
        out = _Rows(m, k, codes, case.group, place.device)
        added = data.among_nan(residual.float(), dtype, place.device)
        _launch_rows(case.source, x, added, weight, out, place.facts, static, values)()
        out.check()
        assert torch.equal(added, wanted_residual), "the residual is wrong"
        found.append(out.rows)
    kept.check()
    rounded = x if case.source == "plain" else kept.tensor
    wanted = rows_contract.QuantizedRows.empty(m, k, codes, group=case.group, device=torch.device("cpu"))
    rows_contract.reference(rounded.cpu(), wanted, static_scale=None if static is None else static.cpu())
    for rows in found:
        assert torch.equal(rows.scales.cpu(), wanted.scales), "scales are not those of the values"
        assert torch.equal(rows.codes.float().cpu(), wanted.codes.float()), "codes are not those of the values"
    if case.source == "plain":
        return 0.0
    allowed = 1.001 * _ROW_ROUNDING[dtype] * exact.abs() + _ROW_ROUNDING[dtype] * torch.finfo(dtype).smallest_normal
    return worst_of(kept.tensor.double(), exact, allowed)


class _Rows:
    """Room for codes and scales between guard bands."""

    def __init__(self, m: int, k: int, codes: torch.dtype, group: int | None, device: torch.device) -> None:
        size, columns = group or k, -(-k // rows_contract.ALIGNMENT) * rows_contract.ALIGNMENT
        self._codes = Guarded((m, columns), codes, stride=columns + 16, device=device)
        self._scales = Guarded((m, -(-k // size)), torch.float32, stride=-(-k // size) + 3, device=device)
        self.rows = rows_contract.QuantizedRows(self._codes.tensor, self._scales.tensor, k, size)

    def check(self) -> None:
        self._codes.check()
        self._scales.check()
        assert not self.rows.codes[:, self.rows.in_features :].contiguous().view(torch.uint8).any(), "the padding is not zero"


def _launch_rows(
    source: str, x: Tensor, residual: Tensor, weight: Tensor, out: _Rows, facts: Device, static: Tensor | None, values: Tensor | None
) -> Launch:
    if source == "plain":
        return quantize_rows.launch(x, out.rows, device=facts, static_scale=static)
    if source == "silu":
        return quantize_rows.launch_silu_mul(x, out.rows, device=facts, static_scale=static, values=values)
    added = residual if source == "add_norm" else None
    return quantize_rows.launch_rms_norm(x, weight, EPS, out.rows, device=facts, residual=added, static_scale=static, values=values)


def exact_rows(source: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What a source's values are before they are rounded, float64, and the residual after it."""
    if source == "silu":
        gate, up = x.double().chunk(2, dim=1)
        return gate * torch.sigmoid(gate) * up, residual
    if source == "plain":
        return x.double(), residual
    if source == "add_norm":
        residual = (x.float() + residual.float()).to(x.dtype)
        x = residual
    wide = x.double()
    return wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double(), residual


@check_case.register
def _(case: LinearCase, place: Place, tile: Tile | None) -> float:
    if not place.is_gpu and not case.kernel.startswith("triton"):
        raise Refused("runs on a GPU alone")
    kernel_type = next((kernel for kernel in kernels_for_platform(f"sm_{place.facts.arch}") if kernel.name == case.kernel), None)
    if kernel_type is None:
        raise Refused(f"sm_{place.facts.arch} does not have it in its list")
    spec, weights = linear_of(case, place.device)
    with place.pretended():
        reason = kernel_type.refuses(spec if place.is_gpu else replace(spec, device=_META))
        if reason is not None:
            raise Refused(reason)
        kernel: LinearKernel = kernel_type(spec, weights)
        x = data.among_nan(torch.randn(case.m, case.k, generator=generator(case.m)), spec.activation_dtype, place.device)
        out = Guarded((case.m, case.n), spec.activation_dtype, stride=case.n + 8, device=place.device)
        given = x if case.kernel.startswith("triton") else x.contiguous()
        kernel(given, out=out.tensor)
        out.check()
    exact = FloatReference(spec, weights)(x, out=torch.empty(case.m, case.n, device=place.device)).double()
    assert bool(torch.isfinite(out.tensor).all()), "the result is not finite"
    error = float((out.tensor.double() - exact).norm() / exact.norm())
    kind = "more" if case.kernel == "triton_w4a8_fp8" else "plain" if case.inputs == "none" else "rounded"
    assert error <= _LINEAR_NORM[kind], f"off by {error:.2g} of the result's norm, allowed {_LINEAR_NORM[kind]}"
    return error / _LINEAR_NORM[kind]


def linear_of(case: LinearCase, device: torch.device) -> tuple[LinearSpec, LinearWeights]:
    """A case's linear in the engine's own words."""
    dtype = DTYPES[case.dtype]
    group = case.group or case.k
    if case.kind == "fp8":
        weight = GroupedWeight(data.codes8(case.n, case.k, FP8, 1), 8, group, data.scales(case.n, case.k // group, seed=2))
    elif case.inputs != "none":
        weight = GroupedWeight(data.codes8(case.n, case.k, torch.int8, 1), 8, case.k, data.scales(case.n, 1, seed=2))
    else:
        weight = data.grouped_weight(case.n, case.k, case.bits, group, case.added, act_order=case.act_order)
    form = WeightForm(case.kind, case.bits, case.group, case.added == "symmetric", case.act_order, activation_of(case))
    bias = torch.randn(case.n, generator=generator(7)).to(dtype) if case.bias else None
    spec = LinearSpec("case", case.k, case.n, case.bias, dtype, device, dtype, form)
    static = torch.tensor([0.01]) if case.inputs == "static" else None
    return spec, LinearWeights(weight, bias, static).to(device)


def activation_of(case: LinearCase) -> ActivationFormat | None:
    """How the case's inputs are quantized."""
    if case.inputs == "none":
        return None
    dtype: Any = "fp8_e4m3" if case.kind == "fp8" else "int8"
    if case.inputs == "group":
        return ActivationFormat(dtype, "group", dynamic=True, group_size=128)
    return ActivationFormat(dtype, "token" if case.inputs == "token" else "tensor", dynamic=case.inputs == "token")


def run_twice(launched: Callable[[], None], outputs: list[Guarded], place: Place) -> None:
    """Two runs and on a GPU a replayed graph give the same bits, and store nowhere else."""
    found = []
    runs: list[Callable[[], None]] = [launched, launched]
    if place.is_gpu:
        runs.append(partial(_replay, launched))
    for run in runs:
        for out in outputs:
            out.poison()
        run()
        for out in outputs:
            out.check()
        found.append([out.tensor.clone() for out in outputs])
    for name, later in zip(("a second run", "a replayed graph"), found[1:], strict=False):
        for first, again in zip(found[0], later, strict=True):
            assert torch.equal(first.view(torch.uint8), again.view(torch.uint8)), f"{name} gives other bits"


def _replay(launched: Callable[[], None]) -> None:
    """Capture and replay launches that have run before: its first call loads it, which no capture allows."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launched()
    graph.replay()
    torch.cuda.synchronize()


def _sums(place: Place, *, is_fp8: bool) -> tuple[float, float]:
    if not place.is_gpu:
        return _INTERPRETED
    return _FP8_SUMS if is_fp8 else _FLOAT_SUMS


def _judge(found: Tensor, exact: Tensor, size: Tensor, sums: tuple[float, float]) -> float:
    """One rounding of the result and the error of sums: element by element, and by the norm, which averages those away."""
    rounding = ROUNDING[found.dtype]
    worst = worst_of(found.double(), exact, 1.01 * rounding * exact.abs() + sums[0] * size + 1e-30)
    norm = float(exact.norm())
    off = float((found.double() - exact).norm()) / norm if norm else 0.0
    assert off <= rounding + sums[1], f"off by {off:.2g} of the result's norm, allowed {rounding + sums[1]:.2g}"
    return worst


def worst_of(found: Tensor, exact: Tensor, allowed: Tensor) -> float:
    """The greatest error as a part of what is allowed; raises AssertionError above 1 and for NaN."""
    ratio = (found - exact).abs() / allowed
    at = int(ratio.nan_to_num(float("inf")).argmax())
    worst = float(ratio.flatten()[at])
    row, column = divmod(at, found.shape[1])
    told = f"[{row}, {column}] is {float(found[row, column]):.6g}, not {float(exact[row, column]):.6g}"
    assert worst <= 1.0, f"{told}: {worst:.3g} times what is allowed"
    return worst
