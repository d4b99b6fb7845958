"""Routers: the linears of a block that choose experts. They stay as they are. Knows no architecture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from .devices import CPU
from .sites import Site, watching


def find_routers(block: nn.Module, sites: Sequence[Site], run: Callable[[], Tensor]) -> list[Site]:
    """The sites, of a block whose weights are loaded, that decide which rows an expert sees.

    Candidates have as many outputs as there are experts and lie beside them. With its rows turned round, a router sends rows elsewhere.
    Where every expert computes every row anyway, all candidates count. `run()` runs the block on some random hidden state; weights are
    restored bit for bit.
    """
    experts = [site for site in sites if site.expert is not None]
    if not experts:
        return []
    counts = {block.get_parameter(site.parameter).shape[0] for site in experts}
    beside = _module_around({site.parameter for site in experts})
    candidates = [
        site
        for site in sites
        if site.expert is None and site.weight(block).shape[0] in counts and site.parameter.split(".")[: len(beside)] == beside
    ]
    if not candidates:
        return []
    before = _rows_of_experts(block, run)
    if any(len({rows for site, rows in before.items() if site.parameter == name}) == 1 for name in {site.parameter for site in before}):
        return candidates
    return [site for site in candidates if _is_felt(before, _turned_round(block, site, run), strictly=not beside)]


def _module_around(parameters: Collection[str]) -> list[str]:
    """The path of the module that holds what holds these parameters."""
    holders = [name.split(".")[:-1] for name in parameters]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*holders, strict=False))]
    return common[:-1] if common in holders else common


Rows = Mapping[Site, tuple[bytes, ...]]


def _is_felt(before: Rows, after: Rows, *, strictly: bool) -> bool:
    """Whether experts were given other rows, `strictly` the same rows dealt out in another way: what comes before a router changes them."""
    same = {row for rows in before.values() for row in rows} == {row for rows in after.values() for row in rows}
    return after != before and (same or not strictly)


@torch.no_grad()
def _rows_of_experts(block: nn.Module, run: Callable[[], Tensor]) -> Rows:
    seen: dict[Site, list[bytes]] = {}

    def watch(site: Site, x: Tensor) -> None:
        if site.expert is not None:
            seen.setdefault(site, []).extend(row.numpy().tobytes() for row in x.reshape(-1, x.shape[-1]).to(CPU))

    with watching(block, watch):
        run()
    return {site: tuple(sorted(rows)) for site, rows in seen.items()}


def _turned_round(block: nn.Module, site: Site, run: Callable[[], Tensor]) -> Rows:
    weight = site.weight(block)
    kept = weight.clone()
    weight.copy_(kept.flip(0))
    try:
        return _rows_of_experts(block, run)
    finally:
        weight.copy_(kept)
