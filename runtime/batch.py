"""Batch: what one step computes, in plain integers. Made by the scheduler, read by the model runner."""

from __future__ import annotations

from dataclasses import dataclass

from .request import Request


@dataclass(frozen=True)
class BatchRow:
    """`count` tokens of one request from position `start`. `samples` is True when they reach the end of what is known."""

    request: Request
    start: int
    count: int
    samples: bool


@dataclass(frozen=True)
class Batch:
    """Rows of one step, decoding ones first."""

    rows: tuple[BatchRow, ...]

    @property
    def num_tokens(self) -> int:
        return sum(row.count for row in self.rows)
