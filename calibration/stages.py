"""Stages: a block's sites in the order in which they are solved, so that each makes up for what those before it lost. Knows no method.

Of a stage, inputs are seen twice: as the float model gives them, and as the block does with the stages before it quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial

from torch import Tensor, nn

from .moments import Collector
from .sites import Site, watching


def stages_of(by_input: Sequence[Sequence[Site]], block: nn.Module) -> list[list[Site]]:
    """Sites that share an input are of one stage, and so are those that differ in nothing but numbers in their names, such as experts."""
    stages: list[tuple[set[object], list[Site]]] = []
    for sites in by_input:
        kinds: set[object] = {(re.sub(r"\d+", "*", site.parameter), site.weight(block).shape) for site in sites}
        same = [stage for stage in stages if stage[0] & kinds]
        for stage in same[1:]:
            same[0][0].update(stage[0])
            same[0][1].extend(stage[1])
            stages.remove(stage)
        if same:
            same[0][0].update(kinds)
            same[0][1].extend(sites)
        else:
            stages.append((kinds, list(sites)))
    return [sites for _, sites in stages]


def see_stage(
    block: nn.Module,
    stage: Sequence[Site],
    plain: Mapping[Site, Tensor],
    solved: Mapping[Site, Tensor],
    importance: Mapping[Site, Tensor],
    runs: Sequence[tuple[Callable[[], object], Callable[[], object]]],
) -> Collector:
    """The moments of what the sites of a stage are given, and how they go with what the float model gives.

    `runs`, a part of the samples at a time, run the block on the float model's hidden states and on the quantized ones. `plain` and
    `solved` [N, K]: weights of the sites of the stages before, which the block has in the first and in the second. Each site must see
    each token once: a run is broken off when all have.
    """
    collector = Collector(stage, importance)
    for run_float, run_quantized in runs:
        meant: dict[Site, Tensor] = {}
        _set(block, plain)
        _watched(block, stage, meant.__setitem__, run_float)
        _set(block, solved)
        _watched(block, stage, partial(_tell, collector, meant), run_quantized)
    return collector


def _tell(collector: Collector, meant: Mapping[Site, Tensor], site: Site, x: Tensor) -> None:
    collector.watch(site, x, meant[site])


class _Enough(Exception):  # a signal, caught here
    """All sites were seen."""


def _watched(block: nn.Module, stage: Sequence[Site], watcher: Callable[[Site, Tensor], object], run: Callable[[], object]) -> None:
    left = set(stage)

    def watch(site: Site, x: Tensor) -> None:
        if site in left:
            watcher(site, x)
            left.discard(site)
            if not left:
                raise _Enough

    with suppress(_Enough), watching(block, watch):
        run()


def _set(block: nn.Module, weights: Mapping[Site, Tensor]) -> None:
    for site, weight in weights.items():
        site.weight(block).copy_(weight)
