"""The walk through a model's blocks: each is read, measured, solved, saved and let go. Knows which steps a method takes, and no format."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.grouped_linear import dequantize
from .devices import CPU, computing_on, give_back_memory, quick_products
from .eight_bit import input_scale
from .float_model import FloatModel, UnknownArchitectureError
from .folds import Fold, find_folds
from .grid import Grid
from .importance import Importance
from .kv_ranges import KVRanges
from .moments import Collector
from .routers import find_routers
from .sites import Site, find_sites
from .solve import Solved, Steps, apply_scales, rescaled, solve_group
from .stages import see_stage
from .streams import Hidden, Inputs, tensors_on
from .work import BlockResult, WorkFolder

GroupSizes = Callable[[str, int, int], Grid | None]  # module path, N, K -> its grid; None: it stays as it is


@dataclass(frozen=True)
class Structure:
    """What a block was found to be made of."""

    sites: tuple[Site, ...]
    folds: tuple[Fold, ...]
    routers: frozenset[Site]


def structure_of(model: FloatModel, inputs: Inputs, index: int, block: nn.Module, *, with_folds: bool) -> Structure:
    """Sites and folds of a loaded block, found with a random hidden state in place of those of `inputs`' first chunk: a few tokens do."""
    run = _probe(model, inputs, index, block)
    sites = find_sites(block, run)
    routers = frozenset(find_routers(block, sites, run))
    return Structure(tuple(sites), tuple(find_folds(block, sites, run)) if with_folds else (), routers)


def _probe(model: FloatModel, inputs: Inputs, index: int, block: nn.Module) -> Callable[[], Tensor]:
    call = inputs.call(index)
    draw = torch.Generator().manual_seed(index)
    rows = inputs.chunks[0].stop
    hidden = torch.randn(rows, inputs.shape[1], *model.hidden_shape, generator=draw, device=CPU).to(model.device)

    @torch.no_grad()
    def run() -> Tensor:
        out = call.run(block, hidden)
        return out if call.board is None else _with_board(out, call.kwargs[call.board])

    return run


def _with_board(out: Tensor, board: Mapping[str, Any]) -> Tensor:
    """All that hangs on a block's weights, one after the other: what is left for other blocks must not change either. As large as `out`."""
    largest = out.abs().max()
    return torch.cat([out.flatten(), *(part.flatten() * (largest / part.abs().max().clamp(min=1e-30)) for part in tensors_on(board))])


def block_name(index: int) -> str:
    """What a finished block is called in the work folder."""
    return f"block-{index:05}"


class Walk:
    """Two streams of hidden states go through the blocks: the float model's, and that of the blocks as they were quantized.

    `importance` of a block: how much what its sites give counts; all the same without it.
    """

    def __init__(
        self,
        model: FloatModel,
        inputs: Inputs,
        probe: Inputs,
        work: WorkFolder,
        floats: Hidden,
        quantized: Hidden,
        grid_of: GroupSizes,
        importance: Callable[[int], Importance] | None = None,
    ) -> None:
        self._importance_of = importance or (lambda index: Importance())
        self._model, self._inputs, self._probe, self._work, self._grid_of = model, inputs, probe, work, grid_of
        self._floats, self._quantized = floats, quantized
        inputs.start(floats)
        quantized.copy_from(floats)

    def block(self, index: int, steps: Steps) -> BlockResult:
        """Quantize block `index`, or take it from the work folder, and move the streams behind it."""
        name = block_name(index)
        with computing_on(self._model.device):
            block = self._model.load_block(index)
            if self._work.has(name):
                result = self._work.load_block(name)
                if self._probe.call(index).board is not None:
                    _probe(self._model, self._probe, index, block)()  # leaves what later blocks read
                self._advance_floats(index, block)
                put(block, result)
                self._advance_quantized(index, block)
            else:
                result = self._solve(index, block, steps)
                self._work.save_block(name, result)
            self._model.free_block(index)
        give_back_memory()
        return result

    def _solve(self, index: int, block: nn.Module, steps: Steps) -> BlockResult:
        started = time.perf_counter()
        structure = structure_of(self._model, self._probe, index, block, with_folds=steps.scale)
        prefix = self._model.block_prefix(index)
        grids: dict[Site, Grid] = {}
        for site in structure.sites:
            n, k = site.weight(block).shape
            grid = None if site in structure.routers else self._grid_of(prefix + str(site), n, k)
            if grid is not None:
                grids[site] = grid
        known = self._importance_of(index)
        importance = Importance(known.tokens, {site: known.outputs[site] for site in grids if site in known.outputs}).on(self._model.device)
        collector, ranges = Collector(structure.sites, importance.tokens), KVRanges()
        with collector.collecting(block):
            for _ in self._inputs.run(index, block, self._quantized):
                pass
        ranges_of = {site: _ranges(site, block, collector) for site in grids}
        quantized = {site.parameter for site in grids}
        before = {key: value.data.clone() for key, value in block.named_parameters() if steps.scale and key not in quantized}
        stored = {name: self._model.names.stored_as(prefix + name) for name in before}
        scalings = apply_scales(block, structure.folds, collector, grids, stored, steps) if steps.scale else {}
        importance = replace(importance, outputs=rescaled(importance.outputs, structure.folds, scalings))
        solved = self._solved_sites(index, block, collector, grids, steps, importance)
        changed = {
            key: value.data.to(stored[key]).float()
            for key, value in block.named_parameters()
            if key in before and not torch.equal(before[key], value)
        }
        if steps.scale or steps.toward_float:
            block = self._model.load_block(index)
        self._advance_floats(index, block)
        weights = {site: found.weight for site, found in solved.items()}
        modules = {
            prefix + str(site): {"error": found.relative_error, "how": found.how, "tokens": found.num_tokens, **ranges_of[site]}
            for site, found in solved.items()
        }
        ordered = {site: weights[site] for site in structure.sites if site in weights}
        notes: dict[str, Any] = {"modules": modules, "scales": {prefix + name: found.relative_error for name, found in scalings.items()}}
        if steps.static_inputs:
            notes["input_scales"] = [input_scale(collector.of(site, weights[site].in_features)) for site in ordered]
        result = BlockResult(ordered, changed, notes)
        put(block, result)
        with ranges.watching(block) if steps.kv_scales else nullcontext():  # keys and values as they will be: rescaled, quantized
            notes["error"] = self._advance_quantized(index, block)
        if steps.kv_scales:
            names = {module: self._model.names.module(prefix + module) for module in ranges.largest}
            notes["kv_scales"] = {
                f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": scale for name, scale in ranges.scales().items()
            }
        notes["seconds"] = time.perf_counter() - started
        return result

    def _solved_sites(
        self, index: int, block: nn.Module, collector: Collector, grids: Mapping[Site, Grid], steps: Steps, importance: Importance
    ) -> dict[Site, Solved]:
        """What becomes of the sites, which `collector` saw in the block as it is. It may have other weights afterwards."""
        if not steps.toward_float:
            return _solve_sites(block, list(grids), collector, grids, steps, importance)
        run, floats, quantized = self._inputs.run_chunk, self._floats, self._quantized
        runs = [
            (partial(run, i, index, block, floats), partial(run, i, index, block, quantized))
            for i in range(self._inputs.num_chunks(quantized))
        ]
        tokens = quantized.shape[0] * quantized.shape[1]
        found: dict[Site, Solved] = {}
        plain: dict[Site, Tensor] = {}
        values: dict[Site, Tensor] = {}
        for stage in collector.by_input(list(grids)):
            seen = None
            if all(collector.sees_each_token(site, len(runs), tokens) for site in stage):
                seen = see_stage(block, stage, plain, values, importance.tokens, runs)
            if seen is not None:
                collector.forget(stage)
            now = _solve_sites(block, stage, seen or collector, grids, steps, importance)
            plain |= {site: site.weight(block).clone() for site in stage}
            values |= {site: dequantize(now[site].weight) for site in stage}
            found |= now
        return found

    def _advance_floats(self, index: int, block: nn.Module) -> None:
        for _ in self._inputs.advance(index, block, self._floats):
            pass

    def _advance_quantized(self, index: int, block: nn.Module) -> float:
        """Mean squared difference of the streams behind the block, relative to the float one's mean square."""
        off = size = 0.0
        for chunk, out in self._inputs.advance(index, block, self._quantized):
            want = self._floats[chunk]
            off += float((out - want).square().sum(dtype=torch.float64))
            size += float(want.square().sum(dtype=torch.float64))
        return off / size if size else 0.0


def _solve_sites(
    block: nn.Module, sites: Sequence[Site], seen: Collector, grids: Mapping[Site, Grid], steps: Steps, importance: Importance
) -> dict[Site, Solved]:
    found: dict[Site, Solved] = {}
    for group in seen.groups(sites):
        weights = [site.weight(block) for site in group]
        moments, gradients = seen.of(group[0], weights[0].shape[1]), importance.outputs.get(group[0])  # its group is itself alone
        found |= zip(group, solve_group(weights, moments, grids[group[0]], steps, gradients), strict=True)
    return found


def _ranges(site: Site, block: nn.Module, collector: Collector) -> dict[str, float]:
    """The largest |weight| of a site and the largest |x| that it was given, as the model has them."""
    weight = site.weight(block)
    return {"largest_weight": float(weight.abs().max()), "largest_input": float(collector.of(site, weight.shape[1]).largest.max())}


@torch.no_grad()
def put(block: nn.Module, result: BlockResult) -> None:
    """Make a loaded block compute with what became of it."""
    for name, value in result.parameters.items():
        block.get_parameter(name).data.copy_(value)
    for site, weight in result.weights.items():
        target = site.weight(block)
        target.copy_(dequantize(weight.to(target.device)))


@dataclass(frozen=True)
class Survey:
    """What a model's blocks have, by module path: sites and their [N, K], those of them that are stored [K, N]."""

    shapes: Mapping[str, tuple[int, int]]
    transposed: frozenset[str]
    runs_quick: bool  # whether all blocks do in `quick_products`, with the same sites
    left: int  # numbers a token that blocks leave for those after them


def survey(model: FloatModel, inputs: Inputs, ranges: KVRanges) -> Survey:
    """Look at every block, once at those that are alike: parameters and what the checkpoint has for them have the same names and shapes.
    `ranges` sees their attention. Raises UnknownArchitectureError for a block that does not run by itself, or that the checkpoint lacks a
    part of."""
    found: dict[str, tuple[int, int]] = {}
    transposed: set[str] = set()
    runs_quick = True
    known: dict[tuple[Any, ...], list[tuple[Site, tuple[int, int]]]] = {}
    for index, block in enumerate(model.blocks):
        parameters = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        signature = (parameters, model.stored_of(index))
        if signature not in known or inputs.call(index).board is not None:  # of those some read what others leave
            loaded = model.load_block(index)
            try:
                with ranges.watching(loaded):
                    structure = structure_of(model, inputs, index, loaded, with_folds=False)
            except (KeyError, IndexError, AttributeError, TypeError, RuntimeError) as error:  # the block's own code
                name = type(model.module).__name__
                raise UnknownArchitectureError(
                    f"{model.block_prefix(index)[:-1]} of {name} does not run by itself ({type(error).__name__}: {error}): "
                    "it cannot be quantized block by block"
                ) from error
            runs_quick = runs_quick and _runs_quick(_probe(model, inputs, index, loaded), loaded, structure.sites, model.device)
            known[signature] = [
                (site, (site.weight(loaded).shape[0], site.weight(loaded).shape[1]))
                for site in structure.sites
                if site not in structure.routers
            ]
            model.free_block(index)
        prefix = model.block_prefix(index)
        found |= {prefix + str(site): shape for site, shape in known[signature]}
        transposed |= {prefix + str(site) for site, _ in known[signature] if site.transposed}
    first = inputs.call(0)
    left = 0 if first.board is None else sum(part.numel() for part in tensors_on(first.kwargs[first.board]))
    return Survey(found, frozenset(transposed), runs_quick, left // inputs.tokens.numel())


def _runs_quick(run: Callable[[], Tensor], block: nn.Module, sites: Sequence[Site], device: torch.device) -> bool:
    try:
        with quick_products(device):
            return set(find_sites(block, run)) == set(sites) and bool(run().isfinite().all())
    except Exception:  # the block's own code, which may know one dtype alone
        return False
    finally:
        run()  # what it leaves for other blocks is exact again
