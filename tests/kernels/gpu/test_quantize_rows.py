"""Rows rounded to codes under the interpreter, against torch: alone, and bit for bit from the values of a norm or a gate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from octavo.benchmarks.gpu.guarded import Guarded
from octavo.kernels import silu_mul
from octavo.kernels.gpu import quantize_rows as gpu
from octavo.kernels.gpu import scaled_linear
from octavo.kernels.gpu.device import DEVICES
from octavo.kernels.gpu.workspace import Workspace
from octavo.kernels.quantize_rows import ALIGNMENT, SMALLEST, QuantizedRows, reference
from octavo.kernels.rms_norm import rms_norm_reference
from octavo.kernels.scaled_linear import ScaledWeight

H100 = DEVICES[90]
FP8, INT8 = torch.float8_e4m3fn, torch.int8
LIMITS = {FP8: 448.0, INT8: 127.0}
EPS = 1e-5
# Half the distance of neighbours, relative: what one rounding may change. In float32 the whole computation's error.
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2e-6}
SOURCES = ("norm", "add_norm", "silu")

codes_dtypes = pytest.mark.parametrize("codes", [FP8, INT8], ids=["fp8", "int8"])
row_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
widths = pytest.mark.parametrize(("m", "k"), [(2, 1), (1, 15), (1, 31), (2, 33), (1, 100), (2, 577), (1, 1040)])


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows go to the kernel for long ones, with tiles of 128 cells."""
    monkeypatch.setattr(gpu, "_WHOLE_CELLS", 0)
    monkeypatch.setattr(gpu, "_LONG_CELLS", 128)


@pytest.fixture(params=["whole", "long"])
def kernel(request: pytest.FixtureRequest) -> str:
    """The kernel that holds a row at once, and the one for long rows."""
    if request.param == "long":
        request.getfixturevalue("small_tiles")
    return request.param


def strided(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The values in rows that lie among NaN, which a load outside of them would bring in."""
    m, k = values.shape
    wide = torch.full((m + 2, k + 24), torch.nan, dtype=dtype)
    inner = wide[1:-1, 8 : 8 + k]
    inner.copy_(values)
    return inner


def random_rows(m: int, k: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + m + k)
    return strided(torch.randn(m, k, generator=generator) * torch.rand(m, 1, generator=generator).mul(12).sub(6).exp(), dtype)


class Out:
    """Room for codes, scales and values, with guard bands."""

    def __init__(self, m: int, k: int, codes: torch.dtype, group: int | None = None, values: torch.dtype | None = None) -> None:
        size = k if group is None else group
        columns = -(-k // ALIGNMENT) * ALIGNMENT
        self._codes = Guarded((m, columns), codes, stride=columns + 16)
        self._scales = Guarded((m, -(-k // size)), torch.float32, stride=-(-k // size) + 3)
        self._values = None if values is None else Guarded((m, k), values, stride=k + 5)
        self.rows = QuantizedRows(self._codes.tensor, self._scales.tensor, k, size)

    @property
    def values(self) -> Tensor | None:
        return None if self._values is None else self._values.tensor

    def check(self) -> None:
        self._codes.check()
        self._scales.check()
        if self._values is not None:
            self._values.check()
        assert not self.rows.codes[:, self.rows.in_features :].contiguous().view(torch.uint8).any(), "the padding is not zero"


def quantized(x: Tensor, codes: torch.dtype, group: int | None, static: float | None = None) -> tuple[Tensor, Tensor]:
    """Codes as float32 [M, K] and scales, group by group."""
    rounded, scales = [], []
    for cells in x.float().split(x.shape[1] if group is None else group, dim=1):
        scale = torch.full((x.shape[0],), static) if static else cells.abs().amax(1) / LIMITS[codes]
        value = cells / torch.where(scale > 0, scale, 1.0)[:, None]
        value = value.clamp(-LIMITS[codes] - (codes == INT8 and static is not None), LIMITS[codes])
        rounded.append(value.to(FP8).float() if codes == FP8 else value.round())
        scales.append(scale)
    return torch.cat(rounded, 1), torch.stack(scales, 1)


def check_codes(out: Out, values: Tensor, static: float | None = None) -> None:
    """`out` holds exactly what torch and the contract's own reference make of `values`."""
    out.check()
    rows, k = out.rows, out.rows.in_features
    wanted_codes, wanted_scales = quantized(values, rows.codes.dtype, rows.group, static)
    assert torch.equal(rows.scales, wanted_scales)
    assert torch.equal(rows.codes[:, :k].float(), wanted_codes)
    own = QuantizedRows.empty(len(values), k, rows.codes.dtype, group=rows.group, device=values.device)
    reference(values, own, static_scale=None if static is None else torch.tensor(static))
    assert torch.equal(own.codes.float(), rows.codes.float())
    assert torch.equal(own.scales, rows.scales)


@codes_dtypes
@row_dtypes
@widths
def test_rows_as_they_are(m: int, k: int, dtype: torch.dtype, codes: torch.dtype) -> None:
    x = random_rows(m, k, dtype, 1)
    out = Out(m, k, codes)
    gpu.launch(x, out.rows, device=H100)()
    check_codes(out, x)


@codes_dtypes
@pytest.mark.parametrize(("k", "group"), [(577, 32), (577, 96), (1040, 128), (480, 448), (33, 32), (100, 160)])
def test_groups(k: int, group: int, codes: torch.dtype, kernel: str) -> None:
    x = random_rows(1, k, torch.bfloat16, 2) * torch.rand(k).mul(6).exp().bfloat16()
    out = Out(1, k, codes, group)
    gpu.launch(x, out.rows, device=H100)()
    check_codes(out, x)


@pytest.mark.parametrize(("k", "group"), [(20_000, None), (20_000, 128), (40_000, 8192)])
def test_rows_too_long_to_hold(k: int, group: int | None) -> None:
    x, weight = random_rows(1, k, torch.bfloat16, 3), random_rows(1, k, torch.bfloat16, 4)[0]
    out = Out(1, k, FP8, group, torch.bfloat16)
    launched = gpu.launch_rms_norm(x, weight, EPS, out.rows, device=H100, values=out.values)
    assert launched.kernel is gpu._long
    launched()
    check_codes(out, out.values)


def inputs(source: str, m: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, or gate and up side by side; residual; weight."""
    weight = random_rows(1, k, torch.float32, 7)[0].to(dtype)
    x = random_rows(m, k, dtype, 5)
    if source == "silu":
        gate = 5 * torch.randn(m, k, generator=torch.Generator().manual_seed(9))
        x = strided(torch.cat([gate, x], 1), dtype)
    return x, random_rows(m, k, dtype, 6), weight


def run(source: str, x: Tensor, residual: Tensor, weight: Tensor, out: Out, static: float | None = None) -> None:
    scale = None if static is None else torch.tensor([static])
    if source == "plain":
        launch = gpu.launch(x, out.rows, device=H100, static_scale=scale)
    elif source == "silu":
        launch = gpu.launch_silu_mul(x, out.rows, device=H100, static_scale=scale, values=out.values)
    else:
        added = residual if source == "add_norm" else None
        launch = gpu.launch_rms_norm(x, weight, EPS, out.rows, device=H100, residual=added, static_scale=scale, values=out.values)
    launch()


def exact_values(source: str, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the source's values are before they are rounded, float64, and the residual after it."""
    if source == "silu":
        gate, up = x.double().chunk(2, dim=1)
        return gate * torch.sigmoid(gate) * up, residual
    wide = x.double()
    if source == "add_norm":
        residual = (x.float() + residual.float()).to(x.dtype)
        wide = residual.double()
    return wide / (wide.square().mean(1, keepdim=True) + EPS).sqrt() * weight.double(), residual


def check_values(source: str, m: int, k: int, dtype: torch.dtype) -> None:
    """The values that are stored are right, and the codes are exactly theirs, whether they are stored or not."""
    x, residual, weight = inputs(source, m, k, dtype)
    exact, wanted_residual = exact_values(source, x, residual, weight)
    out, alone = Out(m, k, FP8, values=dtype), Out(m, k, INT8)
    for target in (out, alone):
        added = strided(residual, dtype)
        run(source, x, added, weight, target)
        assert torch.equal(added, wanted_residual)
        check_codes(target, out.values)
    error = (out.values.double() - exact).abs()
    assert bool((error <= 1.001 * ROUNDING[dtype] * exact.abs() + ROUNDING[dtype] * torch.finfo(dtype).smallest_normal).all())
    if dtype != torch.float32:
        # A few lie too near to the middle between two numbers of the dtype for float32 to tell which one is nearer.
        assert int((out.values != exact.to(dtype)).sum()) <= 1 + m * k // 1000


@pytest.mark.parametrize("source", SOURCES)
@row_dtypes
@widths
def test_values_and_their_codes(m: int, k: int, dtype: torch.dtype, source: str) -> None:
    check_values(source, m, k, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("source", SOURCES)
@row_dtypes
def test_values_of_long_rows_and_their_codes(dtype: torch.dtype, source: str) -> None:
    check_values(source, 1, 300, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.parametrize("source", SOURCES)
@codes_dtypes
@row_dtypes
def test_fused_is_unfused(source: str, dtype: torch.dtype, codes: torch.dtype) -> None:
    """Bit for bit, with inputs whose sums of squares and whose sigmoids float32 holds exactly, so that no order of sums matters."""
    m, k = 2, 577
    generator = torch.Generator().manual_seed(8)
    whole = torch.randint(-12, 13, (m, k), generator=generator)
    _, residual, weight = inputs(source, m, k, dtype)
    if source == "silu":
        gate = torch.tensor([-120.0, 0.0, 18.0, 23.5, 71.0])[torch.randint(5, (m, k), generator=generator)]
        x = strided(torch.cat([gate, torch.randn(m, k, generator=generator)], 1), dtype)
        unfused = silu_mul.reference(x)
    else:
        x, residual = strided(whole, dtype), strided(whole.roll(1, 0) // 2, dtype)
        unfused = rms_norm_reference(residual + x if source == "add_norm" else x, weight, EPS)
    out = Out(m, k, codes, 96)
    run(source, x, residual, weight, out)
    check_codes(out, unfused)


@codes_dtypes
def test_quotients_are_rounded_once(codes: torch.dtype) -> None:
    """Quotients that hit the middle between two codes or miss it by the last bit of a float32, for greatest magnitudes of all kinds."""
    cells = torch.randint(-255, 256, (2, 256, 32), generator=torch.Generator().manual_seed(9)).float()
    out = Out(2, 8192, codes, 32)
    x = cells.flatten(1).bfloat16()
    gpu.launch(x, out.rows, device=H100)()
    check_codes(out, x)


@codes_dtypes
@row_dtypes
@pytest.mark.parametrize("source", ["plain", *SOURCES])
def test_a_static_scale_saturates(source: str, dtype: torch.dtype, codes: torch.dtype) -> None:
    x, residual, weight = inputs(source, 1, 577, dtype)
    values = x if source == "plain" else exact_values(source, x, residual, weight)[0].to(dtype)
    static = float(values.abs().median()) / LIMITS[codes]
    out = Out(1, 577, codes, values=None if source == "plain" else dtype)
    run(source, x, residual, weight, out, static)
    check_codes(out, x if source == "plain" else out.values, static)
    assert float(out.rows.codes.float().max()) == LIMITS[codes]
    assert float(out.rows.codes.float().min()) == (-128.0 if codes == INT8 else -448.0)


def test_static_scales_and_the_greatest_floats(kernel: str) -> None:
    x = torch.tensor([[3e38, -3e38, 1e-30, -1.0, 0.5]])
    for codes in (FP8, INT8):
        for static in (1e-10, 1e-3, 1.0, 1e10):
            out = Out(1, 5, codes)
            run("plain", x, x, x, out, static)
            check_codes(out, x, static)


def test_int8_codes_are_rounded_to_even() -> None:
    """Every half and its neighbours in float32, and every code's own value."""
    halves = torch.arange(-260, 261).float() / 2
    x = torch.cat([halves, halves.nextafter(torch.tensor(1e9)), halves.nextafter(torch.tensor(-1e9))])[None]
    out = Out(1, x.shape[1], INT8)
    run("plain", x, x, x, out, 1.0)
    assert torch.equal(out.rows.codes[:, : x.shape[1]].float(), torch.round(x).clamp(-128, 127))


@codes_dtypes
def test_zeros_and_next_to_zeros(codes: torch.dtype, kernel: str) -> None:
    x = torch.zeros(4, 40)
    x[1] = SMALLEST / 2
    x[2, 3:5] = torch.tensor([SMALLEST, -SMALLEST / 3])
    x[3] = -0.0
    out = Out(4, 40, codes)
    gpu.launch(x, out.rows, device=H100)()
    out.check()
    assert out.rows.scales.flatten().tolist() == [0.0, 0.0, float(torch.tensor(SMALLEST) / LIMITS[codes]), 0.0]
    assert not out.rows.codes[[0, 1, 3]].float().any()
    assert torch.equal(out.rows.codes[2:3, :40].float(), quantized(x[2:3], codes, None)[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NaN in numpy, where the interpreter computes
@codes_dtypes
@pytest.mark.parametrize(("source", "static", "group"), [
    *((source, static, None) for source in ("plain", *SOURCES) for static in (None, 0.25)), ("plain", None, 32), ("silu", None, 32),
])  # fmt: skip
def test_what_is_not_finite_gives_nan(source: str, static: float | None, group: int | None, codes: torch.dtype) -> None:
    check_not_finite(source, static, group, codes)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("source", "group"), [("plain", None), ("add_norm", None), ("silu", 32)])
def test_what_is_not_finite_in_a_long_row_gives_nan(source: str, group: int | None) -> None:
    check_not_finite(source, None, group, INT8)


def check_not_finite(source: str, static: float | None, group: int | None, codes: torch.dtype) -> None:
    """Rows with a NaN or an infinity after rows without, through a linear."""
    k, n, bad = 64, 16, torch.tensor([torch.nan, torch.inf, -torch.inf])
    x, residual, weight = inputs(source, 4, k, torch.bfloat16)
    x[1:, 40] = bad
    out = Out(4, k, codes, group)
    run(source, x, residual, weight, out, static)
    out.check()
    broken = out.rows.scales.isnan()
    assert broken.any(1).tolist() == [False, True, True, True]
    if "norm" not in source:
        assert broken.sum(1).tolist() == [0, 1, 1, 1]
    y = torch.empty(4, n)
    packed = scaled_linear.pack(ScaledWeight(torch.ones(n, k).to(codes), torch.ones(n, 1), 1, k))
    inputs_of_linear = (out.rows.codes.contiguous(), out.rows.scales.contiguous(), out.rows.group)
    scaled_linear.launch(*inputs_of_linear, packed, None, y, device=H100, workspace=Workspace(torch.device("cpu")))()
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()


def test_columns_are_padded_as_linears_want_them() -> None:
    assert [scaled_linear.padded_inputs(k) for k in (1, 16, 17)] == [Out(1, k, FP8).rows.codes.shape[1] for k in (1, 16, 17)]


def test_fp8_is_refused_where_there_is_none() -> None:
    x, out = torch.zeros(1, 32), Out(1, 32, FP8).rows
    for arch in (80, 86):
        with pytest.raises(ValueError, match=f"sm_89 or newer, not sm_{arch}"):
            gpu.launch(x, out, device=DEVICES[arch])
        assert gpu.refuses(INT8, DEVICES[arch]) is None


def _narrow_codes() -> None:
    QuantizedRows(torch.empty(2, 33, dtype=INT8), torch.empty(2, 1), 33, 33)


@pytest.mark.parametrize(("wrong", "says"), [
    (lambda: Out(2, 64, torch.uint8), "float8_e4m3fn or int8, not torch.uint8"),
    (lambda: Out(2, 64, FP8, 48), "multiples of 32, not 48"),
    (_narrow_codes, r"codes must be \(2, 48\)"),
    (lambda: QuantizedRows(torch.empty(2, 64, dtype=INT8), torch.empty(2, 1), 64, 32), r"scales must be float32 \(2, 2\)"),
    (lambda: gpu.launch(torch.zeros(2, 32), Out(2, 64, FP8).rows, device=H100), r"x must be .* \(2, 64\), not torch.float32 \(2, 32\)"),
    (lambda: gpu.launch(torch.zeros(64, 2).t(), Out(2, 64, FP8).rows, device=H100), "rows of x must be contiguous"),
    (lambda: gpu.launch(torch.zeros(2, 64), Out(2, 64, FP8, 32).rows, device=H100, static_scale=torch.ones(1)), "without groups of 32"),
    (lambda: gpu.launch(torch.zeros(2, 64), Out(2, 64, FP8).rows, device=H100, static_scale=torch.ones(2)), "one float32 number"),
    (lambda: gpu.launch_silu_mul(torch.zeros(2, 64), Out(2, 64, FP8).rows, device=H100), r"gate_up must be .* \(2, 128\)"),
    (lambda: gpu.launch_rms_norm(torch.zeros(2, 64), torch.ones(63), EPS, Out(2, 64, FP8).rows, device=H100), r"weight .* \[64\]"),
])  # fmt: skip
def test_what_does_not_go_is_named(wrong: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        wrong()
