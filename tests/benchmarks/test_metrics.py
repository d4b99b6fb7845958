"""The arithmetic of one request and of a run, against values worked out by hand and against NumPy's."""

from __future__ import annotations

import random
import statistics

import pytest

from octavo.benchmarks.metrics import RequestResult, RunResult, Summary

FOUR_TOKENS = RequestResult(start_s=1.0, end_s=2.6, token_times_s=(1.4, 1.8, 2.0, 2.5), prompt_tokens=10, output_tokens=5)


def test_one_request() -> None:
    assert FOUR_TOKENS.ttft_s == pytest.approx(0.4)
    assert FOUR_TOKENS.latency_s == pytest.approx(1.6)
    assert FOUR_TOKENS.tpot_s == pytest.approx((1.6 - 0.4) / 4)
    assert FOUR_TOKENS.itl_s == pytest.approx([0.4, 0.2, 0.5])


def test_one_token_has_no_time_per_further_token() -> None:
    assert RequestResult(start_s=0.0, end_s=1.0, token_times_s=(1.0,), output_tokens=1).tpot_s is None


def test_no_token_has_no_first_one() -> None:
    nothing = RequestResult(start_s=0.0, end_s=1.0)
    assert (nothing.ttft_s, nothing.tpot_s, nothing.itl_s) == (None, None, [])


def linear_percentile(values: list[float], percent: float) -> float:
    """The definition: the value at rank (n - 1) * p, between its two neighbours."""
    ordered, rank = sorted(values), (len(values) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(values) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 1001])
def test_percentiles(size: int) -> None:
    generator = random.Random(size)
    values = [generator.expovariate(1) for _ in range(size)]
    summary = Summary.of(values)
    assert summary is not None
    assert summary.mean == pytest.approx(statistics.fmean(values))
    for percent, value in ((50, summary.p50), (90, summary.p90), (99, summary.p99)):
        assert value == pytest.approx(linear_percentile(values, percent))


def test_an_empty_sample_has_no_summary() -> None:
    assert Summary.of([]) is None


def test_failed_requests_count_in_no_rate() -> None:
    failed = RequestResult(start_s=0.0, end_s=3.0, error="refused", prompt_tokens=99, output_tokens=99)
    run = RunResult(concurrency=2, request_rate=None, requests=(FOUR_TOKENS, FOUR_TOKENS, failed))
    assert run.duration_s == 3.0
    assert run.requests_per_s == pytest.approx(2 / 3)
    assert run.input_tokens_per_s == pytest.approx(20 / 3)
    assert run.output_tokens_per_s == pytest.approx(10 / 3)
    assert run.failures == {"refused": 1}
    assert run.latencies_ms["latency"] == pytest.approx([1600, 1600])


def test_price() -> None:
    """3,600 dollars an hour is one a second; 10 tokens in 1.6 s are 6.25 a second."""
    run = RunResult(concurrency=1, request_rate=None, requests=(FOUR_TOKENS, FOUR_TOKENS))
    assert run.dollars_per_million_output_tokens(3600) == pytest.approx(1e6 / 6.25)


def test_nothing_measured_gives_no_price_and_no_division_by_zero() -> None:
    run = RunResult(concurrency=1, request_rate=None, requests=(RequestResult(start_s=0.0, end_s=0.0, error="refused"),))
    assert run.dollars_per_million_output_tokens(1.0) is None
    assert run.requests_per_s == 0.0
    assert run.summaries_ms["ttft"] is None
