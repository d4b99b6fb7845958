"""Proves overlap with a device whose results come 50 ms late: the host's work hides behind it, and no token changes.

The clock is told, not read; `benchmarks/bench_overlap.py` is the same with a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import octavo
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.batch import Batch
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.outputs import FinishReason
from octavo.runtime.sampling_params import SamplingParams

from .tiny_models import tiny_llama

VOCAB = 131
LATE_MS = 50.0


class FakeDevice:
    """Computes a step in 50 ms, one after another, and shows nothing of it before. `host_ms` passes as the host works or waits."""

    def __init__(self) -> None:
        self.host_ms = self._free_ms = self.idle_ms = 0.0

    def fetch(self, tensors: Sequence[torch.Tensor]) -> FakeDevice.Late:
        if self._free_ms:
            self.idle_ms += max(0.0, self.host_ms - self._free_ms)
        self._free_ms = max(self._free_ms, self.host_ms) + LATE_MS
        return self.Late(self, self._free_ms, [tensor.clone() for tensor in tensors])

    def takes(self, ms: float, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, on the host for so long."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.host_ms += ms
            return work(*args, **kwargs)

        return timed

    class Late:
        def __init__(self, device: FakeDevice, ready_ms: float, tensors: list[torch.Tensor]) -> None:
            self._device, self._ready_ms, self._tensors = device, ready_ms, tensors

        def wait(self) -> list[torch.Tensor]:
            self._device.host_ms = max(self._device.host_ms, self._ready_ms)
            return self._tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1).save_pretrained(
        path
    )
    return path


def run(folder: Path, *, overlap: bool, tokens: int = 40, hook: Callable[[EngineCore, int], None] | None = None, **options: Any) -> Any:
    """Six requests on the fake device, each part of the host's work taking some milliseconds. Gives outputs, device, core, steps."""
    sizes = {"max_total_tokens": 2048, "max_running_requests": 8, "chunked_prefill_size": 64, "page_size": 16, "random_seed": 0}
    config = EngineConfig(device="cpu", **{**sizes, **options}).resolve(device="cpu")
    device = FakeDevice()
    core = EngineCore(config, ModelRunner(config, resolve_model(str(folder)), show_progress=False), fetch=device.fetch, overlap=overlap)
    core.scheduler.schedule = device.takes(4.0, core.scheduler.schedule)  # type: ignore[method-assign]
    core.runner.forward = device.takes(6.0, core.runner.forward)  # type: ignore[method-assign]
    core.scheduler.commit = device.takes(3.0, core.scheduler.commit)  # type: ignore[method-assign]
    source = torch.Generator().manual_seed(1)
    for number, length in enumerate((3, 20, 70, 33, 5, 90)):
        prompt = torch.randint(0, VOCAB, (length,), generator=source).tolist()
        params = SamplingParams(
            max_tokens=tokens + number, temperature=0.8 * (number % 2), seed=number, logprobs=2 if number == 1 else None
        )
        core.add(f"r{number}", prompt, params, stop_token_ids=frozenset({7, 8, 9}))
    texts: dict[str, list[int]] = {}
    ends: dict[str, FinishReason] = {}
    launches = 0
    while core.has_work:
        if hook is not None:
            hook(core, launches)
        launches += 1
        for output in core.step():
            texts.setdefault(output.request_id, []).extend(output.token_ids)
            assert output.request_id not in ends
            if output.finish is not None:
                ends[output.request_id] = output.finish
        device.host_ms += 2.0  # to deliver them
        core.scheduler.check_integrity()
    assert core.scheduler.allocator.num_free + core.scheduler.cache.num_evictable_pages == core.scheduler.allocator.num_pages
    return texts, ends, device, core


def test_the_hosts_work_hides_behind_the_device(folder: Path) -> None:
    texts, ends, device, _ = run(folder, overlap=True)
    in_turn, in_turn_ends, waited, core_in_turn = run(folder, overlap=False)
    assert texts == in_turn
    assert ends == in_turn_ends
    host_ms = waited.host_ms - LATE_MS * core_in_turn.num_steps
    left_ms = device.host_ms - LATE_MS * core_in_turn.num_steps
    assert host_ms >= 15.0 * core_in_turn.num_steps - 1e-6, "without overlap all of it is seen"
    assert left_ms <= 0.1 * host_ms, f"{left_ms:.0f} of {host_ms:.0f} ms are seen"
    assert device.idle_ms == 0.0
    assert waited.idle_ms > 14.0 * (core_in_turn.num_steps - 1)


def test_a_request_that_ends_by_length_costs_no_step_more(folder: Path) -> None:
    *_, core = run(folder, overlap=True)
    *_, in_turn = run(folder, overlap=False)
    assert in_turn.num_steps <= core.num_steps <= in_turn.num_steps + 1  # the one launched before the last stop token was known


def test_tokens_are_the_same_under_retraction(folder: Path) -> None:
    texts, ends, *_ = run(folder, overlap=False)
    for overlap in (False, True):
        found, found_ends, _, core = run(folder, overlap=overlap, max_total_tokens=288, disable_radix_cache=overlap)
        assert core.scheduler.counters.retractions > 0
        assert (found, found_ends) == (texts, ends)


def test_tokens_are_the_same_when_a_step_finds_no_memory(folder: Path) -> None:
    texts, ends, *_ = run(folder, overlap=False)

    failed: list[int] = []

    def from_the_third_on(core: EngineCore, launches: int) -> None:
        if launches == 3:
            forward = core.runner.forward

            def maybe(batch: Batch, awaited: torch.Tensor | None = None) -> torch.Tensor:
                if len(batch.rows) > 2:
                    failed.append(sum(row.request.num_awaited for row in batch.rows))
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return forward(batch, awaited)

            core.runner.forward = maybe  # type: ignore[method-assign]

    found, found_ends, *_ = run(folder, overlap=True, hook=from_the_third_on)
    assert any(failed), "no step failed that was launched ahead"
    assert (found, found_ends) == (texts, ends)


@pytest.mark.parametrize("when", [1, 2, 9])
def test_an_aborted_request_gets_nothing_more_and_the_others_are_as_they_were(folder: Path, when: int) -> None:
    texts, ends, *_ = run(folder, overlap=False)
    reason = FinishReason("abort", message="the caller went away", status_code=499)

    def abort(core: EngineCore, launches: int) -> None:
        if launches == when:
            output = core.abort("r1", reason)
            assert output is not None
            assert output.finish == reason
            core.add("again", [1, 2, 3], SamplingParams(max_tokens=3, temperature=0.0))

    found, found_ends, *_ = run(folder, overlap=True, hook=abort)
    assert len(found.pop("again")) == 3
    cut = found.pop("r1", [])
    assert cut == texts["r1"][: len(cut)]
    assert len(cut) < len(texts["r1"])
    assert found == {name: text for name, text in texts.items() if name != "r1"}
    assert {name: end for name, end in found_ends.items() if name not in ("r1", "again")} == {n: e for n, e in ends.items() if n != "r1"}


@pytest.fixture(scope="module")
def engine() -> Iterator[octavo.Engine]:
    device = FakeDevice()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("octavo.runtime.core.EngineCore", partial(EngineCore, fetch=device.fetch, overlap=True))
        running = octavo.Engine(max_total_tokens=2048, random_seed=0, show_progress=False)
    with running:
        yield running


@pytest.mark.needs_embedded_model
@pytest.mark.parametrize("stop", ["ari", " the", [".", "zebra"]])
def test_stop_strings_cut_the_text_where_they_did(engine: octavo.Engine, stop: Any) -> None:
    wish = {"max_new_tokens": 60, "temperature": 0, "stop": stop}
    prompts = ["The capital of France is", "Once upon a time"]
    with octavo.Engine(max_total_tokens=2048, random_seed=0, show_progress=False) as in_turn:
        wanted = in_turn.generate(prompts, wish)
    found = engine.generate(prompts, wish)
    assert [result["text"] for result in found] == [result["text"] for result in wanted]
    assert [result["meta_info"]["finish_reason"] for result in found] == [result["meta_info"]["finish_reason"] for result in wanted]
    assert engine.flush_cache() is True, "nothing is left of what was launched ahead"
    assert engine.get_server_info()["internal_states"][0]["num_used_tokens"] == 0
