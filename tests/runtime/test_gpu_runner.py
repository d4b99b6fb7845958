"""A whole model on a GPU that is not there, kernels interpreted, weights and pages as a GPU holds them, against the CPU's backend."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import paged_attention
from octavo.kernels.gpu.device import DEVICES, Device, pretend
from octavo.kernels.paged_attention import AttentionPlan, reference
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.core import EngineCore
from octavo.runtime.decode_graphs import Capture
from octavo.runtime.forward_batch import StepArrays
from octavo.runtime.model_runner import ModelRunner
from octavo.runtime.pipeline import Pipeline, Place
from octavo.runtime.sampling_params import SamplingParams

from ..kernels.gpu.interpreter import mend, products_rounded_once
from .tiny_models import Case, make_model, save_model, tiny_llama

mend()
H100 = Device(90, 4, DEVICES[90].shared_bytes)
A100 = Device(80, 4, DEVICES[80].shared_bytes)
VOCAB = 131
SIZES = {"max_total_tokens": 1024, "max_running_requests": 8, "chunked_prefill_size": 64, "page_size": 16, "random_seed": 0}
TIE = 0.08  # log-probabilities nearer than that may change places, where one side computes in 16 bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_llama().half().save_pretrained(path)
    return path


def generate(folder: Path, **options: Any) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Greedy tokens with the best of each place, by request; and which kernels the linears run on."""
    config = EngineConfig(device="cpu", **{**SIZES, **options}).resolve(device="cpu")
    runner = ModelRunner(config, resolve_model(str(folder)), show_progress=False)
    return answers(EngineCore(config, runner)), runner.kernels_in_use()


def answers(core: EngineCore) -> dict[str, list[Any]]:
    """Greedy tokens of three prompts, with the best of each place, by request."""
    source = torch.Generator().manual_seed(1)
    for name, length in (("short", 3), ("prompt", 20), ("chunks", 70)):
        prompt = torch.randint(0, VOCAB, (length,), generator=source).tolist()
        core.add(name, prompt, SamplingParams(max_tokens=4, temperature=0.0, logprobs=6))
    found: dict[str, list[Any]] = {}
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(zip(output.token_ids, output.logprobs, strict=True))
    return found


def assert_alike(found: dict[str, list[Any]], wanted: dict[str, list[Any]], tolerance: float) -> None:
    """The same tokens up to a numerical tie, and log-probabilities within the tolerance until then."""
    assert found.keys() == wanted.keys()
    for name, answer in wanted.items():
        for (token, logprob), (wanted_token, wanted_logprob) in zip(found[name], answer, strict=True):
            if token != wanted_token:
                near = dict(wanted_logprob.top).get(token, -1e9)
                assert wanted_logprob.logprob - near < TIE + tolerance, (name, token, wanted_token, wanted_logprob)
                break
            assert abs(logprob.logprob - wanted_logprob.logprob) <= tolerance, (name, logprob, wanted_logprob)


@pytest.mark.parametrize(
    ("device", "options", "kernel", "tolerance"),
    [
        (H100, {}, "torch_matmul", 0.05),
        pytest.param(A100, {"quantization": "int4"}, "triton_weight_only", 0.05, marks=pytest.mark.long),
        # Inputs to the nearest of few codes: one that flips changes much.
        pytest.param(H100, {"quantization": "fp8"}, "triton_fp8", 0.8, marks=pytest.mark.long),
    ],
    ids=["plain", "int4", "fp8"],
)
def test_greedy_answers_are_the_cpus(folder: Path, device: Device, options: dict[str, Any], kernel: str, tolerance: float) -> None:
    wanted, _ = generate(folder, **options)
    with pretend(device):
        found, kernels = generate(folder, **options)
    assert kernels[kernel] >= 8
    assert_alike(found, wanted, tolerance)


def test_norms_of_queries_and_keys(tmp_path: Path) -> None:
    """Qwen3's: their weights are float32 whatever the activations are."""
    model = make_model(Case("Qwen3Config", {"head_dim": 16, "intermediate_size": 96}))
    save_model(model, tmp_path, "float16")
    wanted, _ = generate(tmp_path)
    with pretend(H100):
        found, _ = generate(tmp_path)
    assert_alike(found, wanted, 0.05)


@pytest.mark.long
@pytest.mark.parametrize(("device", "kv"), [(H100, "fp8_e4m3"), (A100, "int8")])
def test_quantized_pages(folder: Path, device: Device, kv: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the float reference over the same pages: the CPU rounds keys of 32 bits, and gets other codes."""
    with pretend(device):
        found, _ = generate(folder, kv_cache_dtype=kv)
        calls: list[torch.Tensor] = []

        def in_floats(q: Any, k: Any, v: Any, kind: Any, plan: Any, starts: Any, contexts: Any, table: Any, **options: Any) -> None:
            calls.append(q)
            step = AttentionPlan(starts, contexts, table, len(q), q.shape[1], k.shape[1], q.shape[2], table, 0, 1)
            reference(q, k, v, step, kv_dtype=kind, **options)

        monkeypatch.setattr(paged_attention, "attend", in_floats)
        wanted, _ = generate(folder, kv_cache_dtype=kv)
    assert calls
    assert_alike(found, wanted, 0.05)


@pytest.mark.parametrize(
    ("device", "options"),
    [
        (H100, {}),
        pytest.param(A100, {"quantization": "int4", "kv_cache_dtype": "int8"}, marks=pytest.mark.long),
        pytest.param(H100, {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}, marks=pytest.mark.long),
    ],
    ids=["plain", "int4 and int8 pages", "fp8 and fp8 pages"],
)
def test_deterministic_answers_repeat_to_the_bit(folder: Path, device: Device, options: dict[str, Any]) -> None:
    """Alone on a cold cache, beside others in small chunks, and again on a warm cache with a chunk of a single token."""
    prompt = torch.randint(0, VOCAB, (33,), generator=torch.Generator().manual_seed(3)).tolist()
    sizes = {"max_total_tokens": 1024, "max_running_requests": 8, "page_size": 16, "random_seed": 0, "deterministic": True}

    def core_of(chunk: int) -> EngineCore:
        config = EngineConfig(device="cpu", chunked_prefill_size=chunk, **{**sizes, **options}).resolve(device="cpu")
        return EngineCore(config, ModelRunner(config, resolve_model(str(folder)), show_progress=False))

    def answer(core: EngineCore, *others: int) -> list[tuple[int, float]]:
        for length in others:
            core.add(f"other {length}", [length % VOCAB] * length, SamplingParams(max_tokens=5, temperature=0.0))
        core.add("it", prompt, SamplingParams(max_tokens=3, temperature=0.0, logprobs=0))
        found: list[tuple[int, float]] = []
        while core.has_work:
            for output in core.step():
                if output.request_id == "it":
                    found += [(logprob.token_id, logprob.logprob) for logprob in output.logprobs]
        return found

    with pretend(device), products_rounded_once():
        core = core_of(64)
        cold = answer(core)
        warm = answer(core)
        assert core.scheduler.counters.cached_tokens == 32
        crowded = answer(core_of(24), 5, 30)
    assert len(cold) == 3
    assert warm == cold
    assert crowded == cold


class Copies:
    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [tensor.clone() for tensor in tensors]

    def wait(self) -> list[torch.Tensor]:
        return self._tensors


copied = Copies  # as a GPU's tensors go to the host: what is written to them later does not change the copy


def recorder(replays: list[torch.Size]) -> Capture:
    """A graph that is run anew at each replay, from its buffers alone; `replays` gets the shape of what it gave."""

    def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        out = run()

        def replay() -> None:
            replays.append(out.shape)
            out.copy_(run())

        out.fill_(-7)
        return replay, out

    return capture


@pytest.mark.long
@pytest.mark.parametrize(
    ("device", "options"),
    [(H100, {}), (A100, {"quantization": "int4", "kv_cache_dtype": "int8"})],
    ids=["plain", "int4 and int8 pages"],
)
def test_decoding_steps_are_replayed(folder: Path, device: Device, options: dict[str, Any]) -> None:
    """With steps launched ahead."""
    replays: list[torch.Size] = []
    with pretend(device):
        wanted, _ = generate(folder, **options)
        config = EngineConfig(device="cpu", cuda_graph_max_bs=4, **{**SIZES, **options}).resolve(device="cpu")
        runner = ModelRunner(config, resolve_model(str(folder)), show_progress=False)
        runner.capture_graphs(recorder(replays), show_progress=False)
        core = EngineCore(config, runner, overlap=True, fetch=copied)
        found = answers(core)
        core.scheduler.check_integrity()
    assert {shape[0] for shape in replays} <= {1, 2, 4}
    assert replays.count(torch.Size((4, VOCAB))) >= 2, "three requests fill up a graph for four"
    assert replays.count(torch.Size((4,))) == replays.count(torch.Size((4, VOCAB))), "and draw from it by another"
    assert_alike(found, wanted, 0.05)


class Mail:
    """Stages of one process: what they send to each other."""

    def __init__(self) -> None:
        self.sent: deque[torch.Tensor] = deque()

    def send(self, tensor: torch.Tensor, to: int) -> Any:
        assert to == 0
        self.sent.append(tensor)
        return SimpleNamespace(wait=lambda: None)

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        assert source == 1
        tensor.copy_(self.sent.popleft())

    def smallest(self, number: int) -> int:
        return number


@pytest.mark.long
def test_stages_are_replayed(folder: Path) -> None:
    """Each has graphs of its own, between which the hidden states travel; two batches are under way."""
    replays: tuple[list[torch.Size], list[torch.Size]] = ([], [])
    mail, told = Mail(), []
    with pretend(H100):
        wanted, _ = generate(folder)
        config = EngineConfig(device="cpu", pp_size=2, cuda_graph_max_bs=4, **SIZES).resolve(device="cpu")
        runners = [
            ModelRunner(config, resolve_model(str(folder)), pipeline=Pipeline(Place(rank, 1, 2), mail), show_progress=False)
            for rank in range(2)
        ]
        for runner, own in zip(runners, replays, strict=True):
            runner.capture_graphs(recorder(own), show_progress=False)

        def tell(arrays: StepArrays, num_awaited: int, page_size: int) -> None:
            told.append(len(mail.sent))
            runners[1].follow(arrays, num_awaited)

        runners[0]._ranks = SimpleNamespace(tell=tell, check=lambda: None)  # type: ignore[assignment]
        core = EngineCore(config, runners[0], fetch=copied)
        found = answers(core)
        core.scheduler.check_integrity()
    assert max(told) == 1, "a step is told before the one ahead of it is computed here"
    assert replays[0].count(torch.Size((2, VOCAB))) >= 2
    assert replays[1].count(torch.Size((2, 0))) >= 2, "the first stage has no logits"
    assert_alike(found, wanted, 0.05)


def test_the_largest_step_is_computed_and_sampled_before_the_pool_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the GPU's memory is measured by; a chunk longer than a context becomes two prompts."""
    config = EngineConfig(device="cpu", **{**SIZES, "chunked_prefill_size": 40, "max_running_requests": 4, "context_length": 30})
    runner = ModelRunner(config.resolve(device="cpu"), resolve_model(str(folder)), show_progress=False)
    steps: list[tuple[int, ...]] = []
    monkeypatch.setattr(runner, "forward", lambda batch: (steps.append(tuple(row.count for row in batch.rows)), forward(batch))[1])
    forward = type(runner).forward.__get__(runner)
    with pretend(H100):
        runner.profile_step()
    assert steps == [(30, 10, 1, 1)]
    assert not hasattr(runner, "pool"), "the pool that counts is made later"


def test_tokens_are_drawn_by_graphs_as_they_are_without(folder: Path) -> None:
    """Every way of filtering, beside penalties and biases, and batches that do not fill their graph."""
    ways: tuple[dict[str, Any], ...] = (
        {"top_k": 20, "logprobs": 2}, {"top_p": 0.8, "min_p": 0.05}, {"repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
        {"temperature": 0.0, "frequency_penalty": 1.0},
    )  # fmt: skip
    replays: list[torch.Size] = []

    def drawn(core: EngineCore) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, way in enumerate(ways):  # fewer and fewer stay: four that no graph is for, then two mixtures and one alone
            core.add(str(number), [number + 1, 7, 9], SamplingParams(max_tokens=2 + number, seed=number, ignore_eos=True, **way))
        while core.has_work:
            for output in core.step():
                found.setdefault(output.request_id, []).extend(output.token_ids)
        return found

    with pretend(H100), products_rounded_once():
        options = {**SIZES, "cuda_graph_max_bs": 3, "deterministic": True}
        config = EngineConfig(device="cpu", **options).resolve(device="cpu")
        runner = ModelRunner(config, resolve_model(str(folder)), show_progress=False)
        wanted = drawn(EngineCore(config, runner))
        runner.capture_graphs(recorder(replays), show_progress=False)
        found = drawn(EngineCore(config, runner, overlap=True, fetch=copied))
    assert found == wanted
    assert {torch.Size((1,)), torch.Size((2,)), torch.Size((3,))} <= set(replays)
