"""Minutes of mixed traffic at several times what the server can take: nothing is lost, nothing leaks, nothing changes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from octavo.benchmarks.bench_pressure import probe

from .test_end_to_end import Server, start

pytestmark = [pytest.mark.long, pytest.mark.needs_embedded_model]

SOAK_S = float(os.environ.get("OCTAVO_SOAK_S", "600"))
WARM_UP_S = min(60.0, SOAK_S / 4)
RUNNING, QUEUED = 8, 16
CLIENTS = 4 * (RUNNING + QUEUED)
GROWTH_MIB = 48
WORDS = ["river", "stone", "lamp", "paper", "engine", "cloud", "garden", "winter", "signal", "harbour"]
PROMPTS = ("The capital of France is", "def add(a, b):", "Once upon a time", "2, 4, 8, 16,")

Client = httpx.AsyncClient
Kind = Callable[[Client, random.Random], Awaitable[int]]


def text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(words))


async def _post(client: Client, path: str, body: dict[str, Any]) -> httpx.Response:
    response = await client.post(path, json=body)
    if response.status_code == 503:
        assert response.headers["retry-after"]
        assert response.json()["error"]["code"] == "queue_full"
    return response


async def chat(client: Client, draw: random.Random) -> int:
    body = {"messages": [{"role": "user", "content": text(draw, 5)}], "max_tokens": draw.randrange(1, 24)}
    return (await _post(client, "/v1/chat/completions", body)).status_code


async def long_prompt(client: Client, draw: random.Random) -> int:
    return (await _post(client, "/v1/completions", {"prompt": text(draw, draw.randrange(200, 800)), "max_tokens": 4})).status_code


async def four_answers(client: Client, draw: random.Random) -> int:
    response = await _post(client, "/v1/completions", {"prompt": text(draw, 4), "n": 4, "max_tokens": 8, "temperature": 1.0})
    assert response.status_code != 200 or len(response.json()["choices"]) == 4
    return response.status_code


async def stopped(client: Client, draw: random.Random) -> int:
    body = {"prompt": "1, 2, 3, 4,", "max_tokens": 32, "temperature": 0, "stop": ["7"]}
    response = await _post(client, "/v1/completions", body)
    assert response.status_code != 200 or "7" not in response.json()["choices"][0]["text"]
    return response.status_code


async def stream_cut(client: Client, draw: random.Random) -> int:
    body = {"prompt": text(draw, 6), "max_tokens": 200, "stream": True, "ignore_eos": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code == 200:
            lines = response.aiter_lines()
            for _ in range(draw.randrange(1, 8)):
                await anext(lines)
        return response.status_code


async def stream_whole(client: Client, draw: random.Random) -> int:
    body = {"prompt": text(draw, 6), "max_tokens": 12, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line async for line in response.aiter_lines() if line]
        assert response.status_code != 200 or lines[-1] == "data: [DONE]"
        return response.status_code


async def aborted(client: Client, draw: random.Random) -> int:
    rid = f"soak-{draw.randrange(10**12)}"
    task = asyncio.create_task(
        client.post("/generate", json={"text": text(draw, 4), "rid": rid, "sampling_params": {"max_new_tokens": 100}})
    )
    await asyncio.sleep(draw.random() / 2)
    await client.post("/abort_request", json={"rid": rid})
    return (await task).status_code


async def bad(client: Client, draw: random.Random) -> int:
    bodies: list[dict[str, Any]] = [{"prompt": ""}, {"prompt": "a", "max_tokens": -1}, {"prompt": "a", "wrong": 1}, {"prompt": [10**9]}, {}]
    status = (await client.post("/v1/completions", json=draw.choice(bodies))).status_code
    return 200 if status == 400 else status


async def over_long(client: Client, draw: random.Random) -> int:
    response = await client.post("/v1/completions", json={"prompt": text(draw, 9000), "max_tokens": 4})
    assert response.json()["error"]["code"] == "context_length_exceeded"
    return 200 if response.status_code == 400 else response.status_code


KINDS: tuple[Kind, ...] = (chat, chat, chat, long_prompt, four_answers, stopped, stream_cut, stream_whole, aborted, bad, over_long)


def greedy_answers(server: Server) -> list[str]:
    body = {"max_tokens": 16, "temperature": 0}
    return [
        httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": p}, timeout=60).json()["choices"][0]["text"] for p in PROMPTS
    ]


def touch_every_page(server: Server) -> None:
    """Memory of the KV pool is the process's only once it was written: fill it, so that what grows later is a leak."""
    draw = random.Random(0)
    for _ in range(5):
        prompt = [draw.randrange(1000, 40000) for _ in range(4000)]
        httpx.post(f"{server.url}/v1/completions", json={"prompt": prompt, "max_tokens": 1}, timeout=120).raise_for_status()


def held(server: Server) -> dict[str, float]:
    """What could leak: MiB and descriptors of the server and its engine."""
    processes = {"server": psutil.Process(server.process.pid), "engine": psutil.Process(server.engine_pid)}
    found = {f"{name} MiB": process.memory_info().rss / 2**20 for name, process in processes.items()}
    return found | {f"{name} descriptors": process.num_fds() for name, process in processes.items()}


async def soak(url: str, seconds: float) -> Counter[str]:
    """Status by kind, while CLIENTS clients ask without a pause."""
    until = time.monotonic() + seconds
    seen: Counter[str] = Counter()

    async def ask(number: int) -> None:
        draw = random.Random(number)
        async with Client(base_url=url, timeout=120) as client:
            while time.monotonic() < until:
                kind = draw.choice(KINDS)
                status = await kind(client, draw)
                seen[f"{kind.__name__} {status}"] += 1
                if status == 503:
                    await asyncio.sleep(0.2)

    await asyncio.gather(*(ask(number) for number in range(CLIENTS)))
    return seen


@contextmanager
def probing(server: Server) -> Iterator[list[float]]:
    """Inside, a process of its own asks /health every 20 ms, which must answer 200; afterwards the seconds that it took are in what
    this gives, sorted."""
    took: list[float] = []
    ours, theirs = multiprocessing.Pipe()
    prober = multiprocessing.get_context("spawn").Process(target=probe, args=(int(server.url.rpartition(":")[2]), theirs))
    prober.start()
    try:
        yield took
        ours.send(None)
        took += sorted(seconds for _, seconds in ours.recv())
    finally:
        prober.kill()


def test_a_soak(tmp_path: Path) -> None:
    server = start(tmp_path, "--max-running-requests", str(RUNNING), "--max-queued-requests", str(QUEUED), "--log-level", "warning")
    try:
        before = greedy_answers(server)
        touch_every_page(server)
        asyncio.run(soak(server.url, WARM_UP_S))
        warm = held(server)
        with probing(server) as probes:
            seen = asyncio.run(soak(server.url, SOAK_S - WARM_UP_S))
        stats: dict[str, Any] = {}
        deadline = time.monotonic() + 30
        while stats.get("active_requests", 1) or stats["kv_used_tokens"]:
            assert time.monotonic() < deadline, stats
            time.sleep(0.2)
            stats = httpx.get(f"{server.url}/stats", timeout=30).json()
        time.sleep(2)  # connections close
        cool = held(server)
        print(f"\n{dict(sorted(seen.items()))}\n{warm}\n{cool}\n/health p50 {probes[len(probes) // 2] * 1e3:.1f} ms, p99 "
              f"{probes[len(probes) * 99 // 100] * 1e3:.1f} ms\n{stats}")  # fmt: skip
        assert {key.split()[-1] for key in seen} <= {"200", "503"}
        assert all(any(key.startswith(kind.__name__ + " 200") for key in seen) for kind in KINDS)
        assert all(cool[name] <= warm[name] + GROWTH_MIB for name in ("server MiB", "engine MiB"))
        assert all(cool[name] <= warm[name] for name in ("server descriptors", "engine descriptors"))
        assert greedy_answers(server) == before
        assert "Traceback" not in server.text()
    finally:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0, server.text()
