"""Which kernel computes what: the flags that steer it, --explain-quant, /server_info. A wrong wish ends the start with its reason."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from octavo.quant.checkpoint.method_names import _METHODS
from octavo.runtime.config import EngineConfig
from octavo.runtime.logs import LogSettings
from octavo.runtime.process import launch_engine
from octavo.serve import cli
from octavo.serve.app import create_app
from octavo.serve.arguments import options_of, serve_parser
from octavo.serve.explain import explain_quantization
from octavo.serve.options import ServerOptions

from ..runtime.tiny_models import CASES, make_model, save_model

GROUPS = [
    "model.embed_tokens",
    "lm_head",
    "model.layers.*.self_attn.qkv_proj",
    "model.layers.*.self_attn.o_proj",
    "model.layers.*.mlp.gate_up_proj",
]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_model(CASES["llama"]), tmp_path_factory.mktemp("dense"), "bfloat16")


def test_the_flags_reach_the_engine():
    config, _ = options_of(
        serve_parser("serve").parse_all(
            ["--quantization", "int8", "--linear-backend", "cpu_grouped", "--allow-reference", "--skip-kernel-check"]
        )
    )
    assert config.quantization == "int8"
    assert (config.linear_backend, config.allow_reference, config.skip_kernel_check) == ("cpu_grouped", True, True)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--quantization", "awqq"], "--quantization 'awqq' is not valid. Did you mean 'awq'? Known: auto, none,"),
        (["--quantization", "qqqqq"], "--quantization 'qqqqq' is not valid. Known: auto, none,"),
        (["--quantization"], "--quantization has no value"),
        (["--linear-backend", "gpu_magic"], "--linear-backend 'gpu_magic' is not valid: give one of cpu_packed_panels,"),
        (["--allow-reference=1"], "--allow-reference takes no value"),
        (["--explain-quant=most"], "--explain-quant 'most' is not valid: give it alone or as --explain-quant=all"),
    ],
)
def test_bad_values_end_with_two_before_a_model_is_looked_for(argv, words, capsys):
    assert cli.main(["--model-path", "no-such-model", *argv]) == 2
    assert words in capsys.readouterr().err


def test_help_names_every_method():
    text = "".join(serve_parser("serve").format_help().rpartition("--quantization NAME")[2].partition("--linear-backend")[0].split())
    assert [name for name in _METHODS if name not in text] == []


def test_a_word_after_the_flag_is_the_model():
    assert vars(serve_parser("serve").parse_all(["--explain-quant", "m"])) == {"explain_quant": "short", "model": "m"}
    assert vars(serve_parser("serve").parse_all(["--explain-quant=all", "m"])) == {"explain_quant": "all", "model": "m"}


def test_the_command_prints_a_table_and_ends(dense):
    command = [sys.executable, "-m", "octavo", "serve", "--explain-quant", str(dense), "--quantization", "int8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "not served" in done.stderr
    head, _, titles, *rows = done.stdout.splitlines()
    assert head == "Quantization: int8"
    assert titles.split() == ["linears", "count", "out", "x", "in", "MiB", "kernel", "stored", "as"]
    assert [row.split()[0] for row in rows if not row.startswith(" ")][: len(GROUPS)] == GROUPS  # beneath: what refused it
    assert "cpu_int8" in next(row for row in rows if "qkv_proj" in row)
    assert max(map(len, done.stdout.splitlines())) <= 110


def test_all_tells_of_kernels_that_are_not_made_for_the_weights(dense):
    config = EngineConfig(model_path=str(dense), device="cpu", quantization="int4", num_threads=2, page_size=48)
    short, everything = (explain_quantization(config, every_refusal=every) for every in (False, True))
    assert "not cpu_int8: multiplies int8 weights with" in everything
    assert "not cpu_int8" not in short
    assert [line for line in everything.splitlines() if line.startswith(("model.", "total"))] == [
        line for line in short.splitlines() if line.startswith(("model.", "total"))
    ]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--quantization", "awq"], "--quantization awq needs a checkpoint quantized with awq, but this model is dense"),
        (["--linear-backend", "cpu_int8"], "--linear-backend cpu_int8 is made for none of this model's linears (dense)"),
    ],
)
def test_a_wish_that_does_not_fit_the_model_ends_with_one_and_its_reason(dense, flags, words, capsys, monkeypatch):
    monkeypatch.setattr(cli, "_set_up_logging", lambda options: None)
    assert cli.main(["--explain-quant", str(dense), "--device", "cpu", *flags]) == 1
    told = capsys.readouterr()
    assert words in told.err
    assert "Traceback" not in told.err
    assert told.out == ""


@pytest.mark.needs_embedded_model
def test_a_start_that_does_not_fit_the_model_ends_with_one_and_its_reason():
    command = [sys.executable, "-m", "octavo", "serve", "--port", "0", "--quantization", "gptq"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "octavo serve: --quantization gptq contradicts the checkpoint, which is gguf" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.needs_embedded_model
async def test_server_info_has_the_wish_and_what_came_of_it():
    config = EngineConfig(device="cpu", max_total_tokens=512)
    engine = await asyncio.to_thread(launch_engine, config, logs=LogSettings(level="warning"))
    try:
        app = create_app(engine, ServerOptions())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://octavo") as http:
            told = (await http.get("/server_info")).json()["quantization"]
        app.state.context.close()
    finally:
        engine.close()
    assert (told["requested"], told["method"]) == ("auto", "gguf")
    assert sum(group["count"] for group in told["layers"]) == 121
    group = next(group for group in told["layers"] if group["layers"] == "model.layers.*.mlp.down_proj")
    assert (group["scheme"], group["kernel"], group["in_features"]) == ("gguf Q4_1", "cpu_wide", 1536)
    assert {refusal["kernel"]: refusal["made_for_it"] for refusal in group["refused"]} == {"cpu_packed_panels": False, "cpu_int8": False}
