"""report.html: one page that needs no other file, with plots of errors and ranges by module. Computes nothing."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from .quantize_result import QuantizeResult

_SHOWN = 20
_PLOTTED = {"error": "relative output error", "largest_weight": "largest |weight|", "largest_input": "largest |input|"}
_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<title>{{ name }}, quantized</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100% }
pre { background: #f4f4f4; padding: .6rem; overflow-x: auto }
</style>
<h1>{{ name }}, quantized</h1>
<table>{% for key, value in facts %}<tr><th>{{ key }}</th><td>{{ value }}</td></tr>{% endfor %}</table>
<h2>Size</h2>
<table>
<tr><th>tensors</th><th>MiB before</th><th>MiB after</th></tr>
{% for key, before, after in sizes %}
<tr><td>{{ key }}</td><td class=number>{{ "%.1f" | format(before) }}</td><td class=number>{{ "%.1f" | format(after) }}</td></tr>
{% endfor %}
</table>
<h2>Errors and ranges by module</h2>
{% if plot %}<img alt="error, largest weight and largest input of each module, by block" src="data:image/png;base64,{{ plot }}">
{% else %}<p>No plot: the package matplotlib is not installed (pip install 'octavo[bench]').</p>{% endif %}
<h2>Modules that lose most</h2>
<table>
<tr><th>module</th><th>relative output error</th><th>rounded by</th></tr>
{% for key, error, how in worst %}
<tr><td>{{ key }}</td><td class=number>{{ "%.3g" | format(error) }}</td><td>{{ how }}</td></tr>
{% endfor %}
</table>
<h2>Serve it</h2>
<pre>{{ commands | join("\n") }}</pre>
<h2>Recipe</h2>
<pre>{{ recipe }}</pre>
</html>
"""


def page_of(
    result: QuantizeResult, facts: Sequence[tuple[str, str]], sizes: Sequence[tuple[str, float, float]], commands: Sequence[str]
) -> str:
    """The page as HTML."""
    template = jinja2.Environment(autoescape=True).from_string(_PAGE)
    page: str = template.render(
        name=Path(result.model).name,
        facts=facts,
        sizes=sizes,
        commands=commands,
        worst=[(name, error, result.modules[name]["how"]) for name, error in result.worst[:_SHOWN]],
        plot=_plot(result),
        recipe=json.dumps(result.recipe.to_dict(), indent=1),
    )
    return page


def _plot(result: QuantizeResult) -> str | None:
    """A PNG in base64: errors and ranges of every module, a line for each kind; None where the package that draws is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    kinds: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for name, note in result.modules.items():
        block = next((int(part) for part in name.split(".") if part.isdigit()), 0)
        kinds.setdefault(name.rsplit(".", 1)[-1].split("[")[0], []).append((block, note))
    figure = Figure(figsize=(9, 3 * len(_PLOTTED)))
    panels = figure.subplots(len(_PLOTTED), sharex=True)
    for axes, (key, label) in zip(panels, _PLOTTED.items(), strict=True):
        for kind, points in kinds.items():
            axes.plot([x for x, _ in points], [max(note[key], 1e-12) for _, note in points], marker=".", linewidth=1, label=kind)
        axes.set(ylabel=label, yscale="log")
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("block")
    panels[0].legend(fontsize=8, ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110, bbox_inches="tight")
    return base64.b64encode(picture.getvalue()).decode()
