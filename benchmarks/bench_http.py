"""What HTTP costs: the same requests to an Engine in this process and to `octavo serve`, in turns. A plain script; checks nothing.

python benchmarks/bench_http.py [MODEL] [--rounds 4]

One stream: median time to the first token of a streamed completion. Sixty-four streams at once: tokens a second, all told.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import httpx

PROMPT_TOKENS, NEW_TOKENS = 32, 32
ALONE, TOGETHER = 40, 64
PORT = 31801
Ask = Callable[[list[int], int], AsyncGenerator[int, None]]  # a prompt, how many tokens to make; gives how many there are so far


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def first_token(ask: Ask, prompt: list[int]) -> float:
    """Milliseconds to the first token of one stream, which is read to its end, so that no step of it is left to disturb the next."""
    started = time.perf_counter()
    took = 0.0
    async for _ in ask(prompt, 4):
        took = took or 1e3 * (time.perf_counter() - started)
    await asyncio.sleep(0.1)
    return took


async def rate(ask: Ask, seed: int) -> float:
    """Tokens a second of many streams together."""

    async def whole(prompt: list[int]) -> int:
        made = 0
        async for count in ask(prompt, NEW_TOKENS):
            made = count
        return made

    started = time.perf_counter()
    made = await asyncio.gather(*(whole(prompt) for prompt in prompts(TOGETHER, seed)))
    return sum(made) / (time.perf_counter() - started)


def in_process(engine: Any) -> Ask:
    async def ask(prompt: list[int], count: int) -> AsyncGenerator[int, None]:
        params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
        async for result in await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True):
            yield len(result["output_ids"])

    return ask


def over_http(port: int) -> Ask:
    """With sockets alone: an HTTP client costs more than the server does, and on this machine that is the engine's time too."""

    async def ask(prompt: list[int], count: int) -> AsyncGenerator[int, None]:
        wanted = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
        body = json.dumps({**wanted, "stream_options": {"include_usage": True}}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(head.encode() + body)
            so_far, last = 0, b""
            while received := await reader.read(1 << 16):
                events = received.count(b"data: {")
                last = (last + received)[-4096:]
                so_far += events
                if events:
                    yield so_far
            yield int(last.rpartition(b'"completion_tokens":')[2].split(b",")[0].split(b"}")[0])
        finally:
            writer.close()

    return ask


async def compare(engine: Any, port: int, rounds: int) -> None:
    asks = {"in process": in_process(engine), "over HTTP": over_http(port)}
    waits: dict[str, list[float]] = {name: [] for name in asks}
    rates: dict[str, list[float]] = {name: [] for name in asks}
    for number in range(ALONE + 3):
        for name, ask in list(asks.items())[:: 1 if number % 2 else -1]:
            took = await first_token(ask, prompts(1, 1000 * number + len(name))[0])
            if number >= 3:  # the first are for warming up
                waits[name].append(took)
    for number in range(rounds):
        for name, ask in list(asks.items())[:: 1 if number % 2 else -1]:
            rates[name].append(await rate(ask, 10**6 + 10 * number + len(name)))
    for name in asks:
        told = ", ".join(f"{one:.1f}" for one in rates[name])
        print(f"{name:<12}first token {statistics.median(waits[name]):7.1f} ms (median of {ALONE}), {TOGETHER} streams {told} tokens/s")
    added = statistics.median(http - ours for ours, http in zip(*waits.values(), strict=True))
    share = statistics.median(rates["over HTTP"]) / statistics.median(rates["in process"])
    print(f"HTTP adds {added:.1f} ms to the first token, the median of the pairs, and leaves {100 * share:.1f} % of the tokens a second")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    from octavo import Engine

    command = [sys.executable, "-m", "octavo", "serve", *([given.model] if given.model else []), "--port", str(PORT)]
    with subprocess.Popen([*command, "--max-total-tokens", "16384", "--log-level", "error"], stdout=subprocess.DEVNULL) as server:
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{PORT}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)
            with Engine(given.model, show_progress=False, max_total_tokens=16384) as engine:
                asyncio.run(compare(engine, PORT, given.rounds))
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
