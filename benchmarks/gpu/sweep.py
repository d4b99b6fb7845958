"""Tries tiles for one operation and writes the entries that were fastest, for kernels/gpu/configs. The geometric mean over shapes decides.

Candidates are compiled ahead in other processes, and those that spill or do not fit are never started. Results are not looked at: new
entries are to be put into the table, and the part correctness run.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.gpu import catalogue, grouped_format, grouped_linear, inspection, scaled_linear
from octavo.kernels.gpu.ahead import CannotCompile, target
from octavo.kernels.gpu.config import Tile, entries
from octavo.kernels.gpu.device import nearest
from octavo.kernels.gpu.launch import Launch
from octavo.kernels.gpu.workspace import workspace_of
from octavo.kernels.grouped_linear import GroupedWeight
from octavo.kernels.scaled_linear import ScaledWeight

from . import clock
from .checks import Place
from .contenders import SHAPES, Field, Shape
from .data import FP8
from .record import Budget

SWEPT_SHAPES = (SHAPES[0], SHAPES[2], SHAPES[7])  # 25, 117 and 235 million weights
_ROUNDS = 5


@dataclass(frozen=True)
class Tried:
    """A tile's microseconds by shape; none where it was refused, and then why."""

    tile: Tile
    us: dict[str, float]
    fault: str | None = None

    @property
    def mean_us(self) -> float:
        return math.exp(sum(map(math.log, self.us.values())) / len(self.us)) if self.us else math.inf


def sweep(
    op: str, place: Place, budget: Budget, *, jobs: int, shapes: Sequence[Shape] = SWEPT_SHAPES
) -> Iterator[tuple[int | None, list[Tried]]]:
    """For every entry of the operation's table its max_m and what was tried, the fastest first; fewer when time runs out.

    Raises KeyError for an operation that the table does not have.
    """
    for most, present in entries(place.facts.arch, op):
        m = most or 4096
        if present.route == "dense":
            continue
        tiles = list(dict.fromkeys([present, *candidates(op, present, m)]))
        faults = _faults(op, tiles, m, shapes, place, jobs)
        tried = {tile: Tried(tile, {}, fault) for tile, fault in zip(tiles, faults, strict=True)}
        for shape in shapes:
            if not budget.has(30):
                return
            for tile, us in _timed(op, [tile for tile in tiles if tried[tile].fault is None], m, shape, place).items():
                tried[tile].us[shape.label] = us
        yield most, sorted(tried.values(), key=lambda found: (-len(found.us), found.mean_us))


def as_entries(found: Sequence[tuple[int | None, list[Tried]]]) -> list[dict[str, Any]]:
    """The fastest tile for each number of rows as a table has it."""
    return [({} if most is None else {"max_m": most}) | asdict(tried[0].tile) for most, tried in found]


def candidates(op: str, present: Tile, m: int) -> Iterator[Tile]:
    """Tiles of the present route around what m rows ask for."""
    is_8bit = op.startswith(("fp8", "int8"))
    least = 128 if present.route == "stream" else 16
    blocks_m = [size for size in (16, 32, 64, 128) if size >= least and (size < 2 * m or size == least)][-2:]
    blocks_n = (128, 256) if present.route == "stream" else (64, 128)
    blocks_k = (64, 128, 256) if is_8bit and not op.endswith("grouped") else (128,)
    splits = (1, 2, 4) if present.route == "split" else (present.blocks_per_sm,)
    for m_block, n_block, k_block, warps, stages, blocks in itertools.product(blocks_m, blocks_n, blocks_k, (4, 8), (2, 3, 4, 6), splits):
        yield Tile(present.route, m_block, n_block, k_block, warps, stages, blocks)


def _faults(op: str, tiles: Sequence[Tile], m: int, shapes: Sequence[Shape], place: Place, jobs: int) -> list[str | None]:
    """Why each tile must not be started, by compiling it for each shape; what compiles is then found in Triton's cache."""
    if not place.is_gpu:
        return [None] * len(tiles)
    work = [(tile, shape) for tile in tiles for shape in shapes]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(functools.partial(compile_fault, op, m, place.facts.arch), *zip(*work, strict=True), chunksize=6))
    by_tile: dict[Tile, str | None] = {}
    for (tile, _), fault in zip(work, found, strict=True):
        by_tile[tile] = by_tile.get(tile) or fault
    return [by_tile[tile] for tile in tiles]


def compile_fault(op: str, m: int, arch: int, tile: Tile, shape: Shape) -> str | None:
    """Compiles a tile's kernel into Triton's cache. What is wrong with it; nothing where it may run."""
    with target(arch) as compiler:
        try:
            catalogue.OPERATIONS[op].build(tile, m, shape.n, shape.k, nearest(arch))()
        except (CannotCompile, ValueError) as error:
            return str(error)[:300]
    expected = catalogue.OPERATIONS[op].expected(arch, tile.route)
    found = [fault for kernel in compiler.compiled.values() for fault in inspection.faults(inspection.inspect(kernel), expected)]
    return "; ".join(found) or None


def _timed(op: str, tiles: Sequence[Tile], m: int, shape: Shape, place: Place) -> dict[Tile, float]:
    """Microseconds a call of each, in turn; a tile whose kernel fails is left out."""
    launches = _launches(op, m, shape, place)
    calls = {}
    for tile in tiles:
        try:
            made = launches(tile)
            made[0]()
        except Exception as error:  # too many resources for the device: the others go on
            print(f"  {tile.describe()}: {type(error).__name__}: {str(error)[:120]}")
            continue
        calls[tile] = made
    names = {str(index): tile for index, tile in enumerate(calls)}
    timed, _ = clock.time_in_turn({name: calls[tile] for name, tile in names.items()}, place.device, rounds=_ROUNDS)
    return {names[name]: timing.us for name, timing in timed.items()}


def _launches(op: str, m: int, shape: Shape, place: Place) -> Any:
    """A function from a tile to its launches, one for each copy of the weights."""
    n, k, device = shape.n, shape.k, place.device
    field, workspace = Field(shape, place), workspace_of(device)
    out, bias = (torch.zeros(*size, dtype=torch.bfloat16, device=device) for size in ((m, n), (n,)))
    if op.startswith(("fp8", "int8")):
        scaled = [_scaled(op, field) for _ in range(field.num_copies(n * k))]
        group = scaled[0].group
        x = _codes(op, m, k, device)
        x_scale = torch.rand(m, -(-k // group), device=device)
        return lambda tile: [
            scaled_linear._launch(tile, x, x_scale, group, weight, bias, out, device=place.facts, workspace=workspace) for weight in scaled
        ]
    grouped = [_grouped(op, field) for _ in range(field.num_copies(n * k * int(op[1]) // 8))]
    is_a8 = op.endswith("a8")
    inputs = _codes("fp8", m, k, device) if is_a8 else torch.randn(m, k, device=device).bfloat16()
    input_scale = torch.rand(m, 1, device=device) if is_a8 else None

    def launches(tile: Tile) -> list[Launch]:
        return [
            grouped_linear._launch(tile, inputs, weight, bias, out, device=place.facts, workspace=workspace, x_scale=input_scale)
            for weight in grouped
        ]

    return launches


def _codes(op: str, rows: int, columns: int, device: torch.device) -> Tensor:
    if op.startswith("int8"):
        return torch.randint(-127, 128, (rows, columns), device=device).to(torch.int8)
    return (torch.randn(rows, columns, device=device) * 100).clamp(-448, 448).to(FP8)


def _scaled(op: str, field: Field) -> scaled_linear.Packed:
    n, k = field.shape.n, field.shape.k
    rows, group = (128, 128) if op.endswith("grouped") else (1, k)
    scale = torch.rand(-(-n // rows), -(-k // group), device=field.place.device)
    return scaled_linear.pack(ScaledWeight(_codes(op, n, k, field.place.device), scale, rows, group))


def _grouped(op: str, field: Field) -> grouped_format.Packed:
    bits, group = int(op[1]), 32 if op.endswith("fine") else 128
    if op.endswith("fp8"):
        return grouped_format.pack(GroupedWeight(field.normal(FP8), 8, field.shape.k, field.scales(1, torch.float32)))
    scale = field.scales(field.shape.k // group, torch.bfloat16)
    if op.endswith("fine"):
        return grouped_format.pack(GroupedWeight(field.codes(bits), bits, group, scale, offset=torch.randn_like(scale)))
    zeros = torch.randint(0, 1 << bits, scale.shape, dtype=torch.uint8, device=scale.device)
    return grouped_format.pack(GroupedWeight(field.codes(bits), bits, group, scale, zeros=zeros))


def told(op: str, found: Sequence[tuple[int | None, list[Tried]]]) -> str:
    """The fastest five of each number of rows, and the entries for the table."""
    lines = []
    for most, tried in found:
        lines.append(f"{op}, {f'up to {most}' if most else 'more'} rows ({sum(1 for one in tried if one.us)} tiles timed):")
        lines += [f"  {one.mean_us:9.1f} us  {one.tile.describe()}, {one.tile.blocks_per_sm} blocks a multiprocessor" for one in tried[:5]]
    return "\n".join([*lines, *(json.dumps(entry) for entry in as_entries(found))])
