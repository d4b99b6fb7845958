"""Streams: hidden states of all calibration samples on their way through the blocks, in memory or on disk. Knows no method."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calls import Call
from .devices import CPU
from .float_model import FloatModel

CHUNK_TOKENS = 4096  # computed at once


class Hidden:
    """float32 [S, T, ...] of S samples and T tokens, each with H numbers or several streams of H.

    In memory or, with `file`, on disk, of which no more is in memory than was asked for. It is given on `device` and kept on the host.
    """

    def __init__(self, shape: tuple[int, ...], file: Path | None = None, device: torch.device = CPU) -> None:
        self.shape, self._file, self._device = shape, file, device
        self.boards: dict[int, Mapping[str, Any]] = {}  # by chunk: what blocks left for those after them, see Call
        self._values = torch.empty(shape, device=CPU) if file is None else None
        if file is not None:
            with file.open("wb") as made:  # all of it now: a disk that is full is an error here, and a crash once it is mapped
                os.posix_fallocate(made.fileno(), 0, 4 * math.prod(shape))

    def __getitem__(self, rows: slice | Sequence[int]) -> Tensor:
        """[R, T, ...] of some samples; a view where they are in memory and `rows` is a slice."""
        if self._values is not None:
            return self._values[rows].to(self._device)
        assert self._file is not None
        return torch.from_numpy(np.array(np.memmap(self._file, dtype=np.float32, mode="r", shape=self.shape)[rows])).to(self._device)

    def __setitem__(self, rows: slice, values: Tensor) -> None:
        if self._values is not None:
            self._values[rows] = values.to(CPU)
        else:
            assert self._file is not None
            np.memmap(self._file, dtype=np.float32, mode="r+", shape=self.shape)[rows] = values.to(CPU).numpy()

    def copy_from(self, other: Hidden) -> None:
        """Take over the first samples."""
        for row in range(self.shape[0]):
            self[row : row + 1] = other[row : row + 1]


class Inputs:
    """The samples, and what every block is called with beside the hidden state, chunk by chunk."""

    def __init__(self, model: FloatModel, tokens: Tensor, *, cut: int | None = None, quick: bool = False) -> None:
        """`cut`: a number of samples at which a chunk ends, so that streams may have no more. `quick`: whether blocks
        need not be exact; what watches them may see bfloat16 numbers then."""
        self.tokens, self._quick = tokens, quick
        rows = max(1, CHUNK_TOKENS // tokens.shape[1])
        ends = sorted({*range(rows, len(tokens), rows), len(tokens), cut or len(tokens)})
        self.chunks = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        self._calls: list[list[Call]] = []
        self._model = model

    def start(self, hidden: Hidden) -> None:
        """Put what enters the first block into `hidden`, and keep what the blocks are called with."""
        self._calls, hidden.boards = [], {}
        for chunk in self.chunks:
            first, calls = self._model.calls(self.tokens[chunk])
            hidden[chunk] = first
            same = next((known for known in self._calls if len(known) == len(calls) and all(map(_same, known, calls))), None)
            self._calls.append(calls if same is None else same)

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens.shape[0], self.tokens.shape[1]

    def run(self, index: int, block: nn.Module, hidden: Hidden) -> Iterator[tuple[slice, Tensor]]:
        """The output [B, T, ...] of block `index` for each chunk of `hidden`, which is left as it is, or of its first samples."""
        for number in range(self.num_chunks(hidden)):
            yield self.chunks[number], self.run_chunk(number, index, block, hidden)

    def run_chunk(self, number: int, index: int, block: nn.Module, hidden: Hidden) -> Tensor:
        """The output of block `index` for one chunk."""
        return self._computed(number, index, block, hidden)[0]

    def advance(self, index: int, block: nn.Module, hidden: Hidden) -> Iterator[tuple[slice, Tensor]]:
        """`run`, and `hidden` becomes what it gives; block after block."""
        for number in range(self.num_chunks(hidden)):
            out, board = self._computed(number, index, block, hidden)
            hidden[self.chunks[number]] = out
            if board is not None:
                hidden.boards[number] = {name: _moved(value, CPU) for name, value in board.items()}
            yield self.chunks[number], out

    @torch.no_grad()
    def _computed(self, number: int, index: int, block: nn.Module, hidden: Hidden) -> tuple[Tensor, Mapping[str, Any] | None]:
        """The output of block `index` for one chunk, and the board behind it."""
        call, known = self._calls[number][index], hidden.boards.get(number, {})
        board = call.board_of({name: _moved(value, self._model.device) for name, value in known.items()})
        with self._model.quickly() if self._quick else nullcontext():
            return call.run(block, hidden[self.chunks[number]], board).float(), board

    def num_chunks(self, hidden: Hidden) -> int:
        """How many chunks `hidden` has."""
        return sum(chunk.start < hidden.shape[0] for chunk in self.chunks)

    def call(self, index: int) -> Call:
        """What block `index` is called with for the first chunk."""
        return self._calls[0][index]


def tensors_on(board: Mapping[str, Any]) -> list[Tensor]:
    """What blocks left on a board, see Call."""
    values = [part for value in board.values() for part in (value if isinstance(value, tuple | list) else (value,))]
    return [value for value in values if isinstance(value, Tensor)]


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _same(a: Call, b: Call) -> bool:
    return a.hidden_name == b.hidden_name and _equal(a.args, b.args) and _equal(dict(a.kwargs), dict(b.kwargs))


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(_equal, a, b))
    return bool(type(a) is type(b) and not isinstance(a, Tensor) and a == b)
