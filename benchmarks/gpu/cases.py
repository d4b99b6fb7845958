"""What the correctness part checks: every operation and tile-table entry of an architecture, as plain data. Builds no tensor.

A case names shapes, dtypes and formats; checks.py makes its data, runs it and judges it. The rows of the cases of an operation fall into
every entry of its table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import cycle
from typing import Any, Literal

from octavo.kernels.gpu.config import entries, operations

Dtype = Literal["bf16", "fp16", "fp32"]
Added = Literal["symmetric", "zeros", "offset", "two-level", "two-level symmetric"]
Source = Literal["plain", "norm", "add_norm", "silu"]
Inputs = Literal["none", "token", "group", "static"]  # how a linear's inputs are quantized

ROWS = (1, 15, 16, 17, 33, 100, 257, 1000)
_HALVES: tuple[Dtype, ...] = ("bf16", "fp16")


@dataclass(frozen=True)
class Named:
    @property
    def name(self) -> str:
        """Its kind and its fields, but for those at their defaults; one of a kind."""
        words = [type(self).__name__.removesuffix("Case").lower()]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                words.append(str(value) if isinstance(value, str) else f"{field.name}={value}")
        return " ".join(words)


@dataclass(frozen=True)
class ScaledCase(Named):
    """kernels/gpu/scaled_linear.py through `launch`. `w_rows` None: one scale for all rows; a group of None: for all inputs."""

    op: str
    m: int
    n: int
    k: int
    w_rows: int | None = 1
    group: int | None = None
    x_group: int | None = None
    static: bool = False
    bias: bool = True
    out: Dtype = "bf16"
    sms: int = 0  # multiprocessors that the launch is planned for; 0: the card's


@dataclass(frozen=True)
class GroupedCase(Named):
    """kernels/gpu/grouped_linear.py through `launch`; inputs are fp8 where the operation's name ends in a8."""

    op: str
    m: int
    n: int
    k: int
    group: int | None = None
    added: Added = "zeros"
    act_order: bool = False
    bias: bool = True
    dtype: Dtype = "bf16"
    scales: Dtype = "fp16"

    @property
    def bits(self) -> int:
        return int(self.op[1])

    @property
    def is_fp8(self) -> bool:
        return self.op.endswith("fp8")

    @property
    def fp8_inputs(self) -> bool:
        return self.op.endswith("a8")


@dataclass(frozen=True)
class DenseCase(Named):
    """kernels/gpu/dense_linear.py: 16-bit weights; and that a row's bits are the same alone."""

    m: int
    n: int
    k: int
    bias: bool = True
    dtype: Dtype = "bf16"
    op: str = "dense"


@dataclass(frozen=True)
class DequantizeCase(Named):
    """A packed weight [N, K] taken apart."""

    bits: int
    n: int
    k: int
    group: int | None = None
    added: Added = "zeros"
    act_order: bool = False
    is_fp8: bool = False
    dtype: Dtype = "fp32"


@dataclass(frozen=True)
class RowsCase(Named):
    """kernels/gpu/quantize_rows.py: rows as they are, or after a norm or a gate."""

    source: Source
    codes: Literal["fp8", "int8"]
    m: int
    k: int
    dtype: Dtype = "bf16"
    group: int | None = None
    static: bool = False


@dataclass(frozen=True)
class LinearCase(Named):
    """A LinearKernel class by its name, from a weight's canonical form to the product."""

    kernel: str
    kind: Literal["integer", "fp8"]
    bits: int
    m: int
    n: int
    k: int
    group: int | None = None
    added: Added = "symmetric"
    act_order: bool = False
    inputs: Inputs = "none"
    bias: bool = True
    dtype: Dtype = "bf16"


Case = ScaledCase | GroupedCase | DenseCase | DequantizeCase | RowsCase | LinearCase


def all_cases(arch: int) -> tuple[Case, ...]:
    """Everything, for a machine with the GPU."""
    dense = [DenseCase(m, n, k, bias=n == 300, dtype=dtype) for m in ROWS for n, k in ((300, 1000), (4096, 4096)) for dtype in _HALVES]
    found = [*quick_cases(arch), *_scaled(arch), *_grouped(arch), *dense, *_dequantized(), *_rows(arch, small=False), *_linears(arch)]
    return tuple(dict.fromkeys(found))


def quick_cases(arch: int) -> tuple[Case, ...]:
    """One small case for each entry of the commonest tables, and for each class: for sanitizers and for the interpreter."""
    found: list[Case] = []
    for op in ("fp8", "fp8_grouped", "int8", "w4a16", "w4a16_fine", "w3a16", "w8a16_fp8", "w4a8"):
        if op not in operations(arch):
            continue
        for m in _least_rows(arch, op):
            found += _quick(op, m)
    found += [DenseCase(3, 70, 200), DequantizeCase(4, 70, 192, 64, act_order=True), DequantizeCase(8, 10, 128, 64, is_fp8=True)]
    found += [*_rows(arch, small=True), *_quick_linears(arch)]
    return tuple(dict.fromkeys(found))


def rows_of(arch: int, op: str) -> tuple[int, ...]:
    """Numbers of rows for an operation: ROWS, and the most of every entry that none of them falls into."""
    found, least = list(ROWS), 0
    for most, _ in entries(arch, op):
        if most is not None and not any(least < m <= most for m in ROWS):
            found.append(most)
        least = most or 0
    return tuple(sorted(found))


def is_dense(arch: int, op: str, m: int) -> bool:
    """Whether the table has `m` rows multiplied by torch, after the weight is taken apart."""
    tile = next(tile for most, tile in entries(arch, op) if most is None or m <= most)
    return tile.route == "dense"


def _least_rows(arch: int, op: str) -> Iterator[int]:
    """Rows for every entry of a table: one, and one more than the entry before serves."""
    least = 1
    for most, _ in entries(arch, op):
        yield least
        least = (most or 0) + 1


def _quick(op: str, m: int) -> Iterator[Case]:
    if op in ("fp8", "int8"):
        yield ScaledCase(op, m, 70, 1104)
    elif op.endswith("grouped"):
        yield ScaledCase(op, m, 150, 1072, 128, 128, 128)
    elif m <= 512:
        group = {"w4a16_fine": 32, "w8a16_fp8": None}.get(op, 64)
        yield GroupedCase(op, m, 70, 1088, group, "symmetric" if op == "w8a16_fp8" else "zeros")


_SCALED: Sequence[dict[str, Any]] = (
    {},
    {"static": True, "out": "fp16"},
    {"w_rows": None, "bias": False, "out": "fp32"},
    {"out": "fp16", "bias": False},
)
_SCALED_GROUPS = (
    {"w_rows": 128, "group": 128, "x_group": 128},
    {"group": 128, "out": "fp16"},
    {"w_rows": 128, "group": 128, "static": True, "bias": False},
    {"group": 32, "x_group": 128},
    {"w_rows": 64, "group": 96, "x_group": 32, "out": "fp32"},
)
_INPUT_GROUPS = ({"x_group": 128}, {"x_group": 32, "out": "fp16", "bias": False})  # of inputs alone: tiles are the ungrouped ones
_SCALED_SHAPES = ((512, 2048), (333, 1103), (72, 4096), (3, 1040))


def _scaled(arch: int) -> Iterator[ScaledCase]:
    for op in operations(arch):
        if not op.startswith(("fp8", "int8")):
            continue
        is_grouped = op.endswith("grouped")
        forms: Iterator[dict[str, Any]] = cycle(_SCALED_GROUPS if is_grouped else _SCALED)
        for m in rows_of(arch, op):
            for n, k in _SCALED_SHAPES:
                yield ScaledCase(op, m, n, k, **next(forms))
            for form in _SCALED_GROUPS if is_grouped else _INPUT_GROUPS:
                yield ScaledCase(op, m, 200, 1072, **form)
        for m in (2200, 4096):  # blocks that walk over many tiles
            yield ScaledCase(op, m, 1000, 1072, **next(forms), sms=8)


# Group, inputs. The second of a group ends off the tile.
_GROUP_SHAPES: Sequence[tuple[int | None, int]] = ((128, 4096), (128, 1152), (64, 1088), (None, 1103), (None, 2048), (256, 1280))
_FINE_SHAPES: Sequence[tuple[int | None, int, Added]] = (
    (32, 1056, "zeros"), (32, 4096, "offset"), (128, 1152, "offset"), (32, 1024, "two-level"), (24, 1080, "zeros"), (16, 1040, "symmetric"),
)  # fmt: skip
_FP8_SHAPES: Sequence[tuple[int | None, int]] = ((None, 4096), (128, 1152), (None, 1103), (64, 1088), (8, 1048))
_A8_SHAPES: Sequence[tuple[int | None, int]] = ((128, 4096), (64, 1088), (32, 1056), (None, 1536))


def _grouped(arch: int) -> Iterator[Case]:
    for op in operations(arch):
        if not op.startswith("w"):
            continue
        forms = _forms_of(op)
        for index, m in enumerate(rows_of(arch, op)):
            for n in (512, 333) if index % 2 else (200, 72):
                yield from _case_or_linear(arch, replace(next(forms), m=m, n=n))
            if op == "w4a16":
                yield from _product(arch, m)


def _forms_of(op: str) -> Iterator[GroupedCase]:
    """One form after the other, round and round; dtype, bias and order change with other periods."""
    dtypes: Iterator[Dtype] = cycle(("bf16", "fp16", "bf16", "fp16", "fp16"))
    biases, orders = cycle((True, False, True)), cycle((False, False, False, True))
    added: Iterator[Added] = cycle(("zeros", "symmetric", "zeros"))
    for form in cycle(_shapes_of(op)):
        group, k, *rest = form
        is_fp8 = op.endswith("fp8")
        kind: Added = "symmetric" if is_fp8 else rest[0] if rest else next(added)
        is_ordered = next(orders) and kind in ("zeros", "symmetric") and not is_fp8 and not op.endswith("a8")
        dtype: Dtype = "bf16" if op.endswith("a8") else next(dtypes)
        yield GroupedCase(op, 0, 0, k, group, kind, act_order=is_ordered, bias=next(biases), dtype=dtype)


def _shapes_of(op: str) -> Sequence[Any]:
    if op.endswith("fine"):
        return _FINE_SHAPES
    if op.endswith("fp8"):
        return _FP8_SHAPES
    return _A8_SHAPES if op.endswith("a8") else _GROUP_SHAPES


def _product(arch: int, m: int) -> Iterator[Case]:
    """The commonest operation in all its usual forms."""
    dtypes: tuple[Dtype, ...] = ("bf16", "fp16")
    kinds: tuple[Added, ...] = ("zeros", "symmetric")
    if m not in (1, 17, 100):
        return
    for dtype in dtypes:
        for added in kinds:
            for group, k in ((128, 2048), (64, 2048), (None, 1000)):
                yield from _case_or_linear(arch, GroupedCase("w4a16", m, 200, k, group, added, act_order=m == 17, dtype=dtype))


def _case_or_linear(arch: int, case: GroupedCase) -> Iterator[Case]:
    """The case, or where torch multiplies, that of the class that asks torch to."""
    if not is_dense(arch, case.op, case.m):
        yield case
    elif case.added in ("zeros", "symmetric"):
        kind: Literal["fp8", "integer"] = "fp8" if case.is_fp8 else "integer"
        yield LinearCase(
            "triton_weight_only", kind, case.bits, case.m, case.n, case.k, case.group, case.added, case.act_order, bias=case.bias,
            dtype=case.dtype,
        )  # fmt: skip


def _dequantized() -> Iterator[DequantizeCase]:
    for bits in (2, 3, 4, 5, 6, 8):
        for n, k, group in ((70, 1088, 64), (512, 1152, 128), (333, 1103, None)):
            yield DequantizeCase(bits, n, k, group, act_order=n == 333)
        yield DequantizeCase(bits, 200, 1056, 32, "offset", dtype="bf16")
        yield DequantizeCase(bits, 200, 2048, 128, dtype="fp16")
    yield DequantizeCase(8, 333, 1088, 64, "symmetric", is_fp8=True)
    yield DequantizeCase(8, 333, 1103, None, "symmetric", is_fp8=True)


def _rows(arch: int, *, small: bool) -> Iterator[RowsCase]:
    kinds: tuple[Literal["fp8", "int8"], ...] = ("fp8", "int8") if "fp8" in operations(arch) else ("int8",)
    sources: tuple[Source, ...] = ("plain", "norm", "add_norm", "silu")
    dtypes: tuple[Dtype, ...] = ("bf16",) if small else ("bf16", "fp16", "fp32")
    widths = ((2, 577),) if small else ((1, 33), (17, 577), (100, 4096), (3, 14336), (2, 28672))
    for source in sources:
        for codes in kinds:
            for dtype in dtypes:
                for m, k in widths:
                    yield RowsCase(source, codes, m, k, dtype)
            yield RowsCase(source, codes, 3, 577 if small else 4096, group=128)
            if not small:
                yield RowsCase(source, codes, 257, 1104, "fp16", static=True)
                yield RowsCase(source, codes, 1000, 1072, group=32)
                yield RowsCase(source, codes, 2, 28672, group=128)


def _quick_linears(arch: int) -> Iterator[LinearCase]:
    if "fp8" in operations(arch):
        yield LinearCase("triton_fp8", "fp8", 8, 5, 96, 256, inputs="token")
        yield LinearCase("triton_fp8", "fp8", 8, 5, 96, 256, 128, inputs="group")
        yield LinearCase("torch_scaled_mm", "fp8", 8, 5, 96, 256, inputs="token")
        yield LinearCase("triton_w4a8_fp8", "integer", 4, 5, 70, 256, 64)
    yield LinearCase("triton_int8", "integer", 8, 5, 70, 256, inputs="token")
    yield LinearCase("triton_weight_only", "integer", 4, 5, 70, 256, 64, "zeros", act_order=True)
    yield LinearCase("triton_weight_only", "integer", 4, 600, 70, 256, 64, "zeros", dtype="fp16")
    yield LinearCase("torch_int4pack", "integer", 4, 5, 96, 256, 64, "zeros")
    yield LinearCase("autoawq_kernels", "integer", 4, 5, 128, 256, 64, "zeros", dtype="fp16")


def _linears(arch: int) -> Iterator[LinearCase]:
    yield from _quick_linears(arch)
    for m in (1, 16, 33, 257, 1000):
        if "fp8" in operations(arch):
            yield from _fp8_linears(m)
        for inputs in _each("token", "static"):
            yield LinearCase("triton_int8", "integer", 8, m, 333, 1103, inputs=inputs)
        for bits in (2, 3, 4, 5, 6, 8):
            yield LinearCase("triton_weight_only", "integer", bits, m, 333, 1088, 64, "zeros", act_order=bits in (3, 4, 8))
            yield LinearCase("triton_weight_only", "integer", bits, m, 200, 1152, 128, dtype="fp16", bias=False)
            if bits <= 4 and "fp8" in operations(arch):
                yield LinearCase("triton_w4a8_fp8", "integer", bits, m, 333, 1088, 64, "zeros")
        for group in (None, 128):
            yield LinearCase("triton_weight_only", "fp8", 8, m, 333, 1152, group, dtype="fp16")
        for group in (32, 64, 128):
            yield LinearCase("torch_int4pack", "integer", 4, m, 512, 1152, group, "zeros", bias=m > 1)
            yield LinearCase("autoawq_kernels", "integer", 4, m, 512, 1152, group, "zeros", dtype="fp16")


def _fp8_linears(m: int) -> Iterator[LinearCase]:
    for inputs in _each("token", "static"):
        yield LinearCase("triton_fp8", "fp8", 8, m, 333, 1103, inputs=inputs)
        yield LinearCase("torch_scaled_mm", "fp8", 8, m, 512, 1104, inputs=inputs, bias=m > 1)
    yield LinearCase("triton_fp8", "fp8", 8, m, 200, 1152, 128, inputs="group", dtype="fp16")
    yield LinearCase("triton_fp8", "fp8", 8, m, 200, 1152, inputs="group", bias=False)


def _each(*inputs: Inputs) -> Iterable[Inputs]:
    return inputs
