"""What whole models say on the GPU, held against the CPU: each format through the engine, its graphs and its prefix cache included.

The tokens that the GPU gave are scored on the CPU twice, in float32 and in the dtype of the GPU's run: the second shows what rounding
alone changes, and the GPU may differ from the first by few times as much. A token other than the CPU's best is wrong where no tie of
that size decides. Models that `octavo.quantize` makes are made on the GPU, and may lose little more than those made on the CPU.
"""

from __future__ import annotations

import gc
import math
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .answer_models import ASKED, Asked, of_path, quantize_model, write_model
from .checks import Place
from .correctness import device_answers
from .record import Budget, Record, one_line

if TYPE_CHECKING:
    from octavo.runtime.core import EngineCore
    from octavo.runtime.outputs import TokenLogprob

_SECONDS = 30.0  # what a model takes at least
# How much more than rounding on the CPU: sums go in another order, and matrix units keep fewer bits.
_TIMES, _AND = 3.0, 2e-3
_KL_TIMES, _KL_AND = 1.3, 1e-3
_TEXTS = (
    "The capital of France is", "Once upon a time there was a", "def fibonacci(n):\n    ", "Water boils at 100 degrees Celsius because",
    "In 1969, two people walked on the Moon. Their names were",
)  # fmt: skip
_Device = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Talk:
    """What is asked of each model: prompts of so many tokens, all at once, and so long answers."""

    prompts: tuple[int, ...] = (1, 7, 40, 130, 500)
    answer: int = 32


@dataclass(frozen=True)
class _Said:
    """A prompt, what followed it on the GPU, and log-probabilities of the last of both, in their order."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.prompt + self.answer


def run(
    record: Record, place: Place, budget: Budget, *, save: Callable[[], None], asked: Sequence[Asked] = ASKED, model: Path | None = None,
    talk: Talk | None = None,
) -> None:  # fmt: skip
    """Every model that has not been compared yet, while the budget lasts; `model`, a folder or GGUF file, before the others."""
    wanted = [*(of_path(model) if model else ()), *asked]
    for one in wanted:
        if one.name in record.answers:
            continue
        if place.is_gpu and not budget.has(_SECONDS):
            print("  out of time: run the same command again, it goes on from here")
            break
        started = time.perf_counter()
        try:
            result = _compared(one, place, talk or Talk())
        except ModuleNotFoundError as error:
            print(
                f"  answers are not compared: {error}. The engine wants more than torch and Triton: pip install the package's dependencies"
            )
            return
        except Exception as error:  # a wrong answer, a compiler's error or a device's: all of them are what is looked for
            result = {"fault": one_line(error)}
            print(f"  WRONG {one.name}: {result['fault']}")
        record.answers[one.name] = result | {"seconds": round(time.perf_counter() - started, 1)}
        save()
        if result["fault"] and place.is_gpu and not device_answers():
            break
        _let_go(place)
    found = [record.answers[one.name]["fault"] for one in wanted if one.name in record.answers]
    wrong = sum(1 for fault in found if fault)
    print(f"answers: {len(found) - wrong} models right, {wrong} wrong, {len(wanted) - len(found)} not run yet")


def _let_go(place: Place) -> None:
    gc.collect()
    if place.is_gpu:
        torch.cuda.empty_cache()


def _compared(asked: Asked, place: Place, talk: Talk) -> dict[str, Any]:
    """The figures of one model. Raises AssertionError with what is wrong."""
    device: _Device = "cuda" if place.is_gpu else "cpu"
    result: dict[str, Any] = {"fault": None}
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.path
        if folder is None:
            folder = Path(temporary, "model")
            write_model(asked, folder)
        if asked.recipe is not None:
            made, on_cpu = (
                quantize_model(asked, folder, Path(temporary, out), on) for out, on in (("made", device), ("on the CPU", "cpu"))
            )
            result |= {"kl": made.kl, "cpu_kl": on_cpu.kl, "quantize_s": round(made.seconds, 1)}
            allowed = _KL_TIMES * on_cpu.kl + _KL_AND
            assert made.kl <= allowed, f"made on the GPU it loses {made.kl:.4f} nats a token, on the CPU {on_cpu.kl:.4f}"
            folder = Path(temporary, "made")
        with place.pretended():
            core = _engine(asked, folder, device, talk)
            result["kernels"] = core.runner.kernels_in_use()
            said = _said(core, _prompts(asked, folder, core, talk), talk, is_exact=bool(asked.options.get("deterministic")))
            del core
        _let_go(place)
        exact = _scored(_engine(asked, folder, "cpu", talk, dtype="float32"), said)
        rounded = _scored(_engine(asked, folder, "cpu", talk), said)
    return result | _judged(said, exact, rounded)


def _engine(asked: Asked, folder: Path, device: _Device, talk: Talk, **options: Any) -> EngineCore:
    from octavo.quant.checkpoint.resolve import resolve_model
    from octavo.runtime.config import EngineConfig
    from octavo.runtime.core import EngineCore
    from octavo.runtime.model_runner import ModelRunner

    longest = max((*talk.prompts, 64)) + talk.answer
    options = {"max_running_requests": 8, "max_total_tokens": 12 * (longest + 32), "random_seed": 0, **asked.options, **options}
    config = EngineConfig(model_path=str(folder), device=device, **options).resolve(device=device)
    return EngineCore(config, ModelRunner(config, resolve_model(str(folder)), show_progress=False))


def _prompts(asked: Asked, folder: Path, core: EngineCore, talk: Talk) -> list[tuple[int, ...]]:
    """Random tokens; of a model of somebody's own, text."""
    if asked.path is not None:
        from octavo.quant.checkpoint.resolve import resolve_model
        from octavo.runtime.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(resolve_model(str(folder)))
        return [tuple(tokenizer.encode(text)) for text in _TEXTS]
    source = random.Random(1)
    return [tuple(source.randrange(core.limits.vocab_size) for _ in range(length)) for length in talk.prompts]


def _said(core: EngineCore, prompts: Sequence[tuple[int, ...]], talk: Talk, *, is_exact: bool) -> list[_Said]:
    """All prompts at once, with the log-probabilities of their tokens; then again one by one, out of the prefix cache."""
    first = _answers(core, prompts, talk, prompt_logprobs=0)
    again = []
    for prompt in prompts:
        again += _answers(core, [prompt], talk)
    if is_exact:
        for one, other in zip(first, again, strict=True):
            assert one.answer == other.answer, f"deterministic, yet {one.answer} beside others became {other.answer} alone"
            assert one.logprobs[-talk.answer :] == other.logprobs, "deterministic, yet other log-probabilities alone than beside others"
    return first + again


def _answers(core: EngineCore, prompts: Sequence[tuple[int, ...]], talk: Talk, **options: Any) -> list[_Said]:
    from octavo.runtime.sampling_params import SamplingParams

    params = SamplingParams(max_tokens=talk.answer, temperature=0.0, logprobs=0, **options)
    for number, prompt in enumerate(prompts):
        core.add(str(number), prompt, params)
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    values: dict[str, list[float]] = {name: [] for name in tokens}
    while core.has_work:
        for output in core.step():
            assert output.finish is None or output.finish.type == "length", output.finish
            tokens[output.request_id] += output.token_ids
            values[output.request_id] += [one.logprob for one in (*output.prompt_logprobs, *output.logprobs) if one.logprob is not None]
    return [_Said(prompt, tuple(tokens[str(n)]), tuple(values[str(n)])) for n, prompt in enumerate(prompts)]


def _scored(core: EngineCore, said: Sequence[_Said]) -> list[list[TokenLogprob]]:
    """Of each, every token but the first and the best at its place."""
    from octavo.runtime.sampling_params import SamplingParams

    found: dict[str, list[TokenLogprob]] = {}
    for number, one in enumerate(said):
        core.add(str(number), one.tokens, SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=1))
    while core.has_work:
        for output in core.step():
            found.setdefault(output.request_id, []).extend(output.prompt_logprobs[1:])
    return [found[str(number)] for number in range(len(said))]


def _judged(said: Sequence[_Said], exact: Sequence[Sequence[TokenLogprob]], rounded: Sequence[Sequence[TokenLogprob]]) -> dict[str, Any]:
    differences, noise, losses = [], [], []
    for one, truth, near in zip(said, exact, rounded, strict=True):
        wanted = [entry.logprob or 0.0 for entry in truth]
        differences += [found - true for found, true in zip(one.logprobs, wanted[-len(one.logprobs) :], strict=True)]
        noise += [(entry.logprob or 0.0) - true for entry, true in zip(near, wanted, strict=True)]
        losses += [entry.top[0][1] - (entry.logprob or 0.0) for entry in truth[-len(one.answer) :]]
    error, usual, tie = _root_mean_square(differences), _root_mean_square(noise), max(map(abs, noise))
    figures = {
        "error": error, "rounding": usual, "tokens": len(losses), "others": sum(1 for loss in losses if loss > 0), "worst_loss": max(losses)
    }  # fmt: skip
    allowed = _TIMES * usual + _AND
    assert error <= allowed, f"log-probabilities are {error:.4f} off, rounding alone makes {usual:.4f}"
    allowed = _TIMES * tie + _AND
    assert max(losses) <= allowed, f"a token {max(losses):.4f} nats below the CPU's best, where rounding changes {tie:.4f} at most"
    return figures


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
