"""The sampler on a GPU that is not there: the tokens and log-probabilities of the CPU's, for any wishes, step by step."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from octavo.kernels.gpu.device import pretend
from octavo.runtime.penalties import DevicePenalties
from octavo.runtime.sampler import Sampler, SampleResult, SampleRow
from octavo.runtime.sampling_params import SamplingParams

from ..kernels.gpu.interpreter import mend

mend()
VOCAB = 300
PROMPT = [1, 2, 2, 3, 250]
WISHES = {
    "greedy": SamplingParams(temperature=0.0, logprobs=3),
    "plain": SamplingParams(seed=1),
    "filters": SamplingParams(seed=2, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, logprobs=0),
    "penalties": SamplingParams(seed=3, repetition_penalty=1.4, frequency_penalty=0.7, presence_penalty=0.3),
    "greedy penalties": SamplingParams(temperature=0.0, frequency_penalty=1.5, logprobs=2),
    "bias": SamplingParams(seed=4, logit_bias={7: 3.0, 8: -100.0}, min_tokens=3),
}


def run(names: Sequence[str], steps: int) -> list[SampleResult]:
    """The same rows of logits at every step, as a model that forgets would give them."""
    sampler = Sampler(random_seed=0)
    for name in names:
        sampler.add(name, WISHES[name], PROMPT, (5, 6))
    generator = torch.Generator().manual_seed(9)
    rows = torch.randn(len(names), VOCAB, generator=generator) * 2
    pending = [sampler.launch(rows.clone(), [SampleRow(name, step) for name in names]) for step in range(steps)]
    return [sample.wait() for sample in pending]  # none was waited for before the next was launched


def test_tokens_and_logprobs_are_the_cpus() -> None:
    names = list(WISHES)
    wanted = run(names, 6)
    with pretend(90):
        found = run(names, 6)
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.token_ids == theirs.token_ids
        for logprob, other in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert (logprob is None) == (other is None)
            if logprob is not None and other is not None:
                assert logprob.token_id == other.token_id
                assert logprob.logprob == pytest.approx(other.logprob, abs=1e-5)
                assert [token for token, _ in logprob.top] == [token for token, _ in other.top]


def test_the_table_of_counts_grows_and_slots_come_back_clean() -> None:
    with pretend(90):
        sampler = Sampler(random_seed=0)
        params = SamplingParams(temperature=0.0, presence_penalty=2.0)
        row = torch.zeros(1, VOCAB)
        row[0, [10, 20, 30]] = torch.tensor([3.0, 2.0, 1.5])
        for number in range(20):
            sampler.add(str(number), params, PROMPT, ())
            assert sampler.sample(row.clone(), [SampleRow(str(number), 0)]).token_ids == [10]
        for number in range(20):
            assert sampler.sample(row.clone(), [SampleRow(str(number), 1)]).token_ids == [20], number
        sampler.remove("3")
        sampler.add("new", params, PROMPT, ())
        assert sampler.sample(row.clone(), [SampleRow("new", 0)]).token_ids == [10]
        with pytest.raises(ValueError, match="request 'new' is at step 5, but only 1 tokens"):
            sampler.sample(row.clone(), [SampleRow("new", 5)])
        with pytest.raises(ValueError, match="request 'new' is at step 0 again"):
            sampler.sample(row.clone(), [SampleRow("new", 0)])


def test_a_prompts_token_outside_the_vocabulary_has_no_logit() -> None:
    with pretend(90):
        penalties = DevicePenalties(torch.device("cpu"))
        penalties.add("r", [3, VOCAB, 2**31 - 1])
        slot = penalties.slot_of("r", VOCAB)
        assert penalties.counts[slot].nonzero().flatten().tolist() == [3]
