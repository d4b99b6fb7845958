"""The Sampler: seeds whatever the batch, penalties over steps, masks, log-probabilities, skipped stages."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from octavo.runtime import sampler as sampler_module
from octavo.runtime.sampler import Sampler, SampleRow, launch_prompt_logprobs, uniform_numbers
from octavo.runtime.sampling_params import SamplingParams

VOCAB = 300


def model_logits(name: str, step: int) -> torch.Tensor:
    """Stands for a model: the row depends on request and step alone."""
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(sum(name.encode()) * 1000 + step))


def sample(sampler: Sampler, *rows: tuple[str, int]) -> list[int]:
    logits = torch.stack([model_logits(*row) for row in rows])
    return sampler.sample(logits, [SampleRow(*row) for row in rows]).token_ids


def generate(sampler: Sampler, name: str, steps: range) -> list[int]:
    return [sample(sampler, (name, step))[0] for step in steps]


def test_uniform_numbers() -> None:
    seeds = np.repeat(np.arange(200, dtype=np.uint64), 200)
    numbers = uniform_numbers(seeds, list(range(200)) * 200)
    assert numbers.dtype == torch.float64
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert numbers.unique().numel() == numbers.numel()
    counts = torch.histc(numbers, bins=100, min=0, max=1)
    assert float(((counts - 400) ** 2 / 400).sum()) < 99 + 4.5 * math.sqrt(198)
    table = numbers.view(200, 200)
    for other in (table[1:, :], table[:, 1:]):  # neighbouring seeds and steps are not correlated
        first = table[:199, :] if other.shape[0] == 199 else table[:, :199]
        assert abs(float(torch.corrcoef(torch.stack((first.flatten(), other.flatten())))[0, 1])) < 0.025
    assert (
        uniform_numbers(np.array([2**64 - 1], dtype=np.uint64), [5]).item()
        == uniform_numbers(np.array([2**64 - 1], dtype=np.uint64), [5]).item()
    )


def test_a_seed_gives_the_same_text_in_any_company() -> None:
    params = SamplingParams(seed=-3, top_p=0.9, top_k=40, repetition_penalty=1.2)
    alone = Sampler(random_seed=1)
    alone.add("a", params, [1, 2, 3], ())
    expected = generate(alone, "a", range(12))

    crowd = Sampler(random_seed=2)
    crowd.add("b", SamplingParams(), [5], ())
    crowd.add("a", params, [1, 2, 3], ())
    crowd.add("c", SamplingParams(temperature=0), [6], ())
    found = []
    for step in range(12):
        names = [["a"], ["b", "a"], ["c", "a", "b"]][step % 3]
        found.append(sample(crowd, *((name, step) for name in names))[names.index("a")])
    assert found == expected
    assert len(set(expected)) > 3


def test_without_seeds_requests_differ_and_random_seed_repeats_them() -> None:
    def run(random_seed: int | None) -> list[list[int]]:
        sampler = Sampler(random_seed=random_seed)
        for name in ("r1", "r2"):
            sampler.add(name, SamplingParams(), [1], ())
        return [[sample(sampler, (name, 0))[0] for _ in range(1)] + generate(sampler, "r1", range(1, 6)) for name in ("r1", "r2")]

    assert run(4) == run(4)
    assert run(4) != run(5)
    assert run(None) != run(None)
    sampler = Sampler(random_seed=0)
    sampler.add("x", SamplingParams(), [], ())
    sampler.add("y", SamplingParams(), [], ())
    same = model_logits("x", 0).repeat(2, 1)
    pairs = [sampler.sample(same.clone(), [SampleRow("x", step), SampleRow("y", step)]).token_ids for step in range(8)]
    assert any(first != second for first, second in pairs)


def test_retracted_request_goes_on_as_before() -> None:
    params = SamplingParams(seed=9, frequency_penalty=0.5, repetition_penalty=1.3)
    straight = Sampler()
    straight.add("a", params, [4, 5], ())
    expected = generate(straight, "a", range(10))
    interrupted = Sampler()
    interrupted.add("a", params, [4, 5], ())
    interrupted.add("b", SamplingParams(), [], ())
    found = generate(interrupted, "a", range(4))
    for step in range(3):
        sample(interrupted, ("b", step))
    assert found + generate(interrupted, "a", range(4, 10)) == expected
    assert generate(interrupted, "a", range(6, 10)) == expected[6:]  # steps sampled again forget what came after them


def test_penalties_over_steps_against_naive() -> None:
    params = SamplingParams(
        temperature=0, frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.4, logit_bias={7: 3.0, 8: -100}
    )
    prompt = [1, 2, 2, 3, 250]
    sampler = Sampler()
    sampler.add("p", params, prompt, ())
    sampler.add("q", SamplingParams(temperature=0), prompt, ())
    row = model_logits("p", 0)
    row[[1, 7, 8, 11]] = torch.tensor([3.0, 1.0, 4.0, 2.9])
    generated: list[int] = []
    for step in range(60):
        expected = row.tolist()
        for token in {*prompt, *generated}:
            expected[token] = expected[token] / 1.4 if expected[token] > 0 else expected[token] * 1.4
        for token in set(generated):
            expected[token] -= 0.7 * generated.count(token) + 0.3
        expected[7] += 3.0
        expected[8] -= 100
        tokens = sampler.sample(row.repeat(2, 1), [SampleRow("q", step), SampleRow("p", step)]).token_ids
        assert tokens == [int(row.argmax()), max(range(VOCAB), key=expected.__getitem__)]
        generated.append(tokens[1])
    assert len(set(generated)) > 10


def test_min_tokens_masks_until_reached() -> None:
    sampler = Sampler()
    sampler.add("m", SamplingParams(temperature=0, min_tokens=3), [], (5, 6))
    sampler.add("n", SamplingParams(temperature=0), [], (5, 6))
    row = torch.zeros(VOCAB)
    row[[5, 6, 9]] = torch.tensor([3.0, 2.0, 1.0])
    tokens = [sampler.sample(row.repeat(2, 1), [SampleRow("m", step), SampleRow("n", step)]).token_ids for step in range(5)]
    assert tokens == [[9, 5], [9, 5], [9, 5], [5, 5], [5, 5]]


def test_logprobs_are_of_the_raw_distribution() -> None:
    sampler = Sampler()
    sampler.add("a", SamplingParams(temperature=0, logprobs=3, logit_bias={17: 100}), [], ())
    sampler.add("b", SamplingParams(seed=1), [], ())
    sampler.add("c", SamplingParams(seed=2, temperature=0.5, top_k=5, logprobs=0), [], ())
    logits = torch.stack([model_logits(name, 0) for name in "abc"])
    exact = logits.double().log_softmax(1)
    result = sampler.sample(logits.clone(), [SampleRow(name, 0) for name in "abc"])
    first, second, third = result.logprobs
    assert second is None
    assert first is not None
    assert third is not None
    assert first.token_id == result.token_ids[0] == 17
    assert first.logprob == pytest.approx(exact[0, 17].item(), abs=1e-5)
    best = exact[0].topk(3)
    assert [token for token, _ in first.top] == best.indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(best.values.tolist(), abs=1e-5)
    assert third.top == ()
    assert third.logprob == pytest.approx(exact[2, result.token_ids[2]].item(), abs=1e-5)


def test_row_without_a_distribution() -> None:
    sampler = Sampler()
    sampler.add("bad", SamplingParams(logprobs=2, repetition_penalty=1.1), [], ())
    sampler.add("good", SamplingParams(temperature=0, logprobs=2), [], ())
    logits = torch.zeros(2, 10)
    logits[0, 3] = torch.nan
    result = sampler.sample(logits, [SampleRow("bad", 0), SampleRow("good", 0)])
    assert result.token_ids == [-1, 0]
    assert result.logprobs[0] is None
    assert result.logprobs[1] is not None


def test_several_rows_of_one_request() -> None:
    sampler = Sampler()
    sampler.add("s", SamplingParams(seed=3, presence_penalty=1.0), [], ())
    tokens = sample(sampler, ("s", 0), ("s", 1), ("s", 2))
    assert len(tokens) == 3
    sample(sampler, ("s", 1))  # the second of three was rejected: its place is sampled again
    assert len(sample(sampler, ("s", 2))) == 1
    with pytest.raises(ValueError, match="'s' is at step 9, but only 3 tokens"):
        sample(sampler, ("s", 9))


def test_requests_come_and_go() -> None:
    sampler = Sampler()
    sampler.add("a", SamplingParams(temperature=0), [], ())
    with pytest.raises(ValueError, match="'a' is already being sampled"):
        sampler.add("a", SamplingParams(), [], ())
    assert sample(sampler, ("a", 0)) == [int(model_logits("a", 0).argmax())]
    sampler.remove("a")
    with pytest.raises(KeyError):
        sample(sampler, ("a", 0))
    sampler.add("a", SamplingParams(temperature=0, logit_bias={4: 100}), [], ())  # the cached rows of the first "a" are gone
    assert sample(sampler, ("a", 0)) == [4]
    assert sampler.sample(torch.zeros(0, VOCAB), []).token_ids == []
    with pytest.raises(ValueError, match="1 rows of logits, but 2 rows"):
        sampler.sample(torch.zeros(1, VOCAB), [SampleRow("a", 0), SampleRow("a", 1)])


def test_greedy_batch_costs_an_argmax_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a stage that no row needs")

    for name in ("sample_tokens", "PenalisedRow", "add_to_logits", "top_logprobs", "uniform_numbers"):
        monkeypatch.setattr(sampler_module, name, refuse)
    sampler = Sampler()
    sampler.add("a", SamplingParams(temperature=0, top_p=0.5), [], (2,))
    sampler.add("b", SamplingParams(top_k=1), [], (2,))
    assert sample(sampler, ("a", 0), ("b", 0)) == [int(model_logits(name, 0).argmax()) for name in "ab"]


def test_prompt_logprobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "_PROMPT_CHUNK_LOGITS", 4 * VOCAB)
    logits = torch.stack([model_logits("t", step) for step in range(11)]).bfloat16()
    targets = torch.randint(VOCAB, (11,), generator=torch.Generator().manual_seed(0))
    exact = logits.double().log_softmax(1)
    for k in (0, 4, 1024):
        result = launch_prompt_logprobs(logits, targets.tolist(), k=k).wait()
        assert [item.token_id for item in result] == targets.tolist()
        assert [item.logprob for item in result] == pytest.approx(exact.gather(1, targets[:, None])[:, 0].tolist(), abs=1e-5)
        assert {len(item.top) for item in result} == {min(k, VOCAB)}
        for item, row in zip(result, exact, strict=True):
            assert [value for _, value in item.top] == pytest.approx(row.sort(descending=True).values[:k].tolist(), abs=1e-5)
    assert launch_prompt_logprobs(logits[:0], [], k=2).wait() == ()
