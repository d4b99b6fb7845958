"""What a server under load does to streams and probes: gaps between tokens, usual and beside a long prompt, and how long /health takes.

python benchmarks/bench_pressure.py [MODEL] [--streams 8] [--prompt 6000] [--seconds 20] [--port 31802] [-- FLAGS OF octavo serve]

A process of its own asks /health every 20 ms, so that the clients' own work is not counted. A plain script; checks nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import multiprocessing
import multiprocessing.connection
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import httpx

PROBE_EVERY_S = 0.02


def probe(port: int, pipe: multiprocessing.connection.Connection) -> None:
    """Ask /health until told to stop; send when each was asked and what it took, in seconds. Ends at an answer that is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    took: list[tuple[float, float]] = []
    while not pipe.poll():
        started = time.monotonic()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        took.append((started, time.monotonic() - started))
        time.sleep(PROBE_EVERY_S)
    pipe.send(took)


async def stream(client: httpx.AsyncClient, prompt: list[int], until: float) -> list[float]:
    """Times at which a stream's tokens came, until it is cut."""
    times = []
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 4096, "temperature": 0, "ignore_eos": True, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                times.append(time.monotonic())
            if time.monotonic() > until:
                break
    return times


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def told(name: str, values: Sequence[float]) -> str:
    p50, p99, most = statistics.median(values), quantile(values, 0.99), max(values)
    return f"{name:<34}p50 {1e3 * p50:7.1f} ms, p99 {1e3 * p99:7.1f} ms, longest {1e3 * most:7.1f} ms ({len(values)})"


async def load(port: int, streams: int, length: int, seconds: float) -> tuple[list[list[float]], float, float]:
    """Token times of each stream, and when the long prompt was sent and got its first token."""
    draw = random.Random(0)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600, limits=limits) as client:
        until = time.monotonic() + 3 * seconds
        tasks = [asyncio.create_task(stream(client, [draw.randrange(1000, 40000) for _ in range(32)], until)) for _ in range(streams)]
        await asyncio.sleep(seconds)
        sent = time.monotonic()
        body = {"prompt": [draw.randrange(1000, 40000) for _ in range(length)], "max_tokens": 1, "temperature": 0}
        (await client.post("/v1/completions", json=body)).raise_for_status()
        return await asyncio.gather(*tasks), sent, time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=6000, metavar="TOKENS")
    parser.add_argument("--seconds", type=float, default=20, help="of usual load, and again of load with the prompt, or longer")
    parser.add_argument("--port", type=int, default=31802)
    given, flags = parser.parse_known_args()
    command = [sys.executable, "-m", "octavo", "serve", *([given.model] if given.model else []), "--port", str(given.port)]
    flags = [flag for flag in flags if flag != "--"]
    with subprocess.Popen([*command, "--log-level", "error", *flags], stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{given.port}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)
            here, there = multiprocessing.Pipe()
            prober = multiprocessing.Process(target=probe, args=(given.port, there))
            time.sleep(1)
            prober.start()
            time.sleep(3)
            begin = time.monotonic()
            times, sent, answered = asyncio.run(load(given.port, given.streams, given.prompt, given.seconds))
            end = time.monotonic()
            here.send("stop")
            probes = here.recv()
            prober.join()
        finally:
            server.terminate()
    first = max(stream[0] for stream in times)
    gaps = [pair for stream in times for pair in itertools.pairwise(stream) if pair[0] >= first]
    usual = [later - sooner for sooner, later in gaps if later <= sent]
    beside = [later - sooner for sooner, later in gaps if later > sent and sooner < answered]
    print(told("/health, idle", [took for at, took in probes if at < begin]))
    print(told(f"/health, {given.streams} streams", [took for at, took in probes if first <= at < end]))
    print(told("between tokens, usual", usual))
    print(told(f"between tokens, {given.prompt} more", beside))
    rise = quantile(beside, 0.99) / quantile(usual, 0.99)
    print(f"the long prompt took {answered - sent:.1f} s to its first token; p99 between tokens rose {rise:.2f} times")


if __name__ == "__main__":
    main()
