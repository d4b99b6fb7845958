"""What the kernels are to reach on an H100, and whether a record shows that they do."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from .contenders import DENSE
from .timings import floor_us

DATASHEET_FP8_FLOPS = 1979e12  # H100 SXM, dense
_LAYERS_70B, _HEAD_BYTES_70B = 80, 2 * 128_256 * 8192
_LARGE, _PACKED = 50_000_000, 30_000_000

Timings = dict[str, dict[str, Any]]
Ceilings = dict[str, float | None]
Values = Iterable[tuple[str, float]]  # where, and what was found


@dataclass(frozen=True)
class Goal:
    """`values` gives what a record has of linears, of attention or of models; the worst must reach `least`, or be no more than it."""

    text: str
    least: float
    values: Callable[[Timings, Ceilings], Values]
    of: Literal["linears", "attention", "model", "all"] = "linears"  # all: a dict of the three
    is_limit: bool = False


@dataclass(frozen=True)
class Verdict:
    """`worst` None: nothing of it was timed."""

    goal: Goal
    where: str
    worst: float | None
    num_values: int

    @property
    def word(self) -> str:
        if self.worst is None:
            return "untimed"
        return "met" if (self.worst <= self.goal.least if self.goal.is_limit else self.worst >= self.goal.least) else "missed"


def verdicts(timings: Timings, ceilings: Ceilings | None, attention: Timings | None = None, model: Timings | None = None) -> list[Verdict]:
    """Each goal with the worst value that was found for it."""
    found = []
    for goal in GOALS:
        parts = {"linears": timings, "attention": attention or {}, "model": model or {}}
        found_of = parts if goal.of == "all" else parts[goal.of]
        values = list(goal.values(found_of, ceilings or {})) if ceilings is not None or goal.of == "model" else []
        worst_of = max if goal.is_limit else min
        where, worst = worst_of(values, key=lambda pair: pair[1]) if values else ("", None)
        found.append(Verdict(goal, where, worst, len(values)))
    return found


def _is_wrong(timing: dict[str, Any], contender: str) -> bool:
    """Ours was to be timed, and was wrong."""
    return contender in timing["faults"]


def _us(timing: dict[str, Any], m: str, contender: str) -> float | None:
    found = timing["rows"][m].get(contender)
    return None if found is None else float(found["us"])


def _against(kind: str, ours: str, theirs: str, least_m: int, most_m: int) -> Callable[[Timings, Ceilings], Values]:
    """How many times faster we are."""

    def values(timings: Timings, ceilings: Ceilings) -> Values:
        for timing in timings.values():
            if timing["format"] == kind and _is_wrong(timing, ours):
                yield timing["shape"], 0.0
            for m in timing["rows"]:
                mine, other = _us(timing, m, ours), _us(timing, m, theirs)
                if timing["format"] == kind and least_m <= int(m) <= most_m and mine and other:
                    yield f"{timing['shape']}, {m} rows", other / mine

    return values


def _of_floor(kind: str, ours: str, most_m: int, *, least_bytes: int = 0) -> Callable[[Timings, Ceilings], Values]:
    """The floor over the time, of matrices of so many bytes or more."""

    def values(timings: Timings, ceilings: Ceilings) -> Values:
        for timing in timings.values():
            if timing["format"] == kind and _is_wrong(timing, ours):
                yield timing["shape"], 0.0
            if timing["format"] != kind or timing["weight_bytes"].get(ours, 0) < max(least_bytes, 1):
                continue
            for m in timing["rows"]:
                mine = _us(timing, m, ours)
                if int(m) <= most_m and mine:
                    yield f"{timing['shape']}, {m} rows", floor_us(timing, ours, int(m), ceilings) / mine

    return values


def _of_datasheet(timings: Timings, ceilings: Ceilings) -> Values:
    for timing in timings.values():
        if timing["format"] == "fp8" and _is_wrong(timing, "octavo"):
            yield timing["shape"], 0.0
        mine = _us(timing, "4096", "octavo") if timing["format"] == "fp8" and "4096" in timing["rows"] else None
        if mine:
            yield f"{timing['shape']}, 4096 rows", 2 * 4096 * timing["n"] * timing["k"] / (mine * 1e-6) / DATASHEET_FP8_FLOPS


def _decoding(attention: Timings, ceilings: Ceilings) -> Values:
    """Bytes of keys and values over the time, as a part of what copying moves; 16 sequences of 2,048 tokens and beyond."""
    for label, step in attention.items():
        if step["queries"] == 1 and step["sequences"] >= 16 and step["context"] >= 2048:
            us = step["us"].get("bf16")
            yield label, step["bytes"]["bf16"] / (us * 1e-6) / (ceilings["copy_bytes"] or 1.0) if us else 0.0


def _prompts(attention: Timings, ceilings: Ceilings) -> Values:
    """TFLOP/s of whole prompts."""
    for label, step in attention.items():
        if step["queries"] == step["context"]:
            us = step["us"].get("bf16")
            yield label, step["flops"] / us * 1e-6 if us else 0.0


def _fp8_pages(attention: Timings, ceilings: Ceilings) -> Values:
    """Times as fast as bfloat16, 64 sequences of 2,048 tokens."""
    for label, step in attention.items():
        if (step["queries"], step["sequences"], step["context"]) == (1, 64, 2048):
            fp8, bf16 = (step["us"].get(name) for name in ("fp8_e4m3", "bf16"))
            yield label, bf16 / fp8 if fp8 and bf16 else 0.0


def _tokens(variant: str, part: str, load: str) -> Callable[[Timings, Ceilings], Values]:
    """Tokens per second of one part of a variant's load; 0 where it failed."""

    def values(model: Timings, ceilings: Ceilings) -> Values:
        if variant in model:
            found = model[variant].get(part, {}).get(load)
            if found is not None or model[variant]["fault"]:
                yield f"{variant}, {load}", found["tokens_s"] if found else 0.0

    return values


def _idle(model: Timings, ceilings: Ceilings) -> Values:
    for variant, found in model.items():
        for load, step in found.get("decode", {}).items():
            if step["idle"] is not None:
                yield f"{variant}, {load}", step["idle"]


def _fp8_kv(model: Timings, ceilings: Ceilings) -> Values:
    """Times as fast as with bfloat16, 64 sequences of 2,048 tokens."""
    for variant in model:
        plain, quantized = (model.get(name, {}).get("decode", {}).get("64 x 2048") for name in (variant, f"{variant}, fp8 KV"))
        if plain and quantized:
            yield variant, quantized["tokens_s"] / plain["tokens_s"]


def _as_predicted(parts: Timings, ceilings: Ceilings) -> Values:
    """The time that a step of 70B in W4 should take by what its linears and attention took, over the time that it takes."""
    linears = {timing["shape"]: timing["rows"] for timing in parts["linears"].values() if timing["format"] == "w4a16"}
    for load, step in parts["model"].get("70B w4", {}).get("decode", {}).items():
        rows = load.partition(" x ")[0]
        found = [linears.get(f"70B {name}", {}).get(rows, {}).get("octavo", {}).get("us") for name in ("qkv", "o", "gate_up", "down")]
        attended = parts["attention"].get(f"decode {load}", {}).get("us", {}).get("bf16")
        bandwidth = ceilings.get("read_bytes")
        if all(found) and attended and bandwidth:
            predicted_us = _LAYERS_70B * (sum(found) + attended) + _HEAD_BYTES_70B / bandwidth * 1e6
            yield load, predicted_us / 1e3 / step["step_ms"]


GOALS = (
    Goal("fp8, 4096 rows, quantization of inputs included: times as fast as _scaled_mm with the same quantization", 1.0,
         _against("fp8", "octavo", "_scaled_mm", 4096, 4096)),
    Goal("fp8, 4096 rows, quantization of inputs included: of 1,979 TFLOP/s", 0.65, _of_datasheet),
    Goal("fp8, up to 64 rows, matrices of 50 MB and more, quantization of inputs included: of the floor", 0.85,
         _of_floor("fp8", "octavo", 64, least_bytes=_LARGE)),
    Goal("W4A16, up to 16 rows, 30 MB packed and more: of the floor", 0.65, _of_floor("w4a16", "octavo", 16, least_bytes=_PACKED)),
    Goal("W4A16 in float16: times as fast as Marlin", 1.0, _against("w4a16", "octavo fp16", "marlin", 1, 1 << 20)),
    Goal("W4A16, up to 256 rows: times as fast as bf16", 1.0, _against("w4a16", "octavo", DENSE, 1, 256)),
    Goal("W4A16, above 256 rows: times as fast as bf16", 0.92, _against("w4a16", "octavo", DENSE, 257, 1 << 20)),
    Goal("W4A8-fp8, above 256 rows: times as fast as bf16", 1.0, _against("w4a16", "octavo w4a8", DENSE, 257, 1 << 20)),
    Goal("W8A16 fp8, up to 16 rows: of the floor", 0.8, _of_floor("w8a16_fp8", "octavo", 16)),
    Goal("decoding attention, 16 x 2k and beyond: of the bandwidth of copying", 0.85, _decoding, of="attention"),
    Goal("attention of whole prompts: TFLOP/s", 450.0, _prompts, of="attention"),
    Goal("decoding attention over fp8 pages, 64 x 2k: times as fast as over bfloat16", 1.5, _fp8_pages, of="attention"),
    Goal("8B fp8, one stream: tokens per second", 300.0, _tokens("8B fp8", "decode", "1 x 512"), of="model"),
    Goal("8B w4, one stream: tokens per second", 400.0, _tokens("8B w4", "decode", "1 x 512"), of="model"),
    Goal("8B fp8, 1000 in and 1000 out: output tokens per second", 15_220.0, _tokens("8B fp8", "offline", "1000/1000"), of="model"),
    Goal("8B fp8, 128 in and 128 out: output tokens per second", 28_312.0, _tokens("8B fp8", "offline", "128/128"), of="model"),
    Goal("decoding: share of a step in which the GPU idles, at most", 0.03, _idle, of="model", is_limit=True),
    Goal("70B w4, decoding: the time that linears and attention predict, over the time", 0.87, _as_predicted, of="all"),
    Goal("decoding over fp8 KV, 64 x 2k: times as fast as over bfloat16", 1.3, _fp8_kv, of="model"),
)  # fmt: skip
