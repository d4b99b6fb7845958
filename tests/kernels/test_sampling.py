"""Sampling kernels against the float reference, exact probabilities and naive penalties."""

from __future__ import annotations

import math

import pytest
import torch

from octavo.kernels import sampling

VOCABULARIES = (1, 2, 63, 64, 65, 100, 1000, 5000, 49152)


def per_row(rows: int, value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows,), value, dtype=dtype)


def pick(generator: torch.Generator, values: list[float], rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (rows,), generator=generator)]


def random_logits(generator: torch.Generator, kind: str, rows: int, vocab: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab, generator=generator)
    if kind == "peaked":
        return logits * 6
    if kind == "ties":
        return (logits * 2).round()
    if kind == "masked":
        return logits.masked_fill(torch.rand(rows, vocab, generator=generator) < 0.3, -torch.inf)
    return torch.full_like(logits, -1.5) if kind == "equal" else logits


@pytest.mark.parametrize("kind", ["flat", "peaked", "ties", "masked", "equal"])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_kernel_equals_reference(kind: str, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = 6 if vocab > 5000 else 48
    for _ in range(2):
        logits = random_logits(generator, kind, rows, vocab)
        temperature = pick(generator, [0, 1e-6, 0.3, 1, 2, 50, 1e6, 1e30], rows)
        filters = {
            "top_k": pick(generator, [-1, 0, 1, 2, 5, 50, 700, 3000, vocab, 2**31 - 1], rows, torch.int32),
            "top_p": pick(generator, [1, 0.999999, 0.9, 0.5, 0.1, 1e-6], rows),
            "min_p": pick(generator, [0, 0, 0.01, 0.3, 1], rows),
        }
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
        for names in ((), ("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")):
            chosen = {name: filters[name] for name in names}
            tokens = sampling.sample_tokens(logits, temperature, uniform=uniform, **chosen)
            expected = sampling.reference_sample_tokens(logits, temperature, uniform=uniform, **chosen)
            assert torch.equal(tokens, expected), names


@pytest.mark.parametrize("sample", [sampling.sample_tokens, sampling.reference_sample_tokens])
def test_filters_by_hand(sample: object) -> None:
    logits = torch.tensor([0.4, 0.1, 0.2, 0.1, 0.2]).log().repeat(4, 1)
    uniform = torch.tensor([0.0, 0.42, 0.72, 0.9999], dtype=torch.float64)
    one = per_row(4, 1.0)

    def drawn(**filters: torch.Tensor) -> list[int]:
        return sample(logits, one, uniform=uniform, **filters).tolist()  # type: ignore[operator]

    assert drawn() == [0, 1, 3, 4]
    assert drawn(top_k=per_row(4, 2, torch.int32)) == [0, 0, 2, 2]  # of the tied tokens 2 and 4 the lower stays
    assert drawn(top_p=per_row(4, 0.39)) == [0, 0, 0, 0]
    assert drawn(top_p=per_row(4, 0.55)) == [0, 0, 2, 2]
    assert drawn(top_p=per_row(4, 0.75)) == [0, 0, 2, 4]
    assert drawn(min_p=per_row(4, 0.45)) == [0, 0, 2, 4]
    assert drawn(top_k=per_row(4, 3, torch.int32), top_p=per_row(4, 0.7)) == [0, 0, 2, 2]  # 0.4 + 0.2 of 0.8 reaches 0.7


@pytest.mark.parametrize("sample", [sampling.sample_tokens, sampling.reference_sample_tokens])
@pytest.mark.parametrize("vocab", [1, 3, 70, 300])
def test_rows_without_a_distribution(sample: object, vocab: int) -> None:
    logits = torch.zeros(6, vocab)
    logits[0, vocab // 2] = torch.nan
    logits[1, vocab - 1] = -torch.tensor(torch.nan)
    logits[2] = -torch.inf
    logits[3, 0] = torch.inf
    logits[4] = -torch.inf
    logits[4, vocab - 1] = -3e38
    for temperature in (0.0, 1.0):
        for filters in ({}, {"top_k": per_row(6, 2, torch.int32), "top_p": per_row(6, 0.5), "min_p": per_row(6, 0.1)}):
            tokens = sample(logits, per_row(6, temperature), uniform=per_row(6, 0.0, torch.float64), **filters)  # type: ignore[operator]
            assert tokens.tolist() == [-1, -1, -1, -1, vocab - 1, 0]
    assert sampling.greedy_tokens(logits).tolist() == [-1, -1, -1, -1, vocab - 1, 0]


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.randn(20, 1000).round()
    logits[0] = -0.0
    logits[0, 500] = 0.0
    assert sampling.greedy_tokens(logits).tolist() == sampling.reference_greedy_tokens(logits).tolist()
    assert sampling.greedy_tokens(logits)[0] == 0
    assert sampling.greedy_tokens(logits[:0]).tolist() == []


def test_strided_rows() -> None:
    wide = torch.randn(8, 700)
    uniform = torch.rand(8, dtype=torch.float64)
    narrow = wide[::2, 100:400]
    tokens = sampling.sample_tokens(narrow, per_row(4, 0.7), top_p=per_row(4, 0.8), uniform=uniform[:4])
    assert torch.equal(tokens, sampling.sample_tokens(narrow.contiguous(), per_row(4, 0.7), top_p=per_row(4, 0.8), uniform=uniform[:4]))


@pytest.mark.parametrize("top_k", [0, 12])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_frequencies_are_the_probabilities(top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(7)
    vocab, draws = 30, 40_000
    row = torch.randn(vocab, generator=generator) * 1.5
    tokens = sampling.sample_tokens(
        row.repeat(draws, 1),
        per_row(draws, 0.9),
        top_k=per_row(draws, top_k, torch.int32),
        top_p=per_row(draws, top_p),
        uniform=torch.rand(draws, generator=generator, dtype=torch.float64),
    )
    probabilities = torch.softmax(row.double() / 0.9, 0)
    ordered, order = probabilities.sort(descending=True)
    ordered = torch.where(torch.arange(vocab) < (top_k or vocab), ordered, 0.0)
    ordered = ordered / ordered.sum()
    ordered = torch.where(ordered.cumsum(0) - ordered < top_p, ordered, 0.0)
    exact = torch.zeros(vocab, dtype=torch.float64).scatter(0, order, ordered / ordered.sum())
    counts = torch.bincount(tokens, minlength=vocab)
    assert not counts[exact == 0].any()
    kept = exact > 0
    chi_square = float(((counts - draws * exact)[kept] ** 2 / (draws * exact[kept])).sum())
    freedom = int(kept.sum()) - 1
    assert chi_square < freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_top_logprobs(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    for kind in ("flat", "peaked", "ties", "masked", "equal"):
        logits = random_logits(generator, kind, 5, vocab)
        logits[:, 0] = 1.0  # so that no masked row is empty
        tokens = torch.randint(vocab, (5,), generator=generator)
        exact = logits.double().log_softmax(1)
        for k in sorted({0, 1, min(7, vocab), min(vocab, 1000)}):
            chosen, ids, tops = sampling.top_logprobs(logits, tokens, k=k)
            assert ids.shape == tops.shape == (5, k)
            torch.testing.assert_close(chosen.double(), exact.gather(1, tokens[:, None])[:, 0], atol=1e-5, rtol=2e-7)
            assert torch.equal(ids, logits.argsort(dim=1, descending=True, stable=True)[:, :k])
            torch.testing.assert_close(tops.double(), exact.gather(1, ids), atol=1e-5, rtol=2e-7)
            for mine, reference in zip((chosen, ids, tops), sampling.reference_top_logprobs(logits, tokens, k=k), strict=True):
                torch.testing.assert_close(mine, reference, atol=1e-5, rtol=2e-7)


def test_logprobs_of_rows_without_a_distribution() -> None:
    logits = torch.zeros(3, 80)
    logits[0, 70] = torch.nan
    logits[1] = -torch.inf
    tokens = torch.zeros(3, dtype=torch.int64)
    for function in (sampling.top_logprobs, sampling.reference_top_logprobs):
        chosen, ids, tops = function(logits, tokens, k=2)
        assert chosen.isnan().tolist() == [True, True, False]
        assert tops.isnan().all(1).tolist() == [True, True, False]
        assert ids.tolist() == [[-1, -1], [-1, -1], [0, 1]]


def naive_penalties(row: list[float], prompt: list[int], generated: list[int], factors: tuple[float, float, float]) -> list[float]:
    repetition, frequency, presence = factors
    result = list(row)
    for token in {*prompt, *generated}:
        result[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token in set(generated):
        result[token] -= frequency * generated.count(token) + presence
    return result


@pytest.mark.parametrize("vocab", [1, 50, 3000])
def test_penalties_against_naive(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator)
    logits[1, 0] = -torch.inf
    expected, counts, factors = logits.tolist(), [], []
    for row, (prompt_length, length) in zip((3, 1, 0), ((200, 0), (0, 300), (30, 90)), strict=True):
        prompt = torch.randint(vocab, (prompt_length,), generator=generator).tolist()
        generated = torch.randint(vocab, (length,), generator=generator).tolist()
        row_counts = sampling.TokenCounts(prompt)
        for token in generated:
            row_counts.add(token)
        extra = torch.randint(vocab, (20,), generator=generator).tolist()
        for token in extra:
            row_counts.add(token)
        for token in reversed(extra):
            row_counts.forget(token)
        counts.append(row_counts)
        factors.append((1.3, 0.4, -0.7))
        expected[row] = naive_penalties(expected[row], prompt, generated, factors[-1])
    penalties = sampling.PenaltyRows([3, 1, 0], counts, factors)
    for function in (sampling.apply_penalties, sampling.reference_apply_penalties):
        result = logits.clone()
        function(result, penalties)
        torch.testing.assert_close(result, torch.tensor(expected), atol=1e-5, rtol=1e-6)


def test_penalties_pass_over_ids_outside_the_vocabulary() -> None:
    penalties = sampling.PenaltyRows([0], [sampling.TokenCounts([2, 9, 2**31 - 1])], [(2.0, 0.0, 0.0)])
    for function in (sampling.apply_penalties, sampling.reference_apply_penalties):
        logits = torch.ones(2, 4)
        function(logits, penalties)
        assert logits.tolist() == [[1, 1, 0.5, 1], [1, 1, 1, 1]]


def test_wrong_arguments_are_named() -> None:
    logits = torch.zeros(2, 5)
    good = {"temperature": per_row(2, 1.0), "uniform": per_row(2, 0.5, torch.float64)}
    with pytest.raises(ValueError, match="logits must be float32"):
        sampling.sample_tokens(logits.double(), **good)
    with pytest.raises(ValueError, match=r"top_k must be contiguous torch.int32 \[2\]"):
        sampling.sample_tokens(logits, top_k=per_row(2, 1, torch.int64), **good)
    with pytest.raises(ValueError, match="k=6 is not valid"):
        sampling.top_logprobs(logits, torch.zeros(2, dtype=torch.int64), k=6)
    with pytest.raises(ValueError, match="token_ids must be from 0 to 4"):
        sampling.top_logprobs(logits, torch.tensor([0, 5]), k=1)
    with pytest.raises(ValueError, match="not all within the batch of 2"):
        sampling.apply_penalties(logits, sampling.PenaltyRows([2], [sampling.TokenCounts([1])], [(2.0, 0.0, 0.0)]))
