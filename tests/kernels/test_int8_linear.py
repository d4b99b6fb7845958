"""Linears in whole numbers on the CPU, against exact sums, and what is emitted for the CPUs that this one is not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from octavo.kernels.cpu import int8_linear
from octavo.kernels.cpu.grouped_linear import pad_bias
from octavo.kernels.cpu.int8_code import MAX_DEPTH
from octavo.kernels.cpu.tile import COLUMNS, WIDTH
from octavo.kernels.int8_linear import quantize, reference, wide_limit

EPS = torch.finfo(torch.float32).eps


def random_codes(n: int, k: int) -> Tensor:
    codes = torch.randint(-128, 128, (n, k), generator=torch.Generator().manual_seed(n + k)).to(torch.int8)
    codes.view(-1)[0], codes.view(-1)[-1] = -128, 127
    return codes


def random_inputs(m: int, k: int) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m * 7 + k)) * torch.logspace(-4, 4, m)[:, None]


def run(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, static: float | None = None, *, wide: bool = False) -> Tensor:
    """The kernel's result, from the middle of wider rows into the middle of a wider buffer."""
    (m, k), n = x.shape, codes.shape[0]
    buffer = torch.full((m, k + 5), 3.0)
    buffer[:, 2 : 2 + k] = x
    guarded = torch.full((m + 2, n + 7), 7.0)
    out = guarded[1:-1, 3 : 3 + n]
    given = None if static is None else torch.tensor([static])
    packed = int8_linear.pack(codes, scale, wide=wide)
    found = int8_linear.linear(buffer[:, 2 : 2 + k], packed, pad_bias(bias), out, static_scale=given).clone()
    out.fill_(7.0)
    assert (guarded == 7.0).all()
    return found


def exact(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None = None, static: float | None = None) -> Tensor:
    return reference(x, codes, scale, bias, torch.empty(x.shape[0], codes.shape[0], dtype=torch.float64), static_scale=static)


def assert_rounded(found: Tensor, wanted: Tensor, bias: Tensor | None = None) -> None:
    """A few roundings to float32 apart: a wrong code would be thousands away. The sum itself is exact."""
    size = wanted.abs() + (0 if bias is None else 2 * bias.double().abs())
    assert ((found.double() - wanted).abs() <= 4 * EPS * size).all()


@pytest.mark.parametrize("k", [1, 7, 8, 33, 1000])
@pytest.mark.parametrize("n", [1, COLUMNS - 1, COLUMNS, 2 * COLUMNS + 5])
def test_against_exact_sums(n: int, k: int) -> None:
    codes, scale = random_codes(n, k), torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.01
    bias = torch.randn(n, generator=torch.Generator().manual_seed(k))
    for m in (1, 2, 6, 7, 13, 200):
        x = random_inputs(m, k)
        assert_rounded(run(x, codes, scale), exact(x, codes, scale))
        assert_rounded(run(x, codes, scale, bias), exact(x, codes, scale, bias), bias)


def test_inputs_become_the_references_codes() -> None:
    """Read through an identity matrix, ties and both ends among them."""
    k = 64
    x = random_inputs(9, k)
    x[0, :6] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -126.5])  # scale 1: ties go to even
    x[0, 6:] = 0.0
    codes, x_scale = quantize(x)
    assert codes[0, :6].tolist() == [127, 0, 2, 2, 0, -126]
    found = run(x, torch.eye(k).to(torch.int8), torch.ones(k))
    assert torch.equal(found, codes.float() * x_scale[:, None])
    static = 0.25
    codes, x_scale = quantize(x, static)
    assert {-128, 127} <= set(codes.flatten().tolist())
    assert torch.equal(run(x, torch.eye(k).to(torch.int8), torch.ones(k), static=static), codes.float() * x_scale[:, None])


@pytest.mark.parametrize("k", [1, 7, 8, 33, 1000])
def test_wide_inputs(k: int) -> None:
    """16-bit inputs: as exact, of finer codes, and still below what 32 bits hold where everything is at its greatest."""
    n = COLUMNS + 5
    codes, scale = random_codes(n, k), torch.rand(n, generator=torch.Generator().manual_seed(n)) + 0.01
    limit = wide_limit(k)
    assert k * 128 * limit < 2**31
    for m in (1, 6, 13):
        x = random_inputs(m, k)
        wanted = reference(x, codes, scale, None, torch.empty(m, n, dtype=torch.float64), limit=limit)
        assert_rounded(run(x, codes, scale, wide=True), wanted)
        dense = x.double() @ (codes.double() * scale.double()[:, None]).T
        most = x.abs().amax(1, keepdim=True).double() / limit * (codes.double().abs() @ torch.ones(k, dtype=torch.float64)) * scale
        assert ((wanted - dense).abs() <= 0.51 * most).all()
    ends = torch.stack([torch.full((k,), value, dtype=torch.int8) for value in (-128, 127)])
    x = torch.stack([torch.full((k,), value) for value in (-1.0, 1.0)])
    found = run(x, ends, torch.ones(2), wide=True)
    torch.testing.assert_close(found, torch.tensor([[128.0, -127.0], [-128.0, 127.0]]) * k, rtol=1e-6, atol=0)


@pytest.mark.parametrize("k", [8, 4096, MAX_DEPTH])
def test_extremes_neither_overflow_nor_saturate(k: int) -> None:
    """-128 x -128, 127 x 127 and -128 x 127 in every place: sums up to 2**30."""
    codes = torch.stack([torch.full((k,), value, dtype=torch.int8) for value in (-128, 127)])
    x = torch.stack([torch.full((k,), value) for value in (-1000.0, 1000.0)])
    found = run(x, codes, torch.ones(2), static=1.0)
    assert found.tolist() == [[128.0 * 128 * k, -128.0 * 127 * k], [-127.0 * 128 * k, 127.0 * 127 * k]]


def test_more_inputs_than_sums_can_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 65536"):
        int8_linear.pack(torch.zeros(1, MAX_DEPTH + 1, dtype=torch.int8), torch.ones(1))


def test_static_scale_saturates() -> None:
    codes, scale, bias = random_codes(37, 100), torch.rand(37) + 0.01, torch.randn(37)
    x = torch.randn(20, 100, generator=torch.Generator().manual_seed(1)) * 3
    for static in (0.001, 0.02, 10.0):
        assert_rounded(run(x, codes, scale, bias, static), exact(x, codes, scale, bias, static), bias)


def test_a_row_of_zeros_is_the_bias() -> None:
    codes, bias = random_codes(21, 40), torch.randn(21)
    x = torch.randn(9, 40)
    x[[0, 4]] = 0.0
    assert torch.equal(run(x, codes, torch.ones(21), bias)[[0, 4]], bias.expand(2, 21))
    assert torch.equal(run(x, codes, torch.ones(21))[4], torch.zeros(21))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("static", [None, 0.05])
def test_what_is_not_finite_makes_its_row_nan(bad: float, static: float | None) -> None:
    codes, x = random_codes(21, 40), torch.randn(9, 40, generator=torch.Generator().manual_seed(2))
    clean = run(x, codes, torch.ones(21), static=static)
    for column in (0, 39):
        damaged = x.clone()
        damaged[3, column] = bad
        found = run(damaged, codes, torch.ones(21), static=static)
        assert found[3].isnan().all()
        assert exact(damaged, codes, torch.ones(21), static=static)[3].isnan().all()
        others = [row for row in range(9) if row != 3]
        assert torch.equal(found[others], clean[others])


def test_rows_are_the_weights() -> None:
    codes, scale = random_codes(2 * COLUMNS + 5, 33), torch.rand(2 * COLUMNS + 5)
    packed = int8_linear.pack(codes, scale)
    ids = torch.tensor([0, 2 * COLUMNS + 4, COLUMNS, COLUMNS - 1, 0])
    assert torch.equal(int8_linear.rows(packed, ids), codes[ids].float() * scale[ids, None])
    assert int8_linear.rows(packed, ids[:0]).shape == (0, 33)
    for index in (-1, 2 * COLUMNS + 5):
        with pytest.raises(IndexError, match=f"a weight that has {2 * COLUMNS + 5}"):
            int8_linear.rows(packed, torch.tensor([0, index]))


def test_no_rows_at_all() -> None:
    assert run(torch.empty(0, 40), random_codes(21, 40), torch.ones(21)).shape == (0, 21)


def test_weights_take_a_byte_each() -> None:
    n, k = 4 * COLUMNS, 1024
    assert int8_linear.pack(random_codes(n, k), torch.ones(n)).nbytes == n * (k + 4 + 4)


# --- other CPUs ------------------------------------------------------------------------------------------------------

_COMPILE = """
import sys
from llvmlite import binding
width, kind, cpus, wanted, register = int(sys.argv[1]), *sys.argv[2:6]
real = binding.get_host_cpu_features
binding.get_host_cpu_features = lambda: {**real(), "avx512f": width == 16}
from octavo.kernels.cpu import int8_code, jit
binding.get_host_cpu_features = real
binding.initialize_native_target(); binding.initialize_native_asmprinter()
assert int8_code.WIDTH == width
for cpu in cpus.split(","):
    machine = jit.host_machine(cpu)
    assembly = machine.emit_assembly(jit.optimized(int8_code.emit(kind), machine))
    lines = [line for line in assembly.splitlines() if wanted in line and register in line]
    assert len(lines) >= 2 * (1 + 2 + 3 + 4 + 5 + 6), (cpu, len(lines))
    assert "callq" not in assembly, cpu
    assert all(f"tile{rows}:" in assembly for rows in range(1, 7))
"""


@pytest.mark.skipif("x86_64" not in os.uname().machine, reason="x86's code can only be emitted on x86")
@pytest.mark.parametrize(
    ("width", "kind", "cpus", "instruction", "register"),
    [
        (16, "vnni", "cascadelake,sapphirerapids", "vpdpbusd", "zmm"),
        (16, "madd", "skylake-avx512", "vpmaddwd", "zmm"),
        (8, "madd", "haswell,znver3", "vpmaddwd", "ymm"),
        (8, "plain", "haswell", "vpm", "ymm"),
    ],
)
def test_code_for_other_cpus(width: int, kind: str, cpus: str, instruction: str, register: str) -> None:
    """The intrinsics' signatures are LLVM's, and come out as the one instruction that each is for."""
    command = [sys.executable, "-c", _COMPILE, str(width), kind, cpus, instruction, register]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("width", [8, 16])
def test_plain_code_computes_the_same(width: int, tmp_path: Path) -> None:
    """What CPUs without such instructions run, with vectors of either width: run in a process that believes to be on one."""
    code = f"""
import sys
from llvmlite import binding
real = binding.get_host_cpu_features
binding.get_host_cpu_features = lambda: {{**real(), "avx512f": {width} == 16}}
from octavo.kernels.cpu import int8_code
binding.get_host_cpu_features = lambda: {{}}
assert int8_code.way() == "plain" and int8_code.WIDTH == {width}
binding.get_host_cpu_features = real
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_int8_linear as here
here.test_against_exact_sums(2 * here.COLUMNS + 5, 33)
here.test_static_scale_saturates()
here.test_extremes_neither_overflow_nor_saturate(4096)
"""
    environment = {**os.environ} if width == WIDTH else {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
