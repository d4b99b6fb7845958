"""Proves that every dense linear kernel computes x @ W.T + b, over odd shapes and dtypes, and that selection gives its reasons."""

from __future__ import annotations

import pytest
import torch

from octavo.quant import dense_kernels
from octavo.quant.dense_kernels import PackedPanels, TorchMatmul
from octavo.quant.linear import LinearKernel, LinearSpec, select_kernel
from octavo.quant.schemes.unquantized import create_weights, process_weights_after_loading

SHAPES = [(1, 1, 1), (1, 16, 8), (2, 17, 33), (5, 31, 64), (6, 32, 100), (7, 48, 576), (97, 40, 257), (100, 65, 2500), (200, 130, 70)]
CPU = torch.device("cpu")


def make_spec(n: int, k: int, dtype: torch.dtype, *, bias: bool = False) -> LinearSpec:
    return LinearSpec("layer", k, n, bias, dtype, CPU, torch.float32)


@pytest.mark.parametrize("kernel_type", [PackedPanels, TorchMatmul])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_kernels_agree_with_float64(kernel_type: type[LinearKernel], dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, weight, bias = torch.randn(m, k), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    spec = make_spec(n, k, dtype, bias=True)
    kernel = kernel_type(spec, weight, bias)
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
    kernel = PackedPanels(make_spec(50, 300, torch.bfloat16), weight, None)
    together = kernel(x, out=torch.empty(40, 50))
    alone = torch.cat([kernel(x[i : i + 1], out=torch.empty(1, 50)) for i in range(40)])
    assert torch.equal(together, alone)


def test_strided_rows_of_x_are_read_in_place() -> None:
    wide, weight = torch.randn(9, 200), torch.randn(24, 120)
    kernel = PackedPanels(make_spec(24, 120, torch.float32), weight, None)
    got = kernel(wide[:, 40:160], out=torch.empty(9, 24))
    torch.testing.assert_close(got, wide[:, 40:160] @ weight.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel_type", [PackedPanels, TorchMatmul])
def test_rows_give_the_weights_back(kernel_type: type[LinearKernel]) -> None:
    weight = torch.randn(37, 20).bfloat16()
    kernel = kernel_type(make_spec(37, 20, torch.bfloat16), weight, None)
    ids = torch.tensor([0, 36, 15, 16, 15])
    assert torch.equal(kernel.rows(ids), weight[ids].float())


def test_nan_and_infinity_pass_through() -> None:
    weight = torch.ones(3, 4)
    kernel = PackedPanels(make_spec(3, 4, torch.float32), weight, None)
    x = torch.tensor([[float("nan"), 0, 0, 0], [float("inf"), 0, 0, 0]])
    out = kernel(x, out=torch.empty(2, 3))
    assert out[0].isnan().all()
    assert (out[1] == float("inf")).all()


def test_bfloat16_units_change_the_choice_and_the_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(8, 8, torch.bfloat16)
    monkeypatch.setattr(dense_kernels, "cpu_has_bf16_units", lambda: True)
    chosen = select_kernel(spec, dense_kernels.dense_kernels(CPU))
    assert chosen.kernel is TorchMatmul
    assert chosen.refusals == (("cpu_packed_panels", "this CPU has bfloat16 units, with which oneDNN is faster"),)
    monkeypatch.setattr(dense_kernels, "cpu_has_bf16_units", lambda: False)
    assert select_kernel(spec, dense_kernels.dense_kernels(CPU)).kernel is PackedPanels


def test_a_dtype_nobody_takes_lists_every_reason() -> None:
    with pytest.raises(ValueError, match=r"no kernel takes layer .*cpu_packed_panels: .*torch.int8.*torch_matmul: .*torch.int8"):
        select_kernel(make_spec(8, 8, torch.int8), dense_kernels.dense_kernels(CPU))


@pytest.mark.parametrize("size", [2, 4])
def test_slices_for_tensor_parallelism_join_or_add_up(size: int) -> None:
    n, k = 24, 32
    spec = make_spec(n, k, torch.float32, bias=True)
    tensors = {"weight": torch.randn(n, k), "bias": torch.randn(n)}
    x = torch.randn(3, k)
    whole = process_weights_after_loading(tensors, spec)[0](x, out=torch.empty(3, n))
    axes = {name: [axis.role for axis in weight.axes] for name, weight in create_weights(spec).items()}
    columns = []
    for rank in range(size):
        part = {name: tensors[name].chunk(size, dim=axes[name].index("out"))[rank] for name in tensors}
        sliced = LinearSpec("layer", k, n // size, True, torch.float32, CPU, torch.float32)
        columns.append(process_weights_after_loading(part, sliced)[0](x, out=torch.empty(3, n // size)))
    torch.testing.assert_close(torch.cat(columns, dim=1), whole)
    total = tensors["bias"].expand(3, n).clone()
    for rank in range(size):
        part = {"weight": tensors["weight"].chunk(size, dim=axes["weight"].index("in"))[rank]}
        sliced = LinearSpec("layer", k // size, n, False, torch.float32, CPU, torch.float32)
        total += process_weights_after_loading(part, sliced)[0](x.chunk(size, dim=1)[rank], out=torch.empty(3, n))
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-4)
