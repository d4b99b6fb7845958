"""Quantized weights times 16-bit integer inputs: against float64 with the inputs rounded as the contract says, at every width and edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from octavo.kernels.cpu import wide_code, wide_linear
from octavo.kernels.cpu.grouped_linear import pad_bias, panel_format
from octavo.kernels.cpu.jit import host_machine, optimized
from octavo.kernels.cpu.tile import WIDTH
from octavo.kernels.grouped_linear import GroupedWeight, dequantize

EPS = torch.finfo(torch.float32).eps
# name, N, K, group size, bits, kind of zero point
FORMS = [
    ("int4", 48, 128, 64, 4, "zeros"),
    ("int4-32", 50, 96, 32, 4, "zeros"),
    ("int4-symmetric", 33, 128, 128, 4, "constant"),
    ("q4_1", 17, 64, 32, 4, "offset"),
    ("q4_k", 20, 512, 32, 4, "two-level"),
    ("int2", 16, 64, 32, 2, "zeros"),
    ("int8", 31, 192, 96, 8, "zeros"),
    ("int8-channel", 16, 504, 504, 8, "constant"),
    ("signed", 18, 64, 32, 8, "signed"),
]
CASES = [pytest.param(*form, id=name) for name, *form in FORMS]


def make_weight(n: int, k: int, size: int, bits: int, kind: str) -> GroupedWeight:
    generator = torch.Generator().manual_seed(n * k + bits)
    groups = (n, k // size)
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).to(torch.uint8)
    scale = (torch.rand(groups, generator=generator) + 0.1).to(torch.float16)
    if kind == "constant":
        return GroupedWeight(codes, bits, size, scale, zero=1 << (bits - 1))
    if kind == "signed":
        return GroupedWeight((codes.to(torch.int16) - 128).to(torch.int8), bits, size, scale)
    if kind == "offset":
        return GroupedWeight(codes, bits, size, scale, offset=torch.randn(groups, generator=generator).to(torch.float16))
    if kind == "two-level":
        small = torch.randint(1, 64, groups, generator=generator).to(torch.uint8)
        above = torch.rand(n, groups[1] // 8, generator=generator).to(torch.float16)
        return GroupedWeight(codes, bits, size, small, offset=small.flip(1), super_scale=above, super_offset=-above)
    zeros = torch.randint(0, 1 << bits, groups, generator=generator).to(torch.uint8)
    return GroupedWeight(codes, bits, size, scale, zeros=zeros)


def rounded(x: Tensor, weight: GroupedWeight) -> Tensor:
    """Inputs as the kernel takes them, float64: a scale for each group, codes to the greatest that the group's sum allows."""
    limit = min(32767, (2**31 - 1) // (weight.group_size * ((1 << weight.bits) - 1)))
    cells = x.double().view(x.shape[0], -1, weight.group_size)
    scale = (cells.abs().amax(2, keepdim=True).float() / limit).double()
    codes = torch.where(scale > 0, torch.round((cells.float() / scale.float()).double()), 0.0)
    return (codes * scale).flatten(1)


@pytest.mark.parametrize(("n", "k", "size", "bits", "kind"), CASES)
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 100])
def test_every_form(n: int, k: int, size: int, bits: int, kind: str, rows: int) -> None:
    weight, generator = make_weight(n, k, size, bits, kind), torch.Generator().manual_seed(rows)
    packed, exact = wide_linear.pack(weight), dequantize(weight, torch.float64)
    wide = torch.randn(rows, k + 9, generator=generator)
    x, bias = wide[:, 4 : 4 + k], torch.randn(n, generator=generator)
    wide[0] *= 1000.0
    for given in (None, bias):
        guarded = torch.full((rows + 2, n + 7), 7.0)
        out = guarded[1:-1, 3 : 3 + n]
        assert wide_linear.linear(x, packed, pad_bias(given), out) is out
        added = 0.0 if given is None else given.double()
        steps = rounded(x.contiguous(), weight)
        wanted = steps @ exact.T + added
        # Codes are multiplied as they are, so rounding is in proportion to what they reach and not to the weight.
        reach = dequantize(make_reach(weight), torch.float64).abs()
        room = 8 * EPS * (steps.abs() @ reach.T + 1)
        assert ((out.double() - wanted).abs() <= room).all()
        plain = x.double() @ exact.T + added
        assert ((out.double() - plain).norm() / plain.norm()) < 1e-4  # bfloat16 inputs would give about 2e-3
        out.fill_(7.0)
        assert (guarded == 7.0).all()


def make_reach(weight: GroupedWeight) -> GroupedWeight:
    """The largest terms that a weight's codes and zero points make."""
    top = torch.full(weight.codes.shape, (1 << weight.bits) - 1, dtype=torch.uint8)
    offset = weight.offset
    if weight.super_offset is not None:
        return GroupedWeight(
            top,
            weight.bits,
            weight.group_size,
            weight.scale,
            offset=offset,
            super_scale=weight.super_scale,
            super_offset=-weight.super_offset,
        )
    return GroupedWeight(top, weight.bits, weight.group_size, weight.scale, offset=None if offset is None else offset.abs())


@pytest.mark.parametrize(("n", "k", "size", "bits", "kind"), CASES)
def test_rows_give_the_weights_back(n: int, k: int, size: int, bits: int, kind: str) -> None:
    weight = make_weight(n, k, size, bits, kind)
    ids = torch.tensor([0, n - 1, n // 2, 0])
    torch.testing.assert_close(wide_linear.rows(wide_linear.pack(weight), ids), dequantize(weight)[ids], rtol=1e-6, atol=1e-5)


def test_a_rows_bits_do_not_depend_on_its_neighbours() -> None:
    packed = wide_linear.pack(make_weight(50, 256, 64, 4, "zeros"))
    x = torch.randn(40, 256, generator=torch.Generator().manual_seed(0))
    together = wide_linear.linear(x, packed, None, torch.empty(40, 50))
    alone = torch.cat([wide_linear.linear(x[i : i + 1], packed, None, torch.empty(1, 50)) for i in range(40)])
    assert torch.equal(together, alone)


def test_extremes() -> None:
    """Greatest inputs on greatest codes: no sum overflows."""
    weight = GroupedWeight(torch.full((16, 2048), 255, dtype=torch.uint8), 8, 512, torch.ones(16, 4))
    packed = wide_linear.pack(weight)
    for sign in (1.0, -1.0):
        out = wide_linear.linear(torch.full((3, 2048), sign), packed, None, torch.empty(3, 16))
        torch.testing.assert_close(out, torch.full((3, 16), sign * 255.0 * 2048))


def test_zeros_nan_infinity_and_no_rows() -> None:
    packed = wide_linear.pack(make_weight(20, 64, 32, 4, "zeros"))
    x = torch.randn(4, 64)
    x[0], x[1, 40], x[2, 3] = 0.0, torch.nan, torch.inf
    bias = torch.randn(20)
    out = wide_linear.linear(x, packed, pad_bias(bias), torch.empty(4, 20))
    assert torch.equal(out[0], bias)
    assert out[1:3].isnan().all()
    assert out[3].isfinite().all()
    assert wide_linear.linear(x[:0], packed, None, torch.empty(0, 20)).shape == (0, 20)


@pytest.mark.parametrize(("bits", "size"), [(3, 64), (5, 32), (4, 16), (4, 36), (2, 40), (8, 30), (8, 1024)])
def test_what_it_does_not_take(bits: int, size: int) -> None:
    assert not wide_linear.takes(bits=bits, group_size=size)
    with pytest.raises(ValueError, match=f"{bits} bits in groups of {size} cannot be multiplied by 16-bit integers"):
        wide_linear.pack(GroupedWeight(torch.zeros(4, 2 * size, dtype=torch.uint8), bits, size, torch.ones(4, 2)))


def test_sixteen_products_an_instruction() -> None:
    """The inner loop is made of vpmaddwd, which becomes vpdpwssd where the processor also adds; the other ways compile."""
    form = panel_format(make_weight(48, 128, 64, 4, "zeros"), paired=True)
    wide_code.compiled(form)  # sets LLVM up
    with_madd = wide_code.way() != "plain"
    others = ("znver3", "znver4") if WIDTH == 8 else ("skylake-avx512", "znver4")  # LLVM ends the process where registers are narrower
    for machine in (host_machine(), *(host_machine(cpu) for cpu in others if with_madd)):
        for kind in ("madd", "plain") if with_madd else ("plain",):
            text = machine.emit_assembly(optimized(wide_code.emit(form, kind), machine))  # type: ignore[arg-type]
            assert kind == "plain" or "vpmaddwd" in text or "vpdpwssd" in text


def test_what_does_not_fit_the_weight_is_refused_and_not_read() -> None:
    packed = wide_linear.pack(make_weight(20, 64, 32, 4, "zeros"))
    with pytest.raises(ValueError, match=r"x is \(3, 32\) and out \(3, 20\) for a weight of 20 x 64"):
        wide_linear.linear(torch.randn(3, 32), packed, None, torch.empty(3, 20))
    with pytest.raises(ValueError, match=r"x is \(3, 64\) and out \(2, 20\)"):
        wide_linear.linear(torch.randn(3, 64), packed, None, torch.empty(2, 20))
    with pytest.raises(ValueError, match="rows must be contiguous"):
        wide_linear.linear(torch.randn(64, 3).t(), packed, None, torch.empty(3, 20))
