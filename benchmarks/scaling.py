"""Decoding steps of large models on paper: bytes of weights over memory bandwidth, and messages by the alpha-beta model. Measures nothing.

    python benchmarks/scaling.py

A step of B requests on R ranks reads the weights once, a part on each, and each request's keys and values; every layer sums two outputs of
B x hidden bfloat16 over the ranks. Such a sum costs alpha and, in a ring, 2 (R - 1) / R of its bytes over one link. With S stages as many
batches of B / S requests are under way, each in a stage of its own; each goes through all stages before its requests have a token more, and
a message of hidden states costs an alpha and its bytes between two of them. What is left out makes real steps longer: attention's
arithmetic, launches, the head, and that memory gives some 80 % of its figure.
"""

from __future__ import annotations

from typing import NamedTuple

MEMORY = 3.35e12  # bytes a second of an H100 (SXM)
CONTEXT = 2000  # tokens of each request


class Model(NamedTuple):
    name: str
    layers: int
    hidden: int
    kv_bytes: int  # of a token, in bfloat16
    weights: float  # bytes


class Links(NamedTuple):
    name: str
    most: int  # ranks that they join
    alpha: float  # seconds of a small all-reduce
    bandwidth: float  # bytes a second, one direction


MODELS = (
    Model("70B FP8", 80, 8192, 2 * 80 * 8 * 128 * 2, 70.6e9),
    Model("70B W4 g128", 80, 8192, 2 * 80 * 8 * 128 * 2, 39.0e9),
    Model("405B FP8", 126, 16384, 2 * 126 * 8 * 128 * 2, 406e9),
    Model("405B W4 g128", 126, 16384, 2 * 126 * 8 * 128 * 2, 215e9),
)
NVLINK = Links("NVLink", 8, 10e-6, 450e9)
NETWORK = Links("400 Gb/s", 16, 40e-6, 50e9)


def step_seconds(model: Model, links: Links, ranks: int, requests: int, stages: int = 1) -> tuple[float, float]:
    """Of memory, and of messages: what it takes until each of the requests has a token more. `ranks` share a layer."""
    batch = max(1.0, requests / stages)
    memory = (model.weights + batch * CONTEXT * model.kv_bytes) / ranks / MEMORY
    nbytes = 2 * batch * model.hidden
    messages = 0.0 if ranks == 1 else 2 * model.layers * (links.alpha + 2 * (ranks - 1) / ranks * nbytes / links.bandwidth)
    return memory, messages + (stages - 1) * (NETWORK.alpha + nbytes / NETWORK.bandwidth)


def main() -> None:
    print("| model | requests | ranks | GB of weights a rank | memory, ms | messages, ms | step, ms |")
    print("|---|---|---|---|---|---|---|")
    for model in MODELS:
        for requests in (1, 64):
            for ranks, stages, links in (
                (1, 1, NVLINK), (2, 1, NVLINK), (4, 1, NVLINK), (8, 1, NVLINK), (16, 1, NETWORK), (8, 2, NVLINK)
            ):  # fmt: skip
                share = model.weights / ranks / stages / 1e9
                if share > 72:  # of the 80 GB that there are
                    continue
                memory, messages = (1e3 * seconds for seconds in step_seconds(model, links, ranks, requests, stages))
                where = f"{ranks}" if links is NVLINK else f"{ranks}, two nodes"
                where += f" x {stages} stages, two nodes" if stages > 1 else ""
                print(f"| {model.name} | {requests} | {where} | {share:.0f} | {memory:.1f} | {messages:.1f} | {memory + messages:.1f} |")


if __name__ == "__main__":
    main()
