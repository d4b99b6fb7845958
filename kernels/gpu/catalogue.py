"""Every operation that the tables of tiles have entries for: how its launch is built without data, and what its kernels must be made of.

A new operation is a row of OPERATIONS. With it the tests compile each of its entries for each architecture, and `octavo kernels report`
shows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

import torch

from ..grouped_linear import GroupedWeight
from ..scaled_linear import ScaledWeight
from . import dense_linear, grouped_format, grouped_linear, scaled_linear
from .config import Tile, entries, operations
from .device import Device
from .inspection import Expected
from .launch import Launch
from .workspace import Workspace

# Which instruction multiplies, from an architecture on: warp-wide units, those of a warp group (sm_90), of tensor memory (sm_100).
Units = Mapping[int, tuple[str, ...]]  # any of them will do: which it is depends on Triton's version
FP8_UNITS: Final[Units] = {89: ("QMMA",), 90: ("QGMMA",), 100: ("UTCQMMA",), 120: ("QMMA",)}
INT8_UNITS: Final[Units] = {80: ("IMMA",), 90: ("IGMMA",), 100: ("IMMA", "UTCIMMA"), 120: ("IMMA",)}
HALF_UNITS: Final[Units] = {80: ("HMMA",), 90: ("HGMMA",), 100: ("UTCHMMA",), 120: ("HMMA",)}
# Of halves: 8-bit codes that end there were converted first.
_HALVES: Final = tuple(dict.fromkeys(unit for units in HALF_UNITS.values() for unit in units))

OUT_FEATURES, IN_FEATURES = 4096, 4096
_MOST_ROWS: Final = 4096
_META: Final = torch.device("meta")
_GROUP: Final = 128
_BITS: Final = (2, 3, 4, 5, 6, 8)
_Added = Literal["zeros", "offset"]
# Bits, group size and what is added to scaled codes, of formats with small groups: GGUF's, and GPTQ's with 3 bits.
_FINE: Final[tuple[tuple[int, int, _Added], ...]] = (
    (2, 16, "offset"), (3, 32, "zeros"), (4, 32, "offset"), (5, 32, "offset"), (6, 16, "zeros"), (8, 32, "zeros"),
)  # fmt: skip

# Tile, rows, output features, inputs and device to a launch on meta tensors.
Builder = Callable[[Tile, int, int, int, Device], Launch]


@dataclass(frozen=True)
class Operation:
    """`units` by architecture; `never`: instructions that no kernel of it may have."""

    build: Builder
    units: Units
    never: tuple[str, ...] = ()

    def expected(self, arch: int, route: str) -> Expected:
        """What its kernels for `arch` must be made of. On the route "dense" they multiply nothing: torch does, after them."""
        known = [other for other in self.units if other <= arch]
        units = self.units[max(known)] if known and route != "dense" else ()
        return Expected(units, self.never, wide_loads=True)


def _scaled(dtype: torch.dtype, *, grouped: bool = False) -> Builder:
    def build(tile: Tile, m: int, n: int, k: int, device: Device) -> Launch:
        group, rows = (_GROUP, _GROUP) if grouped else (k, 1)
        scale = torch.empty(-(-n // rows), -(-k // group), device=_META)
        weight = scaled_linear.pack(ScaledWeight(torch.empty(n, k, dtype=dtype, device=_META), scale, rows, group))
        x = torch.empty(m, scaled_linear.padded_inputs(k), dtype=dtype, device=_META)
        x_scale = torch.empty(m, -(-k // group), device=_META)
        bias, out = (torch.empty(*shape, dtype=torch.bfloat16, device=_META) for shape in ((n,), (m, n)))
        return scaled_linear._launch(tile, x, x_scale, group, weight, bias, out, device=device, workspace=Workspace(_META))

    return build


def _grouped(
    bits: int,
    *,
    group: int = _GROUP,
    added: _Added | None = "zeros",
    is_fp8: bool = False,
    x_dtype: torch.dtype = torch.bfloat16,
) -> Builder:
    def build(tile: Tile, m: int, n: int, k: int, device: Device) -> Launch:
        codes = torch.empty(n, k, dtype=torch.float8_e4m3fn if is_fp8 else torch.uint8, device=_META)
        scale = torch.empty(n, k // group, dtype=torch.bfloat16, device=_META)
        zeros = torch.empty_like(scale, dtype=torch.uint8) if added == "zeros" else None
        offset = torch.empty_like(scale) if added == "offset" else None
        weight = grouped_format.pack(GroupedWeight(codes, bits, group, scale, zeros=zeros, offset=offset))
        if tile.route == "dense":
            return grouped_linear.dequantize(weight, torch.empty(n, k, dtype=torch.bfloat16, device=_META))
        x = torch.empty(m, k, dtype=x_dtype, device=_META)
        x_scale = torch.empty(m, 1, device=_META) if x_dtype == torch.float8_e4m3fn else None
        bias, out = (torch.empty(*shape, dtype=torch.bfloat16, device=_META) for shape in ((n,), (m, n)))
        return grouped_linear._launch(tile, x, weight, bias, out, device=device, workspace=Workspace(_META), x_scale=x_scale)

    return build


def _dense(tile: Tile, m: int, n: int, k: int, device: Device) -> Launch:
    x, weight, out = (torch.empty(*shape, dtype=torch.bfloat16, device=_META) for shape in ((m, k), (n, k), (m, n)))
    return dense_linear.launch_tile(tile, x, weight, None, out, device=device, workspace=Workspace(_META))


OPERATIONS: Final[Mapping[str, Operation]] = {
    "dense": Operation(_dense, HALF_UNITS),
    "fp8": Operation(_scaled(torch.float8_e4m3fn), FP8_UNITS, never=_HALVES),
    "fp8_grouped": Operation(_scaled(torch.float8_e4m3fn, grouped=True), FP8_UNITS, never=_HALVES),
    "int8": Operation(_scaled(torch.int8), INT8_UNITS, never=_HALVES),
    "int8_grouped": Operation(_scaled(torch.int8, grouped=True), INT8_UNITS, never=_HALVES),
    "w8a16_fp8": Operation(_grouped(8, added=None, is_fp8=True), HALF_UNITS),
    **{f"w{bits}a16": Operation(_grouped(bits), HALF_UNITS) for bits in _BITS},
    **{f"w{bits}a16_fine": Operation(_grouped(bits, group=group, added=added), HALF_UNITS) for bits, group, added in _FINE},
    **{f"w{bits}a8": Operation(_grouped(bits, x_dtype=torch.float8_e4m3fn), FP8_UNITS, never=_HALVES) for bits in _BITS if bits <= 4},
}


@dataclass(frozen=True)
class Entry:
    """One entry of a table, `rows` of x that it is for at most."""

    op: str
    max_m: int | None
    tile: Tile
    rows: tuple[int, ...]

    def expected(self, arch: int) -> Expected:
        """What its kernels must be made of."""
        return OPERATIONS[self.op].expected(arch, self.tile.route)

    def launches(self, device: Device) -> Iterator[Launch]:
        """With the most rows that it is for, and with the fewest where that makes another kernel: then K is cut."""
        launches = (OPERATIONS[self.op].build(self.tile, m, OUT_FEATURES, IN_FEATURES, device) for m in self.rows)
        yield from {str(launch.options): launch for launch in launches}.values()


def table_entries(arch: int, ops: tuple[str, ...] = ()) -> Iterator[Entry]:
    """Every entry of the table that serves an architecture, of some operations or all.

    Raises KeyError for an operation that the table does not have, or that OPERATIONS has no row for.
    """
    for op in ops or operations(arch):
        if op not in OPERATIONS:
            raise KeyError(f"the table of sm_{arch} has tiles for {op!r}, and kernels/gpu/catalogue.py has no row for it")
        least = 16  # not 1: rows that 16 divides have a kernel of their own, and are the usual case
        for most, tile in entries(arch, op):
            rows = sorted({least, most or _MOST_ROWS})
            yield Entry(op, most, tile, tuple(reversed(rows)))
            least = (most or 0) + 16
