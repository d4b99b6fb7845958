"""The register tile: C[rows, columns] (+)= A[rows, depth] @ B[depth, columns] with every partial sum in a vector register.

Emitted as LLVM vector code, because Numba's own vectorizer keeps no tile of accumulators. Everything that multiplies
matrices on the CPU is built from it: linears over packed weights, and both products of attention over KV pages.
It knows addresses and strides in bytes, and no layout beyond "a row of B is contiguous".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numba
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BDtype = Literal["float32", "bfloat16", "float16"]

_F32 = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


def _vector_width() -> int:
    features = binding.get_host_cpu_features()
    return 16 if features.get("avx512f") else 8


WIDTH = _vector_width()  # floats in one register
MAX_ROWS = 6
COLUMNS = 2 * WIDTH  # columns of a full tile: 6 x 2 accumulators fit 16 registers with room for operands


def specialised(*kinds: object) -> Callable[[Any], Any]:
    """A decorator to stand under njit where a factory makes one function of several kinds: gives each a name of its own.

    Machine code knows a function by its name, its argument types and a number counted within the process that compiled it. Kernels
    that different processes compiled meet in one that loads both from the cache: of two functions alike in all three, the first
    would serve both, with wrong results.
    """

    def rename(function: Any) -> Any:
        function.__qualname__ += "_" + "_".join(map(str, kinds))
        return function

    return rename


def _load_b(builder: Any, address: Any, dtype: BDtype, width: int) -> Any:
    """`width` consecutive elements of B as floats."""
    vector_i32 = ir.VectorType(_I32, width)
    element = {"float32": _F32, "bfloat16": _I16, "float16": ir.HalfType()}[dtype]
    raw = builder.load(builder.inttoptr(address, ir.PointerType(ir.VectorType(element, width))))
    raw.align = 4 if dtype == "float32" else 2
    if dtype == "float32":
        return raw
    if dtype == "float16":
        return builder.fpext(raw, ir.VectorType(_F32, width))
    wide = builder.shl(builder.zext(raw, vector_i32), ir.Constant(vector_i32, [16] * width))
    return builder.bitcast(wide, ir.VectorType(_F32, width))


def _broadcast_a(builder: Any, address: Any, width: int) -> Any:
    vector = ir.VectorType(_F32, width)
    value = builder.load(builder.inttoptr(address, ir.PointerType(_F32)))
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(_I32, width), [0] * width))


def make_tile(*, rows: int, vectors: int, dtype: BDtype, width: int = WIDTH) -> Any:
    """An intrinsic `tile(a, a_row, b, b_row, c, c_row, depth, accumulate)` for one tile shape.

    A is float32 [rows, depth], B is `dtype` [depth, vectors * width], C is float32 [rows, vectors * width]. a, b, c are
    addresses and a_row, b_row, c_row byte strides between rows, all int64. `accumulate` (int64) 0 overwrites C, 1 adds to it.
    """
    vector = ir.VectorType(_F32, width)
    element_size = 4 if dtype == "float32" else 2
    fma_type = ir.FunctionType(vector, [vector] * 3)

    def emit(builder: Any, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, depth: Any, accumulate: Any) -> None:
        def at(base: Any, offset: int) -> Any:
            return builder.add(base, ir.Constant(_I64, offset))

        fma = cgutils.get_or_insert_function(builder.module, fma_type, f"llvm.fma.v{width}f32")
        cells = [[cgutils.alloca_once(builder, vector) for _ in range(vectors)] for _ in range(rows)]
        c_rows = [builder.add(c, builder.mul(c_row, ir.Constant(_I64, i))) for i in range(rows)]
        adds = builder.icmp_signed("!=", accumulate, ir.Constant(_I64, 0))
        with builder.if_else(adds) as (then, otherwise):
            with then:
                for i in range(rows):
                    for j in range(vectors):
                        old = builder.load(builder.inttoptr(at(c_rows[i], 4 * width * j), ir.PointerType(vector)))
                        old.align = 4
                        builder.store(old, cells[i][j])
            with otherwise:
                for i in range(rows):
                    for j in range(vectors):
                        builder.store(ir.Constant(vector, [0.0] * width), cells[i][j])
        a_rows = [builder.add(a, builder.mul(a_row, ir.Constant(_I64, i))) for i in range(rows)]
        with cgutils.for_range(builder, depth, intp=_I64) as loop:
            b_at = builder.add(b, builder.mul(b_row, loop.index))
            columns = [_load_b(builder, at(b_at, element_size * width * j), dtype, width) for j in range(vectors)]
            a_offset = builder.mul(loop.index, ir.Constant(_I64, 4))
            for i in range(rows):
                scalar = _broadcast_a(builder, builder.add(a_rows[i], a_offset), width)
                for j in range(vectors):
                    builder.store(builder.call(fma, [scalar, columns[j], builder.load(cells[i][j])]), cells[i][j])
        for i in range(rows):
            for j in range(vectors):
                stored = builder.store(builder.load(cells[i][j]), builder.inttoptr(at(c_rows[i], 4 * width * j), ir.PointerType(vector)))
                stored.align = 4

    def tile(typingctx: Any, a: Any, a_row: Any, b: Any, b_row: Any, c: Any, c_row: Any, depth: Any, accumulate: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            emit(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 8), codegen

    return intrinsic(tile)


def make_row_tiles(*, vectors: int, dtype: BDtype, width: int = WIDTH) -> Any:
    """A Numba function like `make_tile`'s with a leading `rows` (1 to MAX_ROWS), which picks the tile of that height."""
    tile1, tile2, tile3, tile4, tile5, tile6 = (
        make_tile(rows=r, vectors=vectors, dtype=dtype, width=width) for r in range(1, MAX_ROWS + 1)
    )

    @numba.njit(nogil=True)
    @specialised(vectors, dtype, width)
    def row_tiles(rows: int, a: int, a_row: int, b: int, b_row: int, c: int, c_row: int, depth: int, accumulate: int) -> None:
        if rows == 6:
            tile6(a, a_row, b, b_row, c, c_row, depth, accumulate)
        elif rows == 5:
            tile5(a, a_row, b, b_row, c, c_row, depth, accumulate)
        elif rows == 4:
            tile4(a, a_row, b, b_row, c, c_row, depth, accumulate)
        elif rows == 3:
            tile3(a, a_row, b, b_row, c, c_row, depth, accumulate)
        elif rows == 2:
            tile2(a, a_row, b, b_row, c, c_row, depth, accumulate)
        elif rows == 1:
            tile1(a, a_row, b, b_row, c, c_row, depth, accumulate)

    return row_tiles
