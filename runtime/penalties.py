"""Penalties: what each penalised request has generated, on the host or on the device. Knows no logits but to hand them on.

On the CPU the host counts, since it knows every token. On a GPU the device counts what it has just sampled, so that the next step can be
penalised before the host knows of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from ..kernels.sampling import IN_PROMPT, PenaltyRows, TokenCounts, apply_counted_penalties, apply_penalties, count_tokens
from .transfer import to_device

_FIRST_SLOTS = 8


class PenalisedRow(NamedTuple):
    """A row of logits, whose it is, and (repetition, frequency, presence)."""

    row: int
    request_id: str
    factors: tuple[float, float, float]


class PenaltyPlan(Protocol):
    """Penalties of the same requests in the same rows, step after step."""

    def apply(self, logits: torch.Tensor, steps: Sequence[int]) -> None:
        """Penalise logits float32 [B, V] in place; steps[row] tokens of the row's request count. Raises ValueError for a step beyond."""

    def record(self, tokens: torch.Tensor) -> None:
        """Count what was sampled, int64 [B]; -1 counts for nothing."""


class Penalties(Protocol):
    """The penalised requests of an engine."""

    def add(self, request_id: str, prompt_ids: Sequence[int]) -> None: ...
    def remove(self, request_id: str) -> None: ...
    def plan(self, rows: Sequence[PenalisedRow]) -> PenaltyPlan: ...


class _History:
    """What one request has generated, and the counts that follow from it."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.counts = TokenCounts(prompt_ids)
        self._generated: list[int] = []

    def prepare(self, request_id: str, step: int) -> None:
        """Make the counts those of `step`: tokens from there on are forgotten, for they are about to be sampled anew."""
        _check_step(request_id, step, len(self._generated))
        while len(self._generated) > step:
            self.counts.forget(self._generated.pop())

    def record(self, token: int) -> None:
        self._generated.append(token)
        self.counts.add(token)


def _check_step(request_id: str, step: int, num_sampled: int) -> None:
    if step > num_sampled:
        raise ValueError(f"request {request_id!r} is at step {step}, but only {num_sampled} tokens were sampled for it")


class HostPenalties:
    """Counted by the host, which waits for what was sampled."""

    def __init__(self) -> None:
        self._histories: dict[str, _History] = {}

    def add(self, request_id: str, prompt_ids: Sequence[int]) -> None:
        self._histories[request_id] = _History(prompt_ids)

    def remove(self, request_id: str) -> None:
        del self._histories[request_id]

    def plan(self, rows: Sequence[PenalisedRow]) -> PenaltyPlan:
        return _HostPlan(rows, self._histories)


class _HostPlan:
    def __init__(self, rows: Sequence[PenalisedRow], histories: dict[str, _History]) -> None:
        counts = [histories[row.request_id].counts for row in rows]
        self._penalties = PenaltyRows([row.row for row in rows], counts, [row.factors for row in rows])
        self._rows_of: dict[str, tuple[_History, list[int]]] = {}
        for row in rows:
            self._rows_of.setdefault(row.request_id, (histories[row.request_id], []))[1].append(row.row)

    def apply(self, logits: torch.Tensor, steps: Sequence[int]) -> None:
        for request_id, (history, indices) in self._rows_of.items():
            history.prepare(request_id, steps[indices[0]])
        apply_penalties(logits, self._penalties)

    def record(self, tokens: torch.Tensor) -> None:
        token_ids = tokens.tolist()
        for history, indices in self._rows_of.values():
            for index in indices:
                if token_ids[index] >= 0:
                    history.record(token_ids[index])


class DevicePenalties:
    """Counted on the device, in a table int32 [slots, V] that grows with the requests that are penalised together."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._prompts: dict[str, Sequence[int]] = {}
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self.num_sampled: dict[str, int] = {}
        self.counts = torch.empty(0, 0, dtype=torch.int32, device=device)

    def add(self, request_id: str, prompt_ids: Sequence[int]) -> None:
        self._prompts[request_id] = prompt_ids
        self.num_sampled[request_id] = 0

    def remove(self, request_id: str) -> None:
        del self._prompts[request_id], self.num_sampled[request_id]
        if request_id in self._slots:
            self._free.append(self._slots.pop(request_id))

    def plan(self, rows: Sequence[PenalisedRow]) -> PenaltyPlan:
        return _DevicePlan(rows, self)

    def slot_of(self, request_id: str, vocab: int) -> int:
        """The request's row of the table, made if it has none."""
        slot = self._slots.get(request_id)
        if slot is None:
            if not self._free:
                self._grow(vocab)
            slot = self._free[-1]
            self.counts[slot].zero_()
            prompt = np.unique(np.asarray(self._prompts[request_id], dtype=np.int64))
            if prompt.size:
                self.counts[slot].index_fill_(0, to_device([prompt[prompt < vocab]], self._device)[0], IN_PROMPT)
            self._slots[request_id] = self._free.pop()
        return slot

    def _grow(self, vocab: int) -> None:
        before = self.counts.shape[0]
        grown = torch.empty(max(2 * before, _FIRST_SLOTS), vocab, dtype=torch.int32, device=self._device)
        if before:
            grown[:before] = self.counts
        self.counts = grown
        self._free.extend(range(before, grown.shape[0]))


class _DevicePlan:
    def __init__(self, rows: Sequence[PenalisedRow], penalties: DevicePenalties) -> None:
        self._rows, self._penalties = rows, penalties
        self._tensors: tuple[torch.Tensor, ...] | None = None

    def _place(self, vocab: int) -> tuple[torch.Tensor, ...]:
        """Rows and slots int32 [n], factors float32 [n, 3]: those of this plan for good."""
        if self._tensors is None:
            slots = [self._penalties.slot_of(row.request_id, vocab) for row in self._rows]
            arrays = (
                np.array([row.row for row in self._rows], dtype=np.int32),
                np.array(slots, dtype=np.int32),
                np.array([row.factors for row in self._rows], dtype=np.float32),
            )
            self._tensors = tuple(to_device(arrays, self._penalties.counts.device))
        return self._tensors

    def apply(self, logits: torch.Tensor, steps: Sequence[int]) -> None:
        for request_id, step in {row.request_id: steps[row.row] for row in reversed(self._rows)}.items():
            num_sampled = self._penalties.num_sampled[request_id]
            _check_step(request_id, step, num_sampled)
            if step < num_sampled:
                raise ValueError(f"request {request_id!r} is at step {step} again, and the device has counted {num_sampled} tokens of it")
        rows, slots, factors = self._place(logits.shape[1])
        apply_counted_penalties(logits, self._penalties.counts, rows, slots, factors)

    def record(self, tokens: torch.Tensor) -> None:
        rows, slots, _ = self._place(self._penalties.counts.shape[1])
        count_tokens(tokens, self._penalties.counts, rows, slots)
        for row in self._rows:
            self._penalties.num_sampled[row.request_id] += 1
