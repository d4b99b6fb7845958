"""Vector arithmetic emitted as LLVM code: exponentials, broadcasts, reductions, and loads by base address and index.

The emitters (`*_of`, and those that take a builder) work on one float32 or a vector of them, with the same bits for each element.
The indexed loads and stores let LLVM vectorize plain Numba loops, which it cannot where an address is computed for each element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .tile import WIDTH

_F32 = ir.FloatType()
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)
_EXP2 = (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1, 6.931472028550421e-1)
_TANH = (-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1)  # Cephes, for |x| < 0.625
_LOG2E = 1.4426950408889634
_I8 = ir.IntType(8)
FLOAT8 = {"float8_e4m3fn": (3, 7, 448.0), "float8_e5m2": (2, 15, 57344.0)}  # bits of mantissa, exponent's bias, greatest number


def _suffix(kind: Any) -> str:
    return f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"


def constant(kind: Any, value: float) -> Any:
    return ir.Constant(kind, [value] * kind.count if isinstance(kind, ir.VectorType) else value)


def _integers(kind: Any) -> Any:
    return ir.VectorType(_I32, kind.count) if isinstance(kind, ir.VectorType) else _I32


def _call(builder: Any, name: str, *args: Any) -> Any:
    kind = args[0].type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * len(args)), f"llvm.{name}.{_suffix(kind)}")
    return builder.call(function, args)


def fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return _call(builder, "fma", a, b, c)


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = constant(x.type, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma(builder, value, x, constant(x.type, coefficient))
    return value


def exp2_of(builder: Any, x: Any) -> Any:
    """2 ** x for x <= 127 with a relative error below 2e-7; exactly 0 from -127 down (so for -inf), NaN for NaN."""
    kind = x.type
    low = constant(kind, -127.0)
    x = builder.select(builder.fcmp_ordered("<", x, low), low, x)
    whole = _call(builder, "rint", x)
    fraction = builder.fsub(x, whole)
    mantissa = fma(builder, _polynomial(builder, fraction, _EXP2), fraction, constant(kind, 1.0))
    integers = _integers(kind)
    exponent = builder.add(builder.fptosi(whole, integers), constant(integers, 127))
    power = builder.bitcast(builder.shl(exponent, constant(integers, 23)), kind)
    return builder.fmul(mantissa, power)


def tanh_of(builder: Any, x: Any) -> Any:
    kind = x.type
    square = builder.fmul(x, x)
    small = fma(builder, builder.fmul(_polynomial(builder, square, _TANH), square), x, x)
    size = _call(builder, "fabs", x)
    most = constant(kind, 15.0)
    size = builder.select(builder.fcmp_ordered(">", size, most), most, size)
    power = exp2_of(builder, builder.fmul(size, constant(kind, 2 * _LOG2E)))
    large = builder.fsub(constant(kind, 1.0), builder.fdiv(constant(kind, 2.0), builder.fadd(power, constant(kind, 1.0))))
    large = _call(builder, "copysign", large, x)
    return builder.select(builder.fcmp_ordered("<", _call(builder, "fabs", x), constant(kind, 0.625)), small, large)


def at(builder: Any, base: Any, offset: int) -> Any:
    return builder.add(base, ir.Constant(_I64, offset))


def load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, ir.PointerType(kind)))
    element = getattr(kind, "element", kind)
    value.align = {_F32: 4, _I8: 1}.get(element, 2)
    return value


def store(builder: Any, value: Any, address: Any) -> None:
    stored = builder.store(value, builder.inttoptr(address, ir.PointerType(value.type)))
    stored.align = 4


def load_unaligned(builder: Any, address: Any, kind: Any) -> Any:
    """A value of any kind from any address."""
    value = builder.load(builder.inttoptr(address, ir.PointerType(kind)))
    value.align = 1
    return value


def store_unaligned(builder: Any, value: Any, address: Any) -> None:
    """A value of any kind to any address."""
    builder.store(value, builder.inttoptr(address, ir.PointerType(value.type))).align = 1


def splat(builder: Any, value: Any, width: int) -> Any:
    kind = ir.VectorType(value.type, width)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(_I32, width), [0] * width))


def reduce(builder: Any, value: Any, combine: Callable[[Any, Any], Any]) -> Any:
    """Combine all lanes by halving."""
    width = value.type.count
    while width > 1:
        half = width // 2
        undefined = ir.Constant(value.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(value, undefined, ir.Constant(ir.VectorType(_I32, half), list(range(i * half, (i + 1) * half))))
            for i in (0, 1)
        )
        value, width = combine(low, high), half
    return builder.extract_element(value, ir.Constant(_I32, 0))


def for_vectors(builder: Any, address: Any, count: Any, body: Callable[[Any], None]) -> None:
    """Run body(address of a vector) over `count` floats, a multiple of WIDTH."""
    steps = builder.udiv(count, ir.Constant(_I64, WIDTH))
    with cgutils.for_range(builder, steps, intp=_I64) as loop:
        body(builder.add(address, builder.mul(loop.index, ir.Constant(_I64, 4 * WIDTH))))


@intrinsic
def exp2(typingctx: Any, x: Any) -> Any:
    """2 ** x of one float32, with the same bits as the vector form."""
    return types.float32(types.float32), lambda context, builder, signature, args: exp2_of(builder, args[0])


def _indexed_loader(element: Any) -> Any:
    def load_at(typingctx: Any, base: Any, index: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(builder.gep(builder.inttoptr(args[0], ir.PointerType(element)), [args[1]]))

        return types.float32(types.int64, types.int64), codegen

    return load_at


def _indexed_storer(element: Any, convert: Callable[[Any, Any], Any]) -> Any:
    def store_at(typingctx: Any, base: Any, index: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            place = builder.gep(builder.inttoptr(args[0], ir.PointerType(element)), [args[1]])
            builder.store(convert(builder, args[2]), place)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.float32), codegen

    return store_at


def _bfloat16_bits(builder: Any, value: Any) -> Any:
    """The nearest bfloat16 (ties to even) as 16 bits; NaN stays NaN."""
    bits = builder.bitcast(value, _I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(_I32, 16)), ir.Constant(_I32, 1))
    rounded = builder.add(bits, builder.add(odd, ir.Constant(_I32, 0x7FFF)))
    is_nan = builder.fcmp_unordered("uno", value, value)
    high = builder.lshr(builder.select(is_nan, builder.or_(bits, ir.Constant(_I32, 0x400000)), rounded), ir.Constant(_I32, 16))
    return builder.trunc(high, ir.IntType(16))


def clamp(builder: Any, value: Any, low: float, high: float) -> Any:
    """Between low and high; NaN stays."""
    kind = value.type
    value = builder.select(builder.fcmp_ordered("<", value, constant(kind, low)), constant(kind, low), value)
    return builder.select(builder.fcmp_ordered(">", value, constant(kind, high)), constant(kind, high), value)


def _int8_bits(builder: Any, value: Any) -> Any:
    """The nearest int8 (ties to even), saturating; 0 for NaN."""
    value = builder.select(builder.fcmp_unordered("uno", value, value), constant(value.type, 0.0), value)
    whole = builder.fptosi(_call(builder, "rint", clamp(builder, value, -128.0, 127.0)), _I32)
    return builder.trunc(whole, _I8)


def _float8_bits(kind: str) -> Callable[[Any, Any], Any]:
    """The nearest float8 (ties to even) as 8 bits, saturating; NaN for NaN."""
    mantissa, bias, greatest = FLOAT8[kind]
    dropped = 23 - mantissa

    def convert(builder: Any, value: Any) -> Any:
        def word(number: int) -> Any:
            return ir.Constant(_I32, number)

        whole = builder.bitcast(clamp(builder, value, -greatest, greatest), _I32)
        bits = builder.and_(whole, word(0x7FFFFFFF))
        # Exponents that float8 has: round the mantissa by carrying into what is kept.
        odd = builder.and_(builder.lshr(bits, word(dropped)), word(1))
        normal = builder.add(builder.add(bits, odd), word((((bias - 127) << 23) + (1 << (dropped - 1)) - 1) & 0xFFFFFFFF))
        normal = builder.lshr(normal, word(dropped))
        # Below: adding a number whose last bit is the smallest float8 lets the addition round.
        magic = word((127 - bias + 1 + dropped) << 23)
        small = builder.fadd(builder.bitcast(bits, _F32), builder.bitcast(magic, _F32))
        small = builder.sub(builder.bitcast(small, _I32), magic)
        is_small = builder.icmp_unsigned("<", bits, word((128 - bias) << 23))
        code = builder.select(is_small, small, normal)
        code = builder.select(builder.fcmp_unordered("uno", value, value), word(0x7F), code)
        return builder.trunc(builder.or_(code, builder.and_(builder.lshr(whole, word(24)), word(0x80))), _I8)

    return convert


load_f32_at = intrinsic(_indexed_loader(_F32))
store_f32_at = intrinsic(_indexed_storer(_F32, lambda builder, value: value))
store_bf16_at = intrinsic(_indexed_storer(ir.IntType(16), _bfloat16_bits))
store_f16_at = intrinsic(_indexed_storer(ir.HalfType(), lambda builder, value: builder.fptrunc(value, ir.HalfType())))
store_int8_at = intrinsic(_indexed_storer(_I8, _int8_bits))
store_e4m3_at = intrinsic(_indexed_storer(_I8, _float8_bits("float8_e4m3fn")))
store_e5m2_at = intrinsic(_indexed_storer(_I8, _float8_bits("float8_e5m2")))
