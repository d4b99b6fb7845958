"""Prometheus' files and the dashboard: accepted by their own tools, and asking for series that a server has."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from octavo.serve.metrics import Look, Metrics

MONITORING = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
_FUNCTIONS = {"sum", "by", "rate", "histogram_quantile", "deriv", "on", "le", "and", "or", "avg_over_time"}


@pytest.fixture(scope="module")
def series() -> set[str]:
    """Names of every series that a server of one GPU shows once it has answered."""
    state = {
        "generated_tokens": 1,
        "prompt_tokens": 1,
        "cached_tokens": 1,
        "num_evicted_tokens": 1,
        "retractions": 0,
        "aborted": 0,
        "num_running_reqs": 1,
        "num_waiting_reqs": 0,
        "cache_hit_rate": 0.5,
        "num_evictable_cached_tokens": 1,
        "token_usage": 0.1,
        "num_used_tokens": 1,
        "max_total_num_tokens": 9,
        "gen_throughput": 1.0,
        "device_memory_used_bytes": 1,
    }
    engine = {"internal_states": [state], "memory_usage": {"kv": 1}, "startup_seconds": {"import": 1.0}, "kernels": {"fp8": 3}}
    metrics = Metrics()
    metrics._requests.labels("/generate", "200").inc()
    look = Look(model_name="m", active=0, engine_ok=True, heartbeat_age_s=0.1, engine=engine)
    text = metrics.render(look, aliases=False).decode()
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


def expressions() -> Iterator[tuple[str, str]]:
    """Of every panel, rule and alert, with where it stands."""
    board = json.loads((MONITORING / "grafana" / "octavo.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield f"panel {panel['title']!r}", target["expr"]
    for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield f"rule {rule.get('alert') or rule['record']!r}", rule["expr"]


def names_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"|\bby \([^)]*\)|\bon \([^)]*\)", " ", expression)
    return {name for name in re.findall(r"[a-zA-Z_:][\w:]*", bare) if name not in _FUNCTIONS}


def test_every_expression_asks_for_what_there_is(series: set[str]) -> None:
    recorded = {
        rule["record"]
        for group in yaml.safe_load((MONITORING / "rules.yml").read_text())["groups"]
        for rule in group["rules"]
        if "record" in rule
    }
    known = series | recorded | {"up", "DCGM_FI_DEV_GPU_UTIL"}
    unknown = {where: missing for where, expression in expressions() if (missing := names_in(expression) - known)}
    assert unknown == {}
    assert len(list(expressions())) > 30


def test_panels_do_not_lie_over_each_other() -> None:
    panels: list[Any] = json.loads((MONITORING / "grafana" / "octavo.json").read_text())["panels"]
    places = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & places, panel["title"]
        assert place["x"] + place["w"] <= 24
        places |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian's package prometheus) is not installed")
@pytest.mark.parametrize(
    "words", [["check", "config", "prometheus.yml"], ["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"]], ids=" ".join
)
def test_prometheus_own_tool_takes_them(words: list[str]) -> None:
    done = subprocess.run(["promtool", *words], cwd=MONITORING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
