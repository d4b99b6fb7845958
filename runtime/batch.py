"""Batch: what one step computes, in plain integers. Made by the scheduler, read by the model runner."""

from __future__ import annotations

from dataclasses import dataclass

from .request import Request


@dataclass(slots=True)  # not frozen: one is made for each request and step, and that would cost three times as much
class BatchRow:
    """`count` tokens of one request from position `start`. `samples` is True when they reach the end of what is known or awaited.

    `life` is the request's number of retractions by then: what a row computed before another is in pages that are gone.
    """

    request: Request
    start: int
    count: int
    samples: bool
    life: int = 0


@dataclass(frozen=True)
class Batch:
    """Rows of one step, decoding ones first."""

    rows: tuple[BatchRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)
