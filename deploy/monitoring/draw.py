"""Draws the dashboard from a Prometheus server, without Grafana.

    python deploy/monitoring/draw.py --prometheus http://localhost:9090 --minutes 15 --out dashboard.png

Each panel of grafana/octavo.json is drawn with the series that its expressions return: one number for a stat, a bar a series for a table.
Says which panels stay empty. Needs matplotlib, as octavo[bench] has it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
from matplotlib.axes import Axes
from matplotlib.figure import Figure

BOARD = Path(__file__).resolve().parent / "grafana" / "octavo.json"
_POINTS = 200
_COLUMNS = 4


class Prometheus:
    """Its HTTP API. Raises ValueError where it does not answer, is another server, or refuses an expression."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def now(self, expression: str) -> list[dict[str, Any]]:
        """The series that `expression` has at this moment: `metric`, its labels, and `value`, a time and a number as text."""
        return self._ask("query", {"query": expression})

    def over(self, expression: str, seconds: float) -> list[dict[str, Any]]:
        """Its series over the last seconds: `metric` and `values`."""
        end = time.time()
        step = max(1.0, seconds / _POINTS)
        return self._ask("query_range", {"query": expression, "start": f"{end - seconds}", "end": f"{end}", "step": f"{step:g}"})

    def _ask(self, path: str, params: Mapping[str, str]) -> list[dict[str, Any]]:
        try:
            answer = httpx.get(f"{self._url}/api/v1/{path}", params=params, timeout=30).json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise ValueError(f"no Prometheus answers at {self._url}: {error}") from None
        if not isinstance(answer, dict) or answer.get("status") not in ("success", "error"):
            raise ValueError(f"what answers at {self._url} is no Prometheus")
        if answer["status"] != "success":
            raise ValueError(f"Prometheus does not take {params['query']!r}: {answer.get('error')}")
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


def panels(board: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Those that show series, in the order in which they lie."""
    shown = (panel for panel in board["panels"] if panel.get("targets"))
    yield from sorted(shown, key=lambda panel: (panel["gridPos"]["y"], panel["gridPos"]["x"]))


def filled(expression: str, window: str) -> str:
    """The expression with the dashboard's variables set: every model, and `window` to take rates over."""
    return expression.replace("$model", ".*").replace("$__rate_interval", window)


def draw(prometheus: Prometheus, board: Mapping[str, Any], *, seconds: float, window: str) -> tuple[Figure, list[str]]:
    """The picture, and the titles of panels without any series."""
    shown = list(panels(board))
    rows = math.ceil(len(shown) / _COLUMNS)
    figure = Figure(figsize=(4.2 * _COLUMNS, 2.7 * rows), layout="constrained")
    empty = []
    for axes, panel in zip(figure.subplots(rows, _COLUMNS, squeeze=False).flat, shown, strict=False):
        axes.set_title(panel["title"], fontsize=10, loc="left")
        if not _draw_panel(axes, prometheus, panel, seconds, window):
            axes.text(0.5, 0.5, "no data", ha="center", va="center", color="gray", transform=axes.transAxes)
            axes.set_axis_off()
            empty.append(panel["title"])
    for axes in figure.axes[len(shown) :]:
        axes.set_axis_off()
    return figure, empty


def _draw_panel(axes: Axes, prometheus: Prometheus, panel: Mapping[str, Any], seconds: float, window: str) -> bool:
    """Whether there was anything to draw."""
    wanted = [(filled(target["expr"], window), target.get("legendFormat", "")) for target in panel["targets"]]
    if panel["type"] != "timeseries":
        found = [(_label(one, legend), float(one["value"][1])) for expression, legend in wanted for one in prometheus.now(expression)]
        found = [(name, value) for name, value in found if math.isfinite(value)]
        if len(found) == 1 and panel["type"] == "stat":
            axes.text(0.5, 0.5, f"{found[0][1]:,.4g}", ha="center", va="center", fontsize=26, transform=axes.transAxes)
            axes.set_axis_off()
        elif found:
            axes.barh([name for name, _ in found], [value for _, value in found])
            axes.tick_params(labelsize=7)
        return bool(found)
    drawn = False
    for expression, legend in wanted:
        for one in prometheus.over(expression, seconds):
            points = [(float(at), float(value)) for at, value in one["values"] if math.isfinite(float(value))]
            if points:
                last = points[-1][0]
                axes.plot([at - last for at, _ in points], [value for _, value in points], label=_label(one, legend), linewidth=1.2)
                drawn = True
    if drawn:
        unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "")
        axes.set_ylabel({"s": "seconds", "percentunit": "share", "bytes": "bytes"}.get(unit, ""), fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=7)
        axes.set_xlabel("seconds", fontsize=7)
        axes.legend(fontsize=7)
    return drawn


def _label(series: Mapping[str, Any], legend: str) -> str:
    """The legend with the labels that it names; without one, the labels that tell series apart."""
    labels = series["metric"]
    if legend and legend != "__auto":
        for name, value in labels.items():
            legend = legend.replace("{{" + name + "}}", value).replace("{{ " + name + " }}", value)
        return legend
    return ", ".join(value for name, value in labels.items() if name not in ("__name__", "job", "instance", "model_name"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=15.0, help="back from now (default: %(default)g)")
    parser.add_argument("--window", default="1m", help="that rates are taken over (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("dashboard.png"), help="(default: %(default)s)")
    given = parser.parse_args()
    if not 0 < given.minutes < math.inf:
        parser.error(f"--minutes {given.minutes:g} is not possible: give a number above 0")
    try:
        figure, empty = draw(Prometheus(given.prometheus), json.loads(BOARD.read_text()), seconds=60 * given.minutes, window=given.window)
        figure.savefig(given.out, dpi=90)
    except (ValueError, OSError) as error:
        print(f"draw.py: {error}", file=sys.stderr)
        return 1
    print(f"{given.out}" + (f"; no data: {', '.join(empty)}" if empty else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
