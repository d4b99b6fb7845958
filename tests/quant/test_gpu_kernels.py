"""Linear kernels for GPUs under the interpreter, from a checkpoint's tensors to the product; and which of them each architecture takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from octavo.kernels.gpu.device import pretend
from octavo.kernels.quantize_rows import QuantizedRows, quantize_rms_norm, quantize_silu_mul, reference
from octavo.kernels.rms_norm import rms_norm_reference
from octavo.kernels.silu_mul import silu_mul
from octavo.quant.gpu_kernels import TritonFp8, TritonInt8, TritonW4A8, TritonWeightOnly
from octavo.quant.gpu_peer_kernels import TorchScaledMM
from octavo.quant.linear import LinearKernel, LinearSpec, NoKernel, WeightForm, select_kernel
from octavo.quant.linear_format import ActivationFormat
from octavo.quant.platforms import kernels_for_platform

from ..kernels.gpu.interpreter import mend, torch_scales_rows
from .test_conformance import CASES, canonical, spec_of
from .writers import FP8_GROUP, FP8_STATIC, FP8_TOKEN, INT8_TOKEN, Written, rounded

mend()
META = torch.device("meta")
NAMES = [name for name in CASES if name not in ("dense", "pack-w4a8", "int8-asymmetric-inputs")]


def gpu_spec(written: Written, dtype: torch.dtype = torch.bfloat16) -> LinearSpec:
    return replace(spec_of(written), device=META, activation_dtype=dtype)


def on_cpu(spec: LinearSpec) -> LinearSpec:
    """Where the interpreter computes."""
    return replace(spec, device=torch.device("cpu"))


def assert_computes(kernel: LinearKernel, written: Written, m: int, *, dtype: torch.dtype, activation: ActivationFormat | None) -> None:
    """To a rounding of the result, and one of every weight, in the inputs' dtype."""
    n, k = written.weight.shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    bias = written.tensors["bias"].to(dtype).double() if "bias" in written.tensors else torch.zeros(n, dtype=torch.float64)
    inputs = rounded(x.float(), activation, written.tensors.get("input_scale"))
    exact = inputs @ written.weight.T + bias
    room = torch.finfo(dtype).eps * (exact.abs() + 0.5 * inputs.abs() @ written.weight.abs().T)
    wide = torch.full((m, n + 8), float("nan"), dtype=dtype)  # rows of `out` may be strided
    out = kernel(x, out=wide[:, :n])
    assert wide[:, n:].isnan().all()
    assert ((out.double() - exact).abs() <= room).all(), float(((out.double() - exact).abs() - room).max())


@pytest.mark.parametrize("name", NAMES)
def test_every_layout_on_the_kernel_that_an_h100_takes(name: str) -> None:
    written = CASES[name]()
    with pretend(90):
        selected = select_kernel(gpu_spec(written), kernels_for_platform("sm_90")).kernel
        assert selected in (TritonFp8, TritonInt8, TritonWeightOnly)
        kernel = selected(on_cpu(gpu_spec(written)), canonical(written))
        activation = written.format.activation if selected is not TritonWeightOnly else None
        for m in (1, 5):
            assert_computes(kernel, written, m, dtype=torch.bfloat16, activation=activation)
    ids = torch.tensor([0, written.weight.shape[0] - 1, 3])
    torch.testing.assert_close(kernel.rows(ids).double(), written.weight[ids], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("name", ["awq", "gptq-act-order", "pack-4-asym-group", "gptq-v1-3-sym", "float-channel-dynamic"])
@pytest.mark.parametrize("m", [1, 600])
def test_float16_and_many_rows_of_weights_alone(name: str, m: int) -> None:
    """600 rows: weights are taken apart once and multiplied by torch."""
    written = CASES[name]()
    with pretend(80):
        kernel = TritonWeightOnly(on_cpu(gpu_spec(written, torch.float16)), canonical(written))
        assert_computes(kernel, written, m, dtype=torch.float16, activation=None)


@pytest.mark.parametrize("name", ["awq", "pack-4-sym-group", "gptq-v1-3-asym", "gptq-v2-2-asym", "pack-bias", "awq-channel"])
def test_small_integers_as_fp8(name: str) -> None:
    written = CASES[name]()
    with pretend(90):
        spec = gpu_spec(written)
        if name == "awq-channel":  # 72 inputs
            assert "groups of whole 32 inputs, or multiples of 128 inputs, not 72 of 72" in (TritonW4A8.refuses(spec) or "")
            return
        assert TritonW4A8.refuses(spec) is None
        assert_computes(TritonW4A8(on_cpu(spec), canonical(written)), written, 4, dtype=torch.bfloat16, activation=FP8_TOKEN)


def test_static_inputs_saturate_and_zero_rows_are_zero() -> None:
    written = CASES["float-tensor-static"]()
    with pretend(90):
        kernel = TritonFp8(on_cpu(gpu_spec(written)), canonical(written))
        n, k = written.weight.shape
        x = torch.zeros(3, k, dtype=torch.bfloat16)
        x[1] = 1e6
        out = kernel(x, out=torch.empty(3, n, dtype=torch.bfloat16))
    assert torch.equal(out[[0, 2]], torch.zeros(2, n, dtype=torch.bfloat16))
    wanted = rounded(x.float(), FP8_STATIC, written.tensors["input_scale"]) @ written.weight.T
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=1e-6)


def test_no_rows() -> None:
    for name, kernel_type in (("awq", TritonWeightOnly), ("float-channel-dynamic", TritonFp8), ("awq", TritonW4A8)):
        written = CASES[name]()
        with pretend(90):
            kernel = kernel_type(on_cpu(gpu_spec(written)), canonical(written))
            n, k = written.weight.shape
            empty = torch.empty(0, k, dtype=torch.bfloat16)
            assert kernel(empty, out=torch.empty(0, n, dtype=torch.bfloat16)).shape == (0, n)


FP8 = WeightForm("fp8", 8, activation=FP8_TOKEN)
CHOICES = {
    "fp8": (FP8, {80: "triton_weight_only", 86: "triton_weight_only", 89: "triton_fp8", 90: "triton_fp8", 100: "triton_fp8"}),
    "fp8 in blocks": (WeightForm("fp8", 8, 128, activation=FP8_GROUP), {80: "triton_weight_only", 89: "triton_fp8", 90: "triton_fp8"}),
    "fp8 weights alone": (WeightForm("fp8", 8), {80: "triton_weight_only", 90: "triton_weight_only", 100: "triton_weight_only"}),
    "awq": (WeightForm("integer", 4, 128, symmetric=False), dict.fromkeys((80, 86, 89, 90, 100, 120), "triton_weight_only")),
    "gptq act-order": (WeightForm("integer", 4, 128, act_order=True), dict.fromkeys((80, 89, 90, 100), "triton_weight_only")),
    "gptq 3 bits": (WeightForm("integer", 3, 128), dict.fromkeys((80, 90), "triton_weight_only")),
    "gguf 6 bits": (WeightForm("integer", 6, 16), dict.fromkeys((80, 90), "triton_weight_only")),
    "w8a8": (WeightForm("integer", 8, activation=INT8_TOKEN), dict.fromkeys((80, 89, 90, 100), "triton_int8")),
    "dense": (WeightForm("dense", 16), dict.fromkeys((80, 90, 100), "torch_matmul")),
}


@pytest.mark.parametrize("name", CHOICES)
def test_what_each_architecture_takes(name: str) -> None:
    form, wanted = CHOICES[name]
    spec = LinearSpec("layer", 4096, 4096, False, torch.bfloat16, META, torch.bfloat16, form)
    for arch, kernel in wanted.items():
        with pretend(arch):
            assert select_kernel(spec, kernels_for_platform(f"sm_{arch}")).kernel.name == kernel, arch


def test_reasons_and_forced_kernels() -> None:
    spec = LinearSpec("layer", 4096, 4096, False, torch.bfloat16, META, torch.bfloat16, FP8)
    with pretend(80):
        refusals = dict(select_kernel(spec, kernels_for_platform("sm_89")).refusals)
        assert refusals["triton_fp8"] == "needs sm_89 or newer, and this is sm_80"
        with pytest.raises(NoKernel, match=r"triton_fp8 cannot compute .* needs sm_89 or newer, and this is sm_80"):
            select_kernel(spec, kernels_for_platform("sm_89"), backend="triton_fp8")
    with pretend(90):
        kernels = kernels_for_platform("sm_90")
        assert select_kernel(spec, kernels, backend="torch_scaled_mm").kernel is TorchScaledMM
        int4 = replace(spec, form=WeightForm("integer", 4, 128))
        for name in ("triton_w4a8_fp8", "torch_int4pack"):
            assert select_kernel(int4, kernels, backend=name).kernel.name == name
        float32 = replace(spec, activation_dtype=torch.float32)
        assert select_kernel(float32, kernels).kernel.is_reference
    on_cpu_reason = TritonFp8.refuses(on_cpu(spec))
    assert on_cpu_reason == "runs on NVIDIA GPUs, not on cpu"


@pytest.mark.skipif(not torch_scales_rows(), reason="this torch takes one scale for all rows on the CPU")
def test_scaled_mm_of_torch_agrees() -> None:
    """On the CPU, where torch has it too."""
    written = CASES["fp8-scalar"]()
    generator = torch.Generator().manual_seed(0)
    n, k = 64, 96
    codes = torch.randn(n, k, generator=generator).to(torch.float8_e4m3fn)
    written = replace(
        written, tensors={**written.tensors, "weight": codes}, weight=codes.double() * written.tensors["weight_scale"].double()
    )
    with pretend(90):
        spec = gpu_spec(written)
        assert TorchScaledMM.refuses(spec) is None
        assert_computes(TorchScaledMM(on_cpu(spec), canonical(written)), written, 5, dtype=torch.bfloat16, activation=FP8_TOKEN)


@pytest.mark.parametrize("name", ["float-channel-dynamic", "float-tensor-static", "fp8-block", "int8-dynamic"])
def test_inputs_rounded_by_whoever_makes_them(name: str) -> None:
    """A norm, a norm after adding and a gate that round in one pass give what the linear makes of the values themselves."""
    written = CASES[name]()
    generator = torch.Generator().manual_seed(1)
    with pretend(90):
        selected = select_kernel(gpu_spec(written), kernels_for_platform("sm_90")).kernel
        kernel = selected(on_cpu(gpu_spec(written)), canonical(written))
        codes = kernel.input_codes
        assert codes is not None
        n, k = written.weight.shape
        m = 5
        x, residual = (torch.randn(m, k, generator=generator).bfloat16() for _ in range(2))
        gate_up = torch.randn(m, 2 * k, generator=generator).bfloat16()
        weight = torch.rand(k, generator=generator).bfloat16() + 0.5
        for values in ("norm", "add_norm", "gate"):
            kept, rows = residual.clone(), kernel.room(m)
            if values == "gate":
                quantize_silu_mul(gate_up, rows, static_scale=codes.static_scale)
                given = silu_mul(gate_up, out=torch.empty_like(x))
            else:
                quantize_rms_norm(x, weight, 1e-5, rows, residual=kept if values == "add_norm" else None, static_scale=codes.static_scale)
                given = rms_norm_reference(x + residual if values == "add_norm" else x, weight, 1e-5)
                assert torch.equal(kept, x + residual if values == "add_norm" else residual)
            out = kernel.multiply_codes(rows, out=torch.full((m, n), torch.nan, dtype=torch.bfloat16))
            wanted = kernel(given, out=torch.empty_like(out))
            assert float((out.float() - wanted.float()).norm() / wanted.float().norm()) < 1e-2


def test_kernels_that_take_numbers_have_no_room_for_codes() -> None:
    written = CASES["awq"]()
    with pretend(90):
        kernel = TritonWeightOnly(on_cpu(gpu_spec(written)), canonical(written))
    assert kernel.input_codes is None
    with pytest.raises(TypeError, match="triton_weight_only takes no codes"):
        kernel.room(1)


@pytest.mark.parametrize("residual", [True, False])
def test_codes_of_norms_and_gates_on_the_cpu(residual: bool) -> None:
    x, added = torch.randn(3, 64), torch.randn(3, 64)
    weight, gate_up = torch.rand(64), torch.randn(3, 128)
    rows, wanted = (QuantizedRows.empty(3, 64, torch.int8, device=torch.device("cpu")) for _ in range(2))
    quantize_rms_norm(x, weight, 1e-5, rows, residual=added.clone() if residual else None)
    reference(rms_norm_reference(x + added if residual else x, weight, 1e-5), wanted)
    assert int((rows.codes.int() - wanted.codes.int()).abs().max()) <= 1
    torch.testing.assert_close(rows.scales, wanted.scales)
    quantize_silu_mul(gate_up, rows)
    reference(silu_mul(gate_up, out=torch.empty(3, 64)), wanted)
    assert torch.equal(rows.codes, wanted.codes)
