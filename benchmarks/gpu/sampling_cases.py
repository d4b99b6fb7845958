"""Drawing tokens and penalties: cases and their checks, against the float reference over the same logits."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from octavo.kernels import sampling
from octavo.kernels.gpu import sampling as on_gpu
from octavo.kernels.gpu.workspace import Workspace

from .cases import Named
from .checks import Place, check_case, run_twice, worst_of
from .data import generator
from .guarded import Guarded

Logits = Literal["flat", "peaked", "bf16", "masked", "equal"]
_NUDGES = (
    0.0,
    *(sign * 10.0**power for power in (-9, -8, -7, -6, -5) for sign in (1, -1)),
)  # relative: what rounding may move a boundary by


@dataclass(frozen=True)
class SampleCase(Named):
    """Rows of logits, each with filters of its own: some off, some greedy, and one row that is no distribution."""

    rows: int
    vocab: int
    logits: Logits = "flat"
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    greedy: bool = False


@dataclass(frozen=True)
class PenaltyCase(Named):
    """Every second row penalised, by counts that the device has made."""

    rows: int
    vocab: int


def logits_of(case: SampleCase, device: torch.device) -> Tensor:
    """float32 [rows, vocab] among NaN; the last of several rows holds NaN itself."""
    source = generator(case.rows + case.vocab)
    found = torch.full((case.rows, case.vocab + 32), math.nan)
    logits = torch.randn(case.rows, case.vocab, generator=source) * (6 if case.logits == "peaked" else 2)
    if case.logits == "bf16":
        logits = logits.bfloat16().float()
    if case.logits == "masked":
        logits.masked_fill_(torch.rand(case.rows, case.vocab, generator=source) < 0.5, -math.inf)[:, 0] = 1.0
    if case.logits == "equal":
        logits = torch.full_like(logits, -1.5)
    if case.rows > 1:
        logits[-1, case.vocab // 2] = math.nan
    found[:, 16:-16] = logits
    return found.to(device)[:, 16:-16]


@check_case.register
def _(case: SampleCase, place: Place, tile: object) -> float:
    source = generator(case.vocab)

    def pick(*values: float) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), (case.rows,), generator=source)].to(place.device)

    logits = logits_of(case, place.device)
    temperature = None if case.greedy else pick(0.0, 0.3, 0.7, 1.0, 1.0, 2.0)
    top_k = pick(0, 1, 5, 50, 700, 3000).int() if case.top_k else None
    top_p = pick(1.0, 0.99, 0.9, 0.5, 0.05) if case.top_p else None
    min_p = pick(0.0, 0.01, 0.2) if case.min_p else None
    uniform = torch.rand(case.rows, generator=source, dtype=torch.float64).to(place.device)
    out, workspace = Guarded((case.rows, 1), torch.int64, stride=1, device=place.device), Workspace(place.device)
    found = out.tensor.view(-1)
    least = torch.zeros(case.rows, device=place.device) if min_p is None else min_p

    def launched() -> None:
        for launch in on_gpu.launches(logits, temperature, top_k, top_p, least, uniform, found, workspace):
            launch()

    run_twice(launched, [out], place)
    assert int(workspace.arrived.abs().sum()) == 0, "counters of rows were left above zero"
    if temperature is None:
        wanted = sampling.reference_greedy_tokens(logits)
        assert torch.equal(found, wanted), f"tokens {found.tolist()}, not {wanted.tolist()}"
        return 0.0
    wanted = sampling.reference_sample_tokens(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
    differs = (found != wanted).nonzero().flatten()
    is_near = torch.zeros(len(differs), dtype=torch.bool, device=place.device)
    for nudge, moved in itertools.product(_NUDGES, _NUDGES):

        def part(tensor: Tensor | None, change: float = 0.0) -> Tensor | None:
            return None if tensor is None else torch.where(tensor[differs] < 1, tensor[differs] * (1 + change), tensor[differs])

        tokens = sampling.reference_sample_tokens(
            logits[differs], temperature[differs], top_k=None if top_k is None else top_k[differs], top_p=part(top_p, moved),
            min_p=part(min_p, moved), uniform=(uniform[differs] * (1 + nudge)).clamp(max=1 - 1e-12),
        )  # fmt: skip
        is_near |= found[differs] == tokens
        if bool(is_near.all()):
            break
    rows = differs[~is_near].tolist()
    assert not rows, f"rows {rows} drew {found[rows].tolist()}, not {wanted[rows].tolist()}"
    return len(differs) / case.rows


@check_case.register
def _(case: PenaltyCase, place: Place, tile: object) -> float:
    source = generator(case.vocab)
    rows = list(range(0, case.rows, 2))
    slots = torch.randperm(case.rows, generator=source)[: len(rows)]
    prompts = [torch.randint(case.vocab, (30,), generator=source) for _ in rows]
    factors = [(1.0 + 0.1 * (row % 5), 0.2 * (row % 3), 0.5) for row in rows]
    counts = Guarded((case.rows, case.vocab), torch.int32, stride=case.vocab, device=place.device)
    counts.tensor.zero_()
    on_host = [sampling.TokenCounts(prompt.tolist()) for prompt in prompts]
    for slot, prompt in zip(slots.tolist(), prompts, strict=True):
        counts.tensor[slot, prompt.to(place.device)] = sampling.IN_PROMPT
    where = torch.tensor(rows, dtype=torch.int32, device=place.device), slots.int().to(place.device)
    for _ in range(5):
        tokens = torch.randint(-1, case.vocab, (case.rows,), generator=source)
        on_gpu.count(tokens.to(place.device), counts.tensor, *where)()
        for row, count in zip(rows, on_host, strict=True):
            if tokens[row] >= 0:
                count.add(int(tokens[row]))
    logits = torch.randn(case.rows, case.vocab, generator=source)
    exact = logits.clone()
    sampling.reference_apply_penalties(exact, sampling.PenaltyRows(rows, on_host, factors))
    out = Guarded((case.rows, case.vocab), torch.float32, stride=case.vocab + 8, device=place.device)
    out.tensor.copy_(logits)
    on_gpu.penalise(out.tensor, counts.tensor, *where, torch.tensor(factors, device=place.device))()
    out.check()
    counts.check()
    return worst_of(out.tensor.double().cpu(), exact.double(), 1e-6 * exact.double().abs() + 1e-6)


def sampling_cases(*, quick: bool) -> Iterator[SampleCase | PenaltyCase]:
    """Few small ones where each takes seconds; else every way of drawing from rows as long as vocabularies are."""
    yield PenaltyCase(3, 70)
    if quick:
        yield SampleCase(2, 100, greedy=True)
        yield SampleCase(2, 100, "bf16", top_k=True, top_p=True)
        return
    yield PenaltyCase(64, 128_256)
    kinds: tuple[Logits, ...] = ("flat", "peaked", "bf16", "masked", "equal")
    for rows, vocab in ((1, 128_256), (37, 32_000), (64, 151_936), (5, 262_144), (3, 4097)):
        yield SampleCase(rows, vocab, greedy=True)
        for logits, (top_k, top_p, min_p) in itertools.product(
            kinds,
            ((False, False, False), (True, False, False), (False, True, False), (False, False, True), (True, True, True)),
        ):
            yield SampleCase(rows, vocab, logits, top_k, top_p, min_p)
