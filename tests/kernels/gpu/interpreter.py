"""Mends Triton's interpreter, so that kernels compute on the CPU what a GPU computes. Versions 3.6.0 and 3.9.0. Knows no kernel.

bfloat16 and fp8 lie in numpy arrays as bits. Left alone, arithmetic and `tl.dot` work on those bits, and narrowing conversions
truncate where the GPU rounds to the nearest even and saturates: wrong, and silently so. Here such operands are widened to float32
through torch first, and results narrowed through torch. Also mended: scalars under numpy 2.4 and later (3.6.0), bfloat16 constants,
inline PTX (see ptx.py), and float32 fma, which rounds twice (3.6.0). TRITON_INTERPRET=1 must be set before triton is imported.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from . import ptx

Handle = interpreter.TensorHandle
_TORCH = {
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float16: torch.float16,
    tl.float32: torch.float32,
    tl.float64: torch.float64,
}
_GREATEST = {tl.float8e4nv: 448.0, tl.float8e5: 57344.0}
_HELD_AS_BITS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}
_ARITHMETIC = (
    *(f"f{name}" for name in ("add", "sub", "mul", "div", "rem", "neg", "ma", "abs")),
    *("minnumf", "minimumf", "maxnumf", "maximumf", "clampf", "precise_divf", "approx_divf", "precise_sqrt"),
    *(f"fcmp{order}{relation}" for order in "OU" for relation in ("LT", "GT", "LE", "GE", "EQ", "NE")),
    *("exp", "exp2", "log", "log2", "sin", "cos", "sqrt", "rsqrt", "floor", "ceil", "erf"),
)


def _is_bits(value: Any) -> bool:
    return isinstance(value, Handle) and value.dtype.scalar in _HELD_AS_BITS


def _to_torch(value: Any) -> torch.Tensor:
    flat = torch.from_numpy(np.array(value.data, copy=True).reshape(-1))
    return flat.view(_TORCH[value.dtype.scalar]) if _is_bits(value) else flat


def _to_handle(values: torch.Tensor, shape: tuple[int, ...], dtype: Any) -> Any:
    bits = values.contiguous().view(_HELD_AS_BITS[dtype]) if dtype in _HELD_AS_BITS else values.contiguous()
    return Handle(bits.numpy().reshape(shape), dtype)


def _widen(value: Any) -> Any:
    return _to_handle(_to_torch(value).float(), value.data.shape, tl.float32) if _is_bits(value) else value


def _convert(value: Any, dtype: Any) -> Any:
    """A float of one dtype as another: to the nearest, ties to even; fp8 saturates as cvt.rn.satfinite does."""
    numbers = _to_torch(value)
    if dtype in _GREATEST:
        numbers = numbers.float().clamp(-_GREATEST[dtype], _GREATEST[dtype])
    return _to_handle(numbers.to(_TORCH[dtype]), value.data.shape, dtype)


def _on_floats(original: Callable[..., Any]) -> Callable[..., Any]:
    """The operation, in float32 where an operand is held as bits, its result in that operand's dtype."""

    @functools.wraps(original)
    def operation(self: Any, *args: Any, **options: Any) -> Any:
        narrow = next((arg for arg in args if _is_bits(arg)), None)
        if narrow is None:
            return original(self, *args, **options)
        out = original(self, *map(_widen, args), **options)
        if out.data.dtype == np.bool_:
            return Handle(out.data, tl.int1)
        return _convert(Handle(np.asarray(out.data, np.float32), tl.float32), narrow.dtype.scalar)

    return operation


def _mended_cast(original: Callable[..., Any]) -> Callable[..., Any]:
    def cast(self: Any, source: Any, wanted: Any) -> Any:
        have, want = source.dtype.scalar, wanted.scalar
        if source.data.dtype == np.bool_:
            source = Handle(source.data.astype(np.int32), tl.int32)
        elif have in _TORCH and want in _TORCH:
            return source if have == want else _convert(source, want)
        elif have in _HELD_AS_BITS:
            return original(self, _widen(source), wanted)
        if want in _HELD_AS_BITS:
            return _convert(Handle(source.data.astype(np.float32), tl.float32), want)
        return original(self, source, wanted)

    return cast


_rounds_once: list[bool] = []


@contextlib.contextmanager
def products_rounded_once() -> Iterator[None]:
    """Within it a dot's row has the same bits wherever it stands in its tile, as on matrix units; BLAS sums rows in several ways."""
    _rounds_once.append(True)
    try:
        yield
    finally:
        _rounds_once.pop()


def _mended_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def dot(self: Any, a: Any, b: Any, accumulator: Any, *rest: Any, **options: Any) -> Any:
        if a.dtype.scalar in _TORCH:  # in float32, whose products of narrow numbers are exact, and whose BLAS is fast
            a, b = (_widen(x) if _is_bits(x) else Handle(x.data.astype(np.float32), tl.float32) for x in (a, b))
        else:
            a, b = (Handle(x.data.astype(np.int32), tl.int32) for x in (a, b))
        if _rounds_once and a.dtype.scalar == tl.float32:
            exact = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)).astype(np.float32)
            return Handle(exact + accumulator.data, accumulator.dtype.scalar)
        return original(self, a, b, accumulator, *rest, **options)

    return dot


def _fma_rounded_once(original: Callable[..., Any]) -> Callable[..., Any]:
    def fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.dtype.scalar != tl.float32:
            return original(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
        return Handle(exact.astype(np.float32), tl.float32)

    return fma


def _inline_asm(self: Any, text: str, constraints: str, values: list[Any], kinds: Any, is_pure: bool, pack: int) -> Any:
    wanted = [kind.scalar for kind in kinds]
    found = ptx.run(text, constraints, [np.asarray(value.data) for value in values], [kind.primitive_bitwidth for kind in wanted], pack)
    shape = np.broadcast_shapes(*(value.data.shape for value in values))
    handles = [Handle(bits.reshape(shape).view(interpreter._get_np_dtype(kind)), kind) for bits, kind in zip(found, wanted, strict=True)]
    return _Results(handles)


class _Results:
    """What an inline-assembly operation gives, as the language reads it."""

    def __init__(self, handles: list[Any]) -> None:
        self._handles = handles

    def get_result(self, index: int) -> Any:
        return self._handles[index]


@functools.cache
def torch_scales_rows() -> bool:
    """Whether torch's own product of fp8 codes takes a scale for each row on the CPU too: torch 2.11's takes one for all."""
    codes = torch.zeros(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(codes, codes.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


@functools.cache
def mend() -> None:
    """Mend the interpreter, once in a process."""
    builder = interpreter.InterpreterBuilder
    builder.create_fma = _fma_rounded_once(builder.create_fma)
    for name in _ARITHMETIC:
        if hasattr(builder, f"create_{name}"):
            setattr(builder, f"create_{name}", _on_floats(getattr(builder, f"create_{name}")))
    cast = _mended_cast(builder.cast_impl)
    builder.cast_impl = cast
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast)
    to_fp = builder.create_fp_to_fp

    def fp_to_fp(self: Any, source: Any, wanted: Any, rounding: Any = None) -> Any:
        have, want = source.dtype.scalar, wanted.scalar
        return _convert(source, want) if have in _TORCH and want in _TORCH else to_fp(self, source, wanted, rounding)

    builder.create_fp_to_fp = fp_to_fp
    builder.create_dot = _mended_dot(builder.create_dot)
    builder.create_inline_asm = _inline_asm
    builder.get_bf16 = lambda self, value: _convert(Handle(np.array([value], np.float32), tl.float32), tl.bfloat16)
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any, *args: Any) -> None:
        patch(tensor, scope, *args)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    interpreter._patch_lang_tensor = patch_tensor
