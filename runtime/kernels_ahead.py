"""Compiles the GPU kernels of a model, or of all tables of tiles, on a machine without a GPU. Prints nothing but progress.

The model is built on meta tensors, from its configs and the headers of its files. Each kind of linear is called with every number
of rows up to a greatest one, as serving would call it; and whole steps are computed, for attention and what lies between.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from tqdm import tqdm

from ..kernels.gpu.ahead import CannotCompile, Compiled, Compiler, target
from ..kernels.gpu.config import operations, table_architectures
from ..kernels.gpu.device import DEVICES
from ..kernels.gpu.inspection import Expected, KernelReport, faults, inspect
from ..kernels.gpu.launchers import CannotBuild, build_launchers
from ..kernels.paged_attention import plan_attention
from ..kernels.sampling import apply_counted_penalties, count_tokens, greedy_tokens, sample_tokens
from ..quant.build import KernelOptions
from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.resolve import ModelFiles, resolve_model
from ..quant.module_formats import ModuleFormats
from .config import EngineConfig
from .dummy_weights import DummySource
from .forward_batch import ForwardBatch
from .kv_pool import KV_DTYPES, KVPool
from .layers.linear import ParallelLinear
from .layers.parallel import TensorParallelGroup
from .linear_report import LinearReport, check_backend
from .models.config import ModelConfig
from .models.llama import LlamaModel
from .start import die_with_parent
from .weight_dtype import weight_dtype
from .weights import HeaderSource

__all__ = [
    "CannotCompile",
    "architecture",
    "architectures_with",
    "check_operations",
    "compile_model",
    "report_model",
    "report_tables",
    "run_apart",
]

_META = torch.device("meta")
Stored = Mapping[str, frozenset[str]]  # by module: "weight F8_E4M3"
_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class CompiledModel:
    """What was compiled of a model: Triton kernels by name and tile, with how many variants there are of each.

    `num_launchers` is None where they cannot be built, and `launcher_fault` the reason.
    """

    arch: int
    max_rows: int
    linears: LinearReport
    kernels: Counter[tuple[str, str]]
    num_launchers: int | None
    launcher_fault: str | None
    seconds: float


@dataclass(frozen=True, eq=False)
class ReportRow:
    """One kernel, and what is wrong with it. `op` and `max_m` are the table's; None for a model's."""

    report: KernelReport
    faults: tuple[str, ...]
    op: str | None = None
    max_m: int | None = None


def architecture(name: str) -> int:
    """90 for "sm_90". Raises ValueError for one that no kernels are written for."""
    known = {f"sm_{arch}": arch for arch in DEVICES}
    if name not in known:
        raise ValueError(f"--arch {name!r} is not valid: give one of {', '.join(known)}")
    return known[name]


def run_apart(cache_dir: Path, function: Callable[_Given, _Result], *args: _Given.args, **options: _Given.kwargs) -> _Result:
    """Call `function` in a process of its own, where Triton's cache is `cache_dir`: one process compiles for one architecture."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (str(cache_dir),)) as pool:
        try:
            return pool.submit(function, *args, **options).result()
        except BrokenProcessPool as error:
            raise CannotCompile("the compiler's process was killed; is there memory left?") from error


def _begin(cache_dir: str) -> None:
    die_with_parent()
    os.environ["TRITON_CACHE_DIR"] = cache_dir
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to both processes: this one ends without a word


def compile_model(config: EngineConfig, arch: int, *, max_rows: int | None, tp_size: int = 1) -> CompiledModel:
    """Fill Triton's cache with what serving `config` on `arch` launches for 1 to `max_rows` rows, on any of `tp_size` ranks.

    `max_rows` None: the most that a step has with the config. Raises ValueError and its kin for a model that cannot be served there,
    CannotCompile.
    """
    started = time.perf_counter()
    rows = max_rows or most_rows(config)
    with target(arch) as compiler:
        linears = _compile_model(config, compiler, rows, tp_size)
        num_launchers, fault = _launchers(compiler.compiled.values())
    kernels = Counter((compiled.name, compiled.tile) for compiled in compiler.compiled.values())
    return CompiledModel(arch, rows, linears, kernels, num_launchers, fault, time.perf_counter() - started)


def report_model(config: EngineConfig, arch: int, *, max_rows: int | None, tp_size: int = 1) -> tuple[ReportRow, ...]:
    """What the kernels are made of that compile_model compiles."""
    with target(arch) as compiler:
        _compile_model(config, compiler, max_rows or most_rows(config), tp_size)
        bar = _bar(compiler.compiled.values(), "Inspecting", arch)
        reports = [inspect(compiled) for compiled in bar]
    return tuple(ReportRow(report, faults(report, Expected())) for report in reports)


def report_tables(arch: int, *, ops: tuple[str, ...] = ()) -> tuple[ReportRow, ...]:
    """What the kernels are made of that the table for `arch` has entries for; of some operations, or of all.

    Raises ValueError for an operation that it does not have.
    """
    check_operations(arch, ops)
    rows = []
    with target(arch) as compiler:
        from ..kernels.gpu.catalogue import table_entries  # imports Triton, which target has looked for

        for entry in _bar(list(table_entries(arch, ops)), "Compiling", arch):
            seen = set(compiler.compiled)
            for launch in entry.launches(compiler.device):
                launch()
            for compiled in (compiler.compiled[key] for key in compiler.compiled if key not in seen):
                report = replace(inspect(compiled), tile=entry.tile.describe())
                rows.append(ReportRow(report, faults(report, entry.expected(arch)), entry.op, entry.max_m))
    return tuple(rows)


def check_operations(arch: int, ops: tuple[str, ...]) -> None:
    """Raises ValueError for an operation that the table for an architecture does not have."""
    unknown = sorted(set(ops) - set(operations(arch)))
    if unknown:
        raise ValueError(f"--op {unknown[0]!r} is not valid: the table for sm_{arch} has {', '.join(operations(arch))}")


def architectures_with(ops: tuple[str, ...]) -> tuple[int, ...]:
    """Those whose tables have all of these operations; all with a table where none has."""
    return tuple(arch for arch in table_architectures() if set(ops) <= set(operations(arch))) or table_architectures()


def most_rows(config: EngineConfig) -> int:
    """Tokens of the greatest step on a GPU: a chunk of a prompt and one token of every running request."""
    chunk = config.resolve(device="cuda").chunked_prefill_size
    assert chunk is not None
    return chunk + config.max_running_requests


def _launchers(kernels: Iterable[Compiled]) -> tuple[int | None, str | None]:
    try:
        return build_launchers(kernels), None
    except CannotBuild as error:
        return None, str(error)


def _bar(items: Iterable[Any], what: str, arch: int) -> Any:
    return tqdm(items, desc=f"{what} for sm_{arch}", unit="kernel", disable=None, file=sys.stderr)


@torch.inference_mode()
def _compile_model(config: EngineConfig, compiler: Compiler, max_rows: int, tp_size: int) -> LinearReport:
    """Every kind of linear, of every rank, and steps of every kind; gives the report of the first rank's linears."""
    files = resolve_model(config.model_path, revision=config.revision, needs_weights=config.needs_weights)
    done: set[tuple[Any, ...]] = set()
    reports = []
    for rank in range(tp_size):
        model, formats, stored = _model(config, files, TensorParallelGroup(tp_size, rank))
        check_backend(config.linear_backend, model.linears)
        reports.append(LinearReport.of(model.linears, formats.method))
        kinds: dict[tuple[Any, ...], ParallelLinear] = {}
        for linear in model.linears:
            kinds.setdefault((linear is model.embedding, *_kind(linear, stored)), linear)
        new = [linear for kind, linear in kinds.items() if kind not in done]
        done.update(kinds)
        what = f"Compiling for sm_{compiler.device.arch}"
        with tqdm(total=len(new) * max_rows, desc=what, unit="call", disable=None, file=sys.stderr) as bar:
            for linear in new:
                _call(linear, max_rows, bar, rows_too=linear is model.embedding)
        if rank == 0:  # the others' heads are as many
            _compute_steps(config, model, max_rows)
    return reports[0]


def _model(config: EngineConfig, files: ModelFiles, group: TensorParallelGroup) -> tuple[LlamaModel, ModuleFormats, Stored]:
    """The model on meta tensors, with kernels of the target; how it is stored, and by module in which types."""
    described = read_config(files)
    model_config = ModelConfig.from_hf(described)
    dtype = weight_dtype(config, files, model_config)
    options = KernelOptions(config.linear_backend, allow_reference=True, deterministic=config.deterministic)
    if not config.needs_weights:
        formats = ModuleFormats(files, described, {}, quantization=config.quantization)
        dummy = DummySource(
            formats,
            weight_dtype=dtype,
            activation_dtype=dtype,
            device=_META,
            kernel_options=options,
            has_head=not model_config.tie_word_embeddings,
        )
        with dummy:
            return LlamaModel(model_config, dummy, max_position=1, group=group), formats, {}
    reader = open_reader(files)
    stored: dict[str, set[str]] = {}
    for name, info in reader.tensors().items():
        module, _, last = name.rpartition(".")
        stored.setdefault(module, set()).add(f"{last} {info.stored}")
    formats = ModuleFormats(files, described, reader.tensors(), quantization=config.quantization)
    source = HeaderSource(
        reader, formats, weight_dtype=dtype, activation_dtype=dtype, device=_META, kernel_options=options, show_progress=False
    )
    with source:
        model = LlamaModel(model_config, source, max_position=1, group=group)
    return model, formats, {module: frozenset(types) for module, types in stored.items()}


def _kind(linear: ParallelLinear, stored: Stored) -> tuple[Any, ...]:
    """Equal for linears that launch the same kernels."""
    kernels = tuple((type(built.kernel), replace(built.spec, name=""), built.start, built.kernel.weight_bytes) for built in linear.kernels)
    return (kernels, tuple(stored.get(module) for module in linear.shape.sources))


def _call(linear: ParallelLinear, max_rows: int, bar: Any, *, rows_too: bool) -> None:
    """Call a linear with every number of rows; an embedding is asked for its rows too."""
    kernels = [built for built in linear.kernels if not built.kernel.is_reference]
    dtype = linear.kernels[0].spec.activation_dtype
    x = torch.empty(max_rows, linear.in_features, dtype=dtype, device=_META)
    out = torch.empty(max_rows, linear.out_features, dtype=dtype, device=_META)
    indices = torch.empty(max_rows, dtype=torch.int64, device=_META)
    for rows in range(1, max_rows + 1):
        for built in kernels:
            built.kernel(x[:rows], out=out[:rows, built.start : built.stop])
        if rows_too and kernels:
            linear.rows(indices[:rows])
        bar.update()


def _compute_steps(config: EngineConfig, model: LlamaModel, max_rows: int) -> None:
    """Steps of as many sequences as make a difference, one of them with a second token: so decoding and prompts are both there."""
    # References cannot be computed without data: of linears, and of attention where activations are float32.
    if model.activation_dtype == torch.float32 or any(built.kernel.is_reference for linear in model.linears for built in linear.kernels):
        return
    page_size, dtype = config.resolve(device="cuda").page_size, model.activation_dtype
    kv_dtype = KV_DTYPES.get(config.kv_cache_dtype, dtype)
    layer = model.layers[0]
    pool = KVPool(
        num_pages=2, page_size=page_size, num_layers=len(model.layers), num_kv_heads=layer.kv_heads, head_dim=model.config.head_dim,
        dtype=kv_dtype, device=_META,
    )  # fmt: skip

    def whole(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=_META)

    num_sequences = 1
    while num_sequences < min(2 * config.max_running_requests, max_rows):
        tokens = min(num_sequences + 1, max_rows)
        plan = plan_attention(
            whole(num_sequences + 1, dtype=torch.int32), whole(num_sequences, dtype=torch.int32),
            whole(num_sequences, 8, dtype=torch.int32), num_heads=layer.heads, num_kv_heads=layer.kv_heads,
            head_dim=model.config.head_dim, kv_dtype=kv_dtype, num_tokens=tokens, deterministic=config.deterministic,
        )  # fmt: skip
        batch = ForwardBatch(whole(tokens), whole(tokens), whole(tokens), plan, whole(num_sequences))
        model.forward(batch, pool, model.make_workspace(tokens))
        num_sequences *= 2
    _sample(model.config.vocab_size)


def _sample(vocab: int) -> None:
    """Draw from two rows in every way there is: greedily, with each filter, with penalties."""

    def column(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.empty(2, *shape, dtype=dtype, device=_META)

    logits, floats, ints = column(torch.float32, vocab), column(torch.float32), column(torch.int32)
    tokens = greedy_tokens(logits)
    for top_k, top_p in ((None, None), (ints, None), (None, floats), (ints, floats)):
        sample_tokens(logits, floats, top_k=top_k, top_p=top_p, uniform=column(torch.float64))
    counts = column(torch.int32, vocab)
    apply_counted_penalties(logits, counts, ints, ints, column(torch.float32, 3))
    count_tokens(tokens, counts, ints, ints)
