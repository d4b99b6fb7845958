"""An engine of several ranks answers as one of one rank does, and ends, loudly and whole, when a rank does."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

import octavo
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.core import EngineCore
from octavo.runtime.errors import EngineDead
from octavo.runtime.forward_batch import StepArrays
from octavo.runtime.hosts import Device, Machine, ThisMachine, check_machines
from octavo.runtime.logs import LogSettings
from octavo.runtime.messages import encode_config
from octavo.runtime.model_runner import choose_device
from octavo.runtime.models.config import ModelConfig
from octavo.runtime.pipeline import Place
from octavo.runtime.plan import PlanMismatch, make_plan, read_plan
from octavo.runtime.process import EngineProcess
from octavo.runtime.rank_plan import RankPlan, weight_bytes
from octavo.runtime.ranks import Ranks
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.start import load_core

from .test_quantized_loading import LAYOUTS, make
from .tiny_models import save_tokenizer

OPTIONS: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
    "max_total_tokens": 160,
    "page_size": 4,
    "max_running_requests": 6,
    "chunked_prefill_size": 16,
    "skip_kernel_check": True,
}
PROMPTS = [[(7 * number + place) % 131 for place in range(20 + 5 * number)] for number in range(6)]
FAMILY = Path(__file__).resolve().parents[2] / "docker" / "families" / "llama-3-8b"
H100, A100 = Device("H100", 80 << 30), Device("A100", 40 << 30)
END_S = 20.0  # within which an engine is to notice what happened to a rank


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make(tmp_path_factory.mktemp("ranks"), LAYOUTS["gptq-act-order"].write).folder
    save_tokenizer(folder)
    return folder


def answers(core: EngineCore) -> list[list[int]]:
    """Greedy tokens of all prompts, asked for at once, in a pool that does not hold them; and then of the last two again."""
    found: list[list[int]] = []
    for prompts in (PROMPTS, PROMPTS[-2:]):
        tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
        for number, prompt in enumerate(prompts):
            core.add(str(number), prompt, SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True))
        core.add("aborted", PROMPTS[3], SamplingParams(max_tokens=50, temperature=0.0))
        for step in range(1000):
            if step == 5:
                core.abort("aborted", octavo.runtime.outputs.FinishReason("abort"))
            if not core.has_work:
                break
            for output in core.step():
                tokens.get(output.request_id, []).extend(output.token_ids)
        found += tokens.values()
    return found


def core_of(folder: Path, size: int, *, stages: int = 1, overlap: bool = False) -> EngineCore:
    config = octavo.runtime.config.EngineConfig(model_path=str(folder), tp_size=size, pp_size=stages, **OPTIONS)
    core: EngineCore = load_core(config, show_progress=False)
    return EngineCore(core.config, core.runner, overlap=True) if overlap else core


@pytest.mark.parametrize(
    ("size", "stages", "overlap"),
    [(2, 1, False), (2, 1, True), (1, 2, False), (2, 2, False)],
    ids=["in turn", "overlap", "two stages", "two stages of two"],
)
def test_answers_are_those_of_one_rank(folder: Path, size: int, stages: int, overlap: bool) -> None:
    alone, several = core_of(folder, 1), core_of(folder, size, stages=stages, overlap=overlap)
    try:
        assert answers(several) == answers(alone)
        assert several.scheduler.counters.retractions > 0
        assert several.scheduler.counters.cached_tokens > 0
        several.scheduler.check_integrity()
    finally:
        several.close()
    assert children() == []


def test_as_many_batches_are_under_way_as_stages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    core = core_of(folder, 1, stages=2)
    steps: list[tuple[str, set[str]]] = []
    begin, finish = core.runner.begin, core.runner.finish
    batches: dict[int, set[str]] = {}

    def noted(batch: Any, awaited: Any = None) -> StepArrays:
        arrays = begin(batch, awaited)
        batches[id(arrays)] = names = {row.request.request_id for row in batch.rows}
        steps.append(("begun", names))
        return arrays

    def finished(arrays: StepArrays, awaited: Any = None) -> torch.Tensor:
        steps.append(("finished", batches[id(arrays)]))
        return finish(arrays, awaited)

    monkeypatch.setattr(core.runner, "begin", noted)
    monkeypatch.setattr(core.runner, "finish", finished)
    try:
        for number in range(6):
            core.add(str(number), [number, 7, 9], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
        while core.has_work:
            core.step()
    finally:
        core.close()
    kinds = [kind for kind, _ in steps]
    assert kinds[:2] == ["begun", "begun"], "two are under way before the first is computed here"
    assert kinds[2:32] == ["finished", "begun"] * 15
    begun = [names for kind, names in steps if kind == "begun"][4:-4]
    assert all(len(names) == 3 for names in begun)
    assert all(one.isdisjoint(other) for one, other in itertools.pairwise(begun))


def test_what_ends_while_its_step_is_under_way(folder: Path) -> None:
    """Penalties, seeds and log-probabilities are those of one rank; a request may end between its step's beginning and its end."""
    ways: list[dict[str, Any]] = [
        {"seed": 5, "top_k": 9}, {"temperature": 0.0, "repetition_penalty": 1.4}, {"seed": 1, "logprobs": 3, "prompt_logprobs": 2}
    ]  # fmt: skip

    def run(core: EngineCore, ends_after: int) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for number, way in enumerate(ways):
            core.add(f"r{number}", PROMPTS[number], SamplingParams(max_tokens=14, ignore_eos=True, **way))
        core.add("ended", PROMPTS[4], SamplingParams(max_tokens=14, seed=3))
        for step in range(1000):
            if step == ends_after:
                core.abort("ended", octavo.runtime.outputs.FinishReason("abort"))
                core.add("ended", PROMPTS[5], SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True))
            if not core.has_work:
                break
            for output in core.step():
                if step > ends_after or output.request_id != "ended":
                    logprobs = [entry.logprob for entry in output.logprobs]
                    scored = [entry.logprob for entry in output.prompt_logprobs if entry.logprob is not None]
                    found.setdefault(output.request_id, []).extend([*output.token_ids, *logprobs, *scored])
        return found

    alone = core_of(folder, 1)
    wanted = run(alone, 4)
    core = core_of(folder, 1, stages=2)
    try:
        for ends_after in (4, 5, 6):
            found = run(core, ends_after)
            assert set(found) == set(wanted)
            for name, values in wanted.items():
                assert found[name] == pytest.approx(values, abs=1e-3), name
            core.scheduler.check_integrity()
            core.flush_cache()
    finally:
        core.close()


def test_more_stages_than_layers(folder: Path) -> None:
    with pytest.raises(ValueError, match="--pp-size 3 is not possible: this model has 2 layers"):
        octavo.Engine(str(folder), pp_size=3, **OPTIONS, show_progress=False)
    assert children() == []


def test_two_machines_that_meet_by_address(folder: Path) -> None:
    """Both are this one; test_two_nodes.py has two."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    options = {**OPTIONS, "max_total_tokens": 4096, "nnodes": 2, "dist_init_addr": address}
    other = octavo.runtime.config.EngineConfig(model_path=str(folder), node_rank=1, **options)
    code = "import sys; from octavo.runtime import messages, start; sys.exit(start.serve_node(messages.decode_config(sys.argv[1])))"
    sampling = {"max_new_tokens": 12, "temperature": 0, "ignore_eos": True}
    with octavo.Engine(str(folder), **OPTIONS | {"max_total_tokens": 4096}, show_progress=False) as alone:
        wanted = [answer["output_ids"] for answer in alone.generate(input_ids=PROMPTS, sampling_params=sampling)]
    with subprocess.Popen([sys.executable, "-c", code, encode_config(other)]) as node:
        try:
            with octavo.Engine(str(folder), node_rank=0, **options, show_progress=False) as engine:
                again = subprocess.run([sys.executable, "-c", code, encode_config(other)], capture_output=True, text=True, check=False)
                assert "--node-rank 1 has come to" in again.stderr
                found = [answer["output_ids"] for answer in engine.generate(input_ids=PROMPTS, sampling_params=sampling)]
            assert found == wanted
            assert node.wait(30) == 0
        finally:
            node.kill()


def test_without_ray_it_is_told_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(octavo.runtime.start.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--nnodes 2 wants Ray, which is not installed here: pip install 'octavo\[ray\]'"):
        octavo.Engine(str(folder), nnodes=2, **OPTIONS, show_progress=False)


def test_only_the_first_machine_has_an_engine(folder: Path) -> None:
    with pytest.raises(ValueError, match="--node-rank 1 has no engine of its own"):
        octavo.Engine(str(folder), nnodes=2, node_rank=1, dist_init_addr="127.0.0.1:5000", **OPTIONS, show_progress=False)


@pytest.mark.parametrize(
    ("machines", "told"),
    [
        ((Machine("a", "1", (H100, H100)), Machine("b", "2", (H100, H100))), "b runs octavo 2, a 1: install one version on all machines"),
        ((Machine("a", "1", (H100, H100)), Machine("b", "1", (H100,))), "2 ranks a machine are asked for, and b has 1 GPU: lower"),
        ((Machine("a", "1", (H100, H100)), Machine("b", "1", (A100, A100))), r"the machines' GPUs differ.*: a \(2 x H100 of 80 GiB\); b"),
    ],
)
def test_machines_that_do_not_fit(machines: tuple[Machine, ...], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_machines(machines, 2, "cuda")
    check_machines(machines[:1] * 2, 2, "cuda")


def test_what_does_not_fit_is_told_with_what_to_change() -> None:
    config = octavo.runtime.config.EngineConfig(model_path=str(FAMILY), nnodes=2, tp_size=2).resolve(device="cuda", num_devices=8)
    model = ModelConfig.from_hf(json.loads((FAMILY / "config.json").read_text()))
    machines = [Machine(name, "1", (H100,) * 8) for name in ("a", "b")]
    told = RankPlan(config, model, (100e9, 90e9, 90e9, 90e9), (65536,) * 4, False).describe(machines)
    assert "rank 2  b cuda:0  layers 0-15, embedding" in told
    assert (
        "This does not fit: rank 0 would hold 93.1 GiB of weights within 0.88 of 80.0 GiB. Use more ranks (at least about 6 in all" in told
    )
    told = RankPlan(config, model, (10e9, 9e9, 9e9, 9e9), (65536,) * 4, False).describe(machines)
    assert f"Room for about {int(((80 << 30) * 0.88 - 10e9) / 65536):,} tokens in the KV cache (rank 0 has the least)" in told


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "rank_worker" in " ".join(child.cmdline())]


@pytest.fixture
def engine(folder: Path) -> Iterator[octavo.Engine]:
    with octavo.Engine(str(folder), tp_size=2, **OPTIONS | {"max_total_tokens": 4096}, show_progress=False) as engine:
        yield engine


@pytest.fixture
def process(folder: Path) -> Iterator[EngineProcess]:
    """An engine of two ranks as a server has it, ready."""
    config = octavo.runtime.config.EngineConfig(model_path=str(folder), tp_size=2, **OPTIONS)
    process = EngineProcess(config, resolve_model(str(folder)))
    try:
        process._ready.result(120)
        yield process
    finally:
        process.close()


def disagree(engine: octavo.Engine, _: psutil.Process) -> None:
    engine._core.runner._ranks._number += 1


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda _, rank: rank.kill(), "rank 1 of 2 .* was ended by signal 9"),
        (lambda _, rank: rank.suspend(), "rank 1 of 2 .* has given no sign of life for 10 s"),
        (disagree, r"rank 1 of 2 .*: was told step \d+ where step \d+ comes next"),
    ],
    ids=["killed", "stopped", "of another step"],
)
def test_an_engine_ends_with_a_rank(engine: octavo.Engine, harm: Callable[..., None], told: str) -> None:
    (rank,) = children()
    stream = engine.generate(input_ids=PROMPTS[0], sampling_params={"max_new_tokens": 400, "ignore_eos": True}, stream=True)
    next(stream)
    began = time.monotonic()
    harm(engine, rank)
    with pytest.raises(EngineDead, match=told):
        list(stream)
    assert time.monotonic() - began < END_S
    with pytest.raises(EngineDead):
        engine.generate(input_ids=PROMPTS[1])
    rank.wait(END_S)


def test_only_the_server_ends_its_engine(process: EngineProcess) -> None:
    """Service managers send SIGTERM to a whole group, terminals Ctrl-C: the engine goes on until the server has drained."""
    family = [psutil.Process(process.pid), *children()]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        for one in family:
            one.send_signal(number)
    assert not process._dead.wait(2)
    process.close()
    assert psutil.wait_procs(family, timeout=END_S)[1] == []


def test_a_server_notices_though_nothing_is_asked(process: EngineProcess) -> None:
    (rank,) = children()
    rank.kill()
    assert process._dead.wait(END_S)
    assert "rank 1 of 2" in process._cause


def test_a_rank_that_ends_before_all_have_met(folder: Path) -> None:
    config = octavo.runtime.config.EngineConfig(model_path=str(folder), tp_size=2, **OPTIONS).resolve(device="cpu")
    ranks = Ranks(config, LogSettings(), ThisMachine("cpu"))
    try:
        ranks._wait_for(ranks._hello, 120, "come up")
        children()[0].kill()
        with pytest.raises(EngineDead, match=r"rank 1 of 2 .* was ended by signal 9"):
            ranks.join(torch.device("cpu"))
    finally:
        ranks.close()
        ranks.close()  # which does nothing
    assert children() == []


def test_ranks_end_with_a_first_one_that_is_killed(process: EngineProcess) -> None:
    (rank,) = children()
    os.kill(process.pid, signal.SIGKILL)
    rank.wait(END_S)


def test_the_plan_is_told_before_anything_starts(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        core = core_of(folder, 2)
    core.close()
    plan = next(index for index, text in enumerate(caplog.messages) if "2 ranks (processes of 1 thread): every layer cut across 2" in text)
    held = next(index for index, text in enumerate(caplog.messages) if "Rank 1 of 2 on cpu" in text)
    assert plan < held
    told = caplog.messages[plan]
    assert "(2 attention and 1 key-value heads each)" in told
    assert "rank 1  cpu  layers 0-1, embedding, head  about 0.00 GiB of the files' weights  0.5 KiB of keys and values a token" in told
    assert "Room for about 160 tokens in the KV cache" in told
    assert "Act-order: a rank's inputs of o_proj and down_proj belong to all groups" in told


def test_the_planned_weights_are_those_of_the_files() -> None:
    model = ModelConfig.from_hf(json.loads((FAMILY / "config.json").read_text()))
    name = "model.layers.0.self_attn."
    sizes = {
        f"{name}q_proj.qweight": 800,
        f"{name}k_proj.qweight": 80,
        "model.norm.weight": 7,
        "lm_head.weight": 1600,
        f"{name}q_proj.g": 16,
    }
    assert weight_bytes(model, sizes, Place(0, 4, 1)) == 200 + 20 + 7 + 400 + 4
    assert weight_bytes(model, sizes, Place(0, 16, 1)) == 50 + 10 + 7 + 100 + 1  # key-value heads are but eight
    assert weight_bytes(model, sizes, Place(0, 4, 2)) == 7 + 400  # the last stage
    assert weight_bytes(model, sizes, Place(4, 4, 2)) == 200 + 20 + 4


def test_more_ranks_than_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    four, two = (octavo.runtime.config.EngineConfig(tp_size=size) for size in (4, 2))
    with pytest.raises(ValueError, match="--tp-size 4: torch sees 2 GPUs here; give at most 2, or --device cpu"):
        choose_device(four)
    assert (choose_device(two, 1), chosen) == (torch.device("cuda", 1), [1])


def test_dummy_weights_are_held_against_the_ranks_too() -> None:
    config = octavo.runtime.config.EngineConfig(model_path=str(FAMILY), load_format="dummy", tp_size=3).resolve(device="cpu")
    with pytest.raises(ValueError, match=r"--tp-size 3 cannot cut this model .*: sizes that work are 1, 2, 4, 8, 16, 32"):
        RankPlan.of(config, resolve_model(str(FAMILY), needs_weights=False))


def test_what_cannot_be_cut_is_told_at_the_start(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"--tp-size 3 cannot cut this model .*: sizes that work are 1, 2, 4"):
        octavo.Engine(str(folder), tp_size=3, **OPTIONS, show_progress=False)
    assert children() == []


def arrays() -> StepArrays:
    long, short = (np.arange(3, dtype=kind) for kind in (np.int64, np.int32))
    return StepArrays(
        long, long + 1, long + 2, long[:1], short, np.array([5, 9], dtype=np.int32), np.array([[1, 2, 0], [3, 4, 5]], dtype=np.int32)
    )


def test_a_plan_arrives_as_it_was_sent() -> None:
    found = read_plan(make_plan(7, arrays(), 2, 4), 7, 4)
    for name, array in vars(arrays()).items():
        assert np.array_equal(getattr(found, name), array), name
        assert getattr(found, name).dtype == array.dtype


def test_only_pages_of_contexts_are_sent() -> None:
    """One long request among many short ones does not make the plan large."""
    rows, width = 256, 8192
    long = np.zeros(rows, dtype=np.int64)
    contexts = np.full(rows, 40, dtype=np.int32)
    contexts[7] = 16 * width
    table = np.zeros((rows, width), dtype=np.int32)
    table[:, :3] = 1 + np.arange(3 * rows, dtype=np.int32).reshape(rows, 3)
    table[7] = np.arange(width)
    plan = make_plan(0, StepArrays(long, long, long, long, np.arange(rows + 1, dtype=np.int32), contexts, table), 0, 16)
    assert sum(map(len, plan.arrays)) < 60_000
    assert np.array_equal(read_plan(plan, 0, 16).table, table)


def test_a_plan_of_another_step_or_another_content_is_refused() -> None:
    plan = make_plan(7, arrays(), 0, 4)
    with pytest.raises(PlanMismatch, match="was told step 7 where step 8 comes next"):
        read_plan(plan, 8, 4)
    changed = type(plan)(7, (plan.arrays[0][:-1] + b"\1", *plan.arrays[1:]), plan.digest, 0, plan.width)
    with pytest.raises(PlanMismatch, match="whose digest is"):
        read_plan(changed, 7, 4)
    with pytest.raises(PlanMismatch, match="whose digest is"):
        read_plan(type(plan)(7, plan.arrays, plan.digest, 1, plan.width), 7, 4)
