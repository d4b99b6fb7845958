"""Proves the whole path: `octavo serve` as a user starts it, the embedded model, and the real openai client against it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

START_TIMEOUT_S = 240

pytestmark = pytest.mark.needs_embedded_model


@dataclass
class Server:
    """A running `octavo serve`."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""
    clients: list[Any] = field(default_factory=list)

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (found := re.search(r"URL\s+(http://\S+)/v1", self.text())):
            assert self.process.poll() is None, self.text()
            assert time.monotonic() < deadline, self.text()
            time.sleep(0.05)
        self.url = found.group(1)

    @property
    def engine_pid(self) -> int:
        (child,) = psutil.Process(self.process.pid).children()
        return child.pid

    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)


def start(folder: Path, *flags: str) -> Server:
    log = folder / "serve.log"
    with log.open("wb") as out:
        command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--max-total-tokens", "16384", *flags]
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    server = Server(process, log)
    server.wait_ready()
    return server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = start(tmp_path_factory.mktemp("server"))
    yield running
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(20) == 0, running.text()


def test_the_printed_curl_line_works(server: Server) -> None:
    line = next(line for line in server.text().splitlines() if "curl " in line)
    answer = subprocess.run(["bash", "-c", line[line.index("curl ") :]], capture_output=True, check=True, timeout=120)
    assert b'"chat.completion"' in answer.stdout


def test_chat_and_completions(server: Server) -> None:
    client = server.openai()
    chat = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0, max_tokens=30
    )
    assert "Paris" in (chat.choices[0].message.content or "")
    assert chat.choices[0].finish_reason == "stop"
    completion = client.completions.create(model="default", prompt="The capital of France is", temperature=0, max_tokens=5, logprobs=2)
    assert completion.choices[0].text.startswith(" Paris")
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == completion.choices[0].text


def test_streams_carry_usage_and_say_the_same(server: Server) -> None:
    client = server.openai()
    wish: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": "Name three colours."}],
        "temperature": 0,
        "max_tokens": 24,
    }
    whole = client.chat.completions.create(**wish)
    chunks = list(client.chat.completions.create(**wish, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens  # type: ignore[union-attr]


def test_the_model_has_an_id_and_options_have_values(server: Server) -> None:
    assert [model.id for model in server.openai().models.list()] == ["SmolLM2-135M-Instruct"]
    info = httpx.get(f"{server.url}/server_info").json()
    assert (info["context_length"], info["max_total_tokens"]) == (8192, 16384)
    assert info["model_path"] is not None


def test_a_repeated_prefix_is_cached_and_reported(server: Server) -> None:
    client = server.openai()
    prefix = " ".join(f"item {index}" for index in range(120))
    first = client.completions.create(model="default", prompt=prefix + " alpha", max_tokens=2, temperature=0)
    second = client.completions.create(model="default", prompt=prefix + " beta", max_tokens=2, temperature=0)
    assert first.usage is not None
    assert second.usage is not None
    cached = second.usage.prompt_tokens_details.cached_tokens  # type: ignore[union-attr]
    assert cached is not None
    assert second.usage.prompt_tokens - 32 <= cached < second.usage.prompt_tokens


async def test_sixty_four_at_once(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300) as client:

        async def one(index: int) -> str:
            text = ""
            stream = await client.completions.create(
                model="default", prompt=f"{index} plus one is", max_tokens=12, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            async for chunk in stream:
                text += chunk.choices[0].text
            return text

        together = await asyncio.gather(*(one(index) for index in range(64)))
        assert len(together) == 64
        assert all(together)
        assert await one(7) == together[7]


def test_errors_are_openais(server: Server) -> None:
    client = server.openai()
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="default", prompt=[1] * 9000, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    assert "9000" in str(caught.value)
    assert "8192" in str(caught.value)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="default", prompt="a", temperature=9000)
    with pytest.raises(openai.BadRequestError, match="49152"):
        client.completions.create(model="default", prompt=[49152], max_tokens=1)


def test_a_client_that_leaves_is_aborted(server: Server) -> None:
    with httpx.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"model": "default", "prompt": "Once", "max_tokens": 8000, "stream": True, "ignore_eos": True},
        timeout=60,
    ) as response:
        next(response.iter_lines())
    deadline = time.monotonic() + 5
    while httpx.get(f"{server.url}/server_info").json()["internal_states"][0]["num_running_reqs"]:
        assert time.monotonic() < deadline, "the engine still generates for a client that left"
        time.sleep(0.05)


def test_health_is_cheap(server: Server) -> None:
    with httpx.Client() as client:
        assert client.get(f"{server.url}/health").status_code == 200


def test_ctrl_c_ends_everything_with_code_0(tmp_path: Path) -> None:
    server = start(tmp_path, "--max-running-requests", "4")
    engine = server.engine_pid
    os.killpg(server.process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    assert server.process.wait(20) == 0, server.text()
    assert not psutil.pid_exists(engine)
    assert "Traceback" not in server.text()


def test_a_killed_engine_fails_requests_turns_health_red_and_ends_the_server(tmp_path: Path) -> None:
    server = start(tmp_path)
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"model": "default", "prompt": "Once", "max_tokens": 4000, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            os.kill(server.engine_pid, signal.SIGKILL)
            killed = time.monotonic()
            rest = "\n".join(lines)
        assert time.monotonic() - killed < 5
        assert '"error"' in rest
        assert rest.rstrip().endswith("data: [DONE]")
        assert client.get("/health").status_code == 503
    assert server.process.wait(20) != 0
    assert "signal 9" in server.text()


def test_a_wrong_flag_helps(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "octavo", "serve", "--max-total-token", "5"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=60,
    )
    assert result.returncode == 2
    assert "--max-total-tokens" in result.stderr
