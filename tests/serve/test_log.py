"""One line in the log for each request: what was asked, what came of it, what it cost."""

from __future__ import annotations

import json
import logging
import re
from contextlib import suppress
from typing import Any

import httpx
import pytest

from octavo.runtime.client import EngineDead
from octavo.runtime.logs import JsonFormatter

from .conftest import Served
from .fake_engine import wait_until

ASK = [{"role": "user", "content": "Hi"}]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


class Lines:
    """The lines that the server has logged, waiting for the one of a request that has just been answered."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self, level: int = logging.INFO) -> list[str]:
        return [record.getMessage() for record in self._caplog.records if record.levelno >= level and record.name == "octavo.serve"]

    def only(self, level: int = logging.INFO) -> str:
        wait_until(lambda: self.all(level))
        (line,) = self.all(level)
        return line


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture, served: Served) -> Lines:
    caplog.set_level(logging.DEBUG, "octavo.serve")
    return Lines(caplog)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "id_pattern", "prompt_tokens"),
    [
        (CHAT, {"messages": ASK}, r"chatcmpl-\w+", 21),
        (TEXT, {"prompt": "Say"}, r"cmpl-\w+", 3),
        ("/generate", {"text": "Say", "rid": "mine"}, "mine", 3),
    ],
)
def test_an_answer(served, lines, path, body, id_pattern, prompt_tokens, stream):
    served.engine.cached_tokens = 2
    served.http.post(path, json={**body, "stream": stream}, headers={"X-Request-Id": "r-1"}).raise_for_status()
    told = (
        rf"POST {path} 200 in \d+\.\d{{3}} s: request=r-1 client=127\.0\.0\.1 id={id_pattern} "
        rf"prompt_tokens={prompt_tokens} cached_tokens=2 output_tokens=14 finish=stop"
    )
    assert re.fullmatch(told, lines.only()), lines.only()


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_counted_once_and_answers_summed(served, lines, stream):
    served.engine.cached_tokens = 1
    served.post(TEXT, prompt=["a", "bb"], n=2, max_tokens=5, stream=stream).raise_for_status()
    assert "prompt_tokens=3 cached_tokens=2 output_tokens=20 finish=length" in lines.only()


def test_a_batch_of_generate_is_one_line(served, lines):
    served.post("/generate", text=["a", "bb", "c"], rid="job", sampling_params=[{"max_new_tokens": 1}, {}, {}]).raise_for_status()
    assert "id=job_0+2 prompt_tokens=4 cached_tokens=0 output_tokens=29 finish=length,stop" in lines.only()


def _leave(url: str, body: dict[str, Any]) -> None:
    """Ask, and go away before the answer is complete."""
    with suppress(httpx.ReadTimeout), httpx.stream("POST", url, json=body, timeout=httpx.Timeout(5, read=0.25)) as response:
        held = response.iter_lines()  # httpx hangs up when it is collected
        next(held)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": ASK}), (TEXT, {"prompt": "a"}), ("/generate", {"text": "a"})])
def test_a_client_that_leaves_is_told_the_same_way_however_it_asked(served, lines, path, body, stream):
    served.engine.reply, served.engine.delay_s = "x" * 100, 0.03
    _leave(served.url + path, {**body, "stream": stream})
    line = lines.only()
    assert f"POST {path} 499 (client closed) in " in line
    assert re.search(r"output_tokens=[1-9]\d? finish=none error=the client left", line), line


def test_a_refusal(served, lines):
    served.error(TEXT, 400, prompt="a", temperature=-1)
    assert re.fullmatch(rf"POST {TEXT} 400 in \S+ s: request=\w+ client=\S+ error=temperature=-1\.0 is not valid: .*", lines.only()), (
        lines.only()
    )


def test_a_refusal_of_the_router(served, lines):
    served.error("/v1/nothing", 404)
    assert lines.only().startswith("POST /v1/nothing 404 in ")


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_is_a_warning_with_its_own_status(served, lines, stream):
    served.engine.failure = EngineDead("killed by signal 9")
    served.post(TEXT, prompt="a", stream=stream)
    line = lines.only(logging.WARNING)
    assert line.startswith(f"POST {TEXT} 503 in ")
    assert "output_tokens=3 finish=none error=the engine does not answer: killed by signal 9" in line


def test_probes_and_looks_are_for_debugging(served, lines):
    assert served.http.get("/health").status_code == 200
    assert served.http.get("/v1/models").status_code == 200
    wait_until(lambda: len(lines.all(logging.DEBUG)) == 2)
    assert lines.all() == []


def test_what_clients_send_cannot_forge_a_line(served, lines):
    served.post("/generate", text="a", rid="x\nPOST /forged 200")
    assert "id=x\\nPOST /forged 200 " in lines.only()
    assert "\n" not in lines.only()


def test_a_line_is_not_endless(served, lines):
    served.error(f"/{'x' * 5000}", 404)
    assert len(lines.only()) < 700


def test_who_changes_the_server_is_told(served, lines):
    served.http.post("/flush_cache", headers={"X-Request-Id": "r-2"}).raise_for_status()
    assert re.fullmatch(r"POST /flush_cache 200 in \S+ s: request=r-2 client=127\.0\.0\.1", lines.only()), lines.only()


def test_json_has_fields_to_search(served, lines, caplog):
    served.http.post(TEXT, json={"prompt": "Say", "max_tokens": 2}, headers={"X-Request-Id": "r-3"}).raise_for_status()
    lines.only()
    (record,) = [record for record in caplog.records if record.name == "octavo.serve" and record.levelno == logging.INFO]
    told = json.loads(JsonFormatter().format(record))
    assert (told["request_id"], told["client"], told["path"], told["status"]) == ("r-3", "127.0.0.1", TEXT, 200)
    assert (told["prompt_tokens"], told["output_tokens"]) == (3, 2)
    assert told["seconds"] >= 0
