"""Which tile a kernel runs with: a pure function of architecture, operation and sizes over checked tables. Nothing is tuned while serving.

A table (configs/sm_<arch>.json) holds for each operation a list of entries in order of `max_m`, the greatest number of rows that an
entry is for; the last has none and serves all others. An architecture without a table takes the newest one below it. Every entry is
compiled for its architecture by the tests, and refused there if it spills or does not fit into shared memory.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources
from typing import Any, Final

from .device import Device

_PACKAGE: Final = "octavo.kernels.gpu.configs"
_MOST_SPLITS: Final = 32


@dataclass(frozen=True)
class Tile:
    """`block_m` rows of x, `block_n` output features and `block_k` inputs a step; `route` names one of an operation's kernels."""

    route: str
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    blocks_per_sm: int = 2  # how many blocks the grid should offer each multiprocessor before K is no longer split

    def describe(self) -> str:
        """For people: "split 16x128x128, 4 warps, 6 stages"."""
        return f"{self.route} {self.block_m}x{self.block_n}x{self.block_k}, {self.num_warps} warps, {self.num_stages} stages"

    def splits(self, device: Device, m: int, n: int, k: int) -> int:
        """Into how many parts K is cut so that all multiprocessors have work; each keeps at least four steps."""
        tiles = -(-(device.fixed_rows or m) // self.block_m) * -(-n // self.block_n)
        steps = -(-k // self.block_k)
        wanted = -(-self.blocks_per_sm * device.num_sms // tiles)
        return max(1, min(wanted, steps // 4, _MOST_SPLITS))


def tile_for(device: Device, op: str, m: int) -> Tile:
    """The table's entry for `m` rows, or the device's fixed ones. Raises KeyError for an operation that no table has."""
    rows = device.fixed_rows or m
    before: Tile | None = None
    for most, tile in entries(device.arch, op):
        if most is None or rows <= most:
            # torch multiplies on the route "dense", in an order that depends on the rows.
            return before if device.fixed_rows and tile.route == "dense" and before is not None else tile
        before = tile
    raise AssertionError("the last entry of a table has no max_m")


@functools.cache
def entries(arch: int, op: str) -> tuple[tuple[int | None, Tile], ...]:
    """An operation's (max_m, tile) on an architecture, in order."""
    raw = _table(arch).get(op)
    if raw is None:
        raise KeyError(f"no tiles for {op!r} on sm_{arch}: the tables have {', '.join(_table(arch))}")
    found = []
    for entry in raw:
        fields = dict(entry)
        most = fields.pop("max_m", None)
        found.append((most, Tile(**fields)))
    limits = [most for most, _ in found]
    if limits[-1] is not None or None in limits[:-1] or limits[:-1] != sorted(limits[:-1], key=lambda most: most or 0):
        raise ValueError(f"the entries of {op!r} for sm_{arch} must rise in max_m, and the last must have none")
    return tuple(found)


def operations(arch: int) -> tuple[str, ...]:
    """What an architecture's table has entries for."""
    return tuple(_table(arch))


def table_architectures() -> tuple[int, ...]:
    """Architectures that have a table, in order."""
    names = [entry.name for entry in resources.files(_PACKAGE).iterdir()]
    return tuple(sorted(int(name[3:-5]) for name in names if name.startswith("sm_") and name.endswith(".json")))


@functools.cache
def _table(arch: int) -> dict[str, list[dict[str, Any]]]:
    known = [other for other in table_architectures() if other <= arch]
    if not known:
        raise ValueError(f"no tiles for sm_{arch}: there are tables for {', '.join(f'sm_{other}' for other in table_architectures())}")
    text = resources.files(_PACKAGE).joinpath(f"sm_{max(known)}.json").read_text(encoding="utf-8")
    table: dict[str, list[dict[str, Any]]] = json.loads(text)
    return table
