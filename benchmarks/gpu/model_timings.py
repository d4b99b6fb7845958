"""Whole models of dummy weights, timed: decoding, prompts and offline throughput, the host's time and the GPU's idle time beside them.

The engine is the one that serves, without HTTP. Needs what the engine needs besides torch and Triton; what is not there is told.
"""

from __future__ import annotations

import gc
import json
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .checks import Place
from .correctness import device_answers
from .record import Budget, Record, one_line

if TYPE_CHECKING:
    from octavo.runtime.core import EngineCore

PEER = "transformers generate_batch"
_SECONDS = 60.0  # what a variant takes at least
_PART_SECONDS = 20.0  # what one of its loads takes at most, offline ones excepted
_STEPS, _TRACED_STEPS = 40, 12
_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "vocab_size": 128256, "max_position_embeddings": 16384, "head_dim": 128, "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_8B = {**_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_70B = {**_LLAMA, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}


@dataclass(frozen=True)
class Variant:
    """A model in one format. `config` is its config.json, `options` are EngineConfig's; it is given the first `num_offline` of a Load's."""

    name: str
    config: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    num_offline: int | None = None


def _variants() -> tuple[Variant, ...]:
    found = []
    for name, quantization, options in (("bf16", None, {}), ("fp8", None, {"quantization": "fp8"}), ("w4", _AWQ, {})):
        config = LLAMA_8B if quantization is None else {**LLAMA_8B, "quantization_config": quantization}
        found.append(Variant(f"8B {name}", config, options))
        found.append(Variant(f"8B {name}, fp8 KV", config, {**options, "kv_cache_dtype": "fp8_e4m3"}))
    return (*found, Variant("70B w4", {**LLAMA_70B, "quantization_config": _AWQ}, {"max_running_requests": 64}, num_offline=1))


@dataclass(frozen=True)
class Load:
    """What is measured of each: (sequences, context) decoding, prompt lengths, and (requests, prompt, answer) offline."""

    decode: tuple[tuple[int, int], ...] = tuple((sequences, context) for sequences in (1, 16, 64, 256) for context in (512, 2048))
    prefill: tuple[int, ...] = (2048, 8192)
    offline: tuple[tuple[int, int, int], ...] = ((1024, 128, 128), (256, 1000, 1000), (512, 2048, 128))
    steps: int = _STEPS


VARIANTS = _variants()


class TimedFetch:
    """Brings tensors to the host, and knows how long the host waited for them."""

    def __init__(self, fetch: Callable[[Sequence[torch.Tensor]], Any]) -> None:
        self._fetch, self.waited_s = fetch, 0.0

    def __call__(self, tensors: Sequence[torch.Tensor]) -> TimedFetch.Timed:
        return self.Timed(self, self._fetch(tensors))

    class Timed:
        def __init__(self, owner: TimedFetch, arrival: Any) -> None:
            self._owner, self._arrival = owner, arrival

        def wait(self) -> list[torch.Tensor]:
            started = time.perf_counter()
            tensors: list[torch.Tensor] = self._arrival.wait()
            self._owner.waited_s += time.perf_counter() - started
            return tensors


def run(
    record: Record,
    place: Place,
    budget: Budget,
    *,
    save: Callable[[], None],
    variants: Sequence[Variant] = VARIANTS,
    load: Load | None = None,
) -> None:
    """Every variant that has not been timed to its end yet, while the budget lasts; then transformers with the first one's model.

    What has been measured is kept as it comes. Ends where the device answers no more.
    """
    load = load or Load()
    ways = {variant.name: partial(time_variant, variant) for variant in variants}
    if variants:
        ways[PEER] = partial(time_peer, variants[0])
    for name, way in ways.items():
        if name in record.model and not record.model[name].get("unfinished"):
            continue
        if not budget.has(_SECONDS if place.is_gpu else 0.0):
            print("  out of time: run the same command again, it goes on from here")
            return
        try:
            for found in way(place, load, budget):
                record.model[name] = found
                save()
        except ModuleNotFoundError as error:
            print(f"  models are not timed: {error}. The engine wants more than torch and Triton: pip install the package's dependencies")
            return
        except Exception as error:  # told, and the others go on
            record.model[name] = {**record.model.get(name, {}), "unfinished": False, "fault": one_line(error)}
            print(f"  {name}: {record.model[name]['fault']}")
            save()
            if place.is_gpu and not device_answers():
                return
        print(f"timed {name}{', not to its end' if record.model[name].get('unfinished') else ''}", flush=True)
        _let_go(place)


def _let_go(place: Place) -> None:
    gc.collect()
    if place.is_gpu:
        torch.cuda.empty_cache()


def time_variant(variant: Variant, place: Place, load: Load, budget: Budget) -> Iterator[dict[str, Any]]:
    """Tokens per second of each part of the load, milliseconds a step with the host's own, and the share of it in which the GPU idles.

    The same mapping after each measurement, with one more in it, "unfinished" until it has all; it ends before that with the budget.
    """
    from octavo.quant.checkpoint.resolve import resolve_model
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.core import EngineCore
    from octavo.runtime.model_runner import ModelRunner
    from octavo.runtime.transfer import HostCopy

    with tempfile.TemporaryDirectory() as folder, place.pretended():
        Path(folder, "config.json").write_text(json.dumps(variant.config), encoding="utf-8")
        most = max([sequences for sequences, _ in load.decode] + [1])
        options = {
            "max_running_requests": most,
            "disable_radix_cache": True,
            "skip_kernel_check": True,
            "random_seed": 0,
            **variant.options,
        }
        device: Literal["cuda", "cpu"] = "cuda" if place.is_gpu else "cpu"
        config = EngineConfig(model_path=folder, load_format="dummy", device=device, **options).resolve(device=device)
        runner = ModelRunner(config, resolve_model(folder, needs_weights=False), show_progress=False)
        fetch = TimedFetch(HostCopy)
        core = EngineCore(config, runner, fetch=fetch)
        result: dict[str, Any] = {
            "fault": None, "unfinished": True, "weight_bytes": runner.model.weight_bytes, "kv_tokens": runner.pool.num_tokens,
            "load_s": sum(runner.phases.seconds.values()),
            "kernels": runner.kernels_in_use(), "decode": {}, "prefill": {}, "offline": {},
        }  # fmt: skip
        _finish(core, _add(core, min(2, most), 8, 3))  # whatever loads at the first call
        yield result
        for sequences, context in load.decode:
            if not budget.has(_PART_SECONDS if place.is_gpu else 0.0):
                return
            # Those whose prompts are computed first decode while the others' are: for two steps a chunk at most, beside what is timed.
            steps = load.steps + _TRACED_STEPS + 8 + 2 * sequences * (-(-context // (config.chunked_prefill_size or 1)) + 1)
            steps = min(steps, runner.context_length - context)
            if sequences <= config.max_running_requests and sequences * (context + steps) <= runner.pool.num_tokens:
                result["decode"][f"{sequences} x {context}"] = _decode(core, fetch, sequences, context, load.steps, steps, place)
                yield result
        for tokens in load.prefill:
            seconds = min(_finish(core, _add(core, 1, tokens, 1)) for _ in range(2))
            result["prefill"][str(tokens)] = {"tokens_s": tokens / seconds}
            yield result
        for requests, prompt, answer in load.offline[: variant.num_offline]:
            if place.is_gpu and not budget.has(_offline_s(result, requests, prompt, answer)):
                return
            few = max(1, requests // 16)  # whatever is compiled for steps of such sizes
            _finish(core, _add(core, few, prompt, min(answer, 8)))
            seconds = _finish(core, _add(core, requests, prompt, answer))
            result["offline"][f"{prompt}/{answer}"] = {"requests": requests, "tokens_s": requests * answer / seconds}
            yield result
    result["unfinished"] = False
    yield result


def _offline_s(result: Mapping[str, Any], requests: int, prompt: int, answer: int) -> float:
    """Seconds that an offline load will take, by what prompts and steady decoding took."""
    rates = [max((step["tokens_s"] for step in result[part].values()), default=math.inf) for part in ("prefill", "decode")]
    return 1.1 * requests * (prompt / rates[0] + answer / rates[1])


def _add(core: EngineCore, requests: int, prompt: int, answer: int) -> int:
    from octavo.runtime.sampling_params import SamplingParams

    source = random.Random(requests + prompt)
    for number in range(requests):
        ids = [source.randrange(core.limits.vocab_size) for _ in range(prompt)]
        core.add(f"{prompt}-{answer}-{number}", ids, SamplingParams(max_tokens=answer, temperature=0.0))
    return requests * answer


def _finish(core: EngineCore, wanted: int) -> float:
    """Seconds until all that was added has ended, with as many tokens as it wanted."""
    started, tokens = time.perf_counter(), 0
    while core.has_work:
        for output in core.step():
            tokens += len(output.token_ids)
            assert output.finish is None or output.finish.type == "length", output.finish
    assert tokens == wanted, f"{tokens} tokens came, not {wanted}"
    return time.perf_counter() - started


def _decode(core: EngineCore, fetch: TimedFetch, sequences: int, context: int, steps: int, answer: int, place: Place) -> dict[str, Any]:
    """Steady decoding: all prompts are computed before the clock starts, and no request ends before it stops."""
    from octavo.runtime.outputs import FinishReason

    _add(core, sequences, context - steps // 2, answer)
    while core.scheduler.waiting or any(request.is_prefilling for request in core.scheduler.running):
        core.step()
    for _ in range(3):
        core.step()
    fetch.waited_s, started = 0.0, time.perf_counter()
    tokens = sum(len(output.token_ids) for _ in range(steps) for output in core.step())
    seconds = time.perf_counter() - started
    assert tokens == sequences * steps, f"{tokens} tokens came in {steps} steps of {sequences} sequences"
    found = {
        "tokens_s": tokens / seconds, "step_ms": seconds / steps * 1e3, "host_ms": (seconds - fetch.waited_s) / steps * 1e3,
        "idle": _idle_share(core) if place.is_gpu else None,
    }  # fmt: skip
    core.abort_all(FinishReason("abort"))
    while core.has_work:
        core.step()
    return found


def _idle_share(core: EngineCore) -> float | None:
    """The share of some steps in which no kernel ran, from a trace; None where nothing can be traced."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as traced:
        for _ in range(_TRACED_STEPS - 4):
            core.step()
        torch.cuda.synchronize()
    spans = sorted((event.time_range.start, event.time_range.end) for event in traced.events() or [] if event.device_type.name == "CUDA")
    return idle_share(spans) if spans else None


def idle_share(spans: Sequence[tuple[float, float]]) -> float:
    """The part of the time from the first start to the last end that no (start, end) covers; `spans` by their starts."""
    if not spans:
        return 1.0
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return 1.0 - busy / (reached - spans[0][0]) if reached > spans[0][0] else 0.0


def time_peer(variant: Variant, place: Place, load: Load, budget: Budget) -> Iterator[dict[str, Any]]:
    """Offline throughput of transformers' continuous batching, the same model and load, random weights in bfloat16.

    The same mapping after each load, as of `time_variant`. What it makes before its first step (cache, graphs) is not timed; ours is not.
    """
    model = _peer_model(variant, place)
    result: dict[str, Any] = {"fault": None, "unfinished": True, "version": version("transformers"), "offline": {}}
    for requests, prompt, answer in load.offline:
        if place.is_gpu and not budget.has(_SECONDS):
            return
        seconds = _peer_s(model, requests, prompt, answer)
        result["offline"][f"{prompt}/{answer}"] = {"requests": requests, "tokens_s": requests * answer / seconds}
        yield result
    result["unfinished"] = False
    yield result


# It steps in a thread of its own, where tensors made in inference mode cannot be written.
@torch.inference_mode(False)
def _peer_model(variant: Variant, place: Place) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        **{name: value for name, value in variant.config.items() if name not in ("architectures", "model_type")}
    )
    config._attn_implementation = "sdpa"
    with torch.device(place.device):
        return transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()


@torch.inference_mode(False)
def _peer_s(model: Any, requests: int, prompt: int, answer: int) -> float:
    """Seconds until all requests have ended, each with as many tokens as it wanted."""
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from transformers.generation.continuous_batching.utils import WorkloadHints

    source = random.Random(requests + prompt)
    prompts = [[source.randrange(model.config.vocab_size) for _ in range(prompt)] for _ in range(requests)]
    wish = GenerationConfig(max_new_tokens=answer, do_sample=False, eos_token_id=-1, pad_token_id=0)
    hints = WorkloadHints(max_prompt_length=prompt, max_generated_length=answer, num_requests=requests)
    # On the CPU, where only tests come, its cache would be most of the machine's memory.
    size = None if model.device.type == "cuda" else ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=wish, block=True, timeout=5, continuous_batching_config=size, workload_hints=hints
    ) as manager:
        started, tokens, ended = time.perf_counter(), 0, 0
        manager.add_requests(inputs=prompts, max_new_tokens=answer)
        while ended < requests:
            output = manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                ended, tokens = ended + 1, tokens + len(output.generated_tokens)
            elif output is None and not manager.is_running():
                raise RuntimeError(f"it ended after {ended} of {requests} requests of {prompt}/{answer}")
        seconds = time.perf_counter() - started
    assert tokens == requests * answer, f"{tokens} tokens came, not {requests * answer}"
    return seconds
