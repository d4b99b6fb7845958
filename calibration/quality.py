"""What a quantization cost: perplexity, KL and agreement against the original, and tokens a second before and after.

By Octavo's Engine where it serves the architecture, else by transformers with the weights as they read back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .evaluate import LogitsSource, Piece, Scores, score_windows
from .float_model import FloatModel
from .streams import Hidden, Inputs
from .tuning import LOGIT_ROWS
from .windows import windows_of

_LEAST_REST = 24  # tokens
_POOL_BEYOND = 64  # tokens a sequence: pages are not filled to the last


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Measured over `num_tokens` of `text`. KL is KL(original || quantized), nats a token."""

    text: str
    num_tokens: int
    seqlen: int
    by: str  # who computed: "octavo" or "transformers"
    kv_cache: str | None = None  # what the quantized model's cache held; None: what the model computes in
    perplexity: float
    original_perplexity: float
    kl_mean: float
    top1_agreement_percent: float

    @property
    def ppl_increase(self) -> float:
        """Relative: 0.03 is 3 % above the original's."""
        return self.perplexity / self.original_perplexity - 1


def by_engine(
    original: str, quantized: Path, tokens: Sequence[int], *, seqlen: int, text: str, device: str, kv_cache: str | None = None
) -> Quality:
    """With Octavo's Engine, which reads and computes both as it would serve them. `kv_cache`: what the quantized model's holds."""
    from octavo import evaluate

    options = {"device": device, "num_threads": torch.get_num_threads(), "kv_cache_dtype": kv_cache or "auto"}
    found = evaluate(str(quantized), reference=original, token_ids=tokens, seqlen=seqlen, show_progress=True, engine_options=options)
    assert found.reference_perplexity is not None
    assert found.kl_mean is not None
    assert found.top1_agreement_percent is not None
    return Quality(
        text=text,
        num_tokens=found.num_tokens,
        seqlen=seqlen,
        by="octavo",
        kv_cache=kv_cache,
        perplexity=found.perplexity,
        original_perplexity=found.reference_perplexity,
        kl_mean=found.kl_mean,
        top1_agreement_percent=found.top1_agreement_percent,
    )


def by_transformers(
    original: FloatModel, quantized: FloatModel, tokens: Sequence[int], *, seqlen: int, text: str, scratch: Path | None = None
) -> Quality:
    """With transformers in float32, one block in memory at a time; all but the blocks must be loaded. A last window of fewer than
    24 tokens is left out: blocks of any architecture need not run on it.

    `scratch`: a folder for the hidden states, which are in memory without one.
    """
    rest = len(tokens) % seqlen
    windows = windows_of(len(tokens) - (rest if rest < _LEAST_REST else 0), seqlen=seqlen, stride=seqlen)
    cut = [list(tokens[window.start : window.end]) for window in windows]
    whole = [row for row in cut if len(row) == len(cut[0])]
    parts = [torch.tensor(rows) for rows in (whole, cut[len(whole) :]) if rows]  # the last window may be shorter
    places = {tuple(row): (part, i) for part, rows in enumerate(parts) for i, row in enumerate(rows.tolist())}

    def source(model: FloatModel, name: str) -> LogitsSource:
        behind = [
            Hidden((*rows.shape, *model.hidden_shape), None if scratch is None else scratch / f"{name}-{part}.bin", model.device)
            for part, rows in enumerate(parts)
        ]
        inputs = [Inputs(model, rows) for rows in parts]
        for of_part, hidden in zip(inputs, behind, strict=True):
            of_part.start(hidden)
        for index in range(len(model.blocks)):
            block = model.load_block(index)
            for of_part, hidden in zip(inputs, behind, strict=True):
                for _ in of_part.advance(index, block, hidden):
                    pass
            model.free_block(index)

        def logits(ids: Sequence[int]) -> Iterable[Piece]:
            part, i = places[tuple(ids)]
            for at in range(0, len(ids), LOGIT_ROWS):
                rows = slice(at, at + LOGIT_ROWS)
                with torch.no_grad():  # not around the yield: who takes what is given would be inside too
                    found = model.logits(parts[part][[i], rows], behind[part][[i]][:, rows])[0]
                yield at, found

        return logits

    scores: Scores = score_windows(tokens, windows, source(quantized, "quantized-eval"), source(original, "original-eval"))
    assert scores.reference_perplexity is not None
    assert scores.kl is not None
    assert scores.agreement is not None
    return Quality(
        text=text,
        num_tokens=scores.num_tokens,
        seqlen=seqlen,
        by="transformers",
        perplexity=scores.perplexity,
        original_perplexity=scores.reference_perplexity,
        kl_mean=float(scores.kl.mean()),
        top1_agreement_percent=100 * scores.agreement,
    )


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Generated tokens a second on this machine, of one sequence and of several together."""

    alone: float
    together: float
    num_together: int


def speed_of(model_path: str | None, prompt: Sequence[int], *, device: str, new_tokens: int = 48, together: int = 16) -> Speed:
    """Measured once each after a warm-up: for a first impression, `octavo bench` measures."""
    from octavo import Engine

    def timed(engine: Any, count: int) -> float:
        started = time.perf_counter()
        params = {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
        engine.generate(input_ids=[list(prompt)] * count, sampling_params=params)
        return count * new_tokens / (time.perf_counter() - started)

    most = len(prompt) + new_tokens + _POOL_BEYOND
    options: dict[str, Any] = {"max_running_requests": together, "max_total_tokens": together * most, "device": device}
    with Engine(model_path, show_progress=False, num_threads=torch.get_num_threads(), **options) as engine:
        timed(engine, 1)
        return Speed(alone=timed(engine, 1), together=timed(engine, together), num_together=together)
