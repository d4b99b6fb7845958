"""Typed loads and stores by plain integer address inside Numba functions. Nothing is bounds-checked; no array object is built.

Kernels here get addresses (int64, bytes) rather than arrays: a call from Python then costs the same for any tensor dtype,
bfloat16 included, which NumPy lacks.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_F32 = ir.FloatType()
_I16 = ir.IntType(16)
_I32 = ir.IntType(32)


def _pointer(builder: Any, address: Any, pointee: Any) -> Any:
    return builder.inttoptr(address, ir.PointerType(pointee))


def _loader(pointee: Any, result: Any) -> Any:
    def load(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(builder, args[0], pointee))

        return result(types.int64), codegen

    return load


def _storer(pointee: Any, value_type: Any) -> Any:
    def store(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(args[1], _pointer(builder, args[0], pointee))
            return context.get_dummy_value()

        return types.void(types.int64, value_type), codegen

    return store


load_f32 = intrinsic(_loader(_F32, types.float32))
load_i32 = intrinsic(_loader(_I32, types.int32))
load_i64 = intrinsic(_loader(ir.IntType(64), types.int64))
load_u8 = intrinsic(_loader(ir.IntType(8), types.uint8))
load_u16 = intrinsic(_loader(_I16, types.uint16))
store_f32 = intrinsic(_storer(_F32, types.float32))
store_i64 = intrinsic(_storer(ir.IntType(64), types.int64))
store_u16 = intrinsic(_storer(_I16, types.uint16))


@numba.njit(nogil=True)
def argument(arguments: int, index: int) -> int:
    """Number `index` of a block of int64 arguments."""
    return load_i64(arguments + 8 * index)


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32, as uint32."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits (uint32)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(args[0], _F32)

    return types.float32(types.uint32), codegen


@intrinsic
def load_bf16(typingctx: Any, address: Any) -> Any:
    """The bfloat16 at an address, as float32 (exact)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        half = builder.load(_pointer(builder, args[0], _I16))
        wide = builder.shl(builder.zext(half, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, _F32)

    return types.float32(types.int64), codegen


@intrinsic
def store_bf16(typingctx: Any, address: Any, value: Any) -> Any:
    """Round a float32 to the nearest bfloat16 (ties to even) and store it. NaN stays NaN."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits = builder.bitcast(args[1], _I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[1], args[1])
        quiet = builder.or_(bits, ir.Constant(_I32, 0x400000))
        high = builder.lshr(builder.select(is_nan, quiet, rounded), ir.Constant(_I32, 16))
        builder.store(builder.trunc(high, _I16), _pointer(builder, args[0], _I16))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen


@intrinsic
def load_f16(typingctx: Any, address: Any) -> Any:
    """The float16 at an address, as float32 (exact)."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.load(_pointer(builder, args[0], ir.HalfType())), _F32)

    return types.float32(types.int64), codegen


@intrinsic
def store_f16(typingctx: Any, address: Any, value: Any) -> Any:
    """Round a float32 to the nearest float16 and store it."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(builder.fptrunc(args[1], ir.HalfType()), _pointer(builder, args[0], ir.HalfType()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), codegen
