"""Linears over grouped quantized weights on the CPU, against the same whole numbers dequantized and multiplied in float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llvmlite import binding
from torch import Tensor

from octavo.kernels.cpu import grouped_linear, jit, panel_format
from octavo.kernels.cpu.tile import COLUMNS
from octavo.kernels.grouped_linear import GroupedWeight, concatenate, dequantize, from_group_of_column, reference, regroup

EPS = torch.finfo(torch.float32).eps
ROWS = (1, 2, 6, 7, 13, 200)  # up to 6 are multiplied from registers, more through a decoded block


def codes_of(n: int, k: int, bits: int, generator: torch.Generator, *, signed: bool = False) -> Tensor:
    """Every code occurs, the two ends first."""
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator)
    codes.view(-1)[0], codes.view(-1)[-1] = 0, (1 << bits) - 1
    return (codes - 128).to(torch.int8) if signed else codes.to(torch.uint8)


def fp8_codes(n: int, k: int, generator: torch.Generator) -> Tensor:
    """All 254 numbers that e4m3 has, subnormals and +-448 among them, in some order."""
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8)
    return numbers[torch.randint(0, 254, (n, k), generator=generator)].view(torch.float8_e4m3fn)


def make_weight(n: int, k: int, size: int, *, bits: int = 4, kind: str = "constant", scale: torch.dtype = torch.float16) -> GroupedWeight:
    """A random weight. `kind`: constant, signed, fp8, zeros, offset, two-level, two-level-offset."""
    generator = torch.Generator().manual_seed(n * 1000 + k + size + bits)
    groups = (n, k // size)
    scales = (torch.rand(groups, generator=generator) * 0.02 + 0.002).to(scale)
    codes = codes_of(n, k, bits, generator)
    if kind == "constant":
        return GroupedWeight(codes, bits, size, scales, zero=1 << (bits - 1))
    if kind in ("signed", "fp8"):
        codes = fp8_codes(n, k, generator) if kind == "fp8" else codes_of(n, k, 8, generator, signed=True)
        return GroupedWeight(codes, 8, size, scales)
    if kind == "zeros":
        zeros = torch.randint(0, 1 << bits, groups, generator=generator).to(torch.uint8)
        zeros.view(-1)[0], zeros.view(-1)[-1] = 0, (1 << bits) - 1
        return GroupedWeight(codes, bits, size, scales, zeros=zeros)
    if kind == "offset":
        offset = torch.randn(groups, generator=generator).to(scale)
        return GroupedWeight(codes, bits, size, scales, offset=offset)
    per_super = next(count for count in (8, 4, 2, 1) if groups[1] % count == 0)
    above = torch.rand(n, groups[1] // per_super, generator=generator).to(scale)
    if kind == "two-level":
        small = torch.randint(-32, 32, groups, generator=generator).to(torch.int8)
        return GroupedWeight(codes, bits, size, small, zero=1 << (bits - 1), super_scale=above)
    small, lows = (torch.randint(0, 64, groups, generator=generator).to(torch.uint8) for _ in range(2))
    return GroupedWeight(codes, bits, size, small, offset=lows, super_scale=above, super_offset=-above)


def values(weight: GroupedWeight) -> Tensor:
    """W in float64, one column after the other: written on its own, from what GroupedWeight says its fields mean."""
    n, k = weight.codes.shape
    out = torch.empty(n, k, dtype=torch.float64)
    for column in range(k):
        group = column // weight.group_size
        code, scale = weight.codes[:, column].float().double(), weight.scale[:, group].double()
        if weight.super_scale is not None:
            scale = scale * weight.super_scale[:, group // (weight.num_groups // weight.super_scale.shape[1])].double()
        if weight.offset is not None:
            offset = weight.offset[:, group].double()
            if weight.super_offset is not None:
                offset = offset * weight.super_offset[:, group // (weight.num_groups // weight.super_offset.shape[1])].double()
            value = code * scale + offset
        else:
            value = (code - (weight.zeros[:, group].double() if weight.zeros is not None else weight.zero)) * scale
        out[:, column if weight.permutation is None else int(weight.permutation[column])] = value
    return out


def terms(weight: GroupedWeight) -> Tensor:
    """Sizes of what a kernel adds up, codes taken around their middle: its rounding is in proportion to these, not to W."""
    middle = 0.0 if weight.codes.dtype == torch.float8_e4m3fn else (0.0 if weight.codes.dtype == torch.int8 else 2.0 ** (weight.bits - 1))
    size = weight.group_size
    scale = dequantize(GroupedWeight(torch.ones_like(weight.codes), weight.bits, size, weight.scale, super_scale=weight.super_scale))
    out = scale.double().abs() * ((weight.codes.float() - middle).abs() + abs(middle) + 2.0**weight.bits).double()
    if weight.offset is not None:
        ones = torch.zeros_like(weight.codes)
        only = GroupedWeight(
            ones, weight.bits, size, weight.scale, offset=weight.offset, super_scale=weight.super_scale, super_offset=weight.super_offset
        )
        out += dequantize(only).double().abs()
    return out if weight.permutation is None else torch.empty_like(out).index_copy_(1, weight.permutation, out)


def check(weight: GroupedWeight, *row_counts: int, with_bias: bool = False) -> None:
    """Kernel against float64, in the middle of a wider buffer and from the middle of wider rows."""
    packed, exact_weight, sizes = grouped_linear.pack(weight), values(weight), terms(weight)
    for m in row_counts:
        _check_rows(packed, exact_weight, sizes, m, with_bias=with_bias)


def _check_rows(packed: grouped_linear.PackedWeight, exact_weight: Tensor, sizes: Tensor, m: int, *, with_bias: bool) -> None:
    n, k = exact_weight.shape
    generator = torch.Generator().manual_seed(m)
    wide = torch.randn(m, k + 9, generator=generator)
    x = wide[:, 4 : 4 + k]
    bias = torch.randn(n, generator=generator) if with_bias else None
    guarded = torch.full((m + 2, n + 11), 7.0)
    out = guarded[1:-1, 5 : 5 + n]
    assert grouped_linear.linear(x, packed, grouped_linear.pad_bias(bias), out) is out
    exact = x.double() @ exact_weight.T + (0 if bias is None else bias.double())
    plain = torch.nn.functional.linear(x, exact_weight.float(), bias).double()
    # One chain of sums along K, of weights that are made from codes around their middle.
    size_of_x = x.abs().double()
    room = EPS * (2 / k**0.5 * size_of_x @ sizes.T + 6 * size_of_x @ exact_weight.abs().T) + 1e-30
    if bias is not None:
        room += EPS * k**0.5 * bias.abs().double()  # which the chain begins with
    assert (out.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + room.max()
    out.fill_(7.0)
    assert (guarded == 7.0).all()


KINDS: list[tuple[str, dict[str, Any]]] = [
    *((f"{bits}-bit", {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)),
    *((f"{bits}-bit-zeros", {"bits": bits, "kind": "zeros"}) for bits in (2, 3, 4, 8)),
    *((f"{bits}-bit-offset", {"bits": bits, "kind": "offset"}) for bits in (4, 5)),
    ("signed", {"bits": 8, "kind": "signed"}),
    ("fp8", {"bits": 8, "kind": "fp8", "scale": torch.float32}),
    ("fp8-bfloat16-scales", {"bits": 8, "kind": "fp8", "scale": torch.bfloat16}),
    ("bfloat16-scales", {"scale": torch.bfloat16, "kind": "zeros"}),
    ("float32-scales", {"scale": torch.float32, "kind": "zeros"}),
    ("float32-offset", {"scale": torch.float32, "kind": "offset"}),
    *((f"{bits}-bit-two-level", {"bits": bits, "kind": "two-level"}) for bits in (3, 6)),
    *((f"{bits}-bit-two-level-offset", {"bits": bits, "kind": "two-level-offset"}) for bits in (2, 4, 5)),
]


@pytest.mark.parametrize("options", [options for _, options in KINDS], ids=[name for name, _ in KINDS])
def test_every_form(options: dict[str, Any]) -> None:
    weight = make_weight(3 * COLUMNS + 5, 320, 32, **options)
    check(weight, *ROWS)
    check(weight, 1, 6, 13, with_bias=True)


@pytest.mark.parametrize("size", [1, 2, 5, 8, 10, 24, 72, 360])
def test_group_sizes(size: int) -> None:
    """Whole units of a word or not, one group for all inputs, more inputs than are decoded at a time."""
    for options in ({"bits": 4, "kind": "zeros"}, {"bits": 3}, {"bits": 8, "kind": "fp8"}, {"bits": 6, "kind": "two-level"}):
        check(make_weight(COLUMNS + 3, 360, size, **options), 1, 3, 13)


@pytest.mark.parametrize(
    ("n", "k", "size"), [(1, 1, 1), (1, 7, 7), (2, 257, 257), (COLUMNS, 1, 1), (COLUMNS + 1, 13, 13), (2 * COLUMNS, 514, 257)]
)
def test_odd_shapes(n: int, k: int, size: int) -> None:
    for options in ({"bits": 4, "kind": "zeros"}, {"bits": 3}, {"bits": 5, "kind": "offset"}, {"bits": 8, "kind": "fp8"}):
        check(make_weight(n, k, size, **options), 1, 2, 9, with_bias=True)


@pytest.mark.parametrize("zero", [0, 1, 8, 15])
def test_constant_zero_points(zero: int) -> None:
    codes = codes_of(20, 64, 4, torch.Generator().manual_seed(1))
    check(GroupedWeight(codes, 4, 16, torch.full((20, 4), 0.01), zero=zero), 1, 9)


def test_every_code_and_zero_point_of_four_bits() -> None:
    """16 x 16 combinations, read back through rows(): exact, since a product of small whole numbers and a power of two is."""
    codes = torch.arange(16, dtype=torch.uint8).repeat(16, 16)
    zeros = torch.arange(16, dtype=torch.uint8)[:, None].expand(16, 16).contiguous()
    weight = GroupedWeight(codes, 4, 16, torch.full((16, 16), 0.25), zeros=zeros)
    wanted = (codes.float() - torch.arange(16.0)[:, None]) * 0.25
    assert torch.equal(grouped_linear.rows(grouped_linear.pack(weight), torch.arange(16)), wanted)


def test_every_fp8_number_comes_out_right() -> None:
    numbers = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8).view(torch.float8_e4m3fn)
    weight = GroupedWeight(numbers[None].contiguous(), 8, 254, torch.ones(1, 1))
    packed = grouped_linear.pack(weight)
    assert torch.equal(grouped_linear.rows(packed, torch.tensor([0]))[0], numbers.float())
    assert numbers.float().abs()[numbers.float() != 0].min() == 2.0**-9
    one_hot = torch.eye(254)
    for m in (1, 254):
        found = torch.cat([grouped_linear.linear(part, packed, None, torch.empty(len(part), 1)) for part in one_hot.split(m)])
        assert torch.equal(found[:, 0], numbers.float())


@pytest.mark.parametrize("kind", ["in-order", "ragged-last", "cut-through-a-group", "scattered", "one-group-missing"])
def test_groups_of_columns(kind: str) -> None:
    """Whatever group a column belongs to: the weight is scale[n, group] * (code - zero[n, group])."""
    generator = torch.Generator().manual_seed(3)
    n, k = COLUMNS + 2, 96
    columns = torch.arange(k)
    groups = {
        "in-order": columns // 32,
        "ragged-last": columns // 36,
        "cut-through-a-group": (columns + 20) // 32,
        "scattered": (columns // 32)[torch.randperm(k, generator=generator)],
        "one-group-missing": torch.where(columns // 24 == 1, 2, columns // 24),
    }[kind]
    codes, count = codes_of(n, k, 4, generator), int(groups.max()) + 1
    scale = (torch.rand(n, count, generator=generator) + 0.1).half()
    zeros = torch.randint(0, 16, (n, count), generator=generator).to(torch.uint8)
    weight = from_group_of_column(codes, groups, bits=4, scale=scale, zeros=zeros)
    wanted = torch.stack([scale[:, g].double() * (codes[:, c].double() - zeros[:, g].double()) for c, g in enumerate(groups.tolist())], 1)
    assert torch.equal(dequantize(weight, torch.float64), wanted)
    assert (weight.permutation is not None) == (kind == "scattered")
    check(weight, 1, 6, 13)


def test_rows_are_the_weights() -> None:
    for options in (options for _, options in KINDS):
        weight = make_weight(2 * COLUMNS + 5, 320, 32, **options)
        order = torch.randperm(320, generator=torch.Generator().manual_seed(0))
        for permutation in (None, order):
            given = GroupedWeight(**{**vars(weight), "permutation": permutation})
            ids = torch.tensor([0, 2 * COLUMNS + 4, COLUMNS, COLUMNS - 1, 0, 7, 3])
            found = grouped_linear.rows(grouped_linear.pack(given), ids)
            exact = values(given)
            room = 4 * EPS * (exact.abs() + terms(given))
            assert ((found.double() - exact[ids]).abs() <= room[ids]).all()


@pytest.mark.parametrize("index", [-1, 37])
def test_rows_out_of_range_are_refused(index: int) -> None:
    packed = grouped_linear.pack(make_weight(37, 64, 32))
    with pytest.raises(IndexError, match=rf"{index}.* a weight that has 37|rows 0 to {index} asked of a weight that has 37"):
        grouped_linear.rows(packed, torch.tensor([0, index]))
    assert grouped_linear.rows(packed, torch.tensor([], dtype=torch.int64)).shape == (0, 64)


def test_no_rows_at_all() -> None:
    """A step without a token to score multiplies nothing."""
    for options in ({"bits": 4}, {"bits": 4, "kind": "zeros"}, {"bits": 8, "kind": "fp8"}):
        packed = grouped_linear.pack(make_weight(37, 64, 32, **options))
        assert grouped_linear.linear(torch.empty(0, 64), packed, None, torch.empty(0, 37)).shape == (0, 37)


@pytest.mark.parametrize("kind", ["constant", "zeros", "fp8", "two-level-offset"])
def test_nan_passes_through_and_stays_in_its_row(kind: str) -> None:
    packed = grouped_linear.pack(make_weight(37, 64, 32, bits=8 if kind == "fp8" else 4, kind=kind))
    for m in (3, 20):
        x = torch.randn(m, 64, generator=torch.Generator().manual_seed(0))
        clean = grouped_linear.linear(x, packed, None, torch.empty(m, 37)).clone()
        x[1, 40] = float("nan")
        found = grouped_linear.linear(x, packed, None, torch.empty(m, 37))
        assert found[1].isnan().all()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("kind", ["constant", "zeros", "offset", "fp8", "two-level-offset"])
def test_a_rows_bits_do_not_depend_on_its_neighbours(kind: str) -> None:
    """Nor on how many there are: the same chain of multiply-adds whether weights are widened in registers or decoded first."""
    packed = grouped_linear.pack(make_weight(2 * COLUMNS + 5, 320, 32, bits=8 if kind == "fp8" else 4, kind=kind))
    x = torch.randn(40, 320, generator=torch.Generator().manual_seed(0))
    bias = grouped_linear.pad_bias(torch.randn(packed.out_features, generator=torch.Generator().manual_seed(1)))
    together = grouped_linear.linear(x, packed, bias, torch.empty(40, packed.out_features))
    for count in (1, 2, 6, 7, 13):
        parts = [grouped_linear.linear(part, packed, bias, torch.empty(len(part), packed.out_features)) for part in x.split(count)]
        assert torch.equal(torch.cat(parts), together)


def test_weights_take_their_own_width() -> None:
    for bits in (2, 3, 4, 5, 6, 8):
        weight = make_weight(8 * COLUMNS, 512, 128, bits=bits)
        assert grouped_linear.pack(weight).nbytes == 8 * COLUMNS * (512 * bits // 8 + 4 * 2)
    assert grouped_linear.pack(make_weight(8 * COLUMNS, 512, 128, kind="zeros")).nbytes == 8 * COLUMNS * (256 + 4 * 2 + 4 // 2)


def test_regroup_keeps_the_values() -> None:
    for kind in ("constant", "zeros", "offset", "two-level", "two-level-offset"):
        weight = make_weight(9, 128, 32, kind=kind)
        for size in (16, 4, 1):
            smaller = regroup(weight, size)
            assert smaller.group_size == size
            assert torch.equal(dequantize(smaller, torch.float64), dequantize(weight, torch.float64))
        check(smaller, 2)
    with pytest.raises(ValueError, match="groups of 32 cannot be cut into groups of 24"):
        regroup(make_weight(9, 128, 32), 24)


def test_concatenate_keeps_the_values() -> None:
    for options in (options for _, options in KINDS):
        parts = [make_weight(n, 320, 32, **options) for n in (7, 40, 1)]
        joined = concatenate(parts)
        assert joined is not None
        assert joined.codes.dtype == parts[0].codes.dtype
        assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in parts]))
    different_sizes = [make_weight(7, 96, 32, kind="zeros"), make_weight(9, 96, 24, kind="zeros")]
    joined = concatenate(different_sizes)
    assert joined is not None
    assert joined.group_size == 8
    assert torch.equal(dequantize(joined), torch.cat([dequantize(part) for part in different_sizes]))


def test_what_cannot_be_multiplied_together_is_not_concatenated() -> None:
    first = make_weight(7, 64, 32, kind="zeros")
    order = torch.arange(63, -1, -1)
    others = [
        make_weight(7, 64, 32, bits=8, kind="zeros"),
        make_weight(7, 64, 32),
        make_weight(7, 64, 32, kind="zeros", scale=torch.bfloat16),
        make_weight(7, 64, 32, kind="offset"),
        GroupedWeight(**{**vars(first), "permutation": order}),
    ]
    assert all(concatenate([first, other]) is None for other in others)
    assert concatenate([make_weight(7, 64, 32), GroupedWeight(**{**vars(make_weight(7, 64, 32)), "zero": 7})]) is None


def test_contradictions_are_refused() -> None:
    codes, scale = torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2)
    zeros = torch.zeros(4, 2, dtype=torch.uint8)
    for changes, text in (
        ({"codes": codes.int()}, "codes must be"),
        ({"group_size": 24}, "not a whole number of groups"),
        ({"group_size": 0}, "not a whole number of groups"),
        ({"scale": scale[:, :1]}, "scale is"),
        ({"scale": zeros}, "without super_scale"),
        ({"super_scale": scale}, "with super_scale"),
        ({"zeros": zeros, "offset": scale}, "not both"),
        ({"zero": 3, "offset": scale}, "not both"),
        ({"scale": zeros, "super_scale": torch.ones(4, 3)}, "super_scale is"),
        ({"permutation": torch.arange(63)}, "permutation must be"),
    ):
        with pytest.raises(ValueError, match=text):
            GroupedWeight(**{"codes": codes, "bits": 4, "group_size": 32, "scale": scale, **changes})


def test_reference_is_float64_rounded() -> None:
    weight = make_weight(9, 64, 32, kind="zeros")
    x, bias = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), torch.ones(9)
    found = reference(x, weight, bias, torch.empty(5, 9))
    torch.testing.assert_close(found.double(), x.double() @ values(weight).T + 1, rtol=1e-5, atol=1e-5)


# --- other CPUs ------------------------------------------------------------------------------------------------------

_IN_A_PROCESS = """
import sys
from llvmlite import binding
real = binding.get_host_cpu_features
binding.get_host_cpu_features = lambda: {**real(), "avx512f": sys.argv[1] == "16"}
from octavo.kernels.cpu import tile
binding.get_host_cpu_features = real
assert tile.WIDTH == int(sys.argv[1]), tile.WIDTH
"""
FORMS = [
    panel_format.PanelFormat("integer", 4, 32, "float16", "nibbles"),
    panel_format.PanelFormat("integer", 3, 32, "bfloat16", "constant", 4),
    panel_format.PanelFormat("integer", 6, 16, "int8", "constant", 32, per_super=16, super_scale="float16"),
    panel_format.PanelFormat("fp8_e4m3", 8, 128, "float32", "constant"),
]


def in_a_process_of_width(width: int, code: str, tmp_path: Path) -> str:
    """Runs code in a process whose vectors have `width` floats, whatever this CPU has; its compiled kernels are kept apart."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", _IN_A_PROCESS + code, str(width)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_other_vector_widths_compute_the_same(tmp_path: Path) -> None:
    """Panels of the other width (that of CPUs with AVX-512, where this one has none) give the same, but for rounding."""
    other = 8 if COLUMNS == 32 else 16
    code = f"""
import torch
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_grouped_linear as here
assert here.COLUMNS == 2 * {other}
for options in ({{"bits": 4, "kind": "zeros"}}, {{"bits": 3}}, {{"bits": 6, "kind": "two-level"}}, {{"bits": 8, "kind": "fp8"}}):
    here.check(here.make_weight(2 * here.COLUMNS + 5, 320, 32, **options), 1, 6, 13, with_bias=True)
print("done")
"""
    assert in_a_process_of_width(other, code, tmp_path).strip() == "done"


def test_code_for_avx512_and_avx2_compiles(tmp_path: Path) -> None:
    code = f"""
from octavo.kernels.cpu import jit, panel_format
from octavo.kernels.cpu.panel_format import PanelFormat
binding.initialize_native_target(); binding.initialize_native_asmprinter()
for cpu in {{"16": ("cascadelake", "sapphirerapids"), "8": ("haswell",)}}[sys.argv[1]]:
    machine = jit.host_machine(cpu)
    for form in {FORMS!r}:
        assembly = machine.emit_assembly(jit.optimized(panel_format.emit(form), machine))
        register = "zmm" if sys.argv[1] == "16" else "ymm"
        fused = [line for line in assembly.splitlines() if "vfmadd" in line and register in line]
        assert len(fused) > 40, (cpu, form, len(fused))
        assert "callq" not in assembly, (cpu, form)
print("done")
"""
    for width in (8, 16):
        assert in_a_process_of_width(width, code, tmp_path).strip() == "done"


def test_code_compiles_for_a_cpu_without_vector_extensions() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    machine = jit.host_machine("x86-64-v3" if "x86" in binding.get_process_triple() else "generic")
    for form in FORMS:
        assert "direct6" in machine.emit_assembly(jit.optimized(panel_format.emit(form), machine))
