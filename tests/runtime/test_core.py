"""Proves what an EngineCore owes each request beside others: its seed's text, its log-probabilities, its own failure, shared pages.

The model is tiny and random, so a case takes milliseconds; what needs a real one is in test_greedy.py. Each test runs twice: a step at a
time, and with every step launched before the one ahead of it has landed, as on a device that computes while the host goes on.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.batch import Batch
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.kv_pool import KVPool
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.outputs import FinishReason, TokenLogprob, TokenOutput
from octavo.runtime.sampling_params import SamplingParams

from .tiny_models import tiny_llama

VOCAB = 131
POISON = 130  # in one of the two models its embedding is not a number; no prompt but one holds it
PAGE = 16


OVERLAP = [False]


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "overlap"])
def overlap(request: pytest.FixtureRequest) -> bool:
    OVERLAP[0] = request.param
    return OVERLAP[0]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(intermediate_size=88, initializer_range=0.2)


def load(model: Any, folder: Path, **options: Any) -> ModelRunner:
    model.save_pretrained(folder)
    return ModelRunner(_config(**options), resolve_model(str(folder)), show_progress=False)


@pytest.fixture(scope="module")
def runner(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    return load(model, tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def poisoned_runner(model: Any, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    poisoned = copy.deepcopy(model)
    poisoned.model.embed_tokens.weight.data[POISON] = torch.nan
    return load(poisoned, tmp_path_factory.mktemp("poisoned"), skip_kernel_check=True)


def _config(**options: Any) -> EngineConfig:
    sizes = {"max_total_tokens": 2048, "max_running_requests": 32, "chunked_prefill_size": 256, "page_size": PAGE, "random_seed": 0}
    return EngineConfig(device="cpu", **{**sizes, **options}).resolve(device="cpu")


def make_core(runner: ModelRunner, **options: Any) -> EngineCore:
    """A core over the shared weights, with a pool of its own."""
    config = _config(**options)
    assert config.max_total_tokens is not None
    own, shape = copy.copy(runner), runner.model_config
    own.pool = KVPool(
        num_pages=config.max_total_tokens // config.page_size,
        page_size=config.page_size,
        num_layers=shape.num_layers,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=runner.dtype,
        device=runner.device,
    )
    return EngineCore(config, own, overlap=OVERLAP[0])


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = random.Random(1000 * seed + length)
    return [generator.randrange(POISON) for _ in range(length)]


def finish(core: EngineCore) -> dict[str, list[TokenOutput]]:
    """Step until nothing is left; every output by request."""
    outputs: dict[str, list[TokenOutput]] = {}
    while core.has_work:
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.scheduler.check_integrity()
    return outputs


def answer(outputs: Sequence[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


Wishes = Mapping[str, tuple[list[int], SamplingParams]]


def answers(core: EngineCore, wishes: Wishes, order: Sequence[str] | None = None) -> dict[str, list[int]]:
    for name in order or list(wishes):
        core.add(name, *wishes[name], stop_token_ids=frozenset(wishes[name][1].stop_token_ids))
    return {name: answer(outputs) for name, outputs in finish(core).items()}


# --- seeds ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sampled() -> Wishes:
    """Fourteen requests that sample, in seven ways."""
    ways: tuple[dict[str, Any], ...] = (
        {},
        {"temperature": 0.7, "top_p": 0.9},
        {"top_k": 20, "min_p": 0.02},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"temperature": 1.5, "presence_penalty": 1.0, "logit_bias": {3: 2.0}},
        {"temperature": 0.0, "repetition_penalty": 1.2},
        {"min_tokens": 20, "stop_token_ids": tuple(range(100))},  # which would end most texts at the first token
    )
    lengths = (1, 5, 16, 17, 33, 40, 64, 70, 90, 3, 12, 25, 31, 2)
    return {
        f"r{index}": (prompt(length), SamplingParams(max_tokens=24, ignore_eos=True, seed=index // 2, **ways[index % len(ways)]))
        for index, length in enumerate(lengths)
    }


@pytest.fixture(scope="module")
def alone(runner: ModelRunner, sampled: Wishes) -> dict[str, list[int]]:
    return {name: answers(make_core(runner), {name: wish})[name] for name, wish in sampled.items()}


def test_a_seed_gives_the_same_text_whatever_else_is_in_the_batch(
    runner: ModelRunner, sampled: Wishes, alone: dict[str, list[int]]
) -> None:
    core = make_core(runner)
    assert answers(core, sampled) == alone
    assert core.scheduler.counters.retractions == 0
    assert answers(core, sampled, sorted(sampled, reverse=True)) == alone  # another order, on a warm cache
    assert all(len(tokens) >= 20 for tokens in alone.values())


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_a_seed_gives_the_same_text_in_chunks(runner: ModelRunner, sampled: Wishes, alone: dict[str, list[int]], chunk: int) -> None:
    assert answers(make_core(runner, chunked_prefill_size=chunk, disable_radix_cache=chunk == 7), sampled) == alone


@pytest.mark.parametrize("page_size", [1, 4])
def test_a_seed_and_penalties_survive_retraction(runner: ModelRunner, sampled: Wishes, alone: dict[str, list[int]], page_size: int) -> None:
    core = make_core(runner, max_total_tokens=160, page_size=page_size)
    assert answers(core, sampled) == alone
    assert core.scheduler.counters.retractions > 0


def test_without_a_seed_the_engines_own_seed_decides(runner: ModelRunner) -> None:
    wishes = {f"r{index}": (prompt(8), SamplingParams(max_tokens=16, ignore_eos=True)) for index in range(3)}
    first = answers(make_core(runner), wishes)
    assert first == answers(make_core(runner), wishes)
    assert len({tuple(tokens) for tokens in first.values()}) == 3
    assert first != answers(make_core(runner, random_seed=1), wishes)


# --- log-probabilities --------------------------------------------------------------------------------------------------


def log_probabilities(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def assert_reports(found: Sequence[TokenLogprob], tokens: Sequence[int], expected: torch.Tensor, *, k: int) -> None:
    assert [entry.token_id for entry in found] == list(tokens)
    for entry, token, row in zip(found, tokens, expected, strict=True):
        assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
        best = row.topk(k) if k else None
        assert [logprob for _, logprob in entry.top] == pytest.approx([] if best is None else best.values.tolist(), abs=1e-4)
        assert all(row[token].item() == pytest.approx(logprob, abs=1e-4) for token, logprob in entry.top)


@pytest.mark.parametrize("chunk", [1, 7, 256])
def test_prompt_and_answer_logprobs_are_transformers(model: Any, runner: ModelRunner, chunk: int) -> None:
    core = make_core(runner, chunked_prefill_size=chunk)
    wanted = {"a": (50, 3, 0), "b": (20, 0, 0), "c": (1, 2, 0), "d": (50, 1, 30)}  # a and d begin alike: d may share a's pages
    for name, (length, k, start) in wanted.items():
        params = SamplingParams(
            max_tokens=5, ignore_eos=True, seed=1, temperature=0.8, logprobs=k, prompt_logprobs=k, prompt_logprobs_start=start
        )
        core.add(name, prompt(length), params)
    core.add("silent", prompt(30), SamplingParams(max_tokens=5))
    outputs = finish(core)
    for name, (length, k, start) in wanted.items():
        tokens = prompt(length) + answer(outputs[name])
        expected = log_probabilities(model, tokens)
        reported = [entry for output in outputs[name] for entry in output.prompt_logprobs]
        if start == 0:
            assert reported.pop(0) == TokenLogprob(tokens[0], None)
        first = max(start, 1)
        assert_reports(reported, tokens[first:length], expected[first - 1 : length - 1], k=k)
        generated = [entry for output in outputs[name] for entry in output.logprobs]
        assert_reports(generated, tokens[length:], expected[length - 1 : -1], k=k)
    assert not any(output.prompt_logprobs or output.logprobs for output in outputs["silent"])


def test_prompt_logprobs_are_whole_after_retraction_and_on_a_warm_cache(model: Any, runner: ModelRunner) -> None:
    core = make_core(runner, max_total_tokens=96, page_size=4, chunked_prefill_size=8)
    params = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, prompt_logprobs=0)
    for round_ in range(2):
        for index in range(6):
            core.add(f"{round_}-{index}", prompt(24 + index), params)
        for name, outputs in finish(core).items():
            tokens = prompt(24 + int(name[-1]))
            reported = [entry for output in outputs for entry in output.prompt_logprobs]
            assert_reports(reported[1:], tokens[1:], log_probabilities(model, tokens)[:-1], k=0)
    assert core.scheduler.counters.retractions > 0


# --- one request's trouble is not another's -----------------------------------------------------------------------------


GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("steps", [0, 1, 3, 12])
def test_abort_in_the_middle_leaves_the_others_as_they_were(runner: ModelRunner, steps: int) -> None:
    wishes = {f"r{index}": (prompt(20 + 9 * index), GREEDY) for index in range(5)}
    expected = answers(make_core(runner), wishes)
    core = make_core(runner, chunked_prefill_size=16)
    for name, wish in wishes.items():
        core.add(name, *wish)
    outputs = [output for _ in range(steps) for output in core.step()]
    gone = core.abort("r2", FinishReason("abort", message="the caller went away", status_code=499))
    assert gone is not None
    assert gone.finish == FinishReason("abort", message="the caller went away", status_code=499)
    assert gone.token_ids == ()
    assert core.abort("r2", gone.finish) is None
    core.scheduler.check_integrity()
    rest = finish(core)
    assert "r2" not in rest
    found = {name: answer([o for o in outputs if o.request_id == name]) + answer(rest[name]) for name in rest}
    assert found == {name: tokens for name, tokens in expected.items() if name != "r2"}
    assert core.flush_cache()
    assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages
    core.add("r2", *wishes["r2"])  # the name is free again
    assert answer(finish(core)["r2"]) == expected["r2"]


def test_abort_all_ends_everything_at_once(runner: ModelRunner) -> None:
    core = make_core(runner, max_running_requests=2)
    for index in range(5):
        core.add(str(index), prompt(30 + index), GREEDY)
    core.step()
    reason = FinishReason("abort", message="shutting down", status_code=503)
    assert {(output.request_id, output.finish) for output in core.abort_all(reason)} == {(str(index), reason) for index in range(5)}
    assert not core.scheduler.has_work
    assert core.step() == []
    assert not core.has_work
    assert core.flush_cache()
    assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages


@pytest.mark.parametrize("chunk", [1, 256])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 1, "logprobs": 2, "top_p": 0.9}])
def test_output_that_is_not_a_number_ends_its_request_alone_and_with_text(
    poisoned_runner: ModelRunner, sampling: dict[str, Any], chunk: int
) -> None:
    wishes = {f"r{index}": (prompt(20 + 9 * index), GREEDY) for index in range(3)}
    expected = answers(make_core(poisoned_runner), wishes)
    core = make_core(poisoned_runner, max_total_tokens=256, chunked_prefill_size=chunk)  # small, so that the pages are soon used again
    poisoned = prompt(30, seed=1)
    poisoned[10] = POISON
    for _ in range(2):
        core.add("bad", poisoned, SamplingParams(max_tokens=5, ignore_eos=True, **sampling))
        for name, wish in wishes.items():
            core.add(name, *wish)
        outputs = finish(core)
        bad = outputs.pop("bad")
        assert answer(bad) == []
        assert bad[-1].finish == FinishReason("abort", message="the model's output was not a number (NaN)", status_code=500)
        assert all(output.logprobs == () for output in bad)
        assert {name: answer(rows) for name, rows in outputs.items()} == expected
        assert core.flush_cache()
        assert core.scheduler.allocator.num_free == core.scheduler.allocator.num_pages


# --- shared pages -------------------------------------------------------------------------------------------------------


def cached(outputs: Sequence[TokenOutput]) -> int:
    return outputs[-1].cached_tokens


def test_a_repeated_prompt_takes_all_whole_pages_but_that_of_its_last_token(runner: ModelRunner) -> None:
    core = make_core(runner)
    for length, expected in ((40, 32), (48, 32), (49, 48), (15, 0), (17, 16)):
        tokens = prompt(length)
        for index, wanted in enumerate((0, expected)):
            core.add(f"{length}-{index}", tokens, GREEDY)
            assert cached(finish(core)[f"{length}-{index}"]) == wanted
    core.flush_cache()
    core.add("flushed", prompt(40), GREEDY)
    assert cached(finish(core)["flushed"]) == 0


def test_the_next_turn_of_a_conversation_takes_the_answer_too(runner: ModelRunner) -> None:
    core = make_core(runner)
    core.add("first", prompt(40), GREEDY)
    said = answer(finish(core)["first"])
    turn = [*prompt(40), *said, *prompt(9, seed=2)]
    core.add("second", turn, GREEDY)
    outputs = finish(core)["second"]
    assert cached(outputs) == 48  # 40 + 20 tokens, of which the last was never computed: three whole pages
    assert answer(outputs) == answers(make_core(runner, disable_radix_cache=True), {"cold": (turn, GREEDY)})["cold"]


def test_namespaces_share_nothing(runner: ModelRunner) -> None:
    core = make_core(runner)
    for name, namespace in (("a", "one"), ("b", "two"), ("c", "one")):
        core.add(name, prompt(40), GREEDY, namespace=namespace)
    outputs = finish(core)
    assert {name: cached(rows) for name, rows in outputs.items()} == {"a": 0, "b": 0, "c": 32}
    assert answer(outputs["a"]) == answer(outputs["b"]) == answer(outputs["c"])


def test_requests_in_flight_together_share_the_pages_of_their_prefix(runner: ModelRunner) -> None:
    core = make_core(runner, chunked_prefill_size=32)
    prefix = prompt(70)
    wishes = {f"r{index}": ([*prefix, *prompt(5 + index, seed=index)], replace(GREEDY, max_tokens=12)) for index in range(6)}
    for name, wish in wishes.items():
        core.add(name, *wish)
    outputs: dict[str, list[TokenOutput]] = {}
    while len(core.scheduler.running) < len(wishes):
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        assert core.num_steps < 20
    whole = len(prefix) // PAGE
    held = [tuple(request.pages[:whole]) for request in core.scheduler.running]
    assert len(set(held)) == 1
    for name, rows in finish(core).items():
        outputs.setdefault(name, []).extend(rows)
    assert sorted(cached(rows) for rows in outputs.values()) == [0, *[whole * PAGE] * 5]
    cold = make_core(runner, disable_radix_cache=True)
    assert {name: answer(rows) for name, rows in outputs.items()} == answers(cold, wishes)
    assert cold.scheduler.counters.cached_tokens == 0


def test_info_counts_what_happened(runner: ModelRunner) -> None:
    core = make_core(runner)
    for index in range(2):
        core.add(str(index), prompt(40), GREEDY)
    core.step()
    busy = core.info()
    assert (busy["num_running_reqs"] + busy["num_waiting_reqs"], busy["max_total_num_tokens"]) == (2, 2048)
    assert busy["num_used_tokens"] >= 40
    assert not core.flush_cache()  # not while requests are here
    finish(core)
    idle = core.info()
    assert (idle["num_running_reqs"], idle["num_waiting_reqs"], idle["num_used_tokens"], idle["token_usage"]) == (0, 0, 0, 0)
    assert (idle["prompt_tokens"], idle["cached_tokens"], idle["cache_hit_rate"]) == (80, 32, 0.4)
    assert (idle["generated_tokens"], idle["finished"], idle["aborted"]) == (40, 2, 0)
    assert idle["num_evictable_cached_tokens"] == 48  # 59 computed tokens, the same for both


@pytest.mark.parametrize(
    ("limit", "status_code", "told"),
    [
        ({"queue_timeout_s": 5.0}, 503, "longer than 5 s (--queue-timeout)"),
        ({"request_timeout_s": 5.0}, 504, "within 5 s (--request-timeout)"),
    ],
)
def test_what_takes_too_long_ends(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, limit: dict[str, Any], status_code: int, told: str
) -> None:
    core = make_core(runner, max_running_requests=1, **limit)
    now = [100.0]
    monkeypatch.setattr("octavo.runtime.core.time.monotonic", lambda: now[0])
    core.add("first", prompt(40), SamplingParams(max_tokens=30, temperature=0.0, ignore_eos=True))
    core.add("second", prompt(40, seed=1), GREEDY)
    outputs = [output for _ in range(3) for output in core.step()]
    assert all(output.finish is None for output in outputs)
    assert outputs[0].queue_s == 0
    now[0] += 6.0
    ended = {output.request_id: output.finish for output in core.step() if output.finish is not None}
    assert ended.keys() == ({"second"} if "queue_timeout_s" in limit else {"first", "second"})  # the first is not waiting any more
    assert all(found is not None and found.status_code == status_code and told in found.message for found in ended.values())
    finish(core)
    core.scheduler.check_integrity()


# --- memory -----------------------------------------------------------------------------------------------------------


def short_of_memory(core: EngineCore, is_too_much: Callable[[Batch], bool], error: Exception) -> list[Batch]:
    """Have the runner fail for some batches; gives those that failed, as they come."""
    forward, failed = core.runner.forward, []

    def fail(batch: Batch, awaited: torch.Tensor | None = None) -> torch.Tensor:
        if is_too_much(batch):
            failed.append(batch)
            raise error
        return forward(batch, awaited)

    core.runner.forward = fail  # type: ignore[method-assign]
    return failed


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["cuda", "cpu"],
)
@pytest.mark.parametrize(("rows", "tokens"), [(3, 1000), (32, 20), (2, 7), (1, 1)])
def test_steps_that_find_no_memory_are_cut_and_change_no_answer(
    runner: ModelRunner,
    sampled: Wishes,
    alone: dict[str, list[int]],
    rows: int,
    tokens: int,
    error: Exception,
    caplog: pytest.LogCaptureFixture,
) -> None:
    core = make_core(runner)
    failed = short_of_memory(core, lambda batch: len(batch.rows) > rows or batch.num_tokens > tokens, error)
    assert answers(core, sampled) == alone
    assert failed
    assert len(failed) < 20
    assert "no memory for a step of" in caplog.text
    assert "Lower --mem-fraction-static" in caplog.text
    failed.clear()
    core.add("later", *sampled["r3"])
    core.add("and another", *sampled["r4"])
    assert core.scheduler.schedule() is not None
    assert len(core.scheduler.running) == 2, "what is new after all was done starts without limits"


def test_a_request_that_finds_no_memory_alone_ends_and_the_others_go_on(
    runner: ModelRunner, sampled: Wishes, alone: dict[str, list[int]]
) -> None:
    core = make_core(runner)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    short_of_memory(core, lambda batch: any(row.request.request_id == "r2" for row in batch.rows), error)
    for name, wish in sampled.items():
        core.add(name, *wish, stop_token_ids=frozenset(wish[1].stop_token_ids))
    outputs = finish(core)
    (ended,) = outputs.pop("r2")
    assert ended.finish == FinishReason(
        "abort", message="the device is out of memory: CUDA out of memory. Tried to allocate 2 GiB", status_code=503
    )
    assert {name: answer(found) for name, found in outputs.items()} == {name: alone[name] for name in outputs}


def test_other_faults_of_a_step_are_not_taken_for_a_lack_of_memory(runner: ModelRunner) -> None:
    core = make_core(runner)
    short_of_memory(core, lambda batch: True, RuntimeError("CUDA error: an illegal memory access was encountered"))
    core.add("r", prompt(5), SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        core.step()
