"""What HTTP costs: the same requests to an Engine in this process and to `octavo serve`, in turns. A plain script; checks nothing.

python benchmarks/bench_http.py [MODEL] [--rounds 2]

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
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

PROMPT_TOKENS, NEW_TOKENS = 32, 32
ALONE, TOGETHER = 24, 64
Ask = Callable[[list[int], int], AsyncIterator[int]]  # a prompt, how many tokens to make; gives how many there are so far


def prompts(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(1000, 40000) for _ in range(PROMPT_TOKENS)] for _ in range(count)]


async def measure(ask: Ask, seed: int) -> tuple[float, float]:
    """Median milliseconds to the first token of one stream, and tokens a second of many."""
    waits = []
    for prompt in prompts(ALONE, seed):
        started = time.perf_counter()
        async for _ in ask(prompt, 4):
            waits.append(1e3 * (time.perf_counter() - started))
            break
        await asyncio.sleep(0.15)  # the step that was cut ends

    async def whole(prompt: list[int]) -> int:
        made = 0
        async for count in ask(prompt, NEW_TOKENS):
            made = count
        return made

    started = time.perf_counter()
    made = await asyncio.gather(*(whole(prompt) for prompt in prompts(TOGETHER, seed + 1)))
    return statistics.median(waits), sum(made) / (time.perf_counter() - started)


def in_process(model: str | None, rounds: int) -> list[tuple[float, float]]:
    from octavo import Engine

    with Engine(model, show_progress=False, max_total_tokens=16384) as engine:

        async def ask(prompt: list[int], count: int) -> AsyncIterator[int]:
            params = {"max_new_tokens": count, "temperature": 0, "ignore_eos": True}
            async for result in await engine.async_generate(input_ids=prompt, sampling_params=params, stream=True):
                yield len(result["output_ids"])

        return [asyncio.run(measure(ask, 100 * number)) for number in range(rounds + 1)][1:]


def over_http(model: str | None, rounds: int) -> list[tuple[float, float]]:
    command = [sys.executable, "-m", "octavo", "serve", *([model] if model else []), "--port", "31801", "--max-total-tokens", "16384"]
    with subprocess.Popen([*command, "--log-level", "error"], stdout=subprocess.DEVNULL) as server:
        try:
            url = "http://127.0.0.1:31801"
            while True:
                try:
                    httpx.get(f"{url}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)

            async def run(seed: int) -> tuple[float, float]:
                async with httpx.AsyncClient(base_url=url, timeout=600, limits=httpx.Limits(max_connections=None)) as client:

                    async def ask(prompt: list[int], count: int) -> AsyncIterator[int]:
                        body: dict[str, Any] = {"prompt": prompt, "max_tokens": count, "temperature": 0, "ignore_eos": True, "stream": True}
                        body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
                        async with client.stream("POST", "/v1/completions", json=body) as response:
                            async for line in response.aiter_lines():
                                if line.startswith("data: {"):
                                    yield json.loads(line[6:])["usage"]["completion_tokens"]

                    return await measure(ask, seed)

            return [asyncio.run(run(100 * number)) for number in range(rounds + 1)][1:]
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    ours, http = in_process(given.model, given.rounds), over_http(given.model, given.rounds)
    for name, rounds in (("in process", ours), ("over HTTP", http)):
        for first, rate in rounds:
            print(f"{name:<12}first token {first:7.1f} ms (median of {ALONE}), {TOGETHER} streams {rate:7.1f} tokens/s")
    first = statistics.median(r[0] for r in http) - statistics.median(r[0] for r in ours)
    rate = statistics.median(r[1] for r in http) / statistics.median(r[1] for r in ours)
    print(f"HTTP adds {first:.1f} ms to the first token, and leaves {100 * rate:.1f} % of the tokens a second")


if __name__ == "__main__":
    main()
