"""Building a layer's kernels from its parts: what is fused, what is refused, and what the check at load finds."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from octavo.kernels.grouped_linear import GroupedWeight
from octavo.quant import platforms
from octavo.quant.build import BuiltKernel, KernelOptions, Part, build_kernels
from octavo.quant.cpu_kernels import GroupedPanels
from octavo.quant.dense_kernels import PackedPanels
from octavo.quant.linear import LinearKernel, LinearSpec, LinearWeights, NoKernel, WeightForm
from octavo.quant.platforms import kernels_for, register_kernel
from octavo.quant.reference_kernel import FloatReference
from octavo.quant.schemes.base import Slice
from octavo.quant.schemes.registry import scheme_of
from octavo.quant.self_check import KernelFault, SelfCheck, WeightFault

from . import writers
from .writers import FP8_STATIC, INT8_TOKEN, Written

CPU = torch.device("cpu")


def part_of(written: Written) -> Part:
    scheme = scheme_of(written.format)
    weights = scheme.to_canonical(written.tensors, written.module, Slice.whole(written.module))
    return Part(weights, scheme.form(written.module), written.format.describe())


def build(written: list[Written], *, device: torch.device = CPU, **options: object) -> tuple[BuiltKernel, ...]:
    parts = [part_of(item) for item in written]
    given = KernelOptions(**options)  # type: ignore[arg-type]
    return build_kernels("qkv", parts, weight_dtype=torch.float32, activation_dtype=torch.float32, device=device, options=given)


def compute(built: tuple[BuiltKernel, ...], x: Tensor) -> Tensor:
    out = torch.full((len(x), built[-1].stop), float("nan"))
    for piece in built:
        piece.kernel(x, out=out[:, piece.start : piece.stop])
    return out


EQUAL = {
    "dense": [writers.dense(n, 64, seed=n) for n in (40, 8, 16)],
    "awq": [writers.awq(n, 64, 32, seed=n) for n in (40, 8, 16)],
    "awq-one-bias": [writers.awq(40, 64, 32).with_bias(), writers.awq(8, 64, 32, seed=1), writers.awq(16, 64, 32, seed=2).with_bias()],
    "gptq": [writers.gptq(n, 64, 32, seed=n) for n in (40, 8, 16)],
    "pack-group-sizes": [writers.pack_quantized(40, 96, group_size=32), writers.pack_quantized(8, 96, group_size=24)],
    "float": [writers.fp8(n, 64, "channel", seed=n) for n in (40, 8, 16)],
    "float-static": [writers.fp8(n, 64, "tensor", activation=FP8_STATIC, seed=n) for n in (40, 8)],
    "int8": [writers.int8(n, 64, seed=n) for n in (40, 8, 16)],
}
DIFFERENT = {
    "schemes": ([writers.awq(40, 64, 32), writers.fp8(8, 64, "channel"), writers.fp8(16, 64, "channel")], [40, 64]),
    "dense-beside": ([writers.dense(40, 64), writers.awq(8, 64, 32), writers.awq(16, 64, 32)], [40, 64]),
    "bits": ([writers.gptq(40, 64, 32), writers.gptq(8, 64, 32, bits=8)], [40, 48]),
    "middle": ([writers.awq(40, 64, 32), writers.gptq(8, 64, 32, bits=8), writers.awq(16, 64, 32)], [40, 48, 64]),
    "act-order": ([writers.gptq(40, 64, 32, act_order=True), writers.gptq(8, 64, 32, act_order=True, seed=9)], [40, 48]),
    "inputs": ([writers.int8(40, 64), writers.int8(8, 64, activation=None)], [40, 48]),
    "input-scales": (
        [
            writers.fp8(40, 64, "tensor", activation=FP8_STATIC),
            replace(
                writers.fp8(8, 64, "tensor", activation=FP8_STATIC),
                tensors={**writers.fp8(8, 64, "tensor", activation=FP8_STATIC).tensors, "input_scale": torch.tensor(0.02)},
            ),
        ],
        [40, 48],
    ),
    "scale-dtypes": ([writers.pack_quantized(40, 64), writers.pack_quantized(8, 64, scale_dtype=torch.float16)], [40, 48]),
}


def unfused(written: list[Written], x: Tensor) -> Tensor:
    return torch.cat([compute(build([item]), x) for item in written], dim=1)


@pytest.mark.parametrize("name", EQUAL)
def test_equal_forms_make_one_kernel(name: str) -> None:
    built = build(EQUAL[name])
    assert [(piece.start, piece.stop) for piece in built] == [(0, sum(len(item.weight) for item in EQUAL[name]))]
    x = torch.randn(9, EQUAL[name][0].weight.shape[1], generator=torch.Generator().manual_seed(0))
    for m in (1, 9):
        torch.testing.assert_close(compute(built, x[:m]), unfused(EQUAL[name], x[:m]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", DIFFERENT)
def test_different_forms_make_several(name: str) -> None:
    written, stops = DIFFERENT[name]
    built = build(written)
    assert [piece.stop for piece in built] == stops
    assert [piece.start for piece in built] == [0, *stops[:-1]]
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    for m in (1, 9):
        torch.testing.assert_close(compute(built, x[:m]), unfused(written, x[:m]), rtol=1e-5, atol=1e-6)


def test_the_reference_is_no_silent_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupedPanels, "refuses", staticmethod(lambda spec: "is broken today"))
    with pytest.raises(
        NoKernel,
        match=r"qkv \(16 x 64, awq .*\) would run on the slow float reference .*cpu_grouped: is broken today\): give --allow-reference",
    ):
        build([writers.awq(16, 64, 32)])
    built = build([writers.awq(16, 64, 32)], allow_reference=True)
    assert built[0].selection.kernel is FloatReference
    assert ("cpu_grouped", "is broken today") in built[0].selection.refusals


def test_a_forced_backend() -> None:
    written = [writers.int8(16, 64)]
    assert build(written)[0].kernel.name == "cpu_int8"
    assert build(written, backend="cpu_grouped")[0].kernel.name == "cpu_grouped"
    with pytest.raises(NoKernel, match=r"would run on the slow float reference.*give --allow-reference"):
        build(written, backend="reference")
    assert build(written, backend="reference", allow_reference=True)[0].kernel.name == "reference"
    with pytest.raises(NoKernel, match=r"--linear-backend cpu_int8 cannot compute qkv .*one symmetric scale a row"):
        build([writers.pack_quantized(16, 64, bits=8, activation=INT8_TOKEN)], backend="cpu_int8")


class Recorded(GroupedPanels):
    """The CPU's kernel, with a fault to choose; counts its calls."""

    name: ClassVar[str] = "recorded"
    calls: ClassVar[int] = 0
    fault: ClassVar[str] = "none"

    def __call__(self, x: Tensor, *, out: Tensor) -> Tensor:
        type(self).calls += 1
        super().__call__(x, out=out)
        if self.fault == "last-column":
            out[:, -1] *= 1.1
        elif self.fault == "many-rows" and len(x) > 1:
            out[-1, 0] += 1.0
        elif self.fault == "nan":
            out[0, 0] = float("nan")
        return out


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    monkeypatch.setattr(platforms, "_KERNELS", dict(platforms._KERNELS))
    monkeypatch.setattr(Recorded, "calls", 0)
    register_kernel("cpu", Recorded)
    return Recorded


def test_each_kind_is_checked_once(recorded: type[Recorded]) -> None:
    check = SelfCheck()
    for seed in range(3):
        built = build([writers.awq(16, 64, 32, seed=seed)], self_check=check)
        assert built[0].kernel.name == "recorded"
    first = recorded.calls
    assert first >= 2  # one row and many
    build([writers.awq(24, 64, 32)], self_check=check)
    assert recorded.calls == 2 * first
    build([writers.awq(24, 64, 32)])
    assert recorded.calls == 2 * first


@pytest.mark.parametrize(("fault", "text"), [("last-column", "is off by"), ("many-rows", "is off by"), ("nan", "gives NaN")])
def test_a_kernel_that_is_off_is_found(recorded: type[Recorded], monkeypatch: pytest.MonkeyPatch, fault: str, text: str) -> None:
    monkeypatch.setattr(recorded, "fault", fault)
    with pytest.raises(KernelFault, match=rf"qkv \(16 x 64, awq .*\) on kernel recorded {text}.*--linear-backend"):
        build([writers.awq(16, 64, 32)], self_check=SelfCheck())


def test_a_kernels_fault_is_not_the_callers_and_damaged_weights_are_not_the_kernels() -> None:
    assert not issubclass(KernelFault, ValueError)
    assert issubclass(WeightFault, ValueError)


def test_weights_that_are_no_numbers_are_found() -> None:
    scale = torch.full((16, 2), 0.01)
    scale[3, 1] = float("nan")
    codes = torch.zeros(16, 64, dtype=torch.uint8)
    part = replace(part_of(writers.awq(16, 64, 32)), weights=LinearWeights(GroupedWeight(codes, 4, 32, scale)))
    with pytest.raises(WeightFault, match="in the float reference too: its weights are damaged"):
        build_kernels(
            "qkv",
            [part],
            weight_dtype=torch.float32,
            activation_dtype=torch.float32,
            device=CPU,
            options=KernelOptions(self_check=SelfCheck()),
        )


def test_a_large_layer_is_compared_in_part_and_looked_at_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vocabulary's head is not dequantized whole for the check, and a NaN in any of its rows is found and told from a kernel's fault."""
    seen: list[int] = []
    dense = LinearWeights.dense

    def recorded_dense(weights: LinearWeights) -> torch.Tensor:
        seen.append(weights.out_features)
        return dense(weights)

    monkeypatch.setattr(LinearWeights, "dense", recorded_dense)
    weight = torch.randn(5000, 32)
    spec = LinearSpec("lm_head", 32, 5000, False, torch.float32, CPU, torch.float32, WeightForm("dense", 32))
    SelfCheck()(PackedPanels(spec, LinearWeights(weight)), spec, LinearWeights(weight))
    assert 0 < max(seen) <= 512
    weight[1234, 5] = torch.nan
    with pytest.raises(WeightFault, match="in the float reference too: its weights are damaged"):
        SelfCheck()(PackedPanels(spec, LinearWeights(weight)), spec, LinearWeights(weight))


@pytest.mark.parametrize("name", EQUAL)
def test_sound_kernels_pass_the_check(name: str) -> None:
    assert build(EQUAL[name], self_check=SelfCheck())


def test_kernels_are_registered_by_name_and_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platforms, "_KERNELS", dict(platforms._KERNELS))
    with pytest.raises(ValueError, match="platform cpu has no kernel 'marlin'"):
        register_kernel("cpu", Recorded, before="marlin")
    register_kernel("cpu", Recorded, before="reference")
    assert [kernel.name for kernel in kernels_for(CPU)][-2:] == ["recorded", "reference"]
    with pytest.raises(ValueError, match="already has a kernel 'recorded'"):
        register_kernel("cpu", Recorded)


def test_every_kernel_of_the_cpu_says_what_it_takes() -> None:
    spec = LinearSpec("layer", 8, 8, False, torch.float32, torch.device("meta"), torch.float32, part_of(writers.awq(8, 16, 16)).form)
    for kernel in kernels_for(CPU):
        assert isinstance(kernel, type)
        assert issubclass(kernel, LinearKernel)
        assert kernel.is_reference or kernel.refuses(spec)
