"""Plan: one step as rank 0 tells the other ranks, and what these say back. Plain structs in msgpack; no pickle, no tensor."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import numpy as np

from .forward_batch import StepArrays

ALIVE_S = 0.5  # between signs of life
_INT64, _INT32 = np.dtype(np.int64), np.dtype(np.int32)
_DTYPES: tuple[np.dtype[Any], ...] = (_INT64, _INT64, _INT64, _INT64, _INT32, _INT32, _INT32)


class Plan(msgspec.Struct, tag=True, frozen=True):
    """Step `number`: the bytes of its StepArrays, in order, a digest of it all, and how many tokens of the last step it awaits.

    Of each row of the table only the pages that its context fills are sent; `width` is the table's.
    """

    number: int
    arrays: tuple[bytes, ...]
    digest: int
    num_awaited: int
    width: int


class Stop(msgspec.Struct, tag=True, frozen=True):
    """There are no more steps."""


class Hello(msgspec.Struct, tag=True, frozen=True):
    """A rank is there, and has not loaded anything yet."""

    rank: int
    version: str


class Loaded(msgspec.Struct, tag=True, frozen=True):
    """A rank has its part of the model."""

    rank: int
    weight_bytes: int


class Begun(msgspec.Struct, tag=True, frozen=True):
    """A rank computes step `number`, whose digest it found to be `digest`."""

    rank: int
    number: int
    digest: int


class Alive(msgspec.Struct, tag=True, frozen=True):
    """A rank has not been stopped."""

    rank: int


class RankFailed(msgspec.Struct, tag=True, frozen=True):
    """A rank ends, for this reason; `trace` where that is nothing that a user could mend."""

    rank: int
    message: str
    trace: str


ToRank = Plan | Stop | Alive
FromRank = Hello | Loaded | Begun | Alive | RankFailed

plan_encoder = msgspec.msgpack.Encoder()
to_rank_decoder = msgspec.msgpack.Decoder(ToRank)
from_rank_decoder = msgspec.msgpack.Decoder(FromRank)


class PlanMismatch(RuntimeError):
    """A rank was told another step than the one that it has to compute."""


def make_plan(number: int, arrays: StepArrays, num_awaited: int, page_size: int) -> Plan:
    """Step `number` to be sent; `read_plan` gives its arrays back, but for pages that no context fills."""
    width = arrays.table.shape[1]
    pages = arrays.table[_filled(arrays.contexts, width, page_size)]
    packed = tuple(array.tobytes() for array in (*_parts(arrays), pages))
    return Plan(number, packed, _digest(number, packed, num_awaited, width), num_awaited, width)


def read_plan(plan: Plan, number: int, page_size: int) -> StepArrays:
    """The arrays of step `number`. Raises PlanMismatch for another step's, and for arrays that changed on their way."""
    if plan.number != number:
        raise PlanMismatch(f"was told step {plan.number} where step {number} comes next")
    if (found := _digest(plan.number, plan.arrays, plan.num_awaited, plan.width)) != plan.digest:
        raise PlanMismatch(f"was told a step {number} whose digest is {found:08x}, where rank 0 has {plan.digest:08x}")
    ids, positions, slots, wanted, query_start, contexts, pages = (
        np.frombuffer(part, dtype) for part, dtype in zip(plan.arrays, _DTYPES, strict=True)
    )
    table = np.zeros((len(contexts), plan.width), dtype=np.int32)
    table[_filled(contexts, plan.width, page_size)] = pages
    return StepArrays(ids, positions, slots, wanted, query_start, contexts, table)


def _filled(contexts: np.ndarray, width: int, page_size: int) -> np.ndarray:
    """Which places of the table hold pages of each row's context."""
    return np.arange(width) < -(-contexts // page_size)[:, None]


def _parts(arrays: StepArrays) -> tuple[np.ndarray, ...]:
    return arrays.ids, arrays.positions, arrays.slots, arrays.wanted, arrays.query_start, arrays.contexts


def _digest(number: int, parts: tuple[bytes, ...], num_awaited: int, width: int) -> int:
    digest = zlib.crc32(f"{number} {num_awaited} {width} {[len(part) for part in parts]}".encode())
    for part in parts:
        digest = zlib.crc32(part, digest)
    return digest
