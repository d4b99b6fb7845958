"""What was measured: one request's figures, and those of a whole run. Knows no HTTP and prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """One request as its caller saw it. Times are seconds since the run began; a failed request has `error` and no figures."""

    start_s: float
    end_s: float  # of the last token or finish event
    token_times_s: tuple[float, ...] = ()  # arrival of each event that carried text or a token
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    counted_by: Literal["usage", "stream"] = "usage"  # "stream": the server gave no usage, so token events were counted
    error: str | None = None

    @property
    def latency_s(self) -> float:
        return self.end_s - self.start_s

    @property
    def ttft_s(self) -> float | None:
        """Time to first token."""
        return self.token_times_s[0] - self.start_s if self.token_times_s else None

    @property
    def tpot_s(self) -> float | None:
        """Time per output token after the first: (latency - TTFT) / (output tokens - 1)."""
        ttft_s = self.ttft_s
        return (self.latency_s - ttft_s) / (self.output_tokens - 1) if ttft_s is not None and self.output_tokens > 1 else None

    @property
    def itl_s(self) -> list[float]:
        """Inter-token latencies: gaps between events. A server that sends several tokens in one event shows fewer, longer gaps."""
        return [later - earlier for earlier, later in pairwise(self.token_times_s)]


@dataclass(frozen=True)
class Summary:
    """Mean and percentiles (linear interpolation between ranks) of a sample."""

    mean: float
    p50: float
    p90: float
    p99: float

    @staticmethod
    def of(values: Sequence[float]) -> Summary | None:
        """None for an empty sample: no figure is better than a made-up one."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return Summary(float(np.mean(values)), float(p50), float(p90), float(p99))


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """All requests of one run at one load. Rates count successful requests only, over the time from first start to last end."""

    concurrency: int | None  # None: no limit
    request_rate: float | None  # requests/s offered; None: as fast as concurrency allows
    requests: tuple[RequestResult, ...]

    @cached_property
    def succeeded(self) -> tuple[RequestResult, ...]:
        return tuple(request for request in self.requests if request.error is None)

    @property
    def failures(self) -> Counter[str]:
        """Texts of the failures and how often each came."""
        return Counter(request.error for request in self.requests if request.error is not None)

    @cached_property
    def duration_s(self) -> float:
        return max(r.end_s for r in self.requests) - min(r.start_s for r in self.requests) if self.requests else 0.0

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.succeeded)

    @property
    def cached_tokens(self) -> int:
        return sum(request.cached_tokens for request in self.succeeded)

    @property
    def output_tokens(self) -> int:
        return sum(request.output_tokens for request in self.succeeded)

    @property
    def requests_per_s(self) -> float:
        return self._per_second(len(self.succeeded))

    @property
    def input_tokens_per_s(self) -> float:
        return self._per_second(self.prompt_tokens)

    @property
    def output_tokens_per_s(self) -> float:
        return self._per_second(self.output_tokens)

    def _per_second(self, count: int) -> float:
        return count / self.duration_s if self.duration_s > 0 else 0.0

    @cached_property
    def latencies_ms(self) -> dict[str, list[float]]:
        """Every sample behind the percentiles: ttft, tpot (of two tokens or more) and latency per request, itl per gap."""
        done = self.succeeded
        seconds = {
            "ttft": [r.ttft_s for r in done if r.ttft_s is not None],
            "tpot": [r.tpot_s for r in done if r.tpot_s is not None],
            "itl": [gap for r in done for gap in r.itl_s],
            "latency": [r.latency_s for r in done],
        }
        return {name: [1e3 * value for value in values] for name, values in seconds.items()}

    @cached_property
    def summaries_ms(self) -> dict[str, Summary | None]:
        return {name: Summary.of(values) for name, values in self.latencies_ms.items()}

    def dollars_per_million_output_tokens(self, price_per_hour: float) -> float | None:
        """What a million generated tokens cost on a machine of that price; prompt tokens ride free. None without output."""
        return price_per_hour / 3600 / self.output_tokens_per_s * 1e6 if self.output_tokens else None
