"""Stages: a block's sites input by input, in the order in which they are solved, so that each makes up for what those before it lost.

Of a stage, the input is seen twice: as the float model gives it, and as the block does with the stages before it quantized. Knows no
method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from .moments import Collector
from .sites import Site, watching

Run = Callable[[], object]


@torch.no_grad()
def see_stage(
    block: nn.Module,
    stage: Sequence[Site],
    plain: Mapping[Site, Tensor],
    solved: Mapping[Site, Tensor],
    importance: Mapping[Site, Tensor],
    runs: Sequence[tuple[Run, Run]],
) -> Collector | None:
    """The moments of the input that the sites of a stage share, and how it goes with the float model's; None where they do not match.

    `runs`, a part of the samples at a time, run the block on the float model's hidden states and on the quantized ones; each is broken off
    when the stage was seen. `plain` and `solved`: float32 weights [N, K] of the stages before, which the block has in the first and in the
    second. `importance` [S, T]: as `Collector` takes it. The block keeps the weights of the last run.
    """
    collector = Collector(stage, importance)
    for run_float, run_quantized in runs:
        _set(block, plain)
        meant = _input(block, stage[0], run_float)
        _set(block, solved)
        if meant is None or not _collect(block, stage, collector, meant, run_quantized):
            return None
    return collector


class _Enough(Exception):  # a signal, caught here
    """All that is wanted was seen."""


def _input(block: nn.Module, site: Site, run: Run) -> Tensor | None:
    """What a site is given first, if it is called at all."""
    found: list[Tensor] = []

    def watch(seen: Site, x: Tensor) -> None:
        if seen == site:
            found.append(x)
            raise _Enough

    with suppress(_Enough), watching(block, watch):
        run()
    return found[0] if found else None


def _collect(block: nn.Module, stage: Sequence[Site], collector: Collector, meant: Tensor, run: Run) -> bool:
    """Whether all sites were given what has the shape of `meant`."""
    left = set(stage)

    def watch(site: Site, x: Tensor) -> None:
        if site in left:
            if x.shape != meant.shape:
                raise _Enough
            collector.watch(site, x, meant)
            left.discard(site)
            if not left:
                raise _Enough

    with suppress(_Enough), watching(block, watch):
        run()
    return not left


def _set(block: nn.Module, weights: Mapping[Site, Tensor]) -> None:
    for site, weight in weights.items():
        site.weight(block).copy_(weight)
