"""Proves that every dense linear kernel computes x @ W.T + b, over odd shapes and dtypes, and that selection gives its reasons."""

from __future__ import annotations

import pytest
import torch

from octavo.quant import dense_kernels
from octavo.quant.cpu_kernels import GroupedPanels, Int8Panels
from octavo.quant.dense_kernels import PackedPanels, TorchMatmul
from octavo.quant.linear import LinearKernel, LinearSpec, LinearWeights, NoKernel, WeightForm, select_kernel
from octavo.quant.linear_format import ActivationFormat
from octavo.quant.reference_kernel import FloatReference

SHAPES = [(1, 1, 1), (1, 16, 8), (2, 17, 33), (5, 31, 64), (6, 32, 100), (7, 48, 576), (97, 40, 257), (100, 65, 2500), (200, 130, 70)]
CPU = torch.device("cpu")
DENSE_KERNELS = (PackedPanels, TorchMatmul)
KERNELS = (PackedPanels, Int8Panels, GroupedPanels, TorchMatmul, FloatReference)
INT8 = ActivationFormat("int8", "token", dynamic=True)


def make_spec(n: int, k: int, dtype: torch.dtype, *, bias: bool = False, form: WeightForm | None = None) -> LinearSpec:
    return LinearSpec("layer", k, n, bias, dtype, CPU, torch.float32, form or WeightForm("dense", dtype.itemsize * 8))


@pytest.mark.parametrize("kernel_type", [PackedPanels, TorchMatmul])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_kernels_agree_with_float64(kernel_type: type[LinearKernel], dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weight, bias = torch.randn(m, k), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    spec = make_spec(n, k, dtype, bias=True)
    kernel = kernel_type(spec, LinearWeights(weight, bias))
    guarded = torch.full((m + 2, n), 7.0)
    kernel(x, out=guarded[1:-1])
    exact = x.double() @ weight.double().T + bias.double()
    # Packed panels multiply in float32 whatever the weights' dtype; torch rounds activations and results to that dtype.
    rounding = torch.finfo(torch.float32 if kernel_type is PackedPanels else dtype).eps
    bound = rounding * (x.abs().double() @ weight.abs().double().T + bias.abs().double() + 1) * 4
    assert ((guarded[1:-1].double() - exact).abs() <= bound).all()
    assert (guarded[[0, -1]] == 7.0).all()


def test_packed_panels_do_not_depend_on_how_many_rows_come_together() -> None:
    x, weight = torch.randn(40, 300), torch.randn(50, 300).bfloat16()
    kernel = PackedPanels(make_spec(50, 300, torch.bfloat16), LinearWeights(weight))
    together = kernel(x, out=torch.empty(40, 50))
    alone = torch.cat([kernel(x[i : i + 1], out=torch.empty(1, 50)) for i in range(40)])
    assert torch.equal(together, alone)


def test_strided_rows_of_x_are_read_in_place() -> None:
    wide, weight = torch.randn(9, 200), torch.randn(24, 120)
    kernel = PackedPanels(make_spec(24, 120, torch.float32), LinearWeights(weight))
    got = kernel(wide[:, 40:160], out=torch.empty(9, 24))
    torch.testing.assert_close(got, wide[:, 40:160] @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel_type", [PackedPanels, TorchMatmul, FloatReference])
def test_rows_give_the_weights_back(kernel_type: type[LinearKernel]) -> None:
    weight = torch.randn(37, 20).bfloat16()
    kernel = kernel_type(make_spec(37, 20, torch.bfloat16), LinearWeights(weight))
    ids = torch.tensor([0, 36, 15, 16, 15])
    assert torch.equal(kernel.rows(ids), weight[ids].float())


def test_nan_and_infinity_pass_through() -> None:
    weight = torch.ones(3, 4)
    kernel = PackedPanels(make_spec(3, 4, torch.float32), LinearWeights(weight))
    x = torch.tensor([[float("nan"), 0, 0, 0], [float("inf"), 0, 0, 0]])
    out = kernel(x, out=torch.empty(2, 3))
    assert out[0].isnan().all()
    assert (out[1] == float("inf")).all()


def test_bfloat16_units_change_the_choice_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(8, 8, torch.bfloat16)
    monkeypatch.setattr(dense_kernels, "cpu_has_bf16_units", lambda: True)
    chosen = select_kernel(spec, DENSE_KERNELS)
    assert chosen.kernel is TorchMatmul
    assert chosen.refusals == (("cpu_packed_panels", "this CPU has bfloat16 units, with which oneDNN is faster"),)
    monkeypatch.setattr(dense_kernels, "cpu_has_bf16_units", lambda: False)
    assert select_kernel(spec, DENSE_KERNELS).kernel is PackedPanels


def test_a_dtype_nobody_takes_lists_every_reason() -> None:
    with pytest.raises(NoKernel, match=r"no kernel takes layer .*cpu_packed_panels: .*torch.int8.*torch_matmul: .*torch.int8"):
        select_kernel(make_spec(8, 8, torch.int8), DENSE_KERNELS)


@pytest.mark.parametrize(
    ("form", "chosen"),
    [
        (WeightForm("dense", 32), PackedPanels),
        (WeightForm("integer", 4, 32, symmetric=False), GroupedPanels),
        (WeightForm("integer", 3, 128, act_order=True), GroupedPanels),
        (WeightForm("integer", 8), GroupedPanels),  # inputs are not quantized
        (WeightForm("integer", 8, activation=INT8), Int8Panels),
        (WeightForm("integer", 8, activation=ActivationFormat("int8", "tensor", dynamic=False)), Int8Panels),
        (WeightForm("integer", 8, activation=ActivationFormat("int8", "token", dynamic=True, symmetric=False)), GroupedPanels),
        (WeightForm("integer", 8, activation=ActivationFormat("int8", "group", dynamic=True, group_size=32)), GroupedPanels),
        (WeightForm("integer", 8, 32, activation=INT8), GroupedPanels),
        (WeightForm("integer", 8, symmetric=False, activation=INT8), GroupedPanels),
        (WeightForm("integer", 4, activation=INT8), GroupedPanels),
        (WeightForm("fp8", 8, activation=ActivationFormat("fp8_e4m3", "token", dynamic=True)), GroupedPanels),
        (WeightForm("integer", 7, 32), FloatReference),
    ],
)
def test_the_cpus_choice(form: WeightForm, chosen: type[LinearKernel]) -> None:
    assert select_kernel(make_spec(64, 64, torch.float32, form=form), KERNELS).kernel is chosen


def test_a_forced_kernel_is_taken_for_the_weights_it_is_made_for() -> None:
    spec = make_spec(64, 64, torch.float32, form=WeightForm("integer", 8, activation=INT8))
    assert select_kernel(spec, KERNELS, backend="cpu_grouped").kernel is GroupedPanels
    assert select_kernel(spec, KERNELS, backend="torch_matmul").kernel is Int8Panels  # made for dense ones
    refused = make_spec(64, 64, torch.float32, form=WeightForm("integer", 8, 32, activation=INT8))
    with pytest.raises(NoKernel, match=r"--linear-backend cpu_int8 cannot compute layer .*one symmetric scale a row.*Leave the option out"):
        select_kernel(refused, KERNELS, backend="cpu_int8")
