"""Models cut across ranks compute what one rank computes, in every format; what cannot be cut is told with the sizes that can."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.runtime.layers.parallel import TensorParallelGroup

from .rank_program import SEQUENCES
from .test_quantized_loading import LAYOUTS, SIZES, make
from .tiny_models import CASES, Case, assert_close, expected_logits, llama, load, make_model, run, save_model


@dataclass(frozen=True)
class Cut:
    """A model as a folder and as transformers', how an engine is to be made of it, and how far its logits may be from one rank's.

    `rounds`: inputs are rounded by scales that are found as they come. Where inputs are cut, each rank has one of its own, so that results
    differ; they are to be as near to those of inputs that are not rounded as one rank's are.
    """

    make: Callable[[Path], tuple[Path, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 3e-5
    rounds: bool = False


def layout(name: str) -> Cut:
    def made(folder: Path) -> tuple[Path, Any]:
        model = make(folder, LAYOUTS[name].write)
        for module in model.dense.modules():
            module._forward_pre_hooks.clear()  # which round the inputs
        return model.folder, model.dense

    return Cut(made, tolerance=LAYOUTS[name].tolerance, rounds=name in ("float-channel", "float-block", "int8"))


def dense(case: Case, *, tolerance: float = 3e-5, rounds: bool = False, **options: Any) -> Cut:
    def made(folder: Path) -> tuple[Path, Any]:
        model = make_model(case)
        return save_model(model, folder), model

    return Cut(made, options, tolerance, rounds)


CUTS = {
    **{name: layout(name) for name in LAYOUTS},
    "biases": dense(CASES["llama-biases"]),
    "tied": dense(CASES["llama-tied"]),
    "every head its own keys": dense(CASES["llama-every-head-its-own-keys"]),
    "one key head": dense(CASES["llama-one-key-head"]),
    "query and key norms": dense(CASES["qwen3-biases-tied"]),
    "window": dense(CASES["qwen2-window"]),
    "int8 keys and values": dense(CASES["llama"], tolerance=0.03, kv_cache_dtype="int8"),
    **{f"load-time {method}": dense(llama(**SIZES), rounds=True, quantization=method) for method in ("fp8", "int8")},
}
SPARE = {"skip_kernel_check": True, "num_threads": 1}  # ranks of tests share two cores
# 192 inner features: six times the 32 codes of 3 bits that stay together, and no multiple of ten.
REFUSED = {(4, "gptq-3"): "1, 2", (4, "pack-3"): "1, 2", (2, "pack-3-ten-a-word"): "1", (4, "pack-3-ten-a-word"): "1"}


FEW = ("gptq-act-order", "pack-3", "one key head", "int8")  # that are cut into four in every run of the tests


@dataclass(frozen=True)
class Results:
    """Of every model: what transformers computes, what one rank does, and what ranks found, by how many they were."""

    unrounded: Mapping[str, list[torch.Tensor]]
    one: Mapping[str, list[torch.Tensor]]
    held: Mapping[str, int]
    ranks: dict[tuple[int, int, str], list[Any]]
    folders: Mapping[str, Path]

    def add(self, size: int, names: Iterable[str], *, stages: int = 1) -> None:
        """Have some models computed by `stages` of `size` ranks."""
        place = next(iter(self.folders.values())).parent
        jobs = place / f"jobs-{size}-{stages}-{len(self.ranks)}.json"
        outs = {name: f"{jobs}-{number}" for number, name in enumerate(names)}
        jobs.write_text(json.dumps([self._job(name, out) for name, out in outs.items()]))
        command = [sys.executable, "-m", "octavo.tests.runtime.rank_program"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ranks, numbers = range(size * stages), (str(size), str(stages))
        running = [subprocess.Popen([*command, str(rank), *numbers, str(jobs)], env=environment) for rank in ranks]
        assert [process.wait(600) for process in running] == [0] * len(ranks)
        self.ranks.update({(size, stages, name): [torch.load(f"{out}.{rank}") for rank in ranks] for name, out in outs.items()})

    def _job(self, name: str, out: str) -> dict[str, Any]:
        return {"folder": str(self.folders[name]), "options": {**SPARE, **CUTS[name].options}, "out": out}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    place = tmp_path_factory.mktemp("cuts")
    folders, unrounded, one, held = {}, {}, {}, {}
    for number, (name, cut) in enumerate(CUTS.items()):
        folder, model = cut.make(place / str(number))
        folders[name] = folder.rename(place / f"model-{number}")
        if cut.rounds:
            unrounded[name] = [expected_logits(model, item.tokens) for item in SEQUENCES]
        runner = load(folders[name], **cut.options)
        one[name] = run(runner, SEQUENCES)
        held[name] = sum(linear.weight_bytes for linear in runner.model.linears)
    found = Results(unrounded, one, held, {}, folders)
    found.add(2, CUTS)
    found.add(3, ("awq", "tied"))
    found.add(4, FEW)
    found.add(1, CUTS, stages=2)
    found.add(2, FEW, stages=2)
    return found


@pytest.mark.parametrize(("size", "name"), [*((2, name) for name in CUTS), *((4, name) for name in FEW)])
def test_ranks_compute_what_one_computes(results: Results, size: int, name: str) -> None:
    check(results, size, name)


@pytest.mark.parametrize(("size", "name"), [*((1, name) for name in CUTS), *((2, name) for name in FEW)])
def test_stages_compute_what_one_rank_computes(results: Results, size: int, name: str) -> None:
    check(results, size, name, stages=2)
    if size == 1:
        assert all(part["held"] < results.held[name] for part in results.ranks[1, 2, name])


@pytest.mark.long
def test_four_ranks_compute_what_one_computes(results: Results) -> None:
    names = [name for name in CUTS if name not in FEW]
    results.add(4, names)
    for name in names:
        check(results, 4, name)


def check(results: Results, size: int, name: str, stages: int = 1) -> None:
    found = results.ranks[size, stages, name]
    if (told := REFUSED.get((size, name))) is not None:
        for text in found:
            assert f"--tp-size {size} cannot cut this model" in text
            assert text.endswith(f"sizes that work are {told}")
        return
    assert isinstance(found[0], dict), found[0]
    if CUTS[name].rounds:
        assert divergence(results.unrounded[name], found[0]["logits"]) < 1.05 * divergence(results.unrounded[name], results.one[name])
        return
    for own, expected in zip(found[0]["logits"], results.one[name], strict=True):
        assert_close(own, expected, CUTS[name].tolerance)


def divergence(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """KL of distributions, a position."""
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in (wanted, found))
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_what_heads_do_not_divide_into_is_refused(results: Results) -> None:
    for name in ("awq", "tied"):
        for told in results.ranks[3, 1, name]:
            assert "--tp-size 3 cannot cut this model (4 attention heads, 2 key-value heads" in told
            assert told.endswith("sizes that work are 1, 2, 4")


@pytest.mark.parametrize("name", ["awq", "gptq", "pack", "float-channel", "every head its own keys"])
def test_a_rank_holds_its_share(results: Results, name: str) -> None:
    for part in results.ranks[2, 1, name]:
        assert part["held"] < 1.2 * results.held[name] / 2


def test_shares() -> None:
    groups = [TensorParallelGroup(8, rank) for rank in range(8)]
    assert [group.heads(32, 2).first_kv_head for group in groups] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert {(group.heads(64, 8).heads, group.heads(64, 8).kv_heads, group.heads(64, 8).copies) for group in groups} == {(8, 1, 1)}
    assert [group.heads(64, 16).first_kv_head for group in groups] == [0, 2, 4, 6, 8, 10, 12, 14]
    for size in (131, 32000, 49152, 151936, 128256):
        parts = [group.vocabulary(size) for group in groups]
        assert [start for start, _ in parts][1:] == [stop for _, stop in parts][:-1]
        assert (parts[0][0], parts[-1][1]) == (0, size)
        assert all(0 < stop - start <= groups[0].vocabulary_share(size) for start, stop in parts)
    with pytest.raises(ValueError, match="9 attention heads with 3 key-value heads cannot be shared by 2 ranks"):
        TensorParallelGroup(2, 0).heads(9, 3)
