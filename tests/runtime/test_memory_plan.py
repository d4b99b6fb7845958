"""Proves that the KV pool is sized within what the device has, in whole pages, and that the advice in a refusal works when followed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime import memory, model_runner
from octavo.runtime.config import EngineConfig
from octavo.runtime.memory import DeviceMemory, MemoryBudget, OutOfMemoryPlan, device_memory, plan_memory

from .test_dummy_weights import config_folder, config_of

GIB = 1 << 30
PER_TOKEN = 1 << 20  # one page of 16 tokens takes 16 MiB


def plan(
    *,
    total: float = 8,
    free: float = 6,
    weights: float = 1,
    workspace: float = 0.25,
    activations: float | None = None,
    context_length: int = 100_000,
    **options: Any,
) -> MemoryBudget:
    """Sizes in GiB."""
    return plan_memory(
        EngineConfig(**options).resolve(device="cpu" if activations is None else "cuda"),
        device=DeviceMemory("the test", int(total * GIB), int(free * GIB)),
        weights=int(weights * GIB),
        workspace=int(workspace * GIB),
        kv_per_token=PER_TOKEN,
        kv_dtype="bfloat16",
        context_length=context_length,
        activations=None if activations is None else int(activations * GIB),
    )


def test_the_fraction_covers_weights_workspace_and_kv() -> None:
    budget = plan(mem_fraction_static=0.5)
    assert budget.num_tokens * PER_TOKEN == (4 - 1 - 0.25) * GIB


def test_where_a_step_was_measured_the_fraction_covers_all_that_stays() -> None:
    """6 of 8 GiB are free after weights, workspace and 0.75 GiB of others': within 0.75 of 8, 4 are left for KV, and 2 for steps."""
    budget = plan(mem_fraction_static=0.75, activations=1.5)
    assert budget.num_tokens * PER_TOKEN == 4 * GIB
    assert "activations" in budget.table()
    assert [line.split()[0] for line in budget.table().splitlines()[1:6]] == ["weights", "workspace", "activations", "KV", "left"]
    assert "0.50 GiB  of 8.00" in budget.table().splitlines()[5]


def test_what_steps_take_is_kept_free_whatever_the_default_fraction_says() -> None:
    budget = plan(activations=3, max_running_requests=100)
    assert budget.num_tokens == int((6 - 3 - 0.02 * 8) * GIB) // PER_TOKEN // 16 * 16


def test_measured_plans_that_do_not_fit_are_refused_with_what_works() -> None:
    with pytest.raises(OutOfMemoryPlan, match=r"--mem-fraction-static 0\.9 asks for 5\.20 GiB") as caught:
        plan(mem_fraction_static=0.9, activations=1.5)
    advised = float(re.findall(r"at most ([\d.]+)", str(caught.value))[0])
    assert plan(mem_fraction_static=advised, activations=1.5).num_tokens > 0
    with pytest.raises(OutOfMemoryPlan, match=r"2\.00 GiB with what else is on the device, leave no KV cache") as caught:
        plan(mem_fraction_static=0.2, activations=1.5)
    advised = float(re.findall(r"raise it above ([\d.]+)", str(caught.value))[0])
    assert plan(mem_fraction_static=advised, activations=1.5).num_tokens > 0
    with pytest.raises(OutOfMemoryPlan, match=r"steps that take 5\.90 GiB"):
        plan(activations=5.9)


def test_the_default_fraction_takes_no_more_than_what_is_free() -> None:
    budget = plan(free=2)
    assert budget.num_tokens == int((2 * 0.9 - 0.25) * GIB) // PER_TOKEN // 16 * 16


def test_tokens_asked_for_are_given_in_whole_pages() -> None:
    budget = plan(max_total_tokens=1000)
    assert (budget.num_tokens, budget.decided_by, budget.allowed_more) == (992, "--max-total-tokens 1000", None)


@pytest.mark.parametrize(
    ("tokens", "num_tokens", "decided_by", "allowed_more"),
    [
        (1000, 992, "--max-total-tokens 1000", "--mem-fraction-static 0.5"),
        (2816, 2816, "--max-total-tokens 2816", "--mem-fraction-static 0.5"),
        (2817, 2816, "--mem-fraction-static 0.5", "--max-total-tokens 2817"),
        (1_000_000, 2816, "--mem-fraction-static 0.5", "--max-total-tokens 1000000"),
    ],
)
def test_of_tokens_and_fraction_the_smaller_pool_is_made(tokens: int, num_tokens: int, decided_by: str, allowed_more: str) -> None:
    budget = plan(max_total_tokens=tokens, mem_fraction_static=0.5)
    assert (budget.num_tokens, budget.decided_by, budget.allowed_more) == (num_tokens, decided_by, allowed_more)
    assert f"follows {decided_by} ({allowed_more} allows more): raise it" in budget.table()


def test_a_fraction_that_does_not_fit_does_no_harm_beside_fewer_tokens() -> None:
    assert plan(max_total_tokens=64, mem_fraction_static=0.97, free=4).num_tokens == 64


def test_the_pool_is_no_larger_than_all_running_requests_need() -> None:
    assert plan(max_running_requests=2, context_length=160).num_tokens == 320


def test_the_pool_holds_a_whole_context_that_does_not_end_with_a_page() -> None:
    assert plan(max_running_requests=1, context_length=100, page_size=64).num_tokens == 128


@given(
    total=st.floats(1, 64),
    used=st.floats(0, 0.9),
    weights=st.floats(0, 4),
    workspace=st.floats(0, 1),
    page_size=st.sampled_from([1, 16, 64]),
    fraction=st.none() | st.floats(0.01, 0.99),
    tokens=st.none() | st.integers(64, 20_000),
)
def test_a_plan_that_is_made_fits(
    total: float, used: float, weights: float, workspace: float, page_size: int, fraction: float | None, tokens: int | None
) -> None:
    options: dict[str, Any] = {"mem_fraction_static": fraction, "max_total_tokens": tokens}
    free = total * (1 - used)
    try:
        budget = plan(total=total, free=free, weights=weights, workspace=workspace, page_size=page_size, **options)
    except OutOfMemoryPlan:
        reject()
    assert budget.num_tokens >= page_size
    assert budget.num_tokens % page_size == 0
    assert budget.workspace + budget.num_tokens * PER_TOKEN <= free * GIB
    assert budget.num_tokens <= (tokens or budget.num_tokens)
    if tokens is None or fraction is not None:
        assert budget.weights + budget.workspace + budget.num_tokens * PER_TOKEN <= (fraction or 0.5) * total * GIB


def test_too_many_tokens_are_refused_with_a_number_that_works() -> None:
    with pytest.raises(OutOfMemoryPlan, match=r"--max-total-tokens 1000000 asks for 976\.56 GiB") as caught:
        plan(max_total_tokens=1_000_000)
    advised = int(re.findall(r"at most (\d+)", str(caught.value))[0])
    assert plan(max_total_tokens=advised).num_tokens == advised
    with pytest.raises(OutOfMemoryPlan):
        plan(max_total_tokens=advised + 16)


@pytest.mark.parametrize("weights", [1, 1.037, 2.9])
def test_too_large_a_fraction_is_refused_with_one_that_works(weights: float) -> None:
    with pytest.raises(OutOfMemoryPlan, match=r"--mem-fraction-static 0\.97 asks for") as caught:
        plan(mem_fraction_static=0.97, free=4, weights=weights)
    advised = float(re.findall(r"at most ([\d.]+)", str(caught.value))[0])
    assert plan(mem_fraction_static=advised, free=4, weights=weights).num_tokens > 0
    with pytest.raises(OutOfMemoryPlan):
        plan(mem_fraction_static=advised + 0.005, free=4, weights=weights)


@pytest.mark.parametrize("weights", [1, 1.037, 3.21])
def test_too_small_a_fraction_is_refused_with_one_that_works(weights: float) -> None:
    with pytest.raises(OutOfMemoryPlan, match=r"leave no KV cache within --mem-fraction-static 0\.1 of 8\.00 GiB") as caught:
        plan(mem_fraction_static=0.1, weights=weights)
    advised = float(re.findall(r"raise it above ([\d.]+)", str(caught.value))[0])
    assert plan(mem_fraction_static=advised, weights=weights).num_tokens > 0


@pytest.mark.parametrize("options", [{}, {"max_total_tokens": 64}, {"mem_fraction_static": 0.5}])
def test_no_room_for_one_page_is_refused_without_useless_advice(options: dict[str, Any]) -> None:
    with pytest.raises(OutOfMemoryPlan, match=r"the test has 0\.20 GiB free, not enough .*: free some memory"):
        plan(free=0.2, **options)


def test_the_table_shows_every_part_and_the_flag_that_moves_it() -> None:
    lines = plan(mem_fraction_static=0.5).table().splitlines()
    assert lines[0] == "Memory of the test:"
    assert [line.split("GiB")[0].split() for line in lines[1:5]] == [
        ["weights", "(loaded)", "1.00"],
        ["workspace", "0.25"],
        ["KV", "cache", "2.75"],
        ["left", "3.00"],
    ]
    assert "2,816 tokens of 1024.0 KiB (bfloat16)" in lines[3]
    assert "--mem-fraction-static 0.5" in lines[5]
    assert "follows --max-total-tokens 64: raise it" in plan(max_total_tokens=64).table()


# What the machine has


def test_the_machine_is_read() -> None:
    device = device_memory(torch.device("cpu"))
    assert 0 < device.free <= device.total


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)


def test_a_containers_cached_files_count_as_free(tmp_path: Path) -> None:
    write(tmp_path, {"memory.max": "1000\n", "memory.current": "900\n", "memory.stat": "anon 200\ninactive_file 650\n"})
    assert memory._container_memory(tmp_path) == (1000, 250)


def test_a_container_of_version_1_is_read(tmp_path: Path) -> None:
    files = {"limit_in_bytes": "1000\n", "usage_in_bytes": "900\n", "stat": "inactive_file 1\ntotal_inactive_file 300\n"}
    write(tmp_path, {f"memory/memory.{name}": text for name, text in files.items()})
    assert memory._container_memory(tmp_path) == (1000, 600)


@pytest.mark.parametrize("files", [{}, {"memory.max": "max\n", "memory.current": "900\n", "memory.stat": "inactive_file 1\n"}])
def test_without_a_limit_there_is_no_container(tmp_path: Path, files: dict[str, str]) -> None:
    write(tmp_path, files)
    assert memory._container_memory(tmp_path) == (None, 0)


@pytest.mark.parametrize(("limit", "name"), [(1 << 20, "this container"), (1 << 62, "this machine"), (None, "this machine")])
def test_the_smaller_of_machine_and_container_counts(monkeypatch: pytest.MonkeyPatch, limit: int | None, name: str) -> None:
    monkeypatch.setattr(memory, "_container_memory", lambda: (limit, 1 << 10))
    device = device_memory(torch.device("cpu"))
    assert device.name == name
    if name == "this container":
        assert (device.total, device.free) == (1 << 20, (1 << 20) - (1 << 10))


def test_weights_that_find_no_memory_are_told_as_a_plan_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(model_runner, "LlamaModel", fail)
    config = config_of(config_folder(tmp_path, None))
    with pytest.raises(OutOfMemoryPlan, match=r"the weights do not fit into .* GiB free before them.* --quantization fp8 or int4"):
        model_runner.ModelRunner(config, resolve_model(str(tmp_path), needs_weights=False), show_progress=False)
