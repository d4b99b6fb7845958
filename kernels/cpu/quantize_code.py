"""Rounding a run of floats to whole numbers, emitted as LLVM code: the greatest magnitude, then codes. Knows no layout.

A NaN or an infinity poisons the run: it comes out as a NaN to be added to the scale, and the codes are zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .vector_math import constant, fma, load, reduce, splat

_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
FLOATS, INTS = ir.VectorType(_F32, 8), ir.VectorType(_I32, 8)


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = ir.FunctionType(FLOATS, [FLOATS] * len(args))
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.{name}.v8f32"), args)


def _at(builder: Any, source: Any, index: Any) -> Any:
    return load(builder, builder.add(source, builder.mul(index, ir.Constant(_I64, 32))), FLOATS)


def greatest(builder: Any, source: Any, steps: Any) -> tuple[Any, Any]:
    """max|x| of `steps` times 8 floats, without NaN, and 0 or, where one is not finite, NaN."""
    most_cell, poison_cell = cgutils.alloca_once(builder, FLOATS), cgutils.alloca_once(builder, FLOATS)
    builder.store(constant(FLOATS, 0.0), most_cell)
    builder.store(constant(FLOATS, 0.0), poison_cell)
    with cgutils.for_range(builder, steps, intp=_I64) as loop:
        value = _at(builder, source, loop.index)
        size, most = _call(builder, "fabs", value), builder.load(most_cell)
        builder.store(builder.select(builder.fcmp_ordered(">", size, most), size, most), most_cell)
        # NaN stays, and so does infinity, whose product with 0 it is.
        builder.store(fma(builder, value, constant(FLOATS, 0.0), builder.load(poison_cell)), poison_cell)
    most = reduce(builder, builder.load(most_cell), lambda a, b: builder.select(builder.fcmp_ordered(">", a, b), a, b))
    return most, reduce(builder, builder.load(poison_cell), builder.fadd)


def round_run(builder: Any, source: Any, steps: Any, scale: Any, poison: Any, low: Any, high: Any, put: Callable[[Any, Any], None]) -> None:
    """put(index, codes) for every 8 floats: int32 round(x / scale) within low..high, ties to even; zeros for a scale of 0 or a poison."""
    healthy = builder.and_(builder.fcmp_ordered("==", poison, poison), builder.fcmp_ordered(">", scale, ir.Constant(_F32, 0.0)))
    divisor = splat(builder, builder.select(healthy, scale, ir.Constant(_F32, float("inf"))), 8)
    bottom, top = splat(builder, low, 8), splat(builder, high, 8)
    with cgutils.for_range(builder, steps, intp=_I64) as loop:
        value = builder.fdiv(_at(builder, source, loop.index), divisor)
        value = builder.select(builder.fcmp_ordered("==", value, value), value, constant(FLOATS, 0.0))  # inf / inf
        value = _call(builder, "rint", _call(builder, "minnum", _call(builder, "maxnum", value, bottom), top))
        put(loop.index, builder.fptosi(value, INTS))
