"""Drawing tokens on a GPU, under the interpreter, against the float reference and the exact probabilities."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels import sampling
from octavo.kernels.gpu import sampling as on_gpu
from octavo.kernels.gpu.device import pretend

from ..test_sampling import per_row, pick, random_logits

FILTERS = ("top_k", "top_p", "min_p")


def acceptable(logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor, filters: dict[str, torch.Tensor]) -> list[set[int]]:
    """The reference's token of each row, and those that a rounding of the uniform number or of top_p and min_p away from it gives."""
    found: list[set[int]] = [set() for _ in logits]
    for nudge in (0.0, 2e-6, -2e-6):
        for filter_nudge in (0.0, 2e-6, -2e-6):
            moved = {
                name: values if name == "top_k" else torch.where(values < 1, values * (1 + filter_nudge), values)
                for name, values in filters.items()
            }
            tokens = sampling.reference_sample_tokens(logits, temperature, uniform=(uniform + nudge).clamp(0, 1 - 1e-12), **moved)
            for row, token in enumerate(tokens.tolist()):
                found[row].add(token)
    return found


QUICK = (("flat", 1), ("flat", 100), ("equal", 100), ("ties", 100))


@pytest.mark.parametrize(
    ("kind", "vocab"),
    [
        pytest.param(kind, vocab, marks=[] if (kind, vocab) in QUICK else [pytest.mark.long])
        for kind in ("flat", "peaked", "ties", "masked", "equal")
        for vocab in (1, 100, 4097, 9000)
    ],
)
def test_tokens_are_the_references(kind: str, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 3
    logits = random_logits(generator, kind, rows, vocab)
    temperature = pick(generator, [0, 1e-6, 0.3, 1, 1, 1, 2, 50, 1e6, 1e30], rows)
    filters = {
        "top_k": pick(generator, [-1, 0, 1, 2, 5, 50, 700, 3000, vocab, 2**31 - 1], rows, torch.int32),
        "top_p": pick(generator, [1, 0.999999, 0.9, 0.5, 0.1, 1e-6], rows),
        "min_p": pick(generator, [0, 0, 0.01, 0.3, 1], rows),
    }
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    exact = 0
    for names in ((), ("top_k",), ("top_p",), ("min_p",), FILTERS):
        chosen = {name: filters[name] for name in names}
        tokens = on_gpu.sample_tokens(logits, temperature, *(chosen.get(name) for name in FILTERS), uniform)
        expected = sampling.reference_sample_tokens(logits, temperature, uniform=uniform, **chosen)
        allowed = acceptable(logits, temperature, uniform, chosen)
        assert all(token in row for token, row in zip(tokens.tolist(), allowed, strict=True)), (names, tokens, expected)
        exact += int((tokens == expected).sum())
    assert exact >= 14


@pytest.mark.long
def test_a_cut_among_logits_that_no_list_holds() -> None:
    """Half of the row is equal, so that searches read it whole to the last; and half of a 16-bit float's values are ties."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4500, generator=generator).bfloat16().float()
    logits[0, ::2] = 0.5
    top_k, top_p = torch.tensor([2500, 900], dtype=torch.int32), torch.tensor([0.7, 0.97])
    for uniform in (0.31, 0.9999):
        drawn = per_row(2, uniform, torch.float64)
        tokens = on_gpu.sample_tokens(logits, per_row(2, 0.9), top_k, top_p, None, drawn)
        assert (
            tokens.tolist() == sampling.reference_sample_tokens(logits, per_row(2, 0.9), top_k=top_k, top_p=top_p, uniform=drawn).tolist()
        )


def test_logits_on_both_sides_of_zero_and_far_from_it() -> None:
    logits = torch.tensor([[-3e38, -1.0, -1e-30, 0.0, -0.0, 1e-38, 1e-30, 2.0, -torch.inf, 3e38], [5e-39, -5e-39, *[-1e-20] * 8]])
    for k, temperature in ((1, 1e30), (2, 1e30), (4, 1.0), (5, 1e30), (7, 1e30), (10, 1e30)):
        top_k, heat, drawn = per_row(2, k, torch.int32), per_row(2, temperature), per_row(2, 0.999, torch.float64)
        tokens = on_gpu.sample_tokens(logits, heat, top_k, None, None, drawn)
        assert tokens.tolist() == sampling.reference_sample_tokens(logits, heat, top_k=top_k, uniform=drawn).tolist(), (k, temperature)


def test_the_two_best_a_few_roundings_apart() -> None:
    """Pivots between them do not rise: interpolation rounds."""
    cases = ((6.5610527992248535, 1), (2.7344870567321777, 2), (3.7245540618896484, 3), (6.377475738525391, 4), (4.5, 12))
    logits, rows = torch.full((len(cases), 50), -3.0), len(cases)
    for row, (best, apart) in enumerate(cases):
        logits[row, 3] = best
        logits[row, 40] = (logits[row, 3].view(torch.int32) - apart).view(torch.float32)
    tokens = on_gpu.sample_tokens(
        logits, per_row(rows, 1.0), per_row(rows, 2, torch.int32), per_row(rows, 0.9), None, per_row(rows, 0.75, torch.float64)
    )
    assert tokens.tolist() == [40] * rows


@pytest.mark.parametrize("vocab", [1, 70, 4100])
def test_rows_without_a_distribution(vocab: int) -> None:
    logits = torch.zeros(6, vocab)
    logits[0, vocab // 2] = torch.nan
    logits[1, vocab - 1] = -torch.tensor(torch.nan)
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    logits[4, vocab - 1] = -3e38
    some = (per_row(6, 2, torch.int32), per_row(6, 0.5), per_row(6, 0.1))
    for temperature, filters in ((0.0, (None, None, None)), (1.0, (None, None, None)), (1.0, some)):
        tokens = on_gpu.sample_tokens(logits, per_row(6, temperature), *filters, per_row(6, 0.0, torch.float64))
        assert tokens.tolist() == [-1, -1, -1, -1, vocab - 1, 0]
    assert on_gpu.sample_tokens(logits, None, None, None, None, None).tolist() == [-1, -1, -1, -1, vocab - 1, 0]


def test_greedy_takes_the_lowest_id_among_equals_of_strided_rows() -> None:
    wide = torch.randn(4, 9000).round()
    wide[0] = -0.0
    wide[0, 500] = 0.0
    logits = wide[:, 200:8700]
    assert on_gpu.sample_tokens(logits, None, None, None, None, None).tolist() == sampling.reference_greedy_tokens(logits).tolist()
    assert on_gpu.sample_tokens(logits[:0], None, None, None, None, None).tolist() == []


def test_frequencies_are_the_probabilities() -> None:
    generator = torch.Generator().manual_seed(7)
    vocab, draws = 30, 150
    row = torch.randn(vocab, generator=generator) * 1.5
    uniform = torch.rand(draws, generator=generator, dtype=torch.float64)
    tokens = on_gpu.sample_tokens(row.repeat(draws, 1), per_row(draws, 0.9), None, None, None, uniform)
    exact = torch.softmax(row.double() / 0.9, 0)
    chi_square = float(((torch.bincount(tokens, minlength=vocab) - draws * exact) ** 2 / (draws * exact)).sum())
    assert chi_square < vocab - 1 + 4.5 * math.sqrt(2 * (vocab - 1))


def test_what_filters_leave_is_drawn_with_its_exact_probabilities() -> None:
    """Just inside both ends of every token's share of the numbers from 0 to 1: so the shares are known."""
    row = torch.randn(30, generator=torch.Generator().manual_seed(7)) * 1.5
    probabilities = torch.softmax(row.double() / 0.9, 0)
    ordered, order = probabilities.sort(descending=True)
    ordered = torch.where(torch.arange(30) < 12, ordered, 0.0)
    ordered = ordered / ordered.sum()
    ordered = torch.where(ordered.cumsum(0) - ordered < 0.8, ordered, 0.0)
    exact = torch.zeros(30, dtype=torch.float64).scatter(0, order, ordered / ordered.sum())
    kept = exact.nonzero().flatten()
    ends = exact.cumsum(0)[kept]
    uniform = torch.stack((ends - exact[kept] + 1e-6, ends - 1e-6), 1).flatten()
    assert 4 <= len(kept) <= 8
    rows = len(uniform)
    tokens = on_gpu.sample_tokens(
        row.repeat(rows, 1), per_row(rows, 0.9), per_row(rows, 12, torch.int32), per_row(rows, 0.8), None, uniform
    )
    assert tokens.tolist() == kept.repeat_interleave(2).tolist()


@pytest.mark.parametrize("vocab", [5, 3000])
def test_penalties_by_counts_on_the_device(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(4, vocab, generator=generator)
    prompts = [torch.randint(vocab, (6,), generator=generator).tolist() for _ in range(2)]
    counts = torch.zeros(3, vocab, dtype=torch.int32)
    rows, slots = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([2, 0], dtype=torch.int32)
    factors = [(1.3, 0.5, 0.2), (0.7, 0.0, -1.0)]
    on_host = [sampling.TokenCounts(prompt) for prompt in prompts]
    for slot, prompt in zip(slots.tolist(), prompts, strict=True):
        counts[slot, prompt] = sampling.IN_PROMPT
    for _ in range(20):
        tokens = torch.randint(-1, vocab, (4,), generator=generator)
        on_gpu.count(tokens, counts, rows, slots)()
        for row, count in zip(rows.tolist(), on_host, strict=True):
            if tokens[row] >= 0:
                count.add(int(tokens[row]))
    expected = logits.clone()
    sampling.reference_apply_penalties(expected, sampling.PenaltyRows(rows.tolist(), on_host, factors))
    on_gpu.penalise(logits, counts, rows, slots, torch.tensor(factors))()
    torch.testing.assert_close(logits, expected)
    assert not counts[1].any()


@pytest.mark.parametrize("vocab", [1, 65, 5000])
def test_top_logprobs(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for kind in ("flat", "ties", "masked", "equal"):
        logits = random_logits(generator, kind, 900 if vocab == 5000 else 5, vocab)
        logits[:, 0] = 1.0  # so that no masked row is empty
        logits[2] = torch.nan
        tokens = torch.randint(vocab, logits.shape[:1], generator=generator)
        for k in sorted({0, 1, min(7, vocab), min(vocab, 1000)}):
            with pretend(90):
                found = sampling.top_logprobs(logits, tokens, k=k)
            for mine, reference in zip(found, sampling.reference_top_logprobs(logits, tokens, k=k), strict=True):
                torch.testing.assert_close(mine, reference, atol=1e-5, rtol=2e-7, equal_nan=True)
