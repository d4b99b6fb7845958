"""The timings part: contenders of one format and one shape take turns, for every number of rows. Each is checked before it is timed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.grouped_linear import GroupedWeight

from . import clock, contenders
from .checks import Place
from .clock import Call
from .contenders import DENSE, FORMATS, ROWS, SHAPES, Contender, Field, Shape
from .correctness import device_answers
from .peers import Peer
from .record import Budget, Record, one_line

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
            print(f"timed {key}", flush=True)
            save()
            if "broken" in record.timings[key]:
                print("  the device answers no more: run the same command again, it goes on from here")
                return


def time_shape(name: str, field: Field, rows: Sequence[int]) -> dict[str, Any]:
    """One format and shape: results by rows and contender; faults by contender, which is not timed then."""
    shape = field.shape
    faults: dict[str, str] = {}
    found = list(_built(name, field, faults))
    weight_bytes = {contender.name: contender.weight_bytes for contender in found}
    result: dict[str, Any] = {"format": name, "shape": shape.label, "n": shape.n, "k": shape.k, "weight_bytes": weight_bytes}
    result |= {"faults": faults, "rows": {}}
    if place_is_broken := _drop_wrong(found, faults, field, rows, name):
        result["broken"] = place_is_broken
    for m in rows if not place_is_broken else ():
        x = _inputs(field, m)
        calls: dict[str, list[Call]] = {}
        for contender in found:
            out = torch.empty(m, shape.n, dtype=contender.dtype, device=field.place.device)
            prepared = contender.prepare(x.to(contender.dtype))
            calls[contender.name] = [partial(copy, prepared, out) for copy in contender.copies]
        timed, failed = clock.time_in_turn(calls, field.place.device)
        faults |= failed
        result["rows"][str(m)] = {who: vars(timing) for who, timing in timed.items()}
        del calls
        if failed and field.place.is_gpu and not device_answers():
            result["broken"] = next(iter(failed.values()))
            break
    del found
    gc.collect()
    if field.place.is_gpu and "broken" not in result:
        torch.cuda.empty_cache()
    return result


def _drop_wrong(found: list[Contender], faults: dict[str, str], field: Field, rows: Sequence[int], name: str) -> str | None:
    """Leave those out whose results are wrong. Gives the fault after which the device answers no more."""
    for contender in list(found):
        fault = _fault(contender, field, rows)
        if fault is None:
            continue
        faults[contender.name] = fault
        found.remove(contender)
        print(f"  WRONG {name} {field.shape.label} {contender.name}: {fault}")
        if field.place.is_gpu and not device_answers():
            return fault
    return None


def _built(name: str, field: Field, faults: dict[str, str]) -> Iterator[Contender]:
    """The format's contenders beside torch's bfloat16 product. A peer that does not pack its weights is left out, and told."""
    yield from contenders.dense(field)
    usable = []
    small = torch.randint(0, 16, (512, 512), dtype=torch.uint8, device=field.place.device)
    for peer in field.peers if name == "w4a16" else ():
        try:
            scale = torch.ones(512, 512 // 128, dtype=torch.float16, device=small.device)
            peer.linears([GroupedWeight(small, 4, 128, scale, zero=8)])
            usable.append(peer)
        except Exception as error:  # somebody else's code: told, and the others go on
            faults[peer.name] = one_line(error)
    yield from FORMATS[name](replace(field, peers=tuple(usable)))


def _inputs(field: Field, m: int) -> Tensor:
    """Random rows, float32, the same for all contenders."""
    source = torch.Generator(field.place.device).manual_seed(m)
    return torch.randn(m, field.shape.k, generator=source, device=field.place.device)


def _fault(contender: Contender, field: Field, rows: Sequence[int]) -> str | None:
    """What is wrong with its results, for few rows and for many: of many some, from the first to the last."""
    dense = contender.dense()
    for m in rows:
        x = _inputs(field, m).to(contender.dtype)
        out = torch.full((m, field.shape.n), torch.nan, dtype=contender.dtype, device=x.device)
        looked_at = torch.linspace(0, m - 1, min(m, _CHECKED_ROWS), dtype=torch.float64).round().long().to(x.device)
        try:
            product = contender.copies[0](contender.prepare(x), out)
            found = (product if isinstance(product, Tensor) else out)[looked_at].float()
            exact = x[looked_at].float() @ dense.t()
            off = float((found - exact).norm() / exact.norm())
        except Exception as error:  # a kernel that does not compile or run is not timed, and told
            return f"{m} rows: {one_line(error)}"
        if not off <= _BOUNDS[contender.rounds_inputs]:
            return f"{m} rows: off by {off:.2g} of the result's norm, allowed {_BOUNDS[contender.rounds_inputs]}"
    return None


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
    return 1e6 * max(num_bytes / max(ceilings["read_bytes"], ceilings["copy_bytes"] or 0), 2 * m * n * k / rate)
