"""PanelFormat: the byte layout of grouped quantized weights in column panels, and the code that decodes it. Knows no threads.

A panel holds COLUMNS output features. Along K it is one stream that is read from front to back:

    for each super-group (two-level scales only):  super scale, then super offset         COLUMNS elements each
        for each group of `group_size` inputs:     scale        COLUMNS elements
                                                   zero points  COLUMNS of 4 bits or 8 bits each (integer zero points only)
                                                   offset       COLUMNS elements (float offsets only)
                                                   codes        one plane after the other

Codes are cut into planes of 8, 4, 2 or 1 bits (3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2). In a plane of 4 or 8 bits a 32-bit word, in one of 1 or
2 bits a byte, holds the codes of one column for as many consecutive inputs as fit, lowest bits first. fp8 codes lie byte by byte. In a
paired format (2, 4 and 8 bits, one plane) a word's halves hold the codes of even and of odd inputs, as they are: shifted and masked,
it is two 16-bit integers side by side.

Codes are stored or made signed around the middle of their range, `center`: the common symmetric zero point, the middle, then costs
nothing, and a weight is `scale * (code - center) + scale * (center - zero)`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from llvmlite import ir
from numba.core import cgutils

from .jit import compile_module, new_function
from .tile import COLUMNS, MAX_ROWS
from .vector_math import at, constant, fma, load_unaligned, splat, store_unaligned

CodeKind = Literal["integer", "fp8_e4m3"]
ScaleKind = Literal["float16", "bfloat16", "float32", "uint8", "int8"]
ZeroKind = Literal["constant", "nibbles", "bytes"]

TILE_ARGUMENTS: Final = 8
PLANES: Final[dict[int, tuple[int, ...]]] = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
_SIZES: Final[dict[str, int]] = {"float16": 2, "bfloat16": 2, "float32": 4, "uint8": 1, "int8": 1}

_F32 = ir.FloatType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_BYTES, _INTS, _FLOATS = (ir.VectorType(kind, COLUMNS) for kind in (_I8, _I32, _F32))


@dataclass(frozen=True)
class PanelFormat:
    """How one weight is packed. `per_super` groups share a super scale (0: there is none)."""

    codes: CodeKind
    bits: int
    group_size: int
    scale: ScaleKind
    zero: ZeroKind
    constant_zero: int = 0
    offset: ScaleKind | None = None
    per_super: int = 0
    super_scale: ScaleKind | None = None
    super_offset: ScaleKind | None = None
    paired: bool = False

    @property
    def planes(self) -> tuple[tuple[int, int], ...]:
        """(bits, shift) of each plane."""
        shift, planes = 0, []
        for bits in PLANES[self.bits]:
            planes.append((bits, shift))
            shift += bits
        return tuple(planes)

    @property
    def unit(self) -> int:
        """Inputs that fill whole bytes, or words, in every plane."""
        if self.paired:
            return 32 // self.bits
        return 1 if self.codes == "fp8_e4m3" else max(8 // bits if bits < 4 else 32 // bits for bits, _ in self.planes)

    @property
    def center(self) -> int:
        """What is subtracted from codes of this width: 4 and 8 bits (unpaired) are stored less it, the others lose it on the way."""
        return 0 if self.codes == "fp8_e4m3" else 1 << (self.bits - 1)

    @property
    def direct(self) -> bool:
        """Whether rows can be multiplied without decoding to memory first: groups are whole units."""
        return self.group_size % self.unit == 0

    def plane_bytes(self, bits: int) -> int:
        """Bytes of one plane in one group."""
        return -(-self.group_size // self.unit) * self.unit * bits // 8 * COLUMNS

    @property
    def zero_bytes(self) -> int:
        return {"constant": 0, "nibbles": COLUMNS // 2, "bytes": COLUMNS}[self.zero]

    @property
    def header_bytes(self) -> int:
        return COLUMNS * _SIZES[self.scale] + self.zero_bytes + (COLUMNS * _SIZES[self.offset] if self.offset else 0)

    @property
    def group_bytes(self) -> int:
        return self.header_bytes + sum(self.plane_bytes(bits) for bits, _ in self.planes)

    @property
    def super_bytes(self) -> int:
        return sum(COLUMNS * _SIZES[kind] for kind in (self.super_scale, self.super_offset) if kind)


def _numbers(builder: Any, address: Any, kind: ScaleKind) -> Any:
    """COLUMNS elements as floats."""
    if kind == "float32":
        return load_unaligned(builder, address, _FLOATS)
    if kind == "float16":
        return builder.fpext(load_unaligned(builder, address, ir.VectorType(ir.HalfType(), COLUMNS)), _FLOATS)
    if kind == "bfloat16":
        wide = builder.zext(load_unaligned(builder, address, ir.VectorType(_I16, COLUMNS)), _INTS)
        return builder.bitcast(builder.shl(wide, constant(_INTS, 16)), _FLOATS)
    raw = load_unaligned(builder, address, _BYTES)
    return builder.sitofp(builder.sext(raw, _INTS) if kind == "int8" else builder.zext(raw, _INTS), _FLOATS)


def _zero_points(builder: Any, form: PanelFormat, group: Any) -> Any:
    """A group's integer zero points as floats."""
    address = at(builder, group, COLUMNS * _SIZES[form.scale])
    if form.zero == "constant":
        return constant(_FLOATS, float(form.constant_zero))
    if form.zero == "bytes":
        return _numbers(builder, address, "uint8")
    half = ir.VectorType(_I8, COLUMNS // 2)
    raw = load_unaligned(builder, address, half)
    low, high = builder.and_(raw, constant(half, 15)), builder.lshr(raw, constant(half, 4))
    joined = builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(_I32, COLUMNS), list(range(COLUMNS))))
    return builder.sitofp(builder.zext(joined, _INTS), _FLOATS)


def scale_and_offset(builder: Any, form: PanelFormat, group: Any, above: Any, *, centered: bool = True) -> tuple[Any, Any]:
    """What a group's centered codes are multiplied with, and what is added then (None: nothing); `above` is its super-group's address.

    `centered` False: the same for codes as they are.
    """
    scale = _numbers(builder, group, form.scale)
    if form.super_scale is not None:
        scale = builder.fmul(scale, _numbers(builder, above, form.super_scale))
    center = constant(_FLOATS, float(form.center if centered else 0))
    if form.offset is not None:
        offset = _numbers(builder, at(builder, group, COLUMNS * _SIZES[form.scale]), form.offset)
        if form.super_offset is not None:
            assert form.super_scale is not None
            offset = builder.fmul(offset, _numbers(builder, at(builder, above, COLUMNS * _SIZES[form.super_scale]), form.super_offset))
        return scale, fma(builder, scale, center, offset)
    if form.codes == "fp8_e4m3":  # decoded to 2**-8 of their value
        return builder.fmul(scale, constant(_FLOATS, 256.0)), None
    if form.zero == "constant" and form.constant_zero == (form.center if centered else 0):
        return scale, None
    return scale, builder.fmul(scale, builder.fsub(center, _zero_points(builder, form, group)))


def _weight(builder: Any, code: Any, scale: Any, offset: Any) -> Any:
    return builder.fmul(code, scale) if offset is None else fma(builder, code, scale, offset)


def _unit_of_codes(builder: Any, form: PanelFormat, codes: Any, unit: Any) -> list[Any]:
    """Codes less their center of `form.unit` consecutive inputs, as float vectors; `codes` is the first plane's address."""
    if form.codes == "fp8_e4m3":
        start = builder.add(codes, builder.mul(unit, ir.Constant(_I64, COLUMNS)))
        return [_fp8_as_float(builder, load_unaligned(builder, start, _BYTES))]
    whole: list[Any] = [None] * form.unit
    base = codes
    signed = len(form.planes) == 1 and form.bits >= 4 and not form.paired
    for bits, shift in form.planes:
        start = builder.add(base, builder.mul(unit, ir.Constant(_I64, form.unit * bits // 8 * COLUMNS)))
        if form.paired:
            parts = _pairs(builder, form.unit, start, bits)
        else:
            parts = _words(builder, form.unit, start, bits, signed=signed) if bits >= 4 else _bytes(builder, form.unit, start, bits)
        for k, part in enumerate(parts):
            bits_in_place = builder.shl(part, constant(_INTS, shift)) if shift else part
            whole[k] = bits_in_place if whole[k] is None else builder.or_(whole[k], bits_in_place)
        base = at(builder, base, form.plane_bytes(bits))
    return [builder.sitofp(code if signed else builder.sub(code, constant(_INTS, form.center)), _FLOATS) for code in whole]


def _words(builder: Any, unit: int, start: Any, bits: int, *, signed: bool) -> list[Any]:
    """A unit of a plane that lies in 32-bit words. Shifts within a lane are cheaper than widening bytes across lanes."""
    per_word, codes = 32 // bits, []
    for k in range(unit):
        word = load_unaligned(builder, at(builder, start, k // per_word * 4 * COLUMNS), _INTS)
        j = k % per_word
        if signed:
            word = builder.shl(word, constant(_INTS, 32 - bits * (j + 1))) if j + 1 < per_word else word
            codes.append(builder.ashr(word, constant(_INTS, 32 - bits)))
            continue
        word = builder.lshr(word, constant(_INTS, j * bits)) if j else word
        codes.append(builder.and_(word, constant(_INTS, (1 << bits) - 1)) if j + 1 < per_word else word)
    return codes


def pair_shift(k: int, bits: int) -> int:
    """Where in a word of a paired format input k's code begins: even inputs in the lower half, odd ones in the upper."""
    return k % 2 * 16 + k // 2 * bits


def _pairs(builder: Any, unit: int, start: Any, bits: int) -> list[Any]:
    """A unit, one word a column, of a paired format."""
    word = load_unaligned(builder, start, _INTS)
    return [builder.and_(builder.lshr(word, constant(_INTS, pair_shift(k, bits))), constant(_INTS, (1 << bits) - 1)) for k in range(unit)]


def _bytes(builder: Any, unit: int, start: Any, bits: int) -> list[Any]:
    """A unit of a plane that lies in bytes."""
    per_byte, codes = 8 // bits, []
    for k in range(unit):
        raw = load_unaligned(builder, at(builder, start, k // per_byte * COLUMNS), _BYTES)
        j = k % per_byte
        raw = builder.lshr(raw, constant(_BYTES, j * bits)) if j else raw
        codes.append(builder.zext(builder.and_(raw, constant(_BYTES, (1 << bits) - 1)), _INTS))
    return codes


def _fp8_as_float(builder: Any, code: Any) -> Any:
    """2**-8 of the value of e4m3 bytes: float16's bits, but for the exponents' bias, 7 here and 15 there. Subnormals come out right."""
    halves = ir.VectorType(_I16, COLUMNS)
    bits = builder.and_(builder.shl(builder.sext(code, halves), constant(halves, 7)), constant(halves, 0xBFFF))
    return builder.fpext(builder.bitcast(bits, ir.VectorType(ir.HalfType(), COLUMNS)), _FLOATS)


def _emit_decode(module: ir.Module, form: PanelFormat) -> None:
    """decode(above, group, first, steps, target): inputs first..first+steps of a group to float32 weights [steps, COLUMNS].

    `first` is a multiple of the unit; steps are rounded up to one, and so many rows are written.
    """
    builder, (above, group, first, steps, target) = new_function(module, "decode", 5)
    scale, offset = scale_and_offset(builder, form, group, above)
    codes = at(builder, group, form.header_bytes)
    unit = ir.Constant(_I64, form.unit)
    begin = builder.udiv(first, unit)
    count = builder.udiv(builder.add(steps, ir.Constant(_I64, form.unit - 1)), unit)
    with cgutils.for_range(builder, count, intp=_I64) as loop:
        values = _unit_of_codes(builder, form, codes, builder.add(begin, loop.index))
        place = builder.add(target, builder.mul(loop.index, ir.Constant(_I64, form.unit * COLUMNS * 4)))
        for k, code in enumerate(values):
            store_unaligned(builder, _weight(builder, code, scale, offset), at(builder, place, k * COLUMNS * 4))
    builder.ret_void()


class _Tile:
    """Emits the product of some rows of x with some panels, codes turned into weights in registers.

    tile(x, x_row, data, panel_bytes, c, c_row, groups, bias): c[rows, panels * COLUMNS] = x @ panels + bias, over all groups; bias 0
    for none. Weights and the order of sums are those of `decode` followed by kernels/cpu/tile.py, so the bits of a result are the same.
    """

    def __init__(self, module: ir.Module, form: PanelFormat, name: str, *, rows: int, panels: int) -> None:
        self._form, self._rows, self._panels = form, rows, panels
        builder, arguments = new_function(module, name, TILE_ARGUMENTS)
        self._builder = builder
        x, x_row, data, panel_bytes, c, c_row, groups, bias = arguments
        self._x_rows = self._offsets(x, x_row, rows)
        self._data_of = self._offsets(data, panel_bytes, panels)
        self._totals = [[cgutils.alloca_once(builder, _FLOATS) for _ in range(panels)] for _ in range(rows)]
        self._begin(bias)
        for_groups(builder, form, groups, self._group)
        for row, cells in zip(self._offsets(c, c_row, rows), self._totals, strict=True):
            for p, cell in enumerate(cells):
                store_unaligned(builder, builder.load(cell), at(builder, row, 4 * COLUMNS * p))
        builder.ret_void()

    def _offsets(self, base: Any, stride: Any, count: int) -> list[Any]:
        return [self._builder.add(base, self._builder.mul(stride, ir.Constant(_I64, i))) for i in range(count)]

    def _begin(self, bias: Any) -> None:
        """Totals start with the bias, or with zeros."""
        builder = self._builder
        for cells in self._totals:
            for cell in cells:
                builder.store(constant(_FLOATS, 0.0), cell)
        with builder.if_then(builder.icmp_signed("!=", bias, ir.Constant(_I64, 0))):
            for cells in self._totals:
                for p, cell in enumerate(cells):
                    builder.store(_numbers(builder, at(builder, bias, 4 * COLUMNS * p), "float32"), cell)

    def _group(self, above_offset: Any, group_offset: Any, index: Any) -> None:
        builder, form = self._builder, self._form
        groups = [builder.add(data, group_offset) for data in self._data_of]
        aboves = [builder.add(data, above_offset) for data in self._data_of]
        scales = [scale_and_offset(builder, form, group, above) for group, above in zip(groups, aboves, strict=True)]
        codes = [at(builder, group, form.header_bytes) for group in groups]
        first = builder.mul(index, ir.Constant(_I64, 4 * form.group_size))
        with cgutils.for_range(builder, ir.Constant(_I64, form.group_size // form.unit), intp=_I64) as loop:
            x_offset = builder.add(first, builder.mul(loop.index, ir.Constant(_I64, 4 * form.unit)))
            units = [
                [_weight(builder, code, *scale) for code in _unit_of_codes(builder, form, place, loop.index)]
                for place, scale in zip(codes, scales, strict=True)
            ]
            for row, cells in zip(self._x_rows, self._totals, strict=True):
                start = builder.add(row, x_offset)
                for j in range(form.unit):
                    number = builder.load(builder.inttoptr(at(builder, start, 4 * j), _F32.as_pointer()))
                    x = splat(builder, number, COLUMNS)
                    for unit, cell in zip(units, cells, strict=True):
                        builder.store(fma(builder, x, unit[j], builder.load(cell)), cell)


def for_groups(builder: Any, form: PanelFormat, groups: Any, body: Callable[[Any, Any, Any], None]) -> None:
    """Run body(super-group's offset in the panel, group's offset, index) over `groups` groups, whole super-groups."""
    if form.per_super == 0:
        with cgutils.for_range(builder, groups, intp=_I64) as loop:
            body(ir.Constant(_I64, 0), builder.mul(loop.index, ir.Constant(_I64, form.group_bytes)), loop.index)
        return
    per = ir.Constant(_I64, form.per_super)
    span = form.super_bytes + form.per_super * form.group_bytes
    with cgutils.for_range(builder, builder.udiv(groups, per), intp=_I64) as outer:
        above = builder.mul(outer.index, ir.Constant(_I64, span))
        with cgutils.for_range(builder, per, intp=_I64) as inner:
            group = builder.add(at(builder, above, form.super_bytes), builder.mul(inner.index, ir.Constant(_I64, form.group_bytes)))
            body(above, group, builder.add(builder.mul(outer.index, per), inner.index))


def emit(form: PanelFormat) -> ir.Module:
    """LLVM code of a format: decode; pair1 (one row, two panels) and direct1..6 by rows (see _Tile)."""
    module = ir.Module()
    _emit_decode(module, form)
    if form.direct:
        _Tile(module, form, "pair1", rows=1, panels=2)
        for rows in range(1, MAX_ROWS + 1):
            _Tile(module, form, f"direct{rows}", rows=rows, panels=1)
    return module


@functools.cache
def compiled(form: PanelFormat) -> dict[str, int]:
    """Addresses of the format's functions, compiled at the first call."""
    return compile_module(emit(form))
