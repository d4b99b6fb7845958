"""Vector pieces of attention, emitted as LLVM code: softmax over a row of scores, key transposition, values by row address.

Each piece does the same arithmetic in the same order for an element whatever stands around it, so that results do not depend on
how work was cut. They know addresses and byte strides; pages are the caller's business.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .address import load_f32, load_i64, store_f32
from .tile import MAX_ROWS, WIDTH, specialised
from .vector_math import FLOAT8, at, constant, exp2_of, fma, for_vectors, load, reduce, splat, store, tanh_of

KVDtype = Literal["float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2"]
SIZE: Final[dict[KVDtype, int]] = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "float8_e4m3fn": 1, "float8_e5m2": 1}

_F32 = ir.FloatType()
_I8 = ir.IntType(8)
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_BYTES = ir.PointerType(ir.IntType(8))
_VECTOR = ir.VectorType(_F32, WIDTH)
FEW_ROWS = 3  # 12 sums, 3 weights and a column fill 16 registers


@intrinsic
def cap_scores(typingctx: Any, scores: Any, count: Any, inverse: Any, cap: Any) -> Any:
    """scores[i] = cap * tanh(scores[i] * inverse) for `count` floats (a multiple of WIDTH)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        inverses, caps = splat(builder, args[2], WIDTH), splat(builder, args[3], WIDTH)

        def body(address: Any) -> None:
            store(builder, builder.fmul(tanh_of(builder, builder.fmul(load(builder, address, _VECTOR), inverses)), caps), address)

        for_vectors(builder, args[0], args[1], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.float32), codegen


@intrinsic
def softmax_row(typingctx: Any, scores: Any, count: Any, factor: Any, result: Any) -> Any:
    """scores[i] = 2 ** ((scores[i] - greatest) * factor) in place; stores the greatest and the sum at `result`.

    `count` is a multiple of WIDTH. A row of -inf becomes zeros, with greatest -inf and sum 0.
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        scores, count, factor, result = args
        factors = splat(builder, factor, WIDTH)
        bottom = constant(_VECTOR, float("-inf"))
        greatest_cell, sum_cell = (cgutils.alloca_once(builder, _VECTOR) for _ in range(2))
        builder.store(bottom, greatest_cell)
        builder.store(constant(_VECTOR, 0.0), sum_cell)

        def larger(a: Any, b: Any) -> Any:
            return builder.select(builder.fcmp_ordered(">", b, a), b, a)

        def first(address: Any) -> None:
            builder.store(larger(builder.load(greatest_cell), load(builder, address, _VECTOR)), greatest_cell)

        for_vectors(builder, scores, count, first)
        greatest = reduce(builder, builder.load(greatest_cell), larger)
        empty = builder.fcmp_ordered("==", greatest, ir.Constant(_F32, float("-inf")))
        shift = splat(builder, builder.select(empty, ir.Constant(_F32, 0.0), greatest), WIDTH)

        def second(address: Any) -> None:
            # The factor comes after the difference, where rounding is relative to a small number.
            weight = exp2_of(builder, builder.fmul(builder.fsub(load(builder, address, _VECTOR), shift), factors))
            store(builder, weight, address)
            builder.store(builder.fadd(builder.load(sum_cell), weight), sum_cell)

        for_vectors(builder, scores, count, second)
        store(builder, greatest, result)
        store(builder, reduce(builder, builder.load(sum_cell), builder.fadd), at(builder, result, 4))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32, types.int64), codegen


def _blend(builder: Any, total: Any, keep: Any, part: Any, weight: Any, count: Any, width: int) -> None:
    kind = ir.VectorType(_F32, width)
    keeps, weights = splat(builder, keep, width), splat(builder, weight, width)
    with cgutils.for_range(builder, builder.udiv(count, ir.Constant(_I64, width)), intp=_I64) as loop:
        offset = builder.mul(loop.index, ir.Constant(_I64, 4 * width))
        old, new = load(builder, builder.add(total, offset), kind), load(builder, builder.add(part, offset), kind)
        store(builder, fma(builder, new, weights, builder.fmul(old, keeps)), builder.add(total, offset))


@intrinsic
def blend(typingctx: Any, total: Any, keep: Any, part: Any, weight: Any, count: Any) -> Any:
    """total[i] = total[i] * keep + part[i] * weight for `count` floats (a multiple of 8)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _blend(builder, *args, 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.float32, types.int64), codegen


@intrinsic
def scale_row(typingctx: Any, source: Any, factor: Any, target: Any, count: Any) -> Any:
    """target[i] = source[i] * factor for `count` floats (a multiple of 8)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        source, factor, target, count = args
        kind = ir.VectorType(_F32, 8)
        factors = splat(builder, factor, 8)
        with cgutils.for_range(builder, builder.udiv(count, ir.Constant(_I64, 8)), intp=_I64) as loop:
            offset = builder.mul(loop.index, ir.Constant(_I64, 32))
            store(builder, builder.fmul(load(builder, builder.add(source, offset), kind), factors), builder.add(target, offset))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64, types.int64), codegen


@intrinsic
def multiply(typingctx: Any, target: Any, factors: Any, count: Any) -> Any:
    """target[i] *= factors[i] for `count` floats (a multiple of WIDTH)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        target, factors, count = args
        ahead = builder.sub(factors, target)

        def body(address: Any) -> None:
            factor = load(builder, builder.add(address, ahead), _VECTOR)
            store(builder, builder.fmul(load(builder, address, _VECTOR), factor), address)

        for_vectors(builder, target, count, body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@numba.njit(nogil=True, error_model="numpy")
def gather_scales(rows: int, count: int, dim: int, target: int) -> None:
    """The scales of `count` quantized rows, given by address, one float32 after the other."""
    for i in range(count):
        store_f32(target + 4 * i, load_f32(load_i64(rows + 8 * i) + dim))


def _float8(builder: Any, shifted: Any, dtype: KVDtype) -> Any:
    """float8 codes, without their scale: exponent and mantissa stand where a float32 has them, the sign at the top, anything between.

    A code's NaN does not count: see kernels/pages.py.
    """
    mantissa, bias, _ = FLOAT8[dtype]
    floats = ir.VectorType(_F32, shifted.type.count)
    bits = builder.and_(shifted, constant(shifted.type, 0x80000000 | 0x7F << (23 - mantissa)))
    return builder.fmul(builder.bitcast(bits, floats), constant(floats, 2.0 ** (127 - bias)))


def _widen(builder: Any, address: Any, dtype: KVDtype, width: int) -> Any:
    """`width` consecutive stored elements as float32; codes without their scale."""
    floats = ir.VectorType(_F32, width)
    if dtype == "float32":
        return load(builder, address, floats)
    if dtype == "float16":
        return builder.fpext(load(builder, address, ir.VectorType(ir.HalfType(), width)), floats)
    integers = ir.VectorType(_I32, width)
    if SIZE[dtype] == 1:
        signed = builder.sext(load(builder, address, ir.VectorType(_I8, width)), integers)
        if dtype == "int8":
            return builder.sitofp(signed, floats)
        return _float8(builder, builder.shl(signed, constant(integers, 23 - FLOAT8[dtype][0])), dtype)
    wide = builder.shl(builder.zext(load(builder, address, ir.VectorType(_I16, width)), integers), constant(integers, 16))
    return builder.bitcast(wide, floats)


def _transpose8(builder: Any, rows: list[Any]) -> list[Any]:
    """Eight vectors of eight, transposed in the three steps that map to unpack, shuffle and lane-permute instructions."""

    def mix(a: Any, b: Any, order: tuple[int, ...]) -> Any:
        return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_I32, 8), list(order)))

    low, high = (0, 8, 1, 9, 4, 12, 5, 13), (2, 10, 3, 11, 6, 14, 7, 15)
    pairs = [mix(rows[i], rows[i + 1], order) for i in (0, 2, 4, 6) for order in (low, high)]
    left, right = (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15)
    quads = [mix(pairs[base + i], pairs[base + i + 2], order) for base in (0, 4) for i in (0, 1) for order in (left, right)]
    first, second = (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)
    return [mix(quads[i], quads[i + 4], first) for i in range(4)] + [mix(quads[i], quads[i + 4], second) for i in range(4)]


def _prefetch(builder: Any, address: Any) -> None:
    pointer = builder.inttoptr(address, _BYTES)
    kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
    read, keep, data = (ir.Constant(_I32, value) for value in (0, 3, 1))
    builder.call(builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], kind), [pointer, read, keep, data])


def _bf16_pairs(builder: Any, addresses: list[Any]) -> list[Any]:
    """Sixteen bfloat16 of each of eight keys as sixteen columns of float32: transposed in pairs, half the shuffles."""
    integers = ir.VectorType(_I32, 8)
    pairs = _transpose8(builder, [load(builder, address, integers) for address in addresses])
    columns: list[Any] = []
    for pair in pairs:
        low = builder.shl(pair, constant(integers, 16))
        high = builder.and_(pair, constant(integers, 0xFFFF0000))
        columns += [builder.bitcast(half, ir.VectorType(_F32, 8)) for half in (low, high)]
    return columns


def _code_quads(builder: Any, addresses: list[Any], dtype: KVDtype) -> list[Any]:
    """Thirty-two codes of each of eight keys as thirty-two columns of float32, without scales: a quarter of the shuffles."""
    integers = ir.VectorType(_I32, 8)
    columns: list[Any] = []
    for quad in _transpose8(builder, [load(builder, address, integers) for address in addresses]):
        for byte in range(4):
            high = builder.shl(quad, constant(integers, 24 - 8 * byte)) if byte < 3 else quad
            if dtype == "int8":
                columns.append(builder.sitofp(builder.ashr(high, constant(integers, 24)), ir.VectorType(_F32, 8)))
            else:
                columns.append(_float8(builder, builder.ashr(high, constant(integers, 1 + FLOAT8[dtype][0])), dtype))
    return columns


def make_transpose(dtype: KVDtype) -> Any:
    """An intrinsic `transpose(rows, ahead, dim, target, target_row)`: eight keys, given by address, become float32 columns.

    Codes become numbers that their scale is still to be multiplied with.

    `rows` is the address of eight int64 addresses of `dim` elements each (a multiple of 8); target[d, 0..8] is float32. The rows
    whose addresses stand at `ahead` are fetched into the cache meanwhile.
    """
    size = SIZE[dtype]

    def emit(builder: Any, rows: Any, ahead: Any, dim: Any, target: Any, target_row: Any) -> None:
        keys, others = (
            [builder.load(builder.inttoptr(at(builder, base, 8 * i), ir.PointerType(_I64))) for i in range(8)] for base in (rows, ahead)
        )

        def step(first: Any, width: int) -> None:
            """Columns first..first+width."""
            offset = builder.mul(first, ir.Constant(_I64, size))
            addresses = [builder.add(key, offset) for key in keys]
            for other in others:
                _prefetch(builder, builder.add(other, offset))
            if width == 32:
                columns = _code_quads(builder, addresses, dtype)
            elif width == 16:
                columns = _bf16_pairs(builder, addresses)
            else:
                columns = _transpose8(builder, [_widen(builder, address, dtype, 8) for address in addresses])
            place = builder.add(target, builder.mul(target_row, first))
            for i, column in enumerate(columns):
                store(builder, column, builder.add(place, builder.mul(target_row, ir.Constant(_I64, i))))

        width = {"bfloat16": 16, "float32": 8, "float16": 8}.get(dtype, 32)
        with cgutils.for_range(builder, builder.udiv(dim, ir.Constant(_I64, width)), intp=_I64) as loop:
            step(builder.mul(loop.index, ir.Constant(_I64, width)), width)
        if width > 8:
            rest = builder.and_(builder.lshr(dim, ir.Constant(_I64, 3)), ir.Constant(_I64, width // 8 - 1))
            with cgutils.for_range(builder, rest, intp=_I64) as loop:
                step(builder.sub(dim, builder.mul(builder.add(loop.index, ir.Constant(_I64, 1)), ir.Constant(_I64, 8))), 8)

    def transpose(typingctx: Any, rows: Any, ahead: Any, dim: Any, target: Any, target_row: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return intrinsic(transpose)


def make_gather_tile(*, rows: int, vectors: int, dtype: KVDtype, width: int) -> Any:
    """An intrinsic `tile(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)`: tile.make_tile's product with B's rows given by address.

    `b_rows` is the address of `depth` int64 row addresses; each row is read at `b_offset` bytes from there.
    The rows whose addresses stand at `ahead` are fetched into the cache meanwhile, at the same offset.
    """
    vector = ir.VectorType(_F32, width)
    size = SIZE[dtype]

    def emit(builder: Any, a: Any, a_row: Any, b_rows: Any, ahead: Any, b_offset: Any, c: Any, c_row: Any, depth: Any) -> None:
        cells = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
        for row in cells:
            for cell in row:
                builder.store(constant(vector, 0.0), cell)
        a_rows = [builder.add(a, builder.mul(a_row, ir.Constant(_I64, i))) for i in range(rows)]
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            slot = builder.add(b_rows, builder.mul(loop.index, ir.Constant(_I64, 8)))
            b_at = builder.add(builder.load(builder.inttoptr(slot, ir.PointerType(_I64))), b_offset)
            other = builder.load(builder.inttoptr(builder.add(ahead, builder.mul(loop.index, ir.Constant(_I64, 8))), ir.PointerType(_I64)))
            _prefetch(builder, builder.add(other, b_offset))
            a_offset = builder.mul(loop.index, ir.Constant(_I64, 4))

            def weight(i: int) -> Any:
                return splat(builder, load(builder, builder.add(a_rows[i], a_offset), _F32), width)

            def column(j: int) -> Any:
                return _widen(builder, at(builder, b_at, size * width * j), dtype, width)

            def add(i: int, j: int, one: Any, other: Any) -> None:
                builder.store(fma(builder, one, other, builder.load(cells[i][j])), cells[i][j])

            # The smaller set of operands stays in registers, the other passes through one: sums must not be spilled.
            if rows > vectors:
                columns = [column(j) for j in range(vectors)]
                for i in range(rows):
                    one = weight(i)
                    for j in range(vectors):
                        add(i, j, one, columns[j])
            else:
                weights = [weight(i) for i in range(rows)]
                for j in range(vectors):
                    other = column(j)
                    for i in range(rows):
                        add(i, j, weights[i], other)
        for i in range(rows):
            target = builder.add(c, builder.mul(c_row, ir.Constant(_I64, i)))
            for j in range(vectors):
                store(builder, builder.load(cells[i][j]), at(builder, target, 4 * width * j))

    def tile(typingctx: Any, a: Any, a_row: Any, b_rows: Any, ahead: Any, b_offset: Any, c: Any, c_row: Any, depth: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return intrinsic(tile)


def make_gather_tiles(*, vectors: int, dtype: KVDtype, width: int = WIDTH) -> Any:
    """A Numba function `(rows, a, a_row, b_rows, ahead, b_offset, c, c_row, depth)` that picks the tile of 1 to MAX_ROWS rows."""
    tile1, tile2, tile3, tile4, tile5, tile6 = (
        make_gather_tile(rows=r, vectors=vectors, dtype=dtype, width=width) for r in range(1, MAX_ROWS + 1)
    )

    @numba.njit(nogil=True, error_model="numpy")
    @specialised(vectors, dtype, width)
    def tiles(rows: int, a: int, a_row: int, b_rows: int, ahead: int, b_offset: int, c: int, c_row: int, depth: int) -> None:
        if rows == 6:
            tile6(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 5:
            tile5(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 4:
            tile4(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 3:
            tile3(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 2:
            tile2(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 1:
            tile1(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)

    return tiles


def make_few_row_tiles(dtype: KVDtype) -> Any:
    """Like `make_gather_tiles` for 1 to FEW_ROWS rows, of four vectors.

    A tile of few rows has too few sums in flight to hide an addition's delay; twice the columns make up for it.
    """
    tile1, tile2, tile3 = (make_gather_tile(rows=r, vectors=4, dtype=dtype, width=WIDTH) for r in range(1, FEW_ROWS + 1))

    @numba.njit(nogil=True, error_model="numpy")
    @specialised(dtype)
    def tiles(rows: int, a: int, a_row: int, b_rows: int, ahead: int, b_offset: int, c: int, c_row: int, depth: int) -> None:
        if rows == 3:
            tile3(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        elif rows == 2:
            tile2(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)
        else:
            tile1(a, a_row, b_rows, ahead, b_offset, c, c_row, depth)

    return tiles
