"""A step on several ranks of this machine's CPU against one rank's, and against what the alpha-beta model makes of their messages.

    python -m octavo.benchmarks.bench_ranks --ranks 2

Each rank has one thread. The model has random weights (`--hidden`, `--layers`, a vocabulary of 32,000); every request decodes. The time of
a message is fitted to all-reduces of several sizes between as many processes: alpha, what one takes however small, and beta, what a byte
takes. Predicted for R ranks: one rank's step / R, and alpha + beta x bytes for each of two all-reduces a layer, the embedding's and the
logits.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch

from ..runtime.collectives import ProcessGroup, open_store
from ..runtime.config import EngineConfig
from ..runtime.core import EngineCore
from ..runtime.sampling_params import SamplingParams
from ..runtime.start import load_core, prepare_environment

VOCABULARY, PROMPT = 32_000, 32
SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20)  # bytes


def reduce_all(rank: int, size: int, folder: Path, report: Connection | None) -> None:
    """Median seconds of an all-reduce, by bytes."""
    torch.set_num_threads(1)
    group = ProcessGroup(open_store(folder, size)[0], rank=rank, size=size, device=torch.device("cpu"), timeout_s=60)
    found = []
    for nbytes in SIZES:
        tensor = torch.zeros(nbytes // 4)
        took = []
        for _ in range(200):
            began = time.perf_counter()
            group.all_reduce(tensor)
            took.append(time.perf_counter() - began)
        found.append(statistics.median(took[20:]))
    if report is not None:
        report.send(found)


def alpha_beta(size: int) -> tuple[float, float]:
    """Seconds of a message, and of a byte, between `size` processes."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    with tempfile.TemporaryDirectory() as place:
        reports = [there if rank == 0 else None for rank in range(size)]
        workers = [context.Process(target=reduce_all, args=(rank, size, Path(place), reports[rank])) for rank in range(size)]
        for worker in workers:
            worker.start()
        found = here.recv()
        for worker in workers:
            worker.join()
    for nbytes, seconds in zip(SIZES, found, strict=True):
        print(f"  all-reduce of {nbytes:>9,} bytes: {seconds * 1e6:8.0f} us")
    beta, alpha = np.polyfit(SIZES, found, 1, w=1 / np.array(found))
    return float(alpha), float(beta)


def step_seconds(core: EngineCore, requests: int, steps: int) -> float:
    """Median seconds of a step in which `requests` decode."""
    for number in range(requests):
        params = SamplingParams(max_tokens=steps + 10, temperature=0.0, ignore_eos=True)
        core.add(str(number), [(17 * number + place) % VOCABULARY for place in range(PROMPT)], params)
    while any(request.num_generated < 2 for request in core.scheduler.requests):
        core.step()
    took = []
    for _ in range(steps):
        began = time.perf_counter()
        core.step()
        took.append(time.perf_counter() - began)
    while core.has_work:
        core.step()
    core.flush_cache()
    return statistics.median(took)


def model_in(folder: Path, hidden: int, layers: int) -> str:
    heads = hidden // 64
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads // 2, "head_dim": 64,
        "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--requests", default="1,8,32", help="that decode together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    prepare_environment()
    size, hidden, layers = given.ranks, given.hidden, given.layers
    alpha, beta = alpha_beta(size)
    print(f"  alpha {alpha * 1e6:.0f} us, beta {beta * 1e9:.2f} ns a byte")
    counts = [int(count) for count in given.requests.split(",")]
    found: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as place:
        path = model_in(Path(place), hidden, layers)
        for ranks in (1, size):
            config = EngineConfig(
                model_path=path, load_format="dummy", device="cpu", tp_size=ranks, num_threads=1, max_total_tokens=8192,
                skip_kernel_check=True,
            )  # fmt: skip
            core = load_core(config, show_progress=False)
            try:
                found[ranks] = [step_seconds(core, count, given.steps) for count in counts]
            finally:
                core.close()
    print(f"  {'requests':>8} {'1 rank':>10} {size:>4} ranks {'predicted':>12} {'of it messages':>15}")
    for count, one, several in zip(counts, found[1], found[size], strict=True):
        rows = 4 * count
        messages = (2 * layers + 1) * (alpha + beta * rows * hidden) + alpha + beta * rows * VOCABULARY / size
        predicted = one / size + messages
        print(f"  {count:>8} {one * 1e3:>7.1f} ms {several * 1e3:>7.1f} ms {predicted * 1e3:>9.1f} ms {messages * 1e3:>12.1f} ms")


if __name__ == "__main__":
    main()
