"""The goals of kernels and models on a GPU, judged from figures that are written down here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from octavo.benchmarks.gpu.attention_timings import Step
from octavo.benchmarks.gpu.goals import verdicts


def _timing(kind: str, us: dict[str, float], m: int = 16) -> dict[str, Any]:
    rows = {str(m): {name: {"us": value} for name, value in us.items()}}
    weights = dict.fromkeys(us, 100_000_000)
    return {"format": kind, "shape": "some", "n": 10_000, "k": 10_000, "rows": rows, "faults": {}, "weight_bytes": weights}


def test_goals() -> None:
    """100 MB at 2 TB/s are 50 us, and the rows 0.32."""
    ceilings = {"read_bytes": 2e12, "copy_bytes": 2e12, "bf16_flops": 8e14, "fp8_flops": 1.6e15, "int8_flops": None}
    found = {
        "a": _timing("fp8", {"octavo": 55.0, "bf16": 110.0}),
        "b": _timing("fp8", {"octavo": 70.0, "bf16": 110.0}, m=64),
        "c": _timing("w4a16", {"octavo": 60.0, "octavo fp16": 50.0, "marlin": 60.0, "bf16": 110.0}),
        "d": _timing("fp8", {"octavo": 400.0, "_scaled_mm": 440.0}, m=4096),
    }
    by_text = {verdict.goal.text: verdict for verdict in verdicts(found, ceilings)}
    fp8 = next(verdict for text, verdict in by_text.items() if "50 MB" in text)
    assert (fp8.word, fp8.where, fp8.num_values) == ("missed", "some, 64 rows", 2)
    assert fp8.worst == pytest.approx((1e8 + 2 * 64 * 20_000) / 2e12 * 1e6 / 70)
    marlin = next(verdict for text, verdict in by_text.items() if "Marlin" in text)
    assert (marlin.word, marlin.worst) == ("met", pytest.approx(1.2))
    datasheet = next(verdict for text, verdict in by_text.items() if "1,979" in text)
    assert datasheet.worst == pytest.approx(2 * 4096 * 1e8 / 400e-6 / 1979e12)
    assert next(verdict for text, verdict in by_text.items() if text.startswith("W8A16")).word == "untimed"
    assert {verdict.word for verdict in verdicts({}, None)} == {"untimed"}


def test_goals_of_attention() -> None:
    ceilings = {"read_bytes": 3e12, "copy_bytes": 3e12, "bf16_flops": 8e14, "fp8_flops": None, "int8_flops": None}
    decode, prompt = Step(64, 1, 2048), Step(1, 8192, 8192)
    bf16 = decode.bytes_read(torch.bfloat16)
    assert bf16 == 2 * 64 * 2048 * 8 * 128 * 2
    assert prompt.flops == pytest.approx(4 * 32 * 128 * 8192 * 8193 / 2)
    found = {
        "decode": {**vars(decode), "bytes": {"bf16": bf16}, "us": {"bf16": bf16 / 2.7e12 * 1e6, "fp8_e4m3": bf16 / 3.6e12 * 1e6}},
        "prompt": {**vars(prompt), "flops": prompt.flops, "us": {"bf16": prompt.flops / 5e14 * 1e6}},
    }
    bandwidth, rate, fp8 = [verdict for verdict in verdicts({}, ceilings, found) if verdict.goal.of == "attention"]
    assert (bandwidth.word, bandwidth.worst) == ("met", pytest.approx(0.9))
    assert (rate.word, rate.worst) == ("met", pytest.approx(500))
    assert (fp8.word, fp8.worst) == ("missed", pytest.approx(4 / 3))


def test_goals_of_models() -> None:
    step = {"tokens_s": 310.0, "step_ms": 3.2, "host_ms": 0.4, "idle": 0.02}
    model = {
        "8B fp8": {"fault": None, "decode": {"1 x 512": step, "64 x 2048": {**step, "tokens_s": 1000.0, "idle": 0.05}}, "offline": {}},
        "8B fp8, fp8 KV": {"fault": None, "decode": {"64 x 2048": {**step, "tokens_s": 1400.0}}},
        "8B w4": {"fault": "OutOfMemoryError"},
    }
    found = {verdict.goal.text: verdict for verdict in verdicts({}, None, None, model)}
    words = {text.split(":")[0]: verdict.word for text, verdict in found.items() if verdict.goal.of == "model"}
    assert words["8B fp8, one stream"] == "met"
    assert words["8B w4, one stream"] == "missed"
    assert words["8B fp8, 1000 in and 1000 out"] == "untimed"
    assert words["decoding"] == "missed"
    assert words["decoding over fp8 KV, 64 x 2k"] == "met"


def test_a_70b_is_held_against_what_its_parts_took() -> None:
    """80 layers of 4 x 100 us and 50 us, and 2.1 GB of head at 3 TB/s: 36.7 ms."""
    ceilings = {"read_bytes": 3e12, "copy_bytes": 3e12, "bf16_flops": 8e14, "fp8_flops": None, "int8_flops": None}
    linears = {name: {**_timing("w4a16", {"octavo": 100.0}), "shape": f"70B {name}"} for name in ("qkv", "o", "gate_up", "down")}
    attention = {"decode 16 x 2048": {**vars(Step(16, 1, 2048)), "us": {"bf16": 50.0}, "bytes": {"bf16": 1e9}}}
    step = {"tokens_s": 1.0, "step_ms": 40.0, "host_ms": 0.4, "idle": None}
    model = {"70B w4": {"fault": None, "decode": {"16 x 2048": step, "1 x 512": step}}}
    (verdict,) = [verdict for verdict in verdicts(linears, ceilings, attention, model) if verdict.goal.of == "all"]
    assert (verdict.word, verdict.where, verdict.num_values) == ("met", "16 x 2048", 1)
    assert verdict.worst == pytest.approx((80 * 450 + 2 * 128_256 * 8192 / 3e12 * 1e6) / 40_000)
