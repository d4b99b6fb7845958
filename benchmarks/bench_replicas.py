"""Prefix cache hits and time to the first token of replicas, by what divides requests among them, in turns. A plain script; checks nothing.

python benchmarks/bench_replicas.py [MODEL] [--ways least-conn affinity] [--replicas 2] [--rounds 3]

Ways: both of the shipped NGINX files; one of them without its rule, which is round robin; and on Ray Serve (octavo[ray]) our own router and
Ray's. Replicas of one compute thread each hold half of the prefixes that are asked for. Each round starts new ones for each way, so that
their caches are empty, and asks the same prompts with `octavo bench serving`, each with the name of its prefix in X-Session-Id, which NGINX
alone looks at.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from octavo.deploy.nginx import local

WAYS = ("least-conn", "affinity", "round-robin", "ray-prefix", "ray-least-busy")
PORT = 31810
PREFIXES, PREFIX_LEN, INPUT_LEN, OUTPUT_LEN = 8, 512, 32, 8
CONCURRENCY, REQUESTS = 8, 96


def room_of(count: int) -> int:
    """Tokens of a replica's cache: its share of the prefixes and one more, and what runs."""
    return PREFIXES // count * PREFIX_LEN + CONCURRENCY * (INPUT_LEN + OUTPUT_LEN) + PREFIX_LEN


@contextmanager
def behind_ray(model: str | None, count: int, routing: str) -> Iterator[str]:
    """The URL of an application of as many replicas."""
    import ray
    from ray import serve

    from octavo.serve.ray_app import build

    ray.init(num_cpus=count + 2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": PORT})
    flags = {"num_threads": 1, "max_total_tokens": room_of(count), "log_level": "warning", **({"model_path": model} if model else {})}
    try:
        serve.run(build({**flags, "replicas": count, "num_cpus": 0.5, "routing": routing}), name="octavo")
        yield f"http://127.0.0.1:{PORT}"
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def behind_nginx(model: str | None, count: int, name: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if name == "round-robin.conf":
            shipped = (Path(local.__file__).parent / "least-conn.conf").read_text()
            (place / name).write_text(shipped.replace("    least_conn;\n", ""))
            name = str(place / name)
        with replicas(model, count, place) as urls, local.running(name, urls, place) as url:
            yield url


@contextmanager
def replicas(model: str | None, count: int, folder: Path) -> Iterator[list[str]]:
    """URLs of servers that are ready."""
    urls, processes = [], []
    try:
        for number in range(count):
            flags = ["--port", f"{PORT + number}", "--num-threads", "1", "--max-total-tokens", f"{room_of(count)}"]
            flags += ["--model-path", model] if model else []
            with (folder / f"replica-{number}.log").open("wb") as log:
                command = [sys.executable, "-m", "octavo", "serve", *flags]
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            urls.append(f"http://127.0.0.1:{PORT + number}")
        for url, process in zip(urls, processes, strict=True):
            wait_ready(url, process)
        yield urls
    finally:
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            process.wait(60)


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            if httpx.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"the replica at {url} did not start")


def measure(way: str, model: str | None, count: int, seed: int) -> dict[str, float]:
    on_ray = way.startswith("ray-")
    starting = behind_ray(model, count, way.removeprefix("ray-")) if on_ray else behind_nginx(model, count, f"{way}.conf")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        with starting as url:
            load = f"--dataset shared-prefix --num-prefixes {PREFIXES} --prefix-len {PREFIX_LEN} --input-len {INPUT_LEN}"
            load += f" --output-len {OUTPUT_LEN} --ignore-eos --concurrency {CONCURRENCY} --num-requests {REQUESTS} --seed {seed}"
            load += f" --session-header X-Session-Id --output-json {folder / 'run.json'}"
            command = [sys.executable, "-m", "octavo", "bench", "serving", "--base-url", url, *load.split()]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            run: dict[str, Any] = json.loads((folder / "run.json").read_text())["runs"][0]
    return {
        "hits": run["cached_tokens"] / run["prompt_tokens"],
        "ttft_p50_ms": run["ttft_ms"]["p50"],
        "ttft_p99_ms": run["ttft_ms"]["p99"],
        "requests_per_s": run["requests_per_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:2])
    parser.add_argument("--replicas", type=int, choices=(2, 3), default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in given.ways}
    for seed in range(given.rounds):
        for name in given.ways if seed % 2 == 0 else given.ways[::-1]:
            found[name].append(measure(name, given.model, given.replicas, seed))
            print(f"round {seed}, {name}: {found[name][-1]}", flush=True)
    print(f"\n{'':<18}{'hits':>8}{'TTFT p50':>12}{'TTFT p99':>12}{'requests/s':>12}")
    for name, runs in found.items():
        hits, p50, p99, rate = (statistics.median(run[key] for run in runs) for key in runs[0])
        print(f"{name:<18}{hits:>8.1%}{p50:>9.0f} ms{p99:>9.0f} ms{rate:>12.2f}")


if __name__ == "__main__":
    main()
