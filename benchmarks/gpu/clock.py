"""Microseconds of calls on a GPU, in turn within one run, and what the card itself can do. Knows no kernel of ours.

A contender's calls go through copies of its weights that together exceed the cache several times, all in one CUDA graph: so the host
costs nothing, and each call finds its weights in memory. Graphs of all contenders take turns; the median of the rounds counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from .read_kernel import read_all
from .record import one_line

Call = Callable[[], object]

ROTATED_BYTES = 256 << 20  # five times the cache of an H100
_ROUNDS = 15
_LEAST_SAMPLE_US = 400.0
_AHEAD_CYCLES = 200_000
_SIDE = 8192  # of the square matrices that the rates of matrix units are measured with


@dataclass(frozen=True)
class Timing:
    """Microseconds a call: the median of the rounds, the least, and the quartiles' distance relative to the median."""

    us: float
    least_us: float
    spread: float


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches here: bytes read, bytes copied (both counted) and products, a second."""

    read_bytes: float
    copy_bytes: float
    bf16_flops: float
    fp8_flops: float | None
    int8_flops: float | None

    def as_json(self) -> dict[str, float | None]:
        return asdict(self)


def time_in_turn(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, *, rounds: int = _ROUNDS
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Each contender's calls, all of them once a sample; and the faults of those that cannot be timed.

    On the CPU by the wall clock, for tests of this program alone.
    """
    if device.type != "cuda":
        return {name: _timing([_wall_us(calls)]) for name, calls in contenders.items()}, {}
    replays, faults = {}, {}
    stream = torch.cuda.current_stream(device)
    for name, calls in contenders.items():
        try:
            replays[name] = _Replay(calls)
        except Exception as error:  # a capture that is not allowed, a kernel that fails
            faults[name] = one_line(error)
            torch.cuda.set_stream(stream)  # where a capture fails, torch stays on the one that captured
    samples: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name in [name for name in replays if name not in faults]:
            try:
                samples[name].append(replays[name].sample())
            except Exception as error:  # a kernel that fails when it is replayed
                faults[name] = one_line(error)
    return {name: _timing(found) for name, found in samples.items() if name not in faults}, faults


class _Replay:
    """All calls in one graph, replayed as often as a sample needs to be long enough for the device's clock."""

    def __init__(self, calls: Sequence[Call]) -> None:
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # compiles and allocates
                call()
        torch.cuda.current_stream().wait_stream(side)
        self._graph, self._num_calls = torch.cuda.CUDAGraph(), len(calls)
        with torch.cuda.graph(self._graph):
            for call in calls:
                call()
        self._times = 1
        taken = min(self.sample() for _ in range(3)) * self._num_calls
        self._times = max(1, int(_LEAST_SAMPLE_US / max(taken, 1e-3)) + 1)

    def sample(self) -> float:
        """Microseconds a call."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(_AHEAD_CYCLES)  # type: ignore[no-untyped-call]  # replays are queued before the first begins: launching costs the sample nothing
        begin.record()
        for _ in range(self._times):
            self._graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / (self._times * self._num_calls)


def _wall_us(calls: Sequence[Call]) -> float:
    started = time.perf_counter()
    for call in calls:
        call()
    return (time.perf_counter() - started) * 1e6 / len(calls)


def _timing(samples: Sequence[float]) -> Timing:
    median = statistics.median(samples)
    low, _, high = statistics.quantiles(samples, n=4) if len(samples) > 1 else (median, median, median)
    return Timing(median, min(samples), (high - low) / median)


def ceilings(device: torch.device) -> Ceilings:
    """Measured now. On the CPU numbers that mean nothing."""
    is_gpu = device.type == "cuda"
    words = (1 << 31 if is_gpu else 1 << 18) // 4
    data = torch.randint(0, 1 << 30, (words,), dtype=torch.int32, device=device)
    other = torch.empty_like(data)
    side = _SIDE if is_gpu else 32
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    calls: dict[str, list[Call]] = {
        "read": [partial(read_all, data, other)],
        "copy": [lambda: other.copy_(data)],
        "bf16": [lambda: torch.mm(a, b)],
    }
    one = torch.ones(1, device=device)
    if is_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        fp8_a, fp8_b = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
        calls["fp8"] = [lambda: torch._scaled_mm(fp8_a, fp8_b, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)]
    int8_a, int8_b = (value.mul(40).clamp(-127, 127).to(torch.int8) for value in (a, b))
    if is_gpu:
        calls["int8"] = [lambda: torch._int_mm(int8_a, int8_b.t())]
    times = {name: timing.us * 1e-6 for name, timing in time_in_turn(calls, device)[0].items()}
    flops = {name: 2 * side**3 / times[name] for name in ("bf16", "fp8", "int8") if name in times}
    num_bytes = data.nbytes
    return Ceilings(num_bytes / times["read"], 2 * num_bytes / times["copy"], flops["bf16"], flops.get("fp8"), flops.get("int8"))
