"""Proves that a wrong engine option is refused with its flag, its value and a remedy, and that what resolves is a new, whole config."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

import octavo
from octavo.runtime.config import EngineConfig, default_memory_fraction


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device": "tpu"}, "--device 'tpu' is not valid: give auto, cpu or cuda"),
        ({"dtype": "int8"}, "--dtype 'int8' is not valid: give auto, float32, bfloat16 or float16"),
        (
            {"kv_cache_dtype": "int4"},
            "--kv-cache-dtype 'int4' is not valid: give auto, bfloat16, float16, float32, fp8_e4m3, fp8_e5m2, int8 or fp8",
        ),
        ({"schedule_policy": "lifo"}, "--schedule-policy 'lifo' is not valid: give fcfs or lpm"),
        ({"page_size": 0}, "--page-size 0 is not valid: give a whole number of at least 1"),
        ({"page_size": 1.5}, "--page-size 1.5 is not valid"),
        ({"max_running_requests": True}, "--max-running-requests True is not valid"),
        ({"max_queued_requests": 0}, "--max-queued-requests 0 is not valid"),
        ({"chunked_prefill_size": -1}, "--chunked-prefill-size -1 is not valid"),
        ({"context_length": "2k"}, "--context-length '2k' is not valid"),
        ({"num_threads": 0}, "--num-threads 0 is not valid"),
        ({"max_total_tokens": 0}, "--max-total-tokens 0 is not valid"),
        ({"mem_fraction_static": 0.0}, "--mem-fraction-static 0.0 is not valid: give a number between 0 and 1"),
        ({"mem_fraction_static": 1.0}, "--mem-fraction-static 1.0 is not valid"),
        ({"mem_fraction_static": float("nan")}, "--mem-fraction-static nan is not valid"),
        ({"mem_fraction_static": "0.5"}, "--mem-fraction-static '0.5' is not valid"),
        ({"max_radix_cache_len": -1}, "--max-radix-cache-len -1 is not valid: give 0 or more tokens"),
        ({"max_radix_cache_len": "all"}, "--max-radix-cache-len 'all' is not valid"),
        ({"max_radix_cache_len": 100, "disable_radix_cache": True}, "--max-radix-cache-len 100 and --disable-radix-cache contradict"),
        ({"max_total_tokens": 15}, "--max-total-tokens 15 is not valid: give at least one page (--page-size 16)"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError) as caught:
        EngineConfig(**options)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {"max_radix_cache_len": 0, "disable_radix_cache": True},
        {"max_total_tokens": 16},
        {"max_total_tokens": 1, "page_size": 1},
        {"mem_fraction_static": 0.001},
        {"max_total_tokens": 64, "mem_fraction_static": 0.5},
    ],
)
def test_the_edges_of_what_is_allowed(options: dict[str, Any]) -> None:
    config = EngineConfig(**options)
    assert {name: getattr(config, name) for name in options} == options


def test_defaults_depend_on_the_device() -> None:
    cpu, cuda = (EngineConfig().resolve(device=device) for device in ("cpu", "cuda"))
    assert (cpu.device, cpu.chunked_prefill_size, cpu.memory_fraction) == ("cpu", 256, 0.5)
    assert (cuda.device, cuda.chunked_prefill_size, cuda.memory_fraction) == ("cuda", 2048, 0.88)
    assert cpu.num_threads is not None
    assert cpu.num_threads >= 1


def test_resolving_keeps_what_was_given_and_leaves_the_original_alone() -> None:
    given = EngineConfig(chunked_prefill_size=7, num_threads=3, mem_fraction_static=0.25, page_size=4)
    resolved = given.resolve(device="cuda")
    changed = {field.name for field in fields(given) if getattr(given, field.name) != getattr(resolved, field.name)}
    assert changed == {"device", "pp_size"}
    assert given.device == "auto"
    assert resolved.memory_fraction == 0.25


@pytest.mark.parametrize(("device", "fraction"), [("cpu", 0.5), ("cuda", 0.88), ("cuda:1", 0.88)])
def test_the_default_fraction_is_known_by_the_name_of_the_device(device: str, fraction: float) -> None:
    assert default_memory_fraction(device) == fraction


def test_the_python_engine_names_every_option() -> None:
    with pytest.raises(TypeError, match="Engine has no option nope; its options are") as caught:
        octavo.Engine(nope=1)
    assert set(str(caught.value).split("its options are ")[1].split(", ")) == {field.name for field in fields(EngineConfig)}


def test_fp8_is_a_synonym() -> None:
    assert EngineConfig(kv_cache_dtype="fp8").resolve(device="cpu").kv_cache_dtype == "fp8_e4m3"
    assert EngineConfig(kv_cache_dtype="fp8_e5m2").resolve(device="cpu").kv_cache_dtype == "fp8_e5m2"


def test_a_config_cannot_be_changed() -> None:
    config = EngineConfig()
    with pytest.raises(FrozenInstanceError):
        config.page_size = 1  # type: ignore[misc]


def test_the_config_loads_no_torch() -> None:
    code = "import sys, octavo.runtime.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
