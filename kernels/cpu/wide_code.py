"""Code for quantized weights times 16-bit integer inputs, emitted as LLVM: quantize inputs by group, multiply a tile with a panel.

A paired panel (panel_format.py) gives two inputs' codes side by side with one shift and one mask, and `vpmaddwd` multiplies and adds
sixteen of them: half the instructions of float32, and a third of the unpacking. Sums within a group are exact; over groups
`total += scale * (x_scale * sum(xq * code)) + offset * (x_scale * sum(xq))`.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from llvmlite import ir
from numba.core import cgutils

from .int8_code import Way, pair_products, way
from .jit import compile_module, new_function
from .panel_format import PanelFormat, for_groups, scale_and_offset
from .quantize_code import INTS, greatest, round_run
from .tile import COLUMNS, MAX_ROWS, WIDTH
from .vector_math import at, constant, fma, load, load_unaligned, reduce, splat, store, store_unaligned

TILE_ARGUMENTS: Final = 10
QUANTIZE_ARGUMENTS: Final = 8
_F32, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (16, 32, 64))
_INTS, _FLOATS = ir.VectorType(_I32, COLUMNS), ir.VectorType(_F32, COLUMNS)
_HALF_INTS, _HALF_FLOATS = ir.VectorType(_I32, WIDTH), ir.VectorType(_F32, WIDTH)
_SHORTS = ir.VectorType(_I16, 2 * WIDTH)


def greatest_input(group_size: int, bits: int) -> int:
    """The greatest code of an input: 32767, or less where a group's sum could overflow."""
    return min(32767, (2**31 - 1) // (group_size * ((1 << bits) - 1)))


def _half(builder: Any, value: Any, index: int) -> Any:
    order = ir.Constant(ir.VectorType(_I32, WIDTH), list(range(index * WIDTH, (index + 1) * WIDTH)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), order)


class _Tile:
    """tile(x, x_row, panel, c, c_row, scales, sums, small_row, groups, bias): c[rows, COLUMNS] = x @ panel + bias.

    x int16 rows; scales and sums float32 rows of one number a group, `small_row` bytes apart: `x_scale` and `x_scale * sum(xq)`.
    """

    def __init__(self, module: ir.Module, form: PanelFormat, kind: Way, rows: int) -> None:
        self._form, self._kind, self._rows = form, kind, rows
        builder, arguments = new_function(module, f"tile{rows}", TILE_ARGUMENTS)
        self._builder = builder
        x, x_row, self._panel, c, c_row, scales, sums, small_row, groups, bias = arguments
        self._x_rows, self._scale_rows, self._sum_rows = (
            self._offsets(base, stride) for base, stride in ((x, x_row), (scales, small_row), (sums, small_row))
        )
        self._totals = [[cgutils.alloca_once(builder, _HALF_FLOATS) for _ in range(2)] for _ in range(rows)]
        self._partial = [[cgutils.alloca_once(builder, _HALF_INTS) for _ in range(2)] for _ in range(rows)]
        self._begin(bias)
        for_groups(builder, form, groups, self._group)
        for row, cells in zip(self._offsets(c, c_row), self._totals, strict=True):
            for i, cell in enumerate(cells):
                store(builder, builder.load(cell), at(builder, row, 4 * WIDTH * i))
        builder.ret_void()

    def _offsets(self, base: Any, stride: Any) -> list[Any]:
        return [self._builder.add(base, self._builder.mul(stride, ir.Constant(_I64, i))) for i in range(self._rows)]

    def _begin(self, bias: Any) -> None:
        builder = self._builder
        for cells in self._totals:
            for cell in cells:
                builder.store(constant(_HALF_FLOATS, 0.0), cell)
        with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(_I64, 0))):
            for cells in self._totals:
                for i, cell in enumerate(cells):
                    builder.store(load(builder, at(builder, bias, 4 * WIDTH * i), _HALF_FLOATS), cell)

    def _group(self, above_offset: Any, group_offset: Any, index: Any) -> None:
        builder, form = self._builder, self._form
        group, above = builder.add(self._panel, group_offset), builder.add(self._panel, above_offset)
        for cells in self._partial:
            for cell in cells:
                builder.store(constant(_HALF_INTS, 0), cell)
        codes = at(builder, group, form.header_bytes)
        first = builder.mul(index, ir.Constant(_I64, 2 * form.group_size))
        with cgutils.for_range(builder, ir.Constant(_I64, form.group_size // form.unit), intp=_I64) as loop:
            place = builder.add(codes, builder.mul(loop.index, ir.Constant(_I64, 4 * COLUMNS)))
            words = [load_unaligned(builder, at(builder, place, 4 * WIDTH * i), _HALF_INTS) for i in range(2)]
            offset = builder.add(first, builder.mul(loop.index, ir.Constant(_I64, 2 * form.unit)))
            for j in range(form.unit // 2):
                pairs = [self._pair(word, j) for word in words]
                for row, cells in zip(self._x_rows, self._partial, strict=True):
                    inputs = load_unaligned(builder, at(builder, builder.add(row, offset), 4 * j), _I32)
                    wide = builder.bitcast(splat(builder, inputs, WIDTH), _SHORTS)
                    for pair, cell in zip(pairs, cells, strict=True):
                        builder.store(builder.add(builder.load(cell), pair_products(builder, self._kind, pair, wide)), cell)
        self._add_group(group, above, builder.mul(index, ir.Constant(_I64, 4)))

    def _pair(self, word: Any, j: int) -> Any:
        builder, bits = self._builder, self._form.bits
        mask = ((1 << bits) - 1) * 0x10001
        shifted = builder.lshr(word, constant(_HALF_INTS, j * bits)) if j else word
        return builder.bitcast(builder.and_(shifted, constant(_HALF_INTS, mask)), _SHORTS)

    def _add_group(self, group: Any, above: Any, place: Any) -> None:
        builder = self._builder
        scale, offset = scale_and_offset(builder, self._form, group, above, centered=False)
        for i in range(2):
            part, rest = _half(builder, scale, i), None if offset is None else _half(builder, offset, i)
            for r in range(self._rows):
                x_scale = splat(builder, load_unaligned(builder, builder.add(self._scale_rows[r], place), _F32), WIDTH)
                products = builder.fmul(builder.sitofp(builder.load(self._partial[r][i]), _HALF_FLOATS), x_scale)
                total = fma(builder, products, part, builder.load(self._totals[r][i]))
                if rest is not None:
                    x_sum = splat(builder, load_unaligned(builder, builder.add(self._sum_rows[r], place), _F32), WIDTH)
                    total = fma(builder, x_sum, rest, total)
                builder.store(total, self._totals[r][i])


def _emit_quantize(module: ir.Module, form: PanelFormat) -> None:
    """quantize(x, x_row, rows, groups, codes, codes_row, scales, sums): rows of float32 to int16, scales and sums [rows, groups] float32.

    A group with a NaN or an infinity gets the scale NaN, one of zeros the scale 0.
    """
    builder, (x, x_row, rows, groups, codes, codes_row, scales, sums) = new_function(module, "quantize", QUANTIZE_ARGUMENTS)
    size = form.group_size
    limit = ir.Constant(_F32, float(greatest_input(size, form.bits)))
    steps = ir.Constant(_I64, size // 8)
    sum_cell = cgutils.alloca_once(builder, INTS)
    with cgutils.for_range(builder, rows, intp=_I64) as row, cgutils.for_range(builder, groups, intp=_I64) as group:
        source = builder.add(builder.add(x, builder.mul(row.index, x_row)), builder.mul(group.index, ir.Constant(_I64, 4 * size)))
        target = builder.add(builder.add(codes, builder.mul(row.index, codes_row)), builder.mul(group.index, ir.Constant(_I64, 2 * size)))
        most, poison = greatest(builder, source, steps)
        scale = builder.fdiv(most, limit)
        builder.store(constant(INTS, 0), sum_cell)

        def put(index: Any, whole: Any, target: Any = target) -> None:
            builder.store(builder.add(builder.load(sum_cell), whole), sum_cell)
            place = builder.add(target, builder.mul(index, ir.Constant(_I64, 16)))
            store_unaligned(builder, builder.trunc(whole, ir.VectorType(_I16, 8)), place)

        round_run(builder, source, steps, scale, poison, builder.fneg(limit), limit, put)
        scale = builder.fadd(scale, poison)
        small = builder.mul(builder.add(builder.mul(row.index, groups), group.index), ir.Constant(_I64, 4))
        store(builder, scale, builder.add(scales, small))
        total = builder.sitofp(reduce(builder, builder.load(sum_cell), builder.add), _F32)
        store(builder, builder.fmul(total, scale), builder.add(sums, small))
    builder.ret_void()


def emit(form: PanelFormat, kind: Way) -> ir.Module:
    """quantize, and tile1 to tile6 by rows."""
    module = ir.Module()
    _emit_quantize(module, form)
    for rows in range(1, MAX_ROWS + 1):
        _Tile(module, form, kind, rows)
    return module


@functools.cache
def compiled(form: PanelFormat) -> dict[str, int]:
    """Addresses of a format's functions, compiled at the first call."""
    return compile_module(emit(form, "plain" if way() == "plain" else "madd"))
