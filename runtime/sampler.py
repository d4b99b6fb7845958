"""Sampler: the sampling state of every request, and tokens for rows of logits. Knows no model, no schedule and no stop condition.

The random number of a row depends on (seed, step) alone, so a seed gives the same text whatever else is in the batch, in whatever
order, and a retracted request goes on as if nothing had happened. Stages that no row needs are skipped.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

from ..kernels.gpu.device import is_gpu
from ..kernels.sampling import add_to_logits, greedy_tokens, sample_tokens, top_logprobs
from .outputs import TokenLogprob
from .penalties import DevicePenalties, HostPenalties, PenalisedRow, Penalties, PenaltyPlan
from .sampling_params import SamplingParams
from .transfer import Arrival, Fetch, HostCopy, to_device

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
_MOST_PLANS = 4
_PROMPT_CHUNK_LOGITS: Final = 1 << 23  # 32 MiB of float32 at a time


class SampleRow(NamedTuple):
    """One row of logits: whose it is, and how many tokens that request has generated before it."""

    request_id: str
    step: int


@dataclass(frozen=True)
class SampleResult:
    """One entry a row. A token id of -1 means that the row held no distribution (NaN, +inf, or every token forbidden).

    `logprobs` is None for rows that did not ask, and for rows without a token.
    """

    token_ids: list[int]
    logprobs: list[TokenLogprob | None]


class Filters(NamedTuple):
    """Arguments of `sample_tokens` that stay while the same requests stand in the same rows; no temperature: all rows are greedy."""

    temperature: torch.Tensor | None
    top_k: torch.Tensor | None
    top_p: torch.Tensor | None
    min_p: torch.Tensor | None


# Draws tokens int64 [B] from logits float32 [B, V] and uniform numbers, as `sample_tokens` would; None: it cannot.
Draw = Callable[[torch.Tensor, Filters, torch.Tensor | None], torch.Tensor | None]


class PendingSample:
    """Tokens that are being sampled: `tokens` int64 [B] on the device, for the next step; the host's copy when it waits for it."""

    def __init__(self, tokens: torch.Tensor, arrival: Arrival, plan: _Plan) -> None:
        self.tokens = tokens
        self._arrival, self._plan = arrival, plan

    def wait(self) -> SampleResult:
        tokens, *reported = self._arrival.wait()  # and, where any row asked: values, ids of the best, theirs
        token_ids: list[int] = tokens.tolist()
        result = self._plan.no_logprobs.copy()
        if reported:
            chosen = [max(token_ids[row], 0) for row in self._plan.logprob_rows]
            values, top_ids, tops = reported
            found = _as_logprobs(chosen, values, top_ids, tops, self._plan.num_logprobs)
            for row, logprob in zip(self._plan.logprob_rows, found, strict=True):
                result[row] = logprob if token_ids[row] >= 0 else None
        return SampleResult(token_ids, result)


class PendingPromptLogprobs:
    """Log-probabilities of a part of a prompt that are being computed."""

    def __init__(self, targets: Sequence[int], k: int, arrival: Arrival) -> None:
        self._targets, self._k, self._arrival = targets, k, arrival

    def wait(self) -> tuple[TokenLogprob, ...]:
        parts = self._arrival.wait()
        result: list[TokenLogprob] = []
        for values, ids, tops in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
            targets = self._targets[len(result) : len(result) + len(values)]
            result += _as_logprobs(targets, values, ids, tops, [self._k] * len(targets))
        return tuple(result)


def uniform_numbers(seeds: np.ndarray[tuple[int], np.dtype[np.uint64]], steps: Sequence[int]) -> torch.Tensor:
    """float64 in [0, 1) for each (seed, step): SplitMix64 (Steele, Lea, Flood 2014) as a hash, its top 53 bits.

    The seed is mixed once before the step is added, so that near seeds are no shifted copies of one stream.
    """
    counter = np.asarray(steps, dtype=np.uint64) + np.uint64(1)
    mixed = _mix(_mix(seeds + _GOLDEN) + counter * _GOLDEN)
    return torch.from_numpy((mixed >> np.uint64(11)) * 2.0**-53)


def _mix(z: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@dataclass(frozen=True)
class _Request:
    """One request's wishes in the form a step wants them."""

    params: SamplingParams
    seed: int
    forbidden_until_min: tuple[int, ...]
    is_penalised: bool
    bias: tuple[tuple[int, float], ...]


class _Edits(NamedTuple):
    """Additions to the logits: see `add_to_logits`."""

    rows: torch.Tensor
    token_ids: torch.Tensor
    values: torch.Tensor


@dataclass
class _Plan:
    """Everything that stays the same while the same requests stand in the same rows."""

    request_ids: list[str]
    filters: Filters
    seeds: np.ndarray[tuple[int], np.dtype[np.uint64]]
    penalties: PenaltyPlan | None
    min_tokens: list[tuple[int, int]]  # (row, min_tokens) of rows that forbid tokens for a while
    biased: list[int]
    logprob_rows: list[int]
    logprob_index: torch.Tensor
    num_logprobs: list[int]
    no_logprobs: list[TokenLogprob | None]
    forbidding: list[int] | None = None  # rows that `edits` was made for
    edits: _Edits | None = None


class Sampler:
    """Samples for the requests that were added. Not thread-safe: one engine loop owns it."""

    def __init__(
        self, *, device: torch.device | str = "cpu", random_seed: int | None = None, fetch: Fetch = HostCopy, draw: Draw | None = None
    ) -> None:
        """`random_seed` seeds the generator from which requests without a seed draw theirs; None takes it from the system.

        `draw` is asked first, and may have captured what it does. What it gives may be overwritten by the next launch.
        """
        self._draw = draw
        self._device = torch.device(device)
        self._fetch = fetch
        self._generator = random.Random(random_seed)
        self._requests: dict[str, _Request] = {}
        self._penalties: Penalties = DevicePenalties(self._device) if is_gpu(self._device) else HostPenalties()
        self._plans: dict[tuple[str, ...], _Plan] = {}  # by requests, the last used last: batches of stages take turns

    def add(self, request_id: str, params: SamplingParams, prompt_ids: Sequence[int], forbidden_until_min: tuple[int, ...]) -> None:
        """Take up a request. `forbidden_until_min` cannot come before params.min_tokens tokens were generated (eos, stop ids)."""
        if request_id in self._requests:
            raise ValueError(f"request {request_id!r} is already being sampled: remove it first")
        repeats = params.repetition_penalty != 1.0
        penalised = repeats or params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        self._requests[request_id] = _Request(
            params=params,
            seed=(self._generator.getrandbits(64) if params.seed is None else params.seed) % 2**64,
            forbidden_until_min=tuple(forbidden_until_min) if params.min_tokens > 0 else (),
            is_penalised=penalised,
            bias=tuple(params.logit_bias.items()),
        )
        if penalised:
            self._penalties.add(request_id, prompt_ids if repeats else ())

    def remove(self, request_id: str) -> None:
        """Forget a request; KeyError if it was never added. A retracted request stays."""
        if self._requests.pop(request_id).is_penalised:
            self._penalties.remove(request_id)
        for key in [key for key in self._plans if request_id in key]:
            del self._plans[key]

    def sample(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> SampleResult:
        """`launch`, waited for."""
        return self.launch(logits, rows).wait()

    def launch(self, logits: torch.Tensor, rows: Sequence[SampleRow]) -> PendingSample:
        """Sample one token for each row of logits float32 [B, V], which may be overwritten.

        A request may stand in several rows, by rising step; its penalties then see what was sampled before this call, and all
        its tokens are taken to follow each other. On the CPU sampling an earlier step again forgets what came after. Raises KeyError
        for an unknown request and ValueError for a step that does not follow what a penalised request has been sampled for.
        """
        if len(rows) != logits.shape[0]:
            raise ValueError(f"{logits.shape[0]} rows of logits, but {len(rows)} rows to sample")
        plan = self._plan_for(rows)
        raw = self._raw_rows(logits, plan)
        steps = [row.step for row in rows]
        self._edit(logits, plan, steps)
        tokens = self._tokens(logits, plan, steps)
        reported = () if raw is None else _token_logprobs(raw, tokens[plan.logprob_index].clamp_(min=0), max(plan.num_logprobs))
        arrival = self._fetch([tokens, *reported])
        if plan.penalties is not None:
            plan.penalties.record(tokens)  # last: what fails before it may be sampled again
        return PendingSample(tokens, arrival, plan)

    def _tokens(self, logits: torch.Tensor, plan: _Plan, steps: Sequence[int]) -> torch.Tensor:
        filters, uniform = plan.filters, None
        if filters.temperature is not None:
            (uniform,) = to_device([uniform_numbers(plan.seeds, steps).numpy()], self._device)
        drawn = None if self._draw is None else self._draw(logits, filters, uniform)
        if drawn is not None:
            return drawn
        if filters.temperature is None or uniform is None:
            return greedy_tokens(logits)
        return sample_tokens(logits, filters.temperature, top_k=filters.top_k, top_p=filters.top_p, min_p=filters.min_p, uniform=uniform)

    def _plan_for(self, rows: Sequence[SampleRow]) -> _Plan:
        request_ids = [row.request_id for row in rows]
        key = tuple(request_ids)
        plan = self._plans.pop(key, None)
        if plan is None:
            plan = _make_plan(request_ids, [self._requests[request_id] for request_id in request_ids], self._penalties, self._device)
            if len(self._plans) == _MOST_PLANS:
                del self._plans[next(iter(self._plans))]
        self._plans[key] = plan
        return plan

    def _raw_rows(self, logits: torch.Tensor, plan: _Plan) -> torch.Tensor | None:
        """The logits to report log-probabilities of; a copy where something is about to change them."""
        if not plan.logprob_rows:
            return None
        changes = plan.penalties is not None or plan.biased or plan.min_tokens
        if len(plan.logprob_rows) == logits.shape[0]:
            return logits.clone() if changes else logits
        return logits.index_select(0, plan.logprob_index)

    def _edit(self, logits: torch.Tensor, plan: _Plan, steps: Sequence[int]) -> None:
        """Penalties, then biases and forbidden tokens."""
        if plan.penalties is not None:
            plan.penalties.apply(logits, steps)
        if plan.min_tokens or plan.biased:
            forbidding = [index for index, min_tokens in plan.min_tokens if steps[index] < min_tokens]
            if plan.forbidding != forbidding:
                plan.forbidding = forbidding
                plan.edits = self._make_edits(plan, forbidding)
            if plan.edits is not None:
                add_to_logits(logits, *plan.edits)

    def _make_edits(self, plan: _Plan, forbidding: list[int]) -> _Edits | None:
        entries = [(row, token, bias) for row in plan.biased for token, bias in self._requests[plan.request_ids[row]].bias]
        for row in forbidding:
            entries += [(row, token, -torch.inf) for token in self._requests[plan.request_ids[row]].forbidden_until_min]
        if not entries:
            return None
        places, tokens, values = zip(*entries, strict=True)
        arrays = (np.array(places, dtype=np.int64), np.array(tokens, dtype=np.int64), np.array(values, dtype=np.float32))
        return _Edits(*to_device(arrays, self._device))


def _make_plan(request_ids: list[str], requests: list[_Request], penalties: Penalties, device: torch.device) -> _Plan:
    params = [request.params for request in requests]
    drawn = [p for p in params if not p.is_greedy]
    penalised = [
        PenalisedRow(row, request_ids[row], (p.repetition_penalty, p.frequency_penalty, p.presence_penalty))
        for row, p in enumerate(params)
        if requests[row].is_penalised
    ]
    logprob_rows = [row for row, p in enumerate(params) if p.logprobs is not None]
    temperature, top_k, top_p, min_p, logprob_index = to_device(
        (
            np.array([0.0 if p.is_greedy else p.temperature for p in params], dtype=np.float32),
            np.array([_int32(p.top_k) for p in params], dtype=np.int32),
            np.array([p.top_p for p in params], dtype=np.float32),
            np.array([p.min_p for p in params], dtype=np.float32),
            np.array(logprob_rows, dtype=np.int64),
        ),
        device,
    )
    return _Plan(
        request_ids=request_ids,
        filters=Filters(
            temperature if drawn else None,
            top_k if any(p.top_k > 0 for p in drawn) else None,
            top_p if any(p.top_p < 1 for p in drawn) else None,
            min_p if any(p.min_p > 0 for p in drawn) else None,
        ),
        seeds=np.array([request.seed for request in requests], dtype=np.uint64),
        penalties=penalties.plan(penalised) if penalised else None,
        min_tokens=[(row, r.params.min_tokens) for row, r in enumerate(requests) if r.forbidden_until_min],
        biased=[row for row, request in enumerate(requests) if request.bias],
        logprob_rows=logprob_rows,
        logprob_index=logprob_index,
        num_logprobs=[params[row].logprobs or 0 for row in logprob_rows],
        no_logprobs=[None] * len(params),
    )


def _int32(top_k: int) -> int:
    """A top_k that fits its tensor: beyond 31 bits no vocabulary is that large, so the filter is off."""
    return top_k if top_k < 2**31 else 0


def launch_prompt_logprobs(logits: torch.Tensor, targets: Sequence[int], *, k: int, fetch: Fetch = HostCopy) -> PendingPromptLogprobs:
    """Log-probability of each target under its row, and the k best of the row. logits [T, V] of any float dtype, T targets.

    Row t predicts targets[t]: the first prompt token has no row, and the caller gives it TokenLogprob(id, None). Rows are taken
    in chunks, so that no second tensor of the size of `logits` is made.
    """
    (wanted,) = to_device([np.asarray(targets, dtype=np.int64)], logits.device)
    chunk = max(1, _PROMPT_CHUNK_LOGITS // logits.shape[1])
    parts: list[torch.Tensor] = []
    for start in range(0, logits.shape[0], chunk):
        parts += _token_logprobs(logits[start : start + chunk].float(), wanted[start : start + chunk], k)
    return PendingPromptLogprobs(targets, k, fetch(parts))


def _token_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`top_logprobs` with the k best, or all where the vocabulary has fewer."""
    return top_logprobs(logits, token_ids, k=min(k, logits.shape[1]))


def _as_logprobs(
    token_ids: Sequence[int], values: torch.Tensor, top_ids: torch.Tensor, tops: torch.Tensor, ks: Sequence[int]
) -> list[TokenLogprob]:
    """For each row the given token and the `ks[row]` best."""
    rows = zip(token_ids, values.tolist(), top_ids.tolist(), tops.tolist(), ks, strict=True)
    return [TokenLogprob(token, value, tuple(zip(ids[:k], best[:k], strict=True))) for token, value, ids, best, k in rows]
