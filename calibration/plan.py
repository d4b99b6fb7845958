"""Plan: what a quantization will do, and what memory and disk it will take, before anything is computed."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from .budget import Budget, budget_of
from .devices import device_name, free_bytes
from .eight_bit import BLOCK
from .eval_run import DEFAULT_SEQLEN
from .float_model import FloatModel
from .gptq import DOUBLE_UP_TO
from .grid import Grid
from .importance import entries_of
from .out_folder import existing
from .output import FUSED, SHARD_BYTES
from .recipe import Recipe
from .run_texts import EVAL_TOKENS
from .streams import CHUNK_TOKENS, Hidden, Inputs
from .tune_model import bytes_needed
from .tuning import LOGIT_ROWS

_GROUP_SIZES = (64, 128, 32, 16)  # what is tried where nobody said, and what is offered
_PACKED = 8  # outputs and inputs come in whole words of eight
_BASE_BYTES = 700 << 20  # of Python, torch and transformers
_DEFAULT_SHARE = 0.8  # of the memory that is free
_MOST_LINES = 32
_GIB = 2**30
_PROBE_TOKENS = 24
_WEIGHT_COPIES = 8  # float32 [N, K] at once while a linear is solved
_SQUARES, _SQUARES_IN_DOUBLE = 6, 10  # and [K, K], in float32; of narrow linears some are float64
_EVAL_LOGIT_COPIES = 8  # of a window's: both models', and what is made of them
_APART_LOGIT_COPIES = 6  # of a part's, where both models are measured block by block
VERIFIED_TOKENS = 128  # of one sample, that go through the model as it was written
_VERIFY_LOGIT_COPIES = 4
_ENGINE_BYTES = 300 << 20  # of an Engine, beside its weights


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`linears`: [N, K] of those to be quantized, by path; `kept`: those that stay. Bytes are estimates."""

    model: str
    recipe: Recipe
    num_blocks: int
    linears: Mapping[str, tuple[int, int]]
    kept: tuple[str, ...]
    group_size: int
    budget: Budget
    skipped_tuning: str | None  # why the last pass does not run though the method has it
    on_disk: bool  # activations
    bytes_before: int
    bytes_after: int
    work_bytes: int  # on disk, until the run is done
    peak_bytes: int
    max_memory: int
    device: str
    evaluates_whole: bool  # both models in memory at once, in Octavo's Engine; else block by block
    engines: tuple[str, ...] = ()  # that are known to read what is written
    notes: tuple[str, ...] = ()  # what there is to know before the work: what keeps an engine from it, what flatters its quality

    def as_decided(self, tuned: bool) -> Plan:
        """The same plan with the last pass or without, as it was decided when the run began: it must give the same bytes."""
        if tuned == (self.budget.schedule is not None):
            return self
        if tuned:
            return replace(self, budget=budget_of(self.recipe), skipped_tuning=None)
        told = "left out, as when the run began" if budget_of(self.recipe).schedule else None
        return replace(self, budget=self.budget.without_tuning(), skipped_tuning=told)

    def grid_of(self, path: str, n: int, k: int) -> Grid | None:
        """The grid of a linear [n, k]; None where it stays as it is."""
        if path not in self.linears:
            return None
        return Grid(
            self.recipe.bits,
            k if self.group_size == -1 else self.group_size,
            self.recipe.is_symmetric,
            self.recipe.scale_dtype,
            self.recipe.lowest_zero,
        )

    def describe(self) -> str:
        """For people."""
        recipe = self.recipe
        where = "on disk" if self.on_disk else "in memory"
        weighed = "; errors count by the gradient of the model's answer" if self.budget.weighs else ""
        schedule = self.budget.schedule
        tuning = f"{schedule.steps} steps over the whole model" if schedule else self.skipped_tuning or "none"
        if self.budget.own_samples and recipe.calibration != "self":
            tuning += f", on {self.budget.own_samples} samples more, which the model writes"
        rows = [
            ("computed on", self.device),
            ("model", f"{self.model}: {self.num_blocks} blocks, {told_bytes(self.bytes_before)}"),
            (
                "quantized",
                f"{len(self.linears)} linears: {recipe.form(self.group_size)}; method {recipe.method}, written as {recipe.layout}",
            ),
            ("left as they are", ", ".join(["embedding and head", *([_some(self.kept)] if self.kept else [])])),
            (
                "calibration",
                f"{self.budget.samples} x {recipe.row_tokens} tokens: {recipe.calibration}; activations {where}{weighed}",
            ),
            ("tuning", tuning),
            ("written", f"about {told_bytes(self.bytes_after)}, and {told_bytes(self.work_bytes)} meanwhile"),
            (
                "peak memory",
                f"about {told_bytes(self.peak_bytes)} of the {told_bytes(self.max_memory)} allowed"
                + ("; the largest block alone takes more than that" if self.peak_bytes > self.max_memory else ""),
            ),
            *(("note", note) for note in self.notes),
        ]
        return "\n".join(f"{name:<18}{value}" for name, value in rows)


def told_bytes(count: int) -> str:
    """For people."""
    return f"{count / _GIB:.2f} GiB" if count >= _GIB / 10 else f"{count / 2**20:.1f} MiB"


def make_plan(
    name: str,
    model: FloatModel,
    recipe: Recipe,
    found: Mapping[str, tuple[int, int]],
    budget: Budget,
    bytes_before: int,
    *,
    served: bool,
    left: int = 0,
) -> Plan:
    """`served`: whether Octavo's Engine runs the architecture. `left`: numbers a token that blocks leave for later ones, in memory.

    Raises ValueError where nothing is to be quantized, a group size does not fit, naming every linear that it does not, or memory is too
    small for what was asked.
    """
    _check_ignore(recipe, found)
    linears = {path: shape for path, shape in found.items() if not recipe.ignores(path) and not any(size % _PACKED for size in shape)}
    if not linears:
        raise ValueError("there is no linear to quantize: --ignore leaves none, or the model has none that can be packed")
    size = -1 if recipe.eight_bit else group_size_of(recipe, linears)
    if recipe.strategy == "block":
        check_blocks(linears)
    max_memory = recipe.max_memory or int(_available_memory() * _DEFAULT_SHARE)
    weights = sum(n * k for n, k in linears.values())
    overhead = 20 / (size if size > 0 else 1024)
    others = sum(parameter.numel() for parameter in model.module.parameters()) - weights
    width = max(dtype.itemsize for dtype in model.names.stored.values())
    after = others * width + int(weights * ((8 if recipe.eight_bit else recipe.bits) + overhead) / 8)
    if recipe.calibration == "self" and _BASE_BYTES + bytes_before > max_memory:
        raise ValueError(
            f"the model, {bytes_before / _GIB:.1f} GiB whole beside {_BASE_BYTES / _GIB:.1f} for Python and torch, cannot write its own "
            f"calibration text in {max_memory / _GIB:.1f} GiB: "
            "give --calibration FILE, or more --max-memory"
        )
    outer, room = _outer_bytes(model), free_bytes(model.device)
    for_tuning, skipped, entries = 0, None, sum(entries_of(n) for path, (n, _) in found.items() if "[" not in path)
    if budget.schedule is not None:
        for_tuning = bytes_needed(model, budget.schedule, recipe.row_tokens)
        for_tuning += 4 * max(0, entries - 2 * weights)  # errors are weighed with a copy of the weights in place of three
        if _BASE_BYTES + for_tuning > max_memory:
            needed = (_BASE_BYTES + for_tuning) / _GIB
            skipped = f"left out: it needs {needed:.1f} GiB, above the {max_memory / _GIB:.1f} allowed (--max-memory)"
        elif room is not None and for_tuning - outer > room:
            skipped = f"left out: it needs {(for_tuning - outer) / _GIB:.1f} GiB of {model.device}, which has {room / _GIB:.1f} free"
        if skipped is not None:
            budget, for_tuning = budget.without_tuning(), 0
    block = _block_bytes(model, linears, budget)
    if room is not None and block > room:  # what is outside the blocks is there already
        raise ValueError(
            f"{model.device} has {room / _GIB:.1f} GiB free, and the largest block needs about {block / _GIB:.1f}: give --device cpu"
        )
    fixed = _BASE_BYTES + outer + block
    tokens = (budget.samples + budget.own_samples + budget.solve_samples) * recipe.row_tokens
    streams = tokens * math.prod(model.hidden_shape) * 4
    beside_streams = max(fixed, _BASE_BYTES + for_tuning) + tokens * left * 4
    on_disk = beside_streams + streams > max_memory
    both = _BASE_BYTES + 2 * _ENGINE_BYTES + bytes_before + after + _EVAL_LOGIT_COPIES * DEFAULT_SEQLEN * model.vocab_size * 4
    whole = served and both <= max_memory
    verifying = _BASE_BYTES + 2 * outer + block + _VERIFY_LOGIT_COPIES * VERIFIED_TOKENS * model.vocab_size * 4
    apart = _BASE_BYTES + 2 * outer + block + _APART_LOGIT_COPIES * LOGIT_ROWS * model.vocab_size * 4
    apart += 0 if on_disk else 2 * EVAL_TOKENS * math.prod(model.hidden_shape) * 4
    writing = _BASE_BYTES + outer + min(after, SHARD_BYTES)
    peak = max(
        beside_streams + (0 if on_disk else streams),
        verifying,
        writing,
        both if whole else apart,
        _BASE_BYTES + bytes_before if recipe.calibration == "self" else 0,
    )
    return Plan(
        model=name,
        recipe=recipe,
        num_blocks=len(model.blocks),
        linears=linears,
        kept=tuple(sorted(set(found) - set(linears))),
        group_size=size,
        budget=budget,
        skipped_tuning=skipped,
        on_disk=on_disk,
        bytes_before=bytes_before,
        bytes_after=after,
        work_bytes=int(weights * 1.1) * (2 if budget.schedule else 1)
        + (2 * entries if budget.weighs else 0)
        + (2 * streams if on_disk else 0),  # again to measure with
        peak_bytes=peak,
        max_memory=max_memory,
        device=device_name(model.device),
        evaluates_whole=whole,
    )


def _check_ignore(recipe: Recipe, found: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError for a pattern that matches nothing, and for one that leaves out a part of what engines compute as one: some
    experts of a layer or some of their matrices, q_proj without k_proj and v_proj, gate_proj without up_proj."""
    for pattern in recipe.ignore:
        if not any(re.search(pattern, path) for path in found):
            shown = ", ".join(list(found)[:3])
            raise ValueError(f"ignore {pattern!r} matches no linear of the model: they are called {shown}, ...")
    for whole in sorted({path.split("[")[0] for path in found if "[" in path}):
        experts = [path for path in found if path.split("[")[0] == whole]
        if len({recipe.ignores(path) for path in experts}) > 1:
            raise ValueError(f"ignore leaves out some experts of {whole}, which are one tensor: leave out all of them or none")
    joined: dict[str, list[str]] = {}
    for path in found:
        parent, _, name = path.partition("[")[0].rpartition(".")
        if "[" in path:
            joined.setdefault(f"{parent}'s experts", []).append(path)
        for fused, parts in FUSED.items():
            if "[" not in path and name in parts:
                joined.setdefault(f"{parent}.{fused}", []).append(path)
    for whole, paths in joined.items():
        left = [path for path in paths if recipe.ignores(path)]
        if left and len(left) < len(paths):
            others = ", ".join(path for path in paths if path not in left)
            raise ValueError(
                f"ignore leaves out {left[0]} and not {others[:200]}, which engines compute as one, {whole}: leave out all of them or none"
            )


def probe_inputs(model: FloatModel) -> Inputs:
    """A few tokens, to look at the structure of blocks with."""
    inputs = Inputs(model, torch.arange(_PROBE_TOKENS)[None] % model.vocab_size)
    inputs.start(Hidden((1, _PROBE_TOKENS, *model.hidden_shape), device=model.device))
    return inputs


def check_disk(plan: Plan, out: Path, *, beside: int = 0, present: int = 0) -> None:
    """Raises OSError where the disk has less room than the run will need, with `beside` bytes that the plan does not know of, and
    `present` of them there already."""
    place = existing(out)
    free, needed = shutil.disk_usage(place).free, plan.bytes_after + plan.work_bytes + beside - present
    if free < needed:
        raise OSError(
            f"{place} has {told_bytes(free)} free, and this run needs about {told_bytes(needed)}: make room, or give --out elsewhere"
        )


def _available_memory() -> int:
    """Bytes that this process may still take: the machine's, or what its container's limit leaves."""
    available: int = psutil.virtual_memory().available
    try:
        group = Path("/sys/fs/cgroup")
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(cached.get("inactive_file", 0))
        return min(available, int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError):  # no container, or one without a limit
        return available


def _outer_bytes(model: FloatModel) -> int:
    inside = {id(parameter) for block in model.blocks for parameter in block.parameters()}
    return sum(4 * parameter.numel() for parameter in model.module.parameters() if id(parameter) not in inside)


def _block_bytes(model: FloatModel, linears: Mapping[str, tuple[int, int]], budget: Budget) -> int:
    """Of the largest block: weights and a copy, second moments, what solving the largest linear takes, the activations of a chunk.
    In stages, a copy more, and moments of the float model's inputs with the others. Where errors are weighed, what by."""
    in_stages = budget.steps.toward_float > 0

    def of(index: int) -> int:
        prefix = model.block_prefix(index)
        shapes = [shape for path, shape in linears.items() if path.startswith(prefix)]
        weights = (3 if in_stages else 2) * sum(parameter.numel() for parameter in model.blocks[index].parameters())
        moments = (2 if in_stages else 1) * sum(k * k for _, k in shapes)
        squares = {k: (_SQUARES_IN_DOUBLE if k <= DOUBLE_UP_TO else _SQUARES) * k * k for _, k in shapes}
        solving = max((squares[k] + _WEIGHT_COPIES * n * k for n, k in shapes), default=0)
        if budget.weighs:
            outputs = [n for path, (n, _) in linears.items() if path.startswith(prefix) and "[" not in path]
            moments += sum(map(entries_of, outputs))
            solving += _SQUARES_IN_DOUBLE * max(((entries_of(n) // n) ** 2 for n in outputs), default=0)
            solving += len(budget.steps.orders) * len(budget.steps.damps) * max(squares, default=0) ** 2  # what each is made ready with
        active = sum(n + k for (n, k) in {path.split("[")[0]: shape for path, shape in linears.items() if path.startswith(prefix)}.values())
        return 4 * (weights + moments + solving + CHUNK_TOKENS * active)

    return max(map(of, range(len(model.blocks))))


def check_blocks(linears: Mapping[str, tuple[int, int]]) -> None:
    """Raises ValueError listing every linear ([N, K] by path) that fp8's blocks do not divide."""
    bad = {path: shape for path, shape in linears.items() if any(size % BLOCK for size in shape)}
    if bad:
        lines = _lines({path: f"{n} x {k}" for path, (n, k) in bad.items()})
        raise ValueError(f"blocks of {BLOCK} x {BLOCK} do not divide {len(bad)} linears; --weight-scales channel or tensor would:{lines}")


def group_size_of(recipe: Recipe, linears: Mapping[str, tuple[int, int]]) -> int:
    """The group size of every linear ([N, K] by path). Raises ValueError listing all that it does not divide, and the sizes that do."""
    widths = {k for _, k in linears.values()}
    sizes = [size for size in _GROUP_SIZES if all(k % size == 0 for k in widths)]
    if recipe.group_size == "auto":
        if not sizes:
            raise ValueError(
                f"no group size of {', '.join(map(str, _GROUP_SIZES))} divides the inputs {sorted(widths)}: "
                "give --group-size -1, or --ignore some"
            )
        return sizes[0]
    size = recipe.group_size
    if size == -1:
        return -1
    bad = {path: k for path, (_, k) in linears.items() if k % size}
    if bad:
        lines = _lines({path: f"{k} inputs" for path, k in bad.items()})
        offer = f"{', '.join(map(str, sizes))} or -1" if sizes else "-1"
        raise ValueError(f"group size {size} does not divide the inputs of {len(bad)} linears; {offer} would:{lines}")
    return size


def _lines(about: Mapping[str, str]) -> str:
    """A line for each thing that is said of modules; where they are many, those that differ in their numbers alone share one."""
    if len(about) <= _MOST_LINES:
        return "".join(f"\n  {path}: {told}" for path, told in about.items())
    joined: dict[tuple[str, str], int] = {}
    for path, told in about.items():
        key = (re.sub(r"(?<=[.\[])\d+(?=[.\]]|$)", "*", path), told)
        joined[key] = joined.get(key, 0) + 1
    return "".join(f"\n  {path}: {told}" + (f" ({count} of them)" if count > 1 else "") for (path, told), count in joined.items())


def _some(names: Sequence[str], count: int = 6) -> str:
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])
