"""Proves the engine process: requests, refusals, aborts, questions, and that its death is told to everybody who waits."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from contextlib import aclosing
from dataclasses import replace

import pytest

from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.client import EngineDead, RequestRefused
from octavo.runtime.config import EngineConfig
from octavo.runtime.logs import LogSettings
from octavo.runtime.outputs import TextOutput
from octavo.runtime.process import EngineProcess, launch_engine
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.tokenizer import load_tokenizer

pytestmark = pytest.mark.needs_embedded_model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
LONG = SamplingParams(max_tokens=2000, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineProcess]:
    running = launch_engine(EngineConfig(max_total_tokens=8192, max_queued_requests=40), logs=LogSettings(level="warning"))
    yield running
    running.close()


async def collect(engine: EngineProcess, prompt: list[int], params: SamplingParams, request_id: str) -> list[TextOutput]:
    return [output async for output in engine.generate(prompt, params, request_id=request_id)]


async def until_idle(engine: EngineProcess) -> float:
    """Seconds until nothing runs."""
    started = time.monotonic()
    while (await engine.server_info())["internal_states"][0]["num_running_reqs"]:
        assert time.monotonic() - started < 5, "a request goes on that nobody waits for"
        await asyncio.sleep(0.02)
    return time.monotonic() - started


async def test_a_request_streams_and_ends(engine: EngineProcess) -> None:
    outputs = await collect(engine, engine.tokenizer.encode("The capital of France is"), GREEDY, "a")
    assert "".join(output.text for output in outputs).startswith(" Paris")
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.type == "length"
    assert outputs[-1].completion_tokens == 8
    assert all(output.finish is None for output in outputs[:-1])


async def test_a_stop_string_is_no_abort(engine: EngineProcess) -> None:
    async def aborted() -> int:
        return int((await engine.server_info())["internal_states"][0]["aborted"])

    before = await aborted()
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, stop=(" Paris",))
    outputs = await collect(engine, engine.tokenizer.encode("The capital of France is"), params, "stops")
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.type == "stop"
    await until_idle(engine)
    assert await aborted() == before


async def test_many_at_once_each_get_their_own(engine: EngineProcess) -> None:
    prompts = [engine.tokenizer.encode(f"Number {index} is followed by") for index in range(24)]
    alone = [await collect(engine, prompt, GREEDY, f"alone-{index}") for index, prompt in enumerate(prompts[:3])]
    together = await asyncio.gather(*(collect(engine, prompt, GREEDY, f"b-{index}") for index, prompt in enumerate(prompts)))
    for index in range(3):
        assert [o.token_ids for o in together[index]] == [o.token_ids for o in alone[index]]


async def test_leaving_the_iterator_aborts(engine: EngineProcess) -> None:
    stream = engine.generate([1, 2, 3], LONG, request_id="left")
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    assert await until_idle(engine) < 2


async def test_abort_ends_the_iterator_with_a_reason(engine: EngineProcess) -> None:
    outputs = []
    async for output in engine.generate([1, 2, 3], LONG, request_id="aborted"):
        outputs.append(output)
        if len(outputs) == 3:
            await engine.abort("aborted")
    assert outputs[-1].finish is not None
    assert outputs[-1].finish.type == "abort"
    await engine.abort("nobody knows this one")


async def test_refusals_say_why(engine: EngineProcess) -> None:
    for prompt, words in (
        ([], "empty"),
        ([49152], "out of range"),
        ([1] * 8200, "context length"),
        ([1] * 8192, "no room|KV pool|context"),
    ):
        with pytest.raises(RequestRefused, match=words):
            await collect(engine, prompt, GREEDY, "refused")


async def test_a_full_queue_refuses_with_503(engine: EngineProcess) -> None:
    blocked = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    results = await asyncio.gather(
        *(collect(engine, [7] * 400 + [index], blocked, f"flood-{index}") for index in range(60)), return_exceptions=True
    )
    refused = [result for result in results if isinstance(result, RequestRefused)]
    served = [result for result in results if isinstance(result, list)]
    assert len(refused) + len(served) == 60
    assert served
    assert all(result.status_code == 503 and "queue is full" in str(result) for result in refused)
    assert refused


async def test_questions_are_answered(engine: EngineProcess) -> None:
    await until_idle(engine)
    assert await engine.flush_cache() is True
    info = await engine.server_info()
    assert info["page_size"] == 16
    assert info["memory_usage"]["token_capacity"] == 8192
    assert info["internal_states"][0]["num_evictable_cached_tokens"] == 0
    assert engine.model_info.default_sampling == {"temperature": 0.2, "top_p": 0.9}
    assert engine.health().ok
    assert engine.health().heartbeat_age_s < 5


async def test_sigkill_under_load_reaches_every_waiting_caller() -> None:
    victim = await asyncio.to_thread(launch_engine, EngineConfig(max_total_tokens=4096), logs=LogSettings(level="warning"))
    try:
        waiting = [asyncio.create_task(collect(victim, [3, 4, index], LONG, f"doomed-{index}")) for index in range(8)]
        await asyncio.sleep(0.5)
        os.kill(victim.pid, signal.SIGKILL)
        started = time.monotonic()
        results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 10)
        assert time.monotonic() - started < 3
        assert all(isinstance(result, EngineDead) and "signal 9" in str(result) for result in results)
        assert not victim.health().ok
        assert "signal 9" in await asyncio.wait_for(victim.wait_dead(), 2)
        with pytest.raises(EngineDead):
            await collect(victim, [1], GREEDY, "late")
        with pytest.raises(EngineDead):
            await victim.server_info()
    finally:
        victim.close()


async def test_an_engine_that_falls_silent_is_told_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("octavo.runtime.process.SILENT_AFTER_S", 1.5)
    engine = await asyncio.to_thread(launch_engine, EngineConfig(max_total_tokens=4096), logs=LogSettings(level="warning"))

    async def until(is_ok: bool) -> None:
        async with asyncio.timeout(10):
            while engine.health().ok != is_ok:
                await asyncio.sleep(0.05)

    def told(words: str) -> int:
        return sum(words in record.getMessage() for record in caplog.records)

    try:
        waiting = asyncio.create_task(collect(engine, [3, 4, 5], replace(LONG, max_tokens=100), "patient"))
        await asyncio.sleep(0.3)
        os.kill(engine.pid, signal.SIGSTOP)
        await until(False)
        assert "has not answered for" in engine.health().reason
        await asyncio.sleep(1)
        assert told("health is red") == 1  # once, however long it lasts
        os.kill(engine.pid, signal.SIGCONT)
        await until(True)
        assert (await waiting)[-1].finish is not None
        assert told("the engine answers again") == 1
        assert "most recent call first" in capfd.readouterr().err  # the stacks of its threads
    finally:
        engine.close()


def test_a_start_that_cannot_work_says_what_to_change() -> None:
    with pytest.raises(ValueError, match="--context-length 9000 is beyond the model's 8192"):
        launch_engine(EngineConfig(context_length=9000), logs=LogSettings(level="critical"))


def test_ctrl_c_does_not_reach_an_engine_that_starts() -> None:
    """A terminal sends it to the whole group, and the server decides."""
    engine = EngineProcess(EngineConfig(max_total_tokens=512), resolve_model(None), logs=LogSettings(level="warning"))
    try:
        for _ in range(50):  # while Python starts and imports
            os.kill(engine.pid, signal.SIGINT)
            time.sleep(0.01)
        engine.wait_ready(load_tokenizer(resolve_model(None)))
    finally:
        engine.close()


def test_close_ends_the_process() -> None:
    engine = launch_engine(EngineConfig(max_total_tokens=512), logs=LogSettings(level="warning"))
    pid = engine.pid
    engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_an_id_used_again_at_once_gets_nothing_of_the_one_before(engine: EngineProcess) -> None:
    stopped = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    for _ in range(8):
        async with aclosing(engine.generate([3, 4, 5], stopped, request_id="again")) as outputs:
            await anext(outputs)  # then the engine is told to abort, and answers later
        found = await collect(engine, [3, 4, 5], replace(stopped, max_tokens=3), "again")
        assert found[-1].finish is not None
        assert (found[-1].finish.type, found[-1].completion_tokens) == ("length", 3)


async def test_a_silent_engine_is_sent_nothing(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.runtime.process.SILENT_AFTER_S", -1.0)
    with pytest.raises(EngineDead, match="has not answered"):
        await collect(engine, [3, 4, 5], LONG, "nobody")
