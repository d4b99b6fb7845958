"""Octavo on a real Ray Serve: the API through the gateway, prefixes that keep to their replica, replicas that die."""

from __future__ import annotations

import os
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'octavo[ray]'")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed: pip install 'octavo[ray]'")

pytestmark = [pytest.mark.long, pytest.mark.needs_embedded_model]

ARGS = {"num_cpus": 0.5, "num_threads": 1, "max_total_tokens": 8192, "max_running_requests": 4, "log_level": "warning"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    from octavo.serve.ray_app import build

    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(build({**ARGS, "replicas": 2, "most_ahead": 4}), name="octavo")
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


def figures(url: str, name: str) -> dict[str, float]:
    """A metric by replica."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=30).text)
    return {sample.labels["replica"]: sample.value for family in families for sample in family.samples if sample.name == name}


def engines() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # which a zombie is, too
            found += [child] if "octavo.runtime.worker" in " ".join(child.cmdline()) else []
    return found


def ask(url: str, prompt: Any, tokens: int = 4) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{url}/v1/completions", json=body, timeout=120)


def test_the_api_is_the_same(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    name = client.models.list().data[0].id
    chat = client.chat.completions.create(
        model=name, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=30
    )
    assert "Paris" in (chat.choices[0].message.content or "")
    stream = client.completions.create(model=name, prompt="1, 2, 3,", max_tokens=16, temperature=0, stream=True)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 4
    assert "".join(pieces).startswith(" 4, 5, 6")
    wrong = httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": -1}, headers={"X-Request-Id": "mine"})
    assert (wrong.status_code, wrong.headers["x-request-id"]) == (400, "mine")
    assert "max_tokens" in wrong.json()["error"]["message"]
    assert len(httpx.get(f"{url}/v1/models").headers["x-request-id"].split(",")) == 1
    assert httpx.get(f"{url}/nowhere").status_code == 404
    assert httpx.post(f"{url}/v1/completions", content=b"[" * 100_000).status_code == 400
    assert httpx.get(f"{url}/health").json()["status"] == "ok"
    assert httpx.get(f"{url}/flush_cache").status_code == 200
    assert len(figures(url, "sglang_engine_up")) == 2


def test_a_prefix_keeps_to_its_replica(url: str) -> None:
    draw = random.Random(0)
    prefixes = [[draw.randrange(1000, 40000) for _ in range(256)] for _ in range(6)]
    before = figures(url, "sglang_radix_cache_hits_total")
    order = [number % 6 for number in range(48)]
    draw.shuffle(order)
    with ThreadPoolExecutor(4) as pool:
        prompts = [prefixes[number] + [draw.randrange(1000, 40000) for _ in range(16)] for number in order]
        assert [answer.status_code for answer in pool.map(lambda prompt: ask(url, prompt, 1), prompts)] == [200] * 48
    after = figures(url, "sglang_radix_cache_hits_total")
    hits = sum(after.values()) - sum(before.values())
    assert hits >= 0.75 * 42 * 256  # of 42 that came after the first of their prefix; some overlap with it
    assert all(after[replica] > before[replica] for replica in before)


def test_a_client_that_leaves_frees_the_engine(url: str) -> None:
    body = {"prompt": "Once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        for _ in range(4):
            next(lines)
    assert_idle(url)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json={**body, "stream": False}, timeout=1)
    assert_idle(url)


def assert_idle(url: str) -> None:
    """Within ten seconds."""
    deadline = time.monotonic() + 10
    while sum(figures(url, "sglang_num_running_reqs").values()):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_who_aborts_reaches_every_replica(url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        body = {"text": "Once", "sampling_params": {"max_new_tokens": 3000, "ignore_eos": True}}
        answers = [pool.submit(httpx.post, f"{url}/generate", json={**body, "rid": f"one-{number}"}, timeout=60) for number in range(4)]
        time.sleep(1)
        busy = httpx.get(f"{url}/flush_cache")
        assert (busy.status_code, busy.json()["error"]["message"] != "") == (400, True)
        assert httpx.post(f"{url}/abort_request", json={"rid": "one-2"}).json() == {"aborted": 1}
        assert httpx.post(f"{url}/abort_request", json={"rid": "unknown"}).json() == {"aborted": 0}
        assert httpx.post(f"{url}/abort_request", json={"abort_all": True}).json() == {"aborted": 3}
        assert {answer.result().status_code for answer in answers} == {200}
    assert httpx.get(f"{url}/flush_cache").status_code == 200


def test_a_dead_replica_is_replaced_and_no_unanswered_request_is_lost(url: str) -> None:
    killed, *_ = engines()
    assert len(engines()) == 2
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, url, f"Request {number} of many", 24) for number in range(16)]
        time.sleep(0.3)
        os.kill(killed.parent().pid, signal.SIGKILL)  # type: ignore[union-attr]
        found = [answer.result() for answer in answers]
    assert {answer.status_code for answer in found} == {200}
    deadline = time.monotonic() + 120
    while len(engines()) < 2 or len(figures(url, "sglang_engine_up")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert ask(url, "And again").status_code == 200


def test_what_an_engine_that_died_cannot_answer_another_does(url: str) -> None:
    """Its replica lives a while longer, and has nothing to do."""
    before = engines()
    assert len(before) == 2
    os.kill(before[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # what it was computing would be lost
    assert [ask(url, f"Request {number} of a few").status_code for number in range(24)] == [200] * 24
    deadline = time.monotonic() + 120
    while len(engines()) < 2 or set(engines()) == set(before) or len(figures(url, "sglang_engine_up")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_the_manifests_arguments_are_taken() -> None:
    from octavo.serve.ray_app import build

    manifest = Path(__file__).resolve().parents[2] / "deploy" / "k8s" / "overlays" / "ray" / "rayservice.yaml"
    service = next(iter(yaml.safe_load_all(manifest.read_text())))
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    assert build(application["args"])._bound_deployment.name == "gateway"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ({"modl_path": "x"}, "unknown flag --modl-path; did you mean --model-path"),
        ({"replica": 2}, "did you mean replicas"),
        ({"max-replica": 2}, "did you mean max_replicas"),
        ({"port": 5}, "port is not for here"),
        ({"api-key": "secret"}, "use api_key_file"),
        ({"replicas": 2, "max_replicas": 3}, "give one of them"),
        ({"max_running_requests": 0}, "max"),
        ({"log_file": "x.log"}, "use Ray's own logs"),
        ({"help": True}, "serve --help"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3 and max_replicas 2 are not possible"),
        ({"most_ahead": -1}, "at least 0"),
        ({"replicas": "two"}, "replicas 'two' is not possible: give a whole number of at least 1"),
        ({"replicas": 1.5}, "whole number"),
        ({"num_gpus": None}, "num_gpus None is not possible: give a number of at least 0"),
        ({"routing": "random"}, "give prefix or least-busy"),
    ],
)
def test_arguments_that_cannot_be(args: dict[str, Any], told: str) -> None:
    from octavo.serve.ray_app import build

    with pytest.raises(ValueError, match=told):
        build(args)
