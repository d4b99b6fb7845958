"""DecodeGraphs: steps in which every request decodes, and drawing from their logits, captured for each size and replayed. Knows no queue.

A graph has no arguments: it reads buffers that stay where they are, and each step's arrays are copied into them first. It is for so many
rows; a smaller batch is filled up with rows that write to a page of nobody's. All sizes share the memory of the largest. Drawing is a graph
of its own, one for each way of filtering: between the two, logits may be edited.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from ..kernels.sampling import greedy_tokens, sample_tokens
from .forward_batch import AttentionShape, ForwardBatch, StepArrays, with_awaited
from .sampler import Filters
from .transfer import to_device

Replay = Callable[[], object]
# Runs what it is given and takes it down: gives what repeats it, and the tensor that then holds the result.
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Replay, torch.Tensor]]
_EVERY = 8  # between sizes above the smallest


def graph_sizes(most: int) -> list[int]:
    """Numbers of rows that get a graph of their own: few for small batches, where a row more costs much, then every eighth."""
    return sorted({size for size in (1, 2, 4, *range(_EVERY, most + 1, _EVERY), most) if size <= most})


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # loads kernels and lets scratch memory grow, neither of which a capture allows
        torch.cuda.current_stream().wait_stream(self._stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = run()
        return graph.replay, out


@dataclass(frozen=True)
class _Buffers:
    """What graphs read: int64 ids, positions, slots, places and awaited tokens; int32 contexts, query starts and page table."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    places: torch.Tensor
    awaited: torch.Tensor
    contexts: torch.Tensor
    query_start: torch.Tensor
    table: torch.Tensor


class _Drawing:
    """Graphs that draw tokens from the logits of the model's graphs, by size and by which filters there are."""

    def __init__(self, most: int, device: torch.device, capture: Capture) -> None:
        self._capture = capture
        self._temperature, self._top_p, self._min_p = (torch.zeros(most, device=device) for _ in range(3))
        self._top_k = torch.zeros(most, dtype=torch.int32, device=device)
        self._uniform = torch.zeros(most, dtype=torch.float64, device=device)
        self._graphs: dict[tuple[int, bool, bool, bool], tuple[Replay, torch.Tensor]] = {}
        self._filled: tuple[int, Filters] | None = None

    def add(self, logits: torch.Tensor) -> None:
        """Capture every way of drawing from the logits [size, V] that a model's graph fills."""
        size = logits.shape[0]
        for draws, has_k, has_p in ((False, False, False), *itertools.product((True,), (False, True), (False, True))):

            def draw(draws: bool = draws, has_k: bool = has_k, has_p: bool = has_p) -> torch.Tensor:
                if not draws:
                    return greedy_tokens(logits)
                return sample_tokens(
                    logits,
                    self._temperature[:size],
                    top_k=self._top_k[:size] if has_k else None,
                    top_p=self._top_p[:size] if has_p else None,
                    min_p=self._min_p[:size],
                    uniform=self._uniform[:size],
                )

            self._graphs[size, draws, has_k, has_p] = self._capture(draw)

    def draw(self, size: int, rows: int, filters: Filters, uniform: torch.Tensor | None) -> torch.Tensor:
        """Tokens int64 [rows] for the first rows of what the model's graph for `size` gave."""
        run, tokens = self._graphs[size, filters.temperature is not None, filters.top_k is not None, filters.top_p is not None]
        if uniform is not None:
            if self._filled is None or self._filled[0] != size or self._filled[1] is not filters:
                for buffer, values in zip((self._temperature, self._top_k, self._top_p, self._min_p), filters, strict=True):
                    buffer[:size].zero_()  # rows that only fill up are greedy
                    if values is not None:
                        buffer[:rows].copy_(values)
                self._filled = size, filters
            self._uniform[:rows].copy_(uniform)
        run()
        return tokens[:rows]


class DecodeGraphs:
    """Graphs of `compute`, by number of rows."""

    def __init__(
        self,
        compute: Callable[[ForwardBatch, torch.Tensor], torch.Tensor],
        *,
        shape: AttentionShape,
        sizes: Sequence[int],
        max_pages: int,
        vocab_size: int,
        max_awaited: int,
        spare_page: int,
        page_size: int,
        device: torch.device,
        capture: Capture,
        show_progress: bool = True,
    ) -> None:
        """`compute` puts the logits of a step into what it is given, and allocates what it needs; `spare_page` is one that no request gets.

        `vocab_size`: 0 where this rank has no logits, and draws nothing.
        `max_pages`: of one request; `max_awaited`: rows of the largest step that samples.
        """
        most = max(sizes)
        self._spare_page, self._page_size, self._device = spare_page, page_size, device
        self._buffers = buffers = _Buffers(
            ids=torch.zeros(most, dtype=torch.int64, device=device),
            positions=torch.zeros(most, dtype=torch.int64, device=device),
            slots=torch.full((most,), spare_page * page_size, dtype=torch.int64, device=device),
            places=torch.arange(most, dtype=torch.int64, device=device),
            awaited=torch.zeros(max_awaited, dtype=torch.int64, device=device),
            contexts=torch.ones(most, dtype=torch.int32, device=device),
            query_start=torch.arange(most + 1, dtype=torch.int32, device=device),
            table=torch.full((most, max_pages), spare_page, dtype=torch.int32, device=device),
        )

        def step_of(rows: int) -> Callable[[], torch.Tensor]:
            def step() -> torch.Tensor:
                plan = shape.plan(buffers.query_start[: rows + 1], buffers.contexts[:rows], buffers.table[:rows], num_tokens=rows)
                ids = with_awaited(buffers.ids[:rows], buffers.awaited)
                batch = ForwardBatch(ids, buffers.positions[:rows], buffers.slots[:rows], plan, buffers.places[:rows])
                return compute(batch, self._logits[:rows])

            return step

        # One buffer for all: what graphs give stays, so that none may give memory of its own.
        self._logits = torch.zeros(most, vocab_size, device=device)
        self._graphs: dict[int, tuple[Replay, torch.Tensor]] = {}
        self._drawing = _Drawing(most, device, capture)
        self._size = 0  # of the graph that was replayed last
        # The largest first: the others find memory that is large enough.
        for rows in tqdm(sorted(sizes, reverse=True), desc="Capturing CUDA graphs", unit="size", disable=not show_progress, leave=False):
            self._graphs[rows] = capture(step_of(rows))
            if vocab_size:
                self._drawing.add(self._graphs[rows][1])
        self._sizes = sorted(self._graphs)

    def takes(self, arrays: StepArrays) -> bool:
        """Whether every row is one token whose logits are wanted, and there are no more than the largest graph is for."""
        return arrays.num_tokens <= self._sizes[-1] and arrays.is_decoding and arrays.table.shape[1] <= self._buffers.table.shape[1]

    def replay(self, arrays: StepArrays, awaited: torch.Tensor | None) -> torch.Tensor:
        """Logits float32 [num_tokens, vocab_size] of a step that it `takes`, valid until the next."""
        rows = arrays.num_tokens
        size = next(size for size in self._sizes if size >= rows)
        extra = size - rows
        padded = (
            np.pad(arrays.ids, (0, extra)),
            np.pad(arrays.positions, (0, extra)),
            np.pad(arrays.slots, (0, extra), constant_values=self._spare_page * self._page_size),
            np.pad(arrays.contexts, (0, extra), constant_values=1),
            np.pad(arrays.table, ((0, extra), (0, 0)), constant_values=self._spare_page),
        )
        ids, positions, slots, contexts, table = to_device(padded, self._device)
        buffers = self._buffers
        buffers.ids[:size].copy_(ids)
        buffers.positions[:size].copy_(positions)
        buffers.slots[:size].copy_(slots)
        buffers.contexts[:size].copy_(contexts)
        buffers.table[:size, : table.shape[1]].copy_(table)
        if awaited is not None:
            buffers.awaited[: awaited.shape[0]].copy_(awaited)
        run, logits = self._graphs[size]
        run()
        self._size = size
        return logits[:rows]

    def draw(self, logits: torch.Tensor, filters: Filters, uniform: torch.Tensor | None) -> torch.Tensor | None:
        """Tokens int64 [B] of what was replayed last, as `sample_tokens` draws them; None for other logits. They stay until the next draw.

        logits float32 [B, V], uniform float64 [B], None where all rows are greedy.
        """
        if logits.data_ptr() != self._logits.data_ptr() or logits.shape[0] > self._size:
            return None
        return self._drawing.draw(self._size, logits.shape[0], filters, uniform)
