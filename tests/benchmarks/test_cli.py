"""`octavo bench serving` from its options to its files and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from octavo.benchmarks.cli import main

SMALL = ["--vocab-size", "100", "--input-len", "6", "--output-len", "4"]


def bench(url: str, *options: str) -> int:
    return main(["serving", "--base-url", url, *SMALL, *options])


def test_a_sweep_is_printed_and_written(fake_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server = fake_server(first_token_s=0.01, token_s=0.005)
    files = ["--output-json", str(tmp_path / "r.json"), "--output-png", str(tmp_path / "r.png")]
    assert bench(server.url, "--concurrency", "1,4", "--num-requests", "8", "--price-per-hour", "2.5", "--warmup", "2", *files) == 0
    printed = capsys.readouterr().out
    assert "1 at a time: 8 requests succeeded, 0 failed" in printed
    assert "4 at a time: 8 requests succeeded, 0 failed" in printed
    assert "$/M output" in printed
    for name in ("TTFT", "TPOT", "ITL", "latency"):
        assert name in printed
    assert len(server.requests) == 2 + 2 * 8
    assert len({tuple(body["prompt"]) for body in server.requests}) == 18  # no run finds the prompts of another in the cache
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["options"]["model"] == "fake-model"
    first, second = document["runs"]
    assert (first["concurrency"], second["concurrency"], first["num_failed"], first["output_tokens"]) == (1, 4, 0, 32)
    assert first["ttft_ms"].keys() == {"mean", "p50", "p90", "p99"}
    assert len(first["requests"]) == 8
    assert second["output_tokens_per_s"] > 2 * first["output_tokens_per_s"]
    assert first["dollars_per_million_output_tokens"] == pytest.approx(2.5 / 3600 / first["output_tokens_per_s"] * 1e6)
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_one_run_is_drawn(fake_server: Callable[..., Any], tmp_path: Path) -> None:
    assert bench(fake_server(token_s=0.002).url, "--num-requests", "8", "--output-png", str(tmp_path / "r.png")) == 0
    assert (tmp_path / "r.png").stat().st_size > 10_000


def test_prefixes_are_warmed_before_each_run(fake_server: Callable[..., Any]) -> None:
    server = fake_server()
    options = ["--dataset", "shared-prefix", "--num-prefixes", "2", "--prefix-len", "16", "--warm-prefixes"]
    assert bench(server.url, *options, "--num-requests", "6", "--concurrency", "2", "--warmup", "0") == 0
    warming, measured = server.requests[:2], server.requests[2:]
    prefixes = {tuple(body["prompt"]) for body in warming}
    assert [(len(body["prompt"]), body["max_tokens"]) for body in warming] == [(16, 1)] * 2
    assert [(len(body["prompt"]), body["max_tokens"]) for body in measured] == [(22, 4)] * 6
    assert {tuple(body["prompt"][:16]) for body in measured} == prefixes


def test_some_failures_are_shown_and_no_error(fake_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    server = fake_server(fail=lambda number: "status" if number == 3 else None)
    assert bench(server.url, "--num-requests", "6") == 0
    assert "failed 1 times: HTTP 503: the queue is full" in capsys.readouterr().out


def test_all_failing_is_an_error(fake_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    server = fake_server(fail=lambda number: "status")
    assert bench(server.url, "--num-requests", "3", "--warmup", "0") == 1
    assert "failed 3 times: HTTP 503: the queue is full" in capsys.readouterr().out
    assert bench(server.url) == 1
    assert "every warm-up request failed: HTTP 503: the queue is full" in capsys.readouterr().err


def test_an_unreachable_url_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:9") == 1
    assert "cannot reach http://127.0.0.1:9/v1/models" in capsys.readouterr().err


def test_the_key_is_sent_and_kept_out_of_the_report(fake_server: Callable[..., Any], tmp_path: Path) -> None:
    server = fake_server(api_key="sesame")
    assert bench(server.url, "--api-key", "sesame", "--num-requests", "2", "--output-json", str(tmp_path / "r.json")) == 0
    assert "sesame" not in (tmp_path / "r.json").read_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--concurrency", "4,0"], "it must be at least 1"),
        (["--concurrency", "four"], "'four' is not a number"),
        (["--request-rate", "0"], "it must be above 0"),
        (["--num-requets", "3"], "unrecognized arguments: --num-requets"),
        (["--conc", "3"], "unrecognized arguments: --conc"),
    ],
)
def test_bad_values_are_refused(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["serving", *SMALL, *options])
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--prefix-len", "8"], "--prefix-len means nothing for random prompts"),
        (["--session-header", "X-Session-Id"], "--session-header means nothing for random prompts"),
        (["--dataset", "shared-prefix", "--session-header", "a: b"], "--session-header 'a: b' is no name of a header"),
        (["--warm-prefixes"], "--warm-prefixes means nothing for random prompts"),
        (["--endpoint", "chat"], "give --tokenizer PATH instead"),
        (["--tokenizer", "x"], "give one of them"),
        (["--output-json", "no/such/folder/r.json"], "does not exist"),
    ],
)
def test_options_that_cannot_work_together_are_refused(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", *SMALL, *options]) == 2
    assert text in capsys.readouterr().err


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A byte-level tokenizer with some whole words in its vocabulary."""
    text = " the quick brown fox jumps over the lazy dog and then runs far away " * 20
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([text], vocab_size=400, min_frequency=2, special_tokens=["<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_chat_sends_text_of_the_length(fake_server: Callable[..., Any], tokenizer_folder: Path) -> None:
    server = fake_server()
    options = ["--endpoint", "chat", "--tokenizer", str(tokenizer_folder), "--input-len", "9", "--num-requests", "2"]
    assert main(["serving", "--base-url", server.url, *options]) == 0
    for body in server.requests:
        assert len(body["messages"][0]["content"].split()) == 9


def test_the_vocabulary_is_found_where_the_server_says_the_model_lies(fake_server: Callable[..., Any], tokenizer_folder: Path) -> None:
    server = fake_server(models=[{"id": "local", "root": str(tokenizer_folder)}])
    assert main(["serving", "--base-url", server.url, "--num-requests", "2"]) == 0
    assert {token for body in server.requests for token in body["prompt"]} <= set(range(1, 400))


def test_an_unknown_vocabulary_is_asked_for(fake_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", "--base-url", fake_server().url]) == 2
    assert "add --vocab-size N or --tokenizer PATH" in capsys.readouterr().err


def test_a_missing_tokenizer_is_told(fake_server: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serving", "--base-url", fake_server().url, "--tokenizer", str(tmp_path)]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_a_server_without_models_needs_a_name(fake_server: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    server = fake_server(models=None)
    assert bench(server.url) == 2
    assert "name one with --model" in capsys.readouterr().err
    assert bench(server.url, "--model", "mine", "--num-requests", "2") == 0
    assert server.requests[-1]["model"] == "mine"
