"""Perplexity, KL divergence and top-1 agreement from the logits of one model or two. Knows no engine, no text and no file.

Log-softmax is float32, sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .windows import Window

Piece = tuple[int, torch.Tensor]  # position of the first row, logits [n, vocab_size]: row i predicts the token after position + i
LogitsSource = Callable[[Sequence[int]], Iterable[Piece]]  # from the tokens of a window to the logits of its positions, in order

_BLOCK_LOGITS = 1 << 22  # rows are taken in blocks of so many numbers, which bounds the copies made of them


@dataclass(frozen=True)
class Scores:
    """What was measured, over all scored tokens. Nats; those against the reference are None where there was none.

    `kl` is KL(reference || model) of each token over the full vocabulary, float64; `agreement` the share, 0 to 1, of tokens at which both
    models find the same one most likely.
    """

    num_tokens: int
    nll: float
    reference_nll: float | None = None
    kl: np.ndarray | None = None
    agreement: float | None = None

    @property
    def perplexity(self) -> float:
        return _exp(self.nll)

    @property
    def reference_perplexity(self) -> float | None:
        return None if self.reference_nll is None else _exp(self.reference_nll)


def score_windows(
    tokens: Sequence[int],
    windows: Iterable[Window],
    model: LogitsSource,
    reference: LogitsSource | None = None,
    *,
    on_progress: Callable[[int], object] = lambda num_tokens: None,
) -> Scores:
    """Score `windows` of `tokens`. Two models go in step, piece by piece. `on_progress` is told how many tokens were scored just now.

    Raises ValueError when logits are not numbers, or when the two sources give different vocabularies or numbers of positions.
    """
    tally = _Tally()
    for window in windows:
        ids = tokens[window.start : window.end]
        first = window.first_scored - window.start - 1  # the row that predicts the first scored token
        pairs = ((at, ours, None) for at, ours in model(ids)) if reference is None else in_step(model(ids), reference(ids))
        for at, ours, theirs in pairs:
            low, high = max(first - at, 0), min(len(ids) - 1 - at, ours.shape[0])
            if low < high:
                targets = torch.tensor(ids[at + low + 1 : at + high + 1], device=ours.device)
                tally.add(ours[low:high], targets, None if theirs is None else theirs[low:high])
                on_progress(high - low)
    return tally.scores()


def in_step(model: Iterable[Piece], reference: Iterable[Piece]) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """The rows of both, position by position, wherever each one's pieces are cut. Asks for a piece only when it is needed."""
    others = iter(reference)
    theirs: torch.Tensor | None = None  # what is left of the reference's piece
    for start, ours in model:
        done = 0
        while done < ours.shape[0]:
            if theirs is None:
                where, theirs = next(others, (-1, ours))
                if where != start + done:
                    raise ValueError(f"the reference gives no logits for position {start + done}")
            count = min(ours.shape[0] - done, theirs.shape[0])
            yield start + done, ours[done : done + count], theirs[:count]
            done += count
            theirs = theirs[count:] if count < theirs.shape[0] else None


class _Tally:
    """Sums in float64, and one KL value for each token."""

    def __init__(self) -> None:
        self._num_tokens = 0
        self._nll = self._reference_nll = 0.0
        self._agreed = 0
        self._kl: list[np.ndarray] = []

    def add(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        """Rows of one model or two, [n, vocab_size], and the tokens that follow them, int64 [n]."""
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(f"the model's logits are {list(logits.shape)} and the reference's {list(reference.shape)}: not one vocabulary")
        step = max(1, _BLOCK_LOGITS // logits.shape[1])
        for at in range(0, logits.shape[0], step):
            block = slice(at, at + step)
            self._add(logits[block], targets[block], None if reference is None else reference[block])

    def _add(self, logits: torch.Tensor, targets: torch.Tensor, reference: torch.Tensor | None) -> None:
        ours = logits.float().log_softmax(-1)
        self._nll -= _picked(ours, targets)
        self._num_tokens += targets.shape[0]
        if reference is not None:
            theirs = reference.to(logits.device).float().log_softmax(-1)
            self._reference_nll -= _picked(theirs, targets)
            self._agreed += int((logits.argmax(-1) == reference.to(logits.device).argmax(-1)).sum())
            self._kl.append(kl_divergence(theirs, ours).cpu().numpy())
        if math.isnan(self._nll + self._reference_nll):
            raise ValueError(f"the logits hold a value that is not a number (NaN), within the first {self._num_tokens} scored tokens")

    def scores(self) -> Scores:
        count = self._num_tokens
        if not self._kl:
            return Scores(count, self._nll / count)
        return Scores(count, self._nll / count, self._reference_nll / count, np.concatenate(self._kl), self._agreed / count)


def kl_divergence(reference: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of each row in nats, float64 [n], from log-probabilities float32 [n, vocab_size]."""
    share = reference.exp()
    terms = (reference - model).mul_(share).masked_fill_(share == 0, 0.0)  # what the reference rules out adds nothing, not 0 * inf
    return terms.sum(-1, dtype=torch.float64)


def _picked(log_probabilities: torch.Tensor, targets: torch.Tensor) -> float:
    return log_probabilities.gather(1, targets[:, None]).sum(dtype=torch.float64).item()


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
