"""Measured runs as terminal tables, as JSON and as a picture. Knows no server and measures nothing."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import RequestResult, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "latency": "latency"}


def run_table(run: RunResult) -> str:
    """One run in full: rates, percentiles, failures with their texts."""
    failed = len(run.requests) - len(run.succeeded)
    lines = [
        f"{load_label(run)}: {len(run.succeeded)} requests succeeded, {failed} failed, in {run.duration_s:.2f} s",
        f"  requests/s {run.requests_per_s:.2f}   input tokens/s {run.input_tokens_per_s:.1f}   "
        f"output tokens/s {run.output_tokens_per_s:.1f}",
        f"  prompt tokens {run.prompt_tokens} ({run.cached_tokens} from the server's prefix cache)   output tokens {run.output_tokens}",
    ]
    if any(request.counted_by == "stream" for request in run.succeeded):
        lines.append("  output tokens are counted stream events: the server gave no usage")
    lines.append(f"  {'ms':<8}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}")
    for key, name in _NAMES.items():
        summary = run.summaries_ms[key]
        cells = "".join(f"{value:>12.2f}" for value in asdict(summary).values()) if summary else f"{'-':>12}" * 4
        lines.append(f"  {name:<8}{cells}")
    lines.extend(f"  failed {count} times: {text}" for text, count in run.failures.most_common())
    return "\n".join(lines)


def sweep_table(runs: Sequence[RunResult], *, price_per_hour: float | None) -> str:
    """One line a load. With a price also what a million output tokens cost and how much cheaper that is than the first line."""
    head = f"{'load':<28}{'requests/s':>12}{'output tok/s':>14}{'TTFT p50':>10}{'TTFT p99':>10}{'TPOT p50':>10}{'TPOT p99':>10}"
    lines = [head + (f"{'$/M output':>12}{'cheaper':>9}" if price_per_hour is not None else "")]
    for run in runs:
        cells = [f"{run.requests_per_s:>12.2f}{run.output_tokens_per_s:>14.1f}"]
        for key in ("ttft", "tpot"):
            summary = run.summaries_ms[key]
            cells.append(f"{summary.p50:>10.2f}{summary.p99:>10.2f}" if summary else f"{'-':>10}{'-':>10}")
        if price_per_hour is not None:
            cells.append(_price_cells(run, runs[0], price_per_hour))
        lines.append(f"{load_label(run):<28}{''.join(cells)}")
    return "\n".join(lines)


def _price_cells(run: RunResult, first: RunResult, price_per_hour: float) -> str:
    price = run.dollars_per_million_output_tokens(price_per_hour)
    base = first.dollars_per_million_output_tokens(price_per_hour)
    return f"{price:>12.4f}{f'{base / price:.2f}x' if base else '-':>9}" if price else f"{'-':>12}{'-':>9}"


def load_label(run: RunResult) -> str:
    """The offered load in words."""
    limit = f"{run.concurrency} at a time" if run.concurrency is not None else ""
    rate = f"{run.request_rate:g} requests/s" if run.request_rate is not None else ""
    return ", ".join(filter(None, (rate, limit))) or "all at once"


def as_json(runs: Sequence[RunResult], options: Mapping[str, Any], *, price_per_hour: float | None) -> str:
    """Everything measured. Summaries are milliseconds, times of single requests seconds; `options` is what the command was given."""
    machine = {"platform": platform.platform(), "num_cpus": os.cpu_count(), "python": platform.python_version()}
    document = {"format": 1, "client": machine, "options": dict(options), "runs": [_run_json(run, price_per_hour) for run in runs]}
    return json.dumps(document, indent=2)


def _run_json(run: RunResult, price_per_hour: float | None) -> dict[str, Any]:
    return {
        "concurrency": run.concurrency,
        "request_rate": run.request_rate,
        "duration_s": run.duration_s,
        "num_requests": len(run.requests),
        "num_failed": len(run.requests) - len(run.succeeded),
        "failures": dict(run.failures),
        "prompt_tokens": run.prompt_tokens,
        "cached_tokens": run.cached_tokens,
        "output_tokens": run.output_tokens,
        "requests_per_s": run.requests_per_s,
        "input_tokens_per_s": run.input_tokens_per_s,
        "output_tokens_per_s": run.output_tokens_per_s,
        "dollars_per_million_output_tokens": run.dollars_per_million_output_tokens(price_per_hour) if price_per_hour is not None else None,
        **{f"{key}_ms": asdict(summary) if summary else None for key, summary in run.summaries_ms.items()},
        "requests": [_request_json(request) for request in run.requests],
    }


def _request_json(request: RequestResult) -> dict[str, Any]:
    fields = ("start_s", "ttft_s", "tpot_s", "latency_s", "prompt_tokens", "cached_tokens", "output_tokens", "counted_by", "error")
    return {name: getattr(request, name) for name in fields}


def write_png(runs: Sequence[RunResult], path: Path, *, title: str) -> None:
    """Four panels. One run: throughput over time, distributions of the latencies. Several: throughput and percentiles by concurrency."""
    from matplotlib.figure import Figure  # the bench extra; nothing else here needs it

    figure = Figure(figsize=(12, 8), layout="constrained")
    figure.suptitle(title)
    panels = list(figure.subplots(2, 2).flat)
    if len(runs) == 1:
        _draw_run(runs[0], panels)
    else:
        _draw_sweep(runs, panels)
    figure.savefig(path, format="png", dpi=120)


def _draw_run(run: RunResult, panels: Sequence[Axes]) -> None:
    rates, distributions = panels[0], panels[1:]
    times = [time_s for request in run.succeeded for time_s in request.token_times_s]
    width_s = max(run.duration_s / 60, 0.05)
    counts, edges = np.histogram(times, bins=np.arange(0, run.duration_s + 2 * width_s, width_s))
    rates.step(edges[:-1], counts / width_s, where="post")
    rates.set(title=load_label(run), xlabel="seconds", ylabel="stream events/s")
    for panel, keys in zip(distributions, (("ttft",), ("tpot", "itl"), ("latency",)), strict=True):
        for key in keys:
            values = np.sort(run.latencies_ms[key])
            panel.step(values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post", label=_NAMES[key])
        panel.set(title=" and ".join(_NAMES[key] for key in keys), xlabel="ms", ylabel="share at or below", ylim=(0, 1.02))
        panel.legend(loc="lower right")


def _draw_sweep(runs: Sequence[RunResult], panels: Sequence[Axes]) -> None:
    loads = [run.concurrency if run.concurrency is not None else len(run.requests) for run in runs]
    panels[0].plot(loads, [run.output_tokens_per_s for run in runs], marker="o", label="output tokens/s")
    panels[0].set(title="throughput", ylabel="tokens/s", ylim=(0, None))
    for panel, key in zip(panels[1:], ("ttft", "tpot", "latency"), strict=True):
        for quantile in ("p50", "p90", "p99"):
            points = [(load, getattr(s, quantile)) for load, run in zip(loads, runs, strict=True) if (s := run.summaries_ms[key])]
            panel.plot([load for load, _ in points], [value for _, value in points], marker="o", label=quantile)
        panel.set(title=_NAMES[key], ylabel="ms", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="requests at a time", xscale="log")
        panel.set_xticks(loads, labels=[str(load) for load in loads], minor=False)
        panel.set_xticks([], minor=True)
        panel.legend()
