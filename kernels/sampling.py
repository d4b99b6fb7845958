"""From logits to tokens: drawing, log-probabilities, penalties. Tensors in, tensors out; knows no request, no seed and no stop.

Each operation has a reference in torch, plainly written; CPU and GPU have kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch

from .cpu import logprobs as cpu_logprobs
from .cpu import sampling as cpu_sampling
from .cpu import sampling_penalties as cpu_penalties
from .cpu.logit_rows import LOWEST_EXPONENT
from .gpu.device import is_gpu

IN_PROMPT: Final = 1 << 30  # of a token's count on the device: it stands in the prompt
_CHUNK_LOGITS: Final = 1 << 22  # float64 numbers that log-probabilities take at a time on a GPU


@functools.cache
def _gpu_kernels() -> Any:
    """The kernels for NVIDIA GPUs, imported at the first call."""
    from .gpu import sampling as on_gpu

    return on_gpu


def _on_gpu(logits: torch.Tensor, *columns: torch.Tensor | None) -> torch.Tensor:
    tokens: torch.Tensor = _gpu_kernels().sample_tokens(logits, *columns)
    return tokens


def sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    """Draw one token for each row; gives int64 [B].

    logits float32 [B, V], any row stride. temperature, top_p, min_p float32 [B], top_k int32 [B], uniform float64 [B] in [0, 1).
    A filter that is None is off for all rows; top_k <= 0 or >= V, top_p >= 1 and min_p <= 0 turn it off for one row.

    A row of temperature 0 takes its largest logit, the lowest id among equals. Others have weights
    w = exp((logit - max) / temperature), float32 (0 below LOWEST_EXPONENT; sums are float64). In this order: min_p keeps
    w >= min_p; top_k keeps the k largest logits; top_p keeps the fewest of the rest, largest first, whose sum reaches top_p of
    the rest's sum, at least one. Equal logits are kept by lowest id. The token is the first, in id order, at which the running
    sum of what is kept exceeds uniform times the whole. A row without a distribution (NaN, +inf, nothing but -inf) gives -1.
    """
    _check_logits(logits)
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int32),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("uniform", uniform, torch.float64),
    ):
        if tensor is not None:
            _check_per_row(name, tensor, dtype, logits)
    if is_gpu(logits.device):
        return _on_gpu(logits, temperature, top_k, top_p, min_p, uniform)
    if logits.device.type == "cpu":
        return cpu_sampling.sample_tokens(logits, temperature, top_k, top_p, min_p, uniform)
    return reference_sample_tokens(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)


def greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    """`sample_tokens` with every temperature 0: the largest logit's id (lowest among equals), or -1; int64 [B]."""
    _check_logits(logits)
    if is_gpu(logits.device):
        return _on_gpu(logits, None, None, None, None, None)
    if logits.device.type == "cpu":
        return cpu_sampling.sample_tokens(logits, None, None, None, None, None)
    return reference_greedy_tokens(logits)


def reference_greedy_tokens(logits: torch.Tensor) -> torch.Tensor:
    peak = logits.amax(1, keepdim=True)
    ids = torch.arange(logits.shape[1], device=logits.device)
    first = torch.where(logits == peak, ids, logits.shape[1]).amin(1)
    return torch.where(peak.squeeze(1).isfinite(), first, -1)


def reference_sample_tokens(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    *,
    top_k: torch.Tensor | None = None,
    top_p: torch.Tensor | None = None,
    min_p: torch.Tensor | None = None,
    uniform: torch.Tensor,
) -> torch.Tensor:
    vocab = logits.shape[1]
    greedy = reference_greedy_tokens(logits)
    z = (logits - logits.amax(1, keepdim=True)) / torch.where(temperature > 0, temperature, 1.0).unsqueeze(1)
    weights = torch.where(z >= LOWEST_EXPONENT, z.exp(), 0.0)
    if min_p is not None:
        weights = torch.where(weights >= min_p.unsqueeze(1), weights, 0.0)
    mass = weights.double()
    if top_k is not None or top_p is not None:
        order = logits.argsort(dim=1, descending=True, stable=True)
        ranked = mass.gather(1, order)
        if top_k is not None:
            k = torch.where(top_k > 0, top_k, vocab).unsqueeze(1)
            ranked = torch.where((ranked > 0).cumsum(1) <= k, ranked, 0.0)
        if top_p is not None:
            running = ranked.cumsum(1)
            before = running - ranked
            before[:, 1:] = running[:, :-1]
            wanted = top_p.double().unsqueeze(1)
            inside = (before < wanted * running[:, -1:]) | (before == 0) | (wanted >= 1)
            ranked = torch.where(inside, ranked, 0.0)
        mass = torch.zeros_like(mass).scatter(1, order, ranked)
    running = mass.cumsum(1)
    drawn = (running <= (uniform.unsqueeze(1) * running[:, -1:])).sum(1)
    ids = torch.arange(vocab, device=logits.device)
    last = torch.where(mass > 0, ids, 0).amax(1)  # rounding could carry the target past the last token
    drawn = torch.minimum(drawn, last)
    return torch.where((temperature <= 0) | (greedy < 0), greedy, drawn)


def top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of one token a row and of the k best: (float32 [B], int64 [B, k], float32 [B, k]), best first.

    logits float32 [B, V], token_ids int64 [B] within the vocabulary, 0 <= k <= V. Equal logits stand by rising id. Within 1e-5 of
    float64. A row without a distribution (NaN, +inf, nothing but -inf) has NaN and ids -1. Raises ValueError for a k or an id out
    of range.
    """
    _check_logits(logits)
    _check_per_row("token_ids", token_ids, torch.int64, logits)
    vocab = logits.shape[1]
    if not 0 <= k <= vocab:
        raise ValueError(f"k={k} is not valid: it must be from 0 to the vocabulary size {vocab}")
    if is_gpu(logits.device):
        return _selected_logprobs(logits, token_ids, k)
    if logits.device.type != "cpu":
        return reference_top_logprobs(logits, token_ids, k=k)
    if token_ids.numel() and (int(token_ids.min()) < 0 or int(token_ids.max()) >= vocab):
        raise ValueError(f"token_ids must be from 0 to {vocab - 1}, not {token_ids.tolist()}")
    return cpu_logprobs.top_logprobs(logits, token_ids, k)


def log_softmax_rows(logits: torch.Tensor) -> torch.Tensor:
    """log-softmax of each row, computed in float64, as float32 [B, V]; NaN in rows without a distribution."""
    usable = logits.amax(1, keepdim=True).isfinite()
    return torch.where(usable, logits.double().log_softmax(1), torch.nan).float()


def reference_top_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, *, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = log_softmax_rows(logits)
    chosen = logprobs.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    ids = logits.argsort(dim=1, descending=True, stable=True)[:, :k]
    tops = logprobs.gather(1, ids)
    return chosen, torch.where(chosen.isnan().unsqueeze(1), -1, ids), tops


def _selected_logprobs(logits: torch.Tensor, token_ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`top_logprobs` by selection: logit and id make one whole number, so that the k greatest are in order and none is a tie."""
    rows, vocab = logits.shape
    chosen = logits.new_empty(rows)
    ids, tops = token_ids.new_empty(rows, k), logits.new_empty(rows, k)
    later = torch.arange(vocab - 1, -1, -1, device=logits.device)
    chunk = max(1, _CHUNK_LOGITS // vocab)
    for start in range(0, rows, chunk):
        part, here = logits[start : start + chunk], slice(start, start + chunk)
        usable = part.amax(1).isfinite()
        norm = torch.where(usable, part.double().logsumexp(1), torch.nan)
        chosen[here] = (part.gather(1, token_ids[here].unsqueeze(1)).squeeze(1) - norm).float()
        bits = torch.where(part == 0, 0.0, part).view(torch.int32).long()
        keys = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF) << 32 | later
        best = vocab - 1 - (keys.topk(k, dim=1).values & 0xFFFFFFFF)
        tops[here] = (part.gather(1, best) - norm.unsqueeze(1)).float()
        ids[here] = torch.where(usable.unsqueeze(1), best, -1)
    return chosen, ids, tops


class TokenCounts:
    """The tokens one sequence has seen, each once, and how often each was generated. Grows; owns no penalties.

    token_ids and counts are int32 arrays of which the first `length` entries count; a prompt token has count 0.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        unique = np.unique(np.asarray(prompt_ids, dtype=np.int32))
        self.length = self._prompt_length = unique.size
        self._place = {token: place for place, token in enumerate(unique.tolist())}
        self.token_ids = np.empty(unique.size + 64, dtype=np.int32)
        self.token_ids[: unique.size] = unique
        self.counts = np.zeros(unique.size + 64, dtype=np.int32)

    def add(self, token: int) -> None:
        """Count one generated token."""
        place = self._place.get(token)
        if place is None:
            place = self.length
            if place == self.token_ids.size:
                self.token_ids = np.concatenate((self.token_ids, np.empty_like(self.token_ids)))
                self.counts = np.concatenate((self.counts, np.zeros_like(self.counts)))
            self._place[token] = place
            self.token_ids[place] = token
            self.length = place + 1
        self.counts[place] += 1

    def forget(self, token: int) -> None:
        """Take back one `add`, the latest: a token that came with it goes with it."""
        place = self._place[token]
        self.counts[place] -= 1
        if place == self.length - 1 and self.counts[place] == 0 and place >= self._prompt_length:
            del self._place[token]
            self.length = place


class PenaltyRows:
    """Which rows of a batch are penalised, by what, and the counts to do it with. Reads the counts anew at each use."""

    def __init__(self, rows: Sequence[int], counts: Sequence[TokenCounts], factors: Sequence[tuple[float, float, float]]) -> None:
        """One entry for each penalised row: its index in the batch, its counts, and (repetition, frequency, presence)."""
        self.rows = tuple(rows)
        self.counts = tuple(counts)
        self.factors = np.asarray(factors, dtype=np.float32).reshape(-1, 3)
        self.table = np.zeros((len(self.rows), 4), dtype=np.int64)
        self._known: list[int] = [-1] * len(self.rows)
        self.table[:, 0] = self.rows

    def refresh(self) -> None:
        """Bring addresses and lengths up to date with the counts, which may have grown."""
        for i, counts in enumerate(self.counts):
            if counts.length != self._known[i]:
                self._known[i] = counts.length
                self.table[i, 1:] = counts.token_ids.ctypes.data, counts.counts.ctypes.data, counts.length


def apply_penalties(logits: torch.Tensor, penalties: PenaltyRows) -> None:
    """Penalise repeated tokens in place. logits float32 [B, V].

    For each token of a row's counts: divide a positive logit by `repetition` and multiply any other with it (CTRL,
    arXiv:1909.05858), then, if it was generated, subtract count * frequency + presence (OpenAI). Ids that are not in the
    vocabulary have no logit and are passed over.
    """
    _check_logits(logits)
    if any(not 0 <= row < logits.shape[0] for row in penalties.rows):
        raise ValueError(f"penalised rows {penalties.rows} are not all within the batch of {logits.shape[0]}")
    if logits.device.type == "cpu":
        penalties.refresh()
        cpu_penalties.apply_penalties(logits, penalties.table, penalties.factors)
    else:
        reference_apply_penalties(logits, penalties)


def reference_apply_penalties(logits: torch.Tensor, penalties: PenaltyRows) -> None:
    for row, counts, (repetition, frequency, presence) in zip(penalties.rows, penalties.counts, penalties.factors, strict=True):
        ids = torch.from_numpy(counts.token_ids[: counts.length]).to(logits.device, torch.int64)
        generated = torch.from_numpy(counts.counts[: counts.length]).to(logits.device)
        known = ids < logits.shape[1]
        ids, generated = ids[known], generated[known]
        values = logits[row, ids]
        values = torch.where(values > 0, values / float(repetition), values * float(repetition))
        values = torch.where(generated > 0, values - float(frequency) * generated - float(presence), values)
        logits[row, ids] = values


def apply_counted_penalties(
    logits: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, factors: torch.Tensor
) -> None:
    """`apply_penalties` on a GPU, with counts that lie there: rows[i] of logits [B, V] is penalised by counts[slots[i]] and factors[i].

    counts int32 [S, V]: how often a token was generated, plus IN_PROMPT where the prompt has it. rows, slots int32 [n], factors float32
    [n, 3]: repetition, frequency, presence.
    """
    _check_logits(logits)
    _gpu_kernels().penalise(logits, counts, rows, slots, factors)()


def count_tokens(tokens: torch.Tensor, counts: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
    """Count tokens[rows[i]], where it is not -1, in counts[slots[i]]. tokens int64 [B]; the rest as in `apply_counted_penalties`."""
    _gpu_kernels().count(tokens, counts, rows, slots)()


def add_to_logits(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, values: torch.Tensor) -> None:
    """logits[rows[i], token_ids[i]] += values[i], in place: biases, and -inf for tokens that must not come.

    rows and token_ids int64 [N], values float32 [N]; a place may appear twice. Raises IndexError for one outside the logits.
    """
    logits.index_put_((rows, token_ids), values, accumulate=True)


def _check_logits(logits: torch.Tensor) -> None:
    if logits.dim() != 2 or logits.dtype != torch.float32 or logits.shape[1] == 0 or logits.stride(1) != 1:
        given = f"{logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}"
        raise ValueError(f"logits must be float32 [rows, vocabulary] with contiguous rows, not {given}")


def _check_per_row(name: str, tensor: torch.Tensor, dtype: torch.dtype, logits: torch.Tensor) -> None:
    if tensor.shape != logits.shape[:1] or tensor.dtype != dtype or tensor.device != logits.device or not tensor.is_contiguous():
        given = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
        raise ValueError(f"{name} must be contiguous {dtype} [{logits.shape[0]}] on {logits.device}, not {given}")
