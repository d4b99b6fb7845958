"""Metrics: what the server sees and what its engine says, as Prometheus reads them. Knows no route.

Names are the deployment guide's, `sglang_...`. Those that SGLang itself has are given a second time under its own names, `sglang:...`, so
that dashboards made for it work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from ..runtime.outputs import TextOutput
from .exchange import PROBES, Exchange

_PREFIX = "sglang_"
_LATENCY_S = (0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)
_FIRST_TOKEN_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 20, 40, 60, 120)
_BETWEEN_TOKENS_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2, 5)

# SGLang's own name for a metric of ours.
_ALIASES = {
    "generation_requests": "num_requests",
    "request_duration_seconds": "e2e_request_latency_seconds",
    "tokens_generated": "generation_tokens",
    "prompt_tokens": "prompt_tokens",
    "cached_tokens": "cached_tokens",
    "evicted_tokens": "evicted_tokens",
    "num_retracted_requests": "num_retracted_requests",
    "num_aborted_requests": "num_aborted_requests",
    "active_requests": "http_requests_active",
    "num_running_reqs": "num_running_reqs",
    "queue_size": "num_queue_reqs",
    "radix_cache_hit_rate": "cache_hit_rate",
    "token_usage": "token_usage",
    "num_used_tokens": "num_used_tokens",
    "gen_throughput": "gen_throughput",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "queue_time_seconds": "queue_time_seconds",
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What is known at one moment beside what is counted here. `engine` is None where the engine does not answer."""

    model_name: str
    active: int  # requests in flight at this server
    engine_ok: bool
    heartbeat_age_s: float
    engine: Mapping[str, Any] | None  # EngineClient.server_info


class Metrics:
    """Counts as things happen; `render` joins the engine's figures of that moment."""

    def __init__(self) -> None:
        self.last_token_s = -math.inf  # by time.perf_counter
        self._own = CollectorRegistry(auto_describe=False)
        self._requests = Counter(
            f"{_PREFIX}request_total",
            "Requests answered, by path and status, but for probes.",
            ["path", "status"],
            registry=self._own,
        )
        self._generations = Counter(f"{_PREFIX}generation_requests_total", "Requests that the model answered.", registry=self._own)
        self._duration = self._histogram("request_duration_seconds", "From a request's arrival to the end of its answer.", _LATENCY_S)
        self._first_token = self._histogram("time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN_S)
        self._between = self._histogram("inter_token_latency_seconds", "Between one output of a sequence and its next.", _BETWEEN_TOKENS_S)
        self._queue_time = self._histogram("queue_time_seconds", "From a sequence's arrival to its first step.", _FIRST_TOKEN_S)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(_PREFIX + name, about, buckets=buckets, registry=self._own)

    def ended(self, exchange: Exchange) -> None:
        """Note an exchange that is over."""
        if exchange.path in PROBES:
            return
        self._requests.labels(exchange.route, str(exchange.status_code)).inc()
        if exchange.was_served:
            self._generations.inc()
            self._duration.observe(time.perf_counter() - exchange.started)

    def output(self, exchange: Exchange, moments: dict[int, float], index: int, output: TextOutput) -> None:
        """Note an output of sequence `index` of a job; `moments` keeps when each had its last one."""
        if not output.token_ids:
            return
        now_s = time.perf_counter() if output.arrived_s is None else output.arrived_s
        before = moments.get(index)
        moments[index] = now_s
        self.last_token_s = max(self.last_token_s, now_s)
        if before is None:
            self._first_token.observe(now_s - exchange.started)
            self._queue_time.observe(output.queue_s)
        else:
            self._between.observe(now_s - before)

    def render(self, look: Look, *, aliases: bool = True) -> bytes:
        """Everything in Prometheus's text format 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Everything(self._own, look, aliases))
        return generate_latest(registry)


class _Everything(Collector):
    """What was counted, what the engine says, and the aliases of both."""

    def __init__(self, own: CollectorRegistry, look: Look, aliases: bool) -> None:
        self._own, self._look, self._aliases = own, look, aliases

    def collect(self) -> Iterator[Metric]:
        for metric in (*self._own.collect(), *_of_server(self._look), *_of_engine(self._look.engine or {})):
            metric.samples = [_labelled(sample, self._look.model_name) for sample in metric.samples if not sample.name.endswith("_created")]
            yield metric
            alias = _ALIASES.get(metric.name.removeprefix(_PREFIX))
            if self._aliases and alias is not None:
                yield _renamed(metric, f"sglang:{alias}")


def _labelled(sample: Sample, model_name: str) -> Sample:
    return sample._replace(labels={"model_name": model_name, **sample.labels})


def _renamed(metric: Metric, name: str) -> Metric:
    alias = Metric(name, metric.documentation, metric.type)
    alias.samples = [sample._replace(name=name + sample.name.removeprefix(metric.name)) for sample in metric.samples]
    return alias


def _gauge(name: str, about: str, value: float | None) -> Metric:
    if value is None:
        return GaugeMetricFamily(_PREFIX + name, about, labels=())
    return GaugeMetricFamily(_PREFIX + name, about, value=value)


def _of_server(look: Look) -> Iterator[Metric]:
    yield _gauge("active_requests", "Requests being answered or waiting.", look.active)
    yield _gauge("engine_up", "1 while the engine answers.", float(look.engine_ok))
    yield _gauge("engine_heartbeat_age_seconds", "Since the engine's last sign of life.", look.heartbeat_age_s)


def _of_engine(info: Mapping[str, Any]) -> Iterator[Metric]:
    """Families without samples where the engine does not say."""
    state: Mapping[str, Any] = (info.get("internal_states") or [{}])[0]
    for name, key, about in (
        ("tokens_generated", "generated_tokens", "Tokens generated."),
        ("prompt_tokens", "prompt_tokens", "Tokens of prompts, cached ones included."),
        ("cached_tokens", "cached_tokens", "Tokens of prompts that were found in the prefix cache."),
        ("radix_cache_queries", "prompt_tokens", "Tokens looked up in the prefix cache: hits over queries, as rates, is its hit rate."),
        ("radix_cache_hits", "cached_tokens", "Tokens found in the prefix cache."),
        ("evicted_tokens", "num_evicted_tokens", "Tokens that made way in the prefix cache."),
        ("num_retracted_requests", "retractions", "Times that a running request gave its pages back and waited again."),
        ("num_aborted_requests", "aborted", "Sequences ended before they were done: by their client, by a limit, by a failure."),
    ):
        counter = CounterMetricFamily(_PREFIX + name, about)
        if key in state:
            counter.add_metric([], state[key])
        yield counter
    for name, key, about in (
        ("num_running_reqs", "num_running_reqs", "Sequences computed together now."),
        ("queue_size", "num_waiting_reqs", "Sequences that wait in the engine."),
        ("radix_cache_hit_rate", "cache_hit_rate", "Share of prompt tokens since the start that were found in the prefix cache."),
        ("radix_cache_evictable_tokens", "num_evictable_cached_tokens", "Tokens kept for reuse that no running request holds."),
        ("token_usage", "token_usage", "Share of the KV pool that running requests hold."),
        ("num_used_tokens", "num_used_tokens", "Tokens of the KV pool that running requests hold."),
        ("max_total_num_tokens", "max_total_num_tokens", "Tokens that the KV pool holds."),
        ("gen_throughput", "gen_throughput", "Tokens generated a second, over the last ten seconds."),
    ):
        yield _gauge(name, about, state.get(key))
    used = GaugeMetricFamily(_PREFIX + "gpu_memory_used_bytes", "Memory of the GPU that is taken, by whomever.", labels=["gpu"])
    if state.get("device_memory_used_bytes") is not None:
        used.add_metric([str(info.get("device", "cuda:0"))], state["device_memory_used_bytes"])
    yield used
    memory = GaugeMetricFamily(_PREFIX + "memory_bytes", "What the engine has set aside, by what for.", labels=["kind"])
    for kind in ("weight", "kv", "workspace"):
        if kind in info.get("memory_usage", {}):
            memory.add_metric([kind], info["memory_usage"][kind])
    yield memory
    startup = GaugeMetricFamily(_PREFIX + "startup_time_seconds", "How long the start took, by phase.", labels=["phase"])
    for phase, seconds in info.get("startup_seconds", {}).items():
        startup.add_metric([phase], seconds)
    yield startup
    kernels = InfoMetricFamily(_PREFIX + "linear_kernel", "Which kernel computes how many linear layers.", labels=["kernel"])
    for kernel, count in info.get("kernels", {}).items():
        kernels.add_metric([kernel], {"layers": str(count)})
    yield kernels
