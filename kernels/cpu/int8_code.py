"""Code for whole-number products on the CPU, emitted as LLVM: quantize rows of inputs, and multiply a tile of them with a panel.

Three ways, by what the CPU has. AVX512-VNNI: `vpdpbusd` takes four products a lane, of unsigned inputs (code + 128; the panel's sums
take the 128 out again). AVX2 or AVX-512: `vpmaddwd` takes two, of inputs as 16-bit integers. Elsewhere: plain vector code, two a lane.
Sums are exact: below 2**31 for K up to 65,536.
"""

from __future__ import annotations

import functools
from typing import Any, Final, Literal

from llvmlite import binding, ir
from numba.core import cgutils

from .jit import compile_module, new_function
from .quantize_code import INTS, greatest, round_run
from .tile import COLUMNS, MAX_ROWS, WIDTH
from .vector_math import at, constant, fma, load_unaligned, splat, store_unaligned

Way = Literal["vnni", "madd", "plain"]

MAX_DEPTH: Final = 1 << 16
TILE_ARGUMENTS: Final = 10
QUANTIZE_ARGUMENTS: Final = 9
_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
_INTS, _FLOATS = ir.VectorType(_I32, COLUMNS), ir.VectorType(_F32, COLUMNS)
_HALF_INTS = ir.VectorType(_I32, WIDTH)
# As the intrinsic was until LLVM 21; newer ones, which name bytes, take this from text and convert it. The other way round fails.
_VNNI = ir.FunctionType(_HALF_INTS, [_HALF_INTS] * 3)


@functools.cache
def way() -> Way:
    """What this CPU has."""
    features = binding.get_host_cpu_features()
    if WIDTH == 16 and features.get("avx512vnni"):
        return "vnni"
    if (WIDTH == 16 and features.get("avx512bw")) or (WIDTH == 8 and features.get("avx2")):
        return "madd"
    return "plain"


def products_per_lane(kind: Way) -> int:
    """Consecutive inputs that lie side by side in a panel: [K / this, COLUMNS, this]."""
    return 4 if kind == "vnni" else 2


def code_bytes(kind: Way) -> int:
    """Bytes of one quantized input."""
    return 1 if kind == "vnni" else 2


def _halves(builder: Any, value: Any) -> list[Any]:
    """A vector's two halves: what fits one register each."""
    half = value.type.count // 2
    order = ir.VectorType(_I32, half)
    return [
        builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), ir.Constant(order, list(range(i * half, (i + 1) * half))))
        for i in (0, 1)
    ]


def _dot(builder: Any, kind: Way, total: Any, x: Any, w: Any) -> Any:
    """total[WIDTH int32] + products: x is one lane's inputs (int32) for all lanes, w bytes of WIDTH lanes."""
    inputs = splat(builder, x, WIDTH)
    if kind == "vnni":
        function = cgutils.get_or_insert_function(builder.module, _VNNI, "llvm.x86.avx512.vpdpbusd.512")
        return builder.call(function, [total, inputs, builder.bitcast(w, _HALF_INTS)])
    shorts = ir.VectorType(_I16, 2 * WIDTH)
    return builder.add(total, pair_products(builder, kind, builder.sext(w, shorts), builder.bitcast(inputs, shorts)))


def pair_products(builder: Any, kind: Way, wide: Any, pairs: Any) -> Any:
    """Sums of the products of neighbours: two vectors of 2 * WIDTH int16 to WIDTH int32."""
    shorts = wide.type
    if kind == "madd":
        name = "llvm.x86.avx512.pmaddw.d.512" if WIDTH == 16 else "llvm.x86.avx2.pmadd.wd"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_HALF_INTS, [shorts, shorts]), name)
        return builder.call(function, [wide, pairs])
    product = builder.mul(builder.sext(wide, ir.VectorType(_I32, 2 * WIDTH)), builder.sext(pairs, ir.VectorType(_I32, 2 * WIDTH)))
    undefined, order = ir.Constant(product.type, ir.Undefined), ir.VectorType(_I32, WIDTH)
    even, odd = (builder.shuffle_vector(product, undefined, ir.Constant(order, list(range(i, 2 * WIDTH, 2)))) for i in (0, 1))
    return builder.add(even, odd)


def _emit_tile(module: ir.Module, kind: Way, rows: int) -> None:
    """tile(x, x_row, panel, c, c_row, lanes, x_scale, w_scale, start, bias): c[rows, COLUMNS] of quantized rows and one panel.

    `lanes` is K in units of products_per_lane; start int32 [COLUMNS] is what sums begin with, bias 0 for none.
    """
    builder, arguments = new_function(module, f"tile{rows}", TILE_ARGUMENTS)
    x, x_row, panel, c, c_row, lanes, x_scale, w_scale, start, bias = arguments
    x_rows = [builder.add(x, builder.mul(x_row, ir.Constant(_I64, r))) for r in range(rows)]
    begin = _halves(builder, load_unaligned(builder, start, _INTS))
    cells = [[cgutils.alloca_once(builder, _HALF_INTS) for _ in range(2)] for _ in range(rows)]
    for row in cells:
        for cell, value in zip(row, begin, strict=True):
            builder.store(value, cell)
    step = products_per_lane(kind)
    half = ir.VectorType(_I8, WIDTH * step)
    with cgutils.for_range(builder, lanes, intp=_I64) as loop:
        place = builder.add(panel, builder.mul(loop.index, ir.Constant(_I64, COLUMNS * step)))
        weights = [load_unaligned(builder, at(builder, place, i * WIDTH * step), half) for i in range(2)]
        offset = builder.mul(loop.index, ir.Constant(_I64, step * code_bytes(kind)))
        for row, address in zip(cells, x_rows, strict=True):
            inputs = load_unaligned(builder, builder.add(address, offset), _I32)
            for cell, w in zip(row, weights, strict=True):
                builder.store(_dot(builder, kind, builder.load(cell), inputs, w), cell)
    scales = _halves(builder, load_unaligned(builder, w_scale, _FLOATS))
    has_bias = builder.icmp_signed("!=", bias, ir.Constant(_I64, 0))
    biases = _halves(builder, load_unaligned(builder, builder.select(has_bias, bias, w_scale), _FLOATS))
    zeros = constant(biases[0].type, 0.0)
    for r, row in enumerate(cells):
        scale = splat(builder, load_unaligned(builder, at(builder, x_scale, 4 * r), _F32), WIDTH)
        target = builder.add(c, builder.mul(c_row, ir.Constant(_I64, r)))
        for i, cell in enumerate(row):
            total = builder.sitofp(builder.load(cell), scale.type)
            value = fma(builder, total, builder.fmul(scale, scales[i]), builder.select(has_bias, biases[i], zeros))
            store_unaligned(builder, value, at(builder, target, 4 * WIDTH * i))
    builder.ret_void()


def _emit_quantize(module: ir.Module, kind: Way) -> None:
    """quantize(x, x_row, rows, k, codes, codes_row, scales, static, limit): rows of K float32, K a multiple of 8.

    `static` is 0 or the address of the scale; `limit` is the greatest code.
    """
    builder, (x, x_row, rows, k, codes, codes_row, scales, static, limit) = new_function(module, "quantize", QUANTIZE_ARGUMENTS)
    steps = builder.udiv(k, ir.Constant(_I64, 8))
    top = builder.sitofp(limit, _F32)
    bottom = builder.fsub(builder.fneg(top), ir.Constant(_F32, 1.0))
    is_static = builder.icmp_signed("!=", static, ir.Constant(_I64, 0))
    given = load_unaligned(builder, builder.select(is_static, static, x), _F32)
    with cgutils.for_range(builder, rows, intp=_I64) as loop:
        row = builder.add(x, builder.mul(loop.index, x_row))
        target = builder.add(codes, builder.mul(loop.index, codes_row))
        most, poison = greatest(builder, row, steps)
        scale = builder.select(is_static, given, builder.fdiv(most, top))
        place = builder.add(scales, builder.mul(loop.index, ir.Constant(_I64, 4)))
        store_unaligned(builder, builder.fadd(scale, poison), place)

        def put(index: Any, whole: Any, target: Any = target) -> None:
            if kind == "vnni":
                whole = builder.add(whole, constant(INTS, 128))
            narrow = builder.trunc(whole, ir.VectorType(_I8 if kind == "vnni" else _I16, 8))
            store_unaligned(builder, narrow, builder.add(target, builder.mul(index, ir.Constant(_I64, 8 * code_bytes(kind)))))

        round_run(builder, row, steps, scale, poison, bottom, top, put)
    builder.ret_void()


def emit(kind: Way) -> ir.Module:
    """quantize, and tile1 to tile6 by rows."""
    module = ir.Module()
    _emit_quantize(module, kind)
    for rows in range(1, MAX_ROWS + 1):
        _emit_tile(module, kind, rows)
    return module


@functools.cache
def compiled(kind: Way) -> dict[str, int]:
    """Addresses of the functions, compiled at the first call."""
    return compile_module(emit(kind))
