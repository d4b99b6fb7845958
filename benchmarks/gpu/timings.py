"""The timings part: contenders of one format and one shape take turns, for every number of rows. Each is checked before it is timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import clock, contenders
from .checks import Place
from .clock import Call
from .contenders import DENSE, FORMATS, ROWS, SHAPES, Contender, Field, Shape
from .data import generator
from .peers import Peer
from .record import Budget, Record

_CHECKED_ROWS = 64
_BOUNDS = {False: 2e-2, True: 6e-2}  # by whether inputs are rounded: relative to the result's norm; torch rounds some scales to bfloat16
_SECONDS = 25.0  # one format and shape, at most


def run(
    record: Record, place: Place, budget: Budget, *, save: Callable[[], None], peers: tuple[Peer, ...] = (), formats: Sequence[str] = (),
    shapes: Sequence[Shape] = SHAPES, rows: Sequence[int] = ROWS,
) -> None:  # fmt: skip
    """Every format and shape that has not been timed yet, while the budget lasts. The ceilings first, once."""
    if record.ceilings is None:
        record.ceilings = clock.ceilings(place.device).as_json()
        save()
    for shape in shapes:
        for name in formats or FORMATS:
            key = f"{name} {shape.label}"
            if key in record.timings:
                continue
            if not budget.has(_SECONDS):
                print("  out of time: run the same command again, it goes on from here")
                return
            record.timings[key] = time_shape(name, Field(shape, place, peers), rows)
            print(f"timed {key}")
            save()


def time_shape(name: str, field: Field, rows: Sequence[int]) -> dict[str, Any]:
    """One format and shape: results by rows and contender; faults by contender, which is not timed then."""
    shape = field.shape
    faults: dict[str, str] = {}
    found = list(_built(name, field, faults))
    weight_bytes = {contender.name: contender.weight_bytes for contender in found}
    result: dict[str, Any] = {"format": name, "shape": shape.label, "n": shape.n, "k": shape.k, "weight_bytes": weight_bytes}
    result |= {"faults": faults, "rows": {}}
    for contender in list(found):
        fault = _fault(contender, field, rows)
        if fault is not None:
            faults[contender.name] = fault
            found.remove(contender)
            print(f"  WRONG {name} {shape.label} {contender.name}: {fault}")
    for m in rows:
        calls = {contender.name: _calls(contender, field, m) for contender in found}
        timed = clock.time_in_turn(calls, field.place.device)
        result["rows"][str(m)] = {who: vars(timing) for who, timing in timed.items()}
        del calls
    del found
    gc.collect()
    if field.place.is_gpu:
        torch.cuda.empty_cache()
    return result


def _built(name: str, field: Field, faults: dict[str, str]) -> Iterator[Contender]:
    """The format's contenders beside torch's bfloat16 product. A peer that does not pack its weights is left out, and told."""
    yield from contenders.dense(field)
    usable = []
    small = replace(field, shape=Shape("small", 512, 512))
    for peer in field.peers if name == "w4a16" else ():
        try:
            list(FORMATS[name](replace(small, peers=(peer,))))
            usable.append(peer)
        except Exception as error:  # somebody else's code: told, and the others go on
            faults[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    yield from FORMATS[name](replace(field, peers=tuple(usable)))


def _inputs(contender: Contender, field: Field, m: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(m, field.shape.k, generator=generator(m)).to(contender.dtype).to(field.place.device)
    return x, torch.full((m, field.shape.n), float("nan"), dtype=contender.dtype, device=field.place.device)


def _fault(contender: Contender, field: Field, rows: Sequence[int]) -> str | None:
    """What is wrong with its results, for few rows and for many."""
    dense = contender.dense()
    for m in rows:
        x, out = _inputs(contender, field, m)
        try:
            product = contender.copies[0](contender.prepare(x), out)
            found = (product if isinstance(product, Tensor) else out)[:_CHECKED_ROWS].float()
            exact = x[:_CHECKED_ROWS].float() @ dense.t()
            off = float((found - exact).norm() / exact.norm())
        except Exception as error:  # a kernel that does not compile or run is not timed, and told
            return f"{m} rows: " + " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if not off <= _BOUNDS[contender.rounds_inputs]:
            return f"{m} rows: off by {off:.2g} of the result's norm, allowed {_BOUNDS[contender.rounds_inputs]}"
    return None


def _calls(contender: Contender, field: Field, m: int) -> list[Call]:
    x, out = _inputs(contender, field, m)
    prepared = contender.prepare(x)
    return [partial(copy, prepared, out) for copy in contender.copies]


def floor_us(timing: dict[str, Any], contender: str, m: int, ceilings: dict[str, float | None]) -> float:
    """The least that a product of m rows can take: its bytes at the bandwidth of reading, or its products at the rate of their units."""
    n, k = int(timing["n"]), int(timing["k"])
    num_bytes = float(timing["weight_bytes"][contender]) + 2 * m * (n + k)
    rate = ceilings["bf16_flops"]
    if contender.startswith("octavo w4a8") or (timing["format"] in ("fp8", "fp8_blocks") and contender != DENSE):
        rate = ceilings["fp8_flops"] or rate
    elif timing["format"] == "int8" and contender != DENSE:
        rate = ceilings["int8_flops"] or rate
    assert rate is not None
    assert ceilings["read_bytes"] is not None
    return 1e6 * max(num_bytes / ceilings["read_bytes"], 2 * m * n * k / rate)
