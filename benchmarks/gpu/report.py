"""A record as a page in markdown and as pictures. Measures nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contenders import DENSE
from .goals import Verdict, verdicts
from .record import Record
from .timings import floor_us

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TITLES = {
    "fp8": "fp8 weights per channel, fp8 inputs per token", "fp8_blocks": "fp8 in blocks of 128 x 128", "int8": "int8 weights and inputs",
    "w4a16": "int4 weights in groups of 128", "w8a16_fp8": "fp8 weights, inputs as they are",
}  # fmt: skip


def write(record: Record, folder: Path) -> list[Path]:
    """README.md and a picture for each format that was timed; gives their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "README.md"
    page.write_text("\n".join(_page(record)) + "\n", encoding="utf-8")
    pictures = []
    for kind in _formats(record):
        pictures.append(folder / f"{kind}.png")
        _draw(record, kind, pictures[-1])
    return [page, *pictures]


def goal_lines(record: Record) -> list[str]:
    """The goals and what became of them, as rows of a table in markdown."""
    lines = ["| goal | least | worst found | where | values | |", "| --- | --- | --- | --- | --- | --- |"]
    return lines + [_goal_line(verdict) for verdict in verdicts(record.timings, record.ceilings, record.attention, record.model)]


def _goal_line(verdict: Verdict) -> str:
    worst = "-" if verdict.worst is None else f"{verdict.worst:.2f}"
    return f"| {verdict.goal.text} | {verdict.goal.least:.2f} | {worst} | {verdict.where or '-'} | {verdict.num_values} | {verdict.word} |"


def _formats(record: Record) -> list[str]:
    return list(dict.fromkeys(timing["format"] for timing in record.timings.values()))


def _page(record: Record) -> Iterator[str]:
    yield f"# Kernels on {record.machine['gpu']}\n"
    yield "Written by `python benchmarks/gpu/run.py`; benchmarks/README.md says how it measures.\n"
    yield "| | |\n| --- | --- |"
    for name, value in record.machine.items():
        yield f"| {name} | {value} |"
    if record.ceilings is not None:
        yield from (f"| {name.replace('_', ' ')} | {_rate(name, value)} |" for name, value in record.ceilings.items() if value)
    yield "\n## Correctness\n"
    yield from _correctness(record)
    yield "\n## Goals\n"
    yield from goal_lines(record)
    for kind in _formats(record):
        yield f"\n## {_TITLES[kind]}\n"
        yield f"Microseconds a call; in brackets the floor over it. `{DENSE}` is torch's product of bfloat16 weights.\n"
        yield f"![{kind}]({kind}.png)\n"
        yield from _table(record, [timing for timing in record.timings.values() if timing["format"] == kind])
    if record.attention:
        yield "\n## Attention over pages\n"
        yield "Microseconds a call by what pages hold; in brackets TB/s of keys and values, for prompts TFLOP/s."
        yield "`sdpa` is torch's, in bfloat16.\n"
        yield from _attention(record)
    if record.answers:
        yield "\n## Answers\n"
        yield "What models say, against the CPU in float32. Error and rounding: root mean square of differences of log-probabilities,"
        yield "in nats, of the GPU and of the CPU in the same dtype. Others: tokens that were not the CPU's best, and by how much.\n"
        yield from _answers(record)
    if record.model:
        yield "\n## Whole models\n"
        yield "Dummy weights, greedy, through the engine; in brackets what reading weights alone would take, over the time."
        yield "Host: milliseconds of a step in which the host was busy; idle: the share in which no kernel ran.\n"
        yield from _models(record)
    if record.peers:
        yield "\n## Not compared\n"
        yield from (f"- {name}: {reason}" for name, reason in record.peers.items())


def _rate(name: str, value: float) -> str:
    return f"{value / 1e12:.2f} TB/s" if name.endswith("bytes") else f"{value / 1e12:.0f} TFLOP/s"


def _correctness(record: Record) -> Iterator[str]:
    results = record.correctness.values()
    wrong = {name: result["fault"] for name, result in record.correctness.items() if result["fault"]}
    refused = sum(1 for result in results if result["refused"])
    right = len(results) - len(wrong) - refused
    yield f"{len(results)} cases: {right} right, {len(wrong)} wrong, {refused} refused.\n"
    yield from (f"- WRONG {name}: {fault}" for name, fault in wrong.items())
    for tool, result in record.sanitizer.items():
        yield f"- compute-sanitizer {tool}: {result['fault'] or result['refused'] or 'clean'}"
    if not record.sanitizer:
        yield "- compute-sanitizer was not run"


def _table(record: Record, timings: Sequence[dict[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for timing in timings for name in timing["weight_bytes"] if name not in timing["faults"]))
    yield "| shape | rows | " + " | ".join(names) + " |"
    yield "| --- " * (len(names) + 2) + "|"
    for timing in timings:
        for m, row in timing["rows"].items():
            cells = []
            for name in names:
                us = row.get(name, {}).get("us")
                share = floor_us(timing, name, int(m), record.ceilings) / us if us and record.ceilings else None
                cells.append("-" if us is None else f"{us:.1f}" + (f" ({share:.2f})" if share is not None else ""))
            yield f"| {timing['shape']} | {m} | " + " | ".join(cells) + " |"
    for timing in timings:
        yield from (f"\n{timing['shape']}, {name}: {fault}" for name, fault in timing["faults"].items())


def _models(record: Record) -> Iterator[str]:
    bandwidth = (record.ceilings or {}).get("copy_bytes")
    yield "| model | load | tokens/s | ms a step | host ms | idle |"
    yield "| --- " * 6 + "|"
    for name, found in record.model.items():
        for load, step in found.get("decode", {}).items():
            floor = f" ({found['weight_bytes'] / bandwidth * 1e3 / step['step_ms']:.2f})" if bandwidth else ""
            idle = "-" if step["idle"] is None else f"{step['idle']:.1%}"
            yield f"| {name} | decode {load} | {step['tokens_s']:.0f} | {step['step_ms']:.2f}{floor} | {step['host_ms']:.2f} | {idle} |"
        for part in ("prefill", "offline"):
            yield from (f"| {name} | {part} {load} | {step['tokens_s']:.0f} | | | |" for load, step in found.get(part, {}).items())
        if found["fault"] or found.get("unfinished"):
            yield f"| {name} | {found['fault'] or 'not to its end: run the same command again'} | | | | |"


def _answers(record: Record) -> Iterator[str]:
    yield "| model | error | rounding | tokens | others | by at most | kernels |"
    yield "| --- " * 7 + "|"
    for name, found in record.answers.items():
        if found["fault"]:
            yield f"| {name} | WRONG: {found['fault']} | | | | | |"
            continue
        kernels = ", ".join(f"{count} {kernel}" for kernel, count in found["kernels"].items())
        counts = f"{found['tokens']} | {found['others']} | {found['worst_loss']:.4f}"
        yield f"| {name} | {found['error']:.4f} | {found['rounding']:.4f} | {counts} | {kernels} |"


def _attention(record: Record) -> Iterator[str]:
    names = list(dict.fromkeys(name for step in record.attention.values() for name in step["us"]))
    yield "| step | " + " | ".join(names) + " |"
    yield "| --- " * (len(names) + 1) + "|"
    for label, step in record.attention.items():
        cells = []
        for name in names:
            us = step["us"].get(name)
            rate = step["bytes"][name] / 1e12 if step["queries"] == 1 else step["flops"] / 1e12
            cells.append("-" if us is None else f"{us:.1f} ({rate / (us * 1e-6):.2f})")
        yield f"| {label} | " + " | ".join(cells) + " |"
    for label, step in record.attention.items():
        yield from (f"\n{label}, {name}: {fault}" for name, fault in step["faults"].items())


def _draw(record: Record, kind: str, path: Path) -> None:
    """Times as fast as bf16, by rows; a panel for each shape."""
    from matplotlib.figure import Figure  # the bench extra; nothing else here needs it

    timings = [timing for timing in record.timings.values() if timing["format"] == kind]
    columns = min(4, len(timings))
    lines = -(-len(timings) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * lines + 0.8), layout="constrained")
    figure.suptitle(f"{_TITLES[kind]}: times as fast as bf16 ({record.machine['gpu']})")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, timing in zip(panels, timings, strict=False):
        _draw_shape(panel, timing)
    for panel in panels[len(timings) :]:
        panel.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.savefig(path, format="png", dpi=110)


def _draw_shape(panel: Axes, timing: dict[str, Any]) -> None:
    rows = [m for m, row in timing["rows"].items() if DENSE in row]
    for name in timing["weight_bytes"]:
        points = [(int(m), timing["rows"][m][DENSE]["us"] / timing["rows"][m][name]["us"]) for m in rows if name in timing["rows"][m]]
        if points and name != DENSE:
            style = "-" if name.startswith("octavo") else "--"
            panel.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    panel.axhline(1.0, color="grey", linewidth=0.8)
    panel.set_xscale("log", base=2)
    panel.set_xticks([int(m) for m in rows], rows, fontsize=7)
    panel.minorticks_off()
    panel.set_ylim(bottom=0)
    panel.set_title(timing["shape"], fontsize=9)
    panel.set_xlabel("rows", fontsize=8)
