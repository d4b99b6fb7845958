"""Folds: where a block can be rescaled without changing what it computes, found by trying. Knows no architecture.

A feeder (a norm, or a linear) is scaled by random factors, output by output, and every site is watched. Where each channel of an input
then grew by one of the factors, that input is a copy of the feeder's output; where dividing the readers' columns by those factors
restores the block's output, nothing else reads it. Under grouped-query attention several heads of o_proj so read one of v_proj's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .devices import CPU
from .sites import Site, watching

FeederKind = Literal["norm", "norm plus one", "linear"]
_TOLERANCE = 2e-3  # of a ratio, in float32; factors lie further apart than that for the few hundred channels compared at once
_SAME = 1e-4  # of the block's output, relative to its largest value
_MAX_FACTOR = 2.0


@dataclass(frozen=True, eq=False)
class Fold:
    """A part of a feeder's outputs may be divided by factors [R] when column k of every reader is multiplied by factor `source[k]`.

    `feeder` is the parameter's name in the block; "norm plus one" is a norm that multiplies with 1 + its weight. `start` to `stop`: the
    outputs that are read so, all of them but in fused linears.
    """

    feeder: str
    kind: FeederKind
    transposed: bool  # a linear stored as [K, N]
    start: int
    stop: int
    readers: tuple[Site, ...]
    source: Tensor  # int64 [K]

    def apply(self, block: nn.Module, factors: Tensor, *, stored: torch.dtype | None = None) -> Tensor:
        """Divide the feeder's outputs by `factors` float32 [R] and multiply the readers' columns by them; gives the factors taken.

        With `stored`, a norm's weight is rounded to it, and the readers make up for that.
        """
        factors = factors if stored is None or self.kind == "linear" else self._exact(block, factors, stored)
        whole = torch.ones(block.get_parameter(self.feeder).shape[-1 if self.transposed else 0])
        whole[self.start : self.stop] = 1 / factors
        _scale_feeder(block, self.feeder, self.kind, self.transposed, whole)
        if stored is not None and self.kind != "linear":
            weight = block.get_parameter(self.feeder).data
            weight.copy_(weight.to(stored))  # from the last bit of float32, see _exact
        for site in self.readers:
            site.weight(block).mul_(factors[self.source])
        return factors

    def _exact(self, block: nn.Module, factors: Tensor, stored: torch.dtype) -> Tensor:
        """Factors near those given under which the divided norm is exact in `stored`."""
        weight = block.get_parameter(self.feeder).data
        one = 1.0 if self.kind == "norm plus one" else 0.0
        rounded = ((weight + one) / factors - one).to(stored).float() + one
        return torch.where(rounded != 0, (weight + one) / rounded, factors)

    @property
    def num_factors(self) -> int:
        return self.stop - self.start


def _scale_feeder(block: nn.Module, name: str, kind: FeederKind, transposed: bool, factors: Tensor) -> None:
    """Multiply a feeder's outputs by `factors`, its bias included."""
    weight = block.get_parameter(name).data
    if kind == "norm plus one":
        weight.add_(1).mul_(factors).sub_(1)
    elif kind == "norm" or transposed:
        weight.mul_(factors)
    else:
        weight.mul_(factors[:, None])
    bias = getattr(block.get_submodule(name.rpartition(".")[0]), "bias", None) if name.endswith("weight") else None
    if isinstance(bias, Tensor):
        bias.data.mul_(factors)


def find_folds(block: nn.Module, sites: Sequence[Site], run: Callable[[], Tensor]) -> list[Fold]:
    """The folds of a block whose weights are loaded. `run()` runs it on some random hidden state and gives its output; weights are
    changed for the trials and restored bit for bit."""
    probe = _Probe(block, sites, run)
    found = []
    for name, kinds, transposed in _candidates(block, sites):
        for kind in kinds:
            fold = probe.try_feeder(name, kind, transposed)
            if fold is not None:
                found.append(fold)
                break
    return found


def _candidates(block: nn.Module, sites: Sequence[Site]) -> list[tuple[str, tuple[FeederKind, ...], bool]]:
    norms: list[tuple[str, tuple[FeederKind, ...], bool]] = [
        (f"{name}.weight", ("norm", "norm plus one"), False)
        for name, module in block.named_modules()
        if isinstance(weight := getattr(module, "weight", None), nn.Parameter) and weight.dim() == 1
    ]
    return norms + [(site.parameter, ("linear",), site.transposed) for site in sites if site.expert is None]


class _Probe:
    def __init__(self, block: nn.Module, sites: Sequence[Site], run: Callable[[], Tensor]) -> None:
        self._block, self._sites, self._run = block, sites, run
        self._output, self._inputs = self._watch()

    @torch.no_grad()
    def _watch(self) -> tuple[Tensor, dict[Site, Tensor]]:
        inputs: dict[Site, list[Tensor]] = {}
        with watching(self._block, lambda site, x: inputs.setdefault(site, []).append(x.reshape(-1, x.shape[-1]).clone())):
            output = self._run()
        return output, {site: torch.cat(parts) for site, parts in inputs.items()}

    def try_feeder(self, name: str, kind: FeederKind, transposed: bool) -> Fold | None:
        count = self._block.get_parameter(name).shape[-1 if transposed else 0]
        for start, stop in self._parts(count, kind):
            fold = self._try_part(name, kind, transposed, count, start, stop)
            if fold is not None:
                return fold
        return None

    def _parts(self, count: int, kind: FeederKind) -> list[tuple[int, int]]:
        """All outputs, and where up_proj and v_proj lie when they are fused with others: behind gate_proj, behind q_proj and k_proj."""
        parts = [(0, count)]
        if kind == "linear":
            sizes = {len(x[0]) for x in self._inputs.values()}
            parts += [((count + k) // 2, count) for k in sorted(sizes) if k < count and (count - k) % 2 == 0]
            parts += [(count // 2, count)] * (count % 2 == 0) + [(0, count // 2)] * (count % 2 == 0)
        return list(dict.fromkeys(parts))

    def _try_part(self, name: str, kind: FeederKind, transposed: bool, count: int, start: int, stop: int) -> Fold | None:
        draw = torch.Generator().manual_seed(0)
        factors = _MAX_FACTOR ** (
            torch.randperm(stop - start, generator=draw, device=CPU).to(self._output.device).float() / max(stop - start - 1, 1) * 2 - 1
        )
        whole = torch.ones(count)
        whole[start:stop] = factors
        kept = self._saved([name])
        _scale_feeder(self._block, name, kind, transposed, whole)
        _, inputs = self._watch()
        self._restore(kept)
        sources = {site: source for site, x in inputs.items() if (source := self._source(site, x, factors)) is not None}
        if not sources:
            return None
        first, source = next(iter(sources.items()))
        parameters = {site.parameter for site in sources} | self._experts_fed_like(first)
        if name in parameters or any(not torch.equal(source, other) for other in sources.values()):
            return None
        readers = tuple(site for site in self._sites if site.parameter in parameters)  # experts that this probe did not reach too
        fold = Fold(name, kind, transposed, start, stop, readers, source)
        return fold if self._holds(fold, factors) else None

    def _experts_fed_like(self, site: Site) -> set[str]:
        """Parameters whose experts were each given some rows of a site's input: what they get changes when their router is scaled."""
        rows = self._inputs[site]
        known = {row.numpy().tobytes() for row in rows.to(CPU)}
        found = set()
        for other, x in self._inputs.items():
            if (
                other.expert is not None
                and x.shape[1] == rows.shape[1]
                and len(x)
                and all(row.numpy().tobytes() in known for row in x.to(CPU))
            ):
                found.add(other.parameter)
        return found

    def _source(self, site: Site, x: Tensor, factors: Tensor) -> Tensor | None:
        """For each channel of a site's input the feeder's output that it copies; None where some channel copies none."""
        before = self._inputs.get(site)
        if before is None or before.shape != x.shape or not len(x):
            return None
        energy = before.square().sum(0)
        ratio = (before * x).sum(0) / energy.clamp(min=1e-30)
        off = (x - before * ratio).abs().amax(0) / before.abs().amax(0).clamp(min=1e-30)
        if float(off.max()) > _TOLERANCE or float((ratio - 1).abs().max()) < _TOLERANCE:
            return None
        ordered, where = factors.sort()
        at = (
            torch.searchsorted(ordered, ratio).clamp(1, len(ordered) - 1)
            if len(ordered) > 1
            else torch.zeros(len(ratio), dtype=torch.int64)
        )
        if len(ordered) > 1:
            at = torch.where((ordered[at] - ratio).abs() < (ordered[at - 1] - ratio).abs(), at, at - 1)
        if float((ordered[at] / ratio - 1).abs().max()) > _TOLERANCE:
            return None
        return where[at]

    def _holds(self, fold: Fold, factors: Tensor) -> bool:
        """Whether the block computes the same with the fold as without."""
        kept = self._saved([fold.feeder, *{site.parameter for site in fold.readers}])
        fold.apply(self._block, factors)
        output, _ = self._watch()
        self._restore(kept)
        return float((output - self._output).abs().max()) <= _SAME * float(self._output.abs().max())

    def _saved(self, names: Sequence[str]) -> dict[str, Tensor]:
        parameters = dict(self._block.named_parameters())
        for name in list(names):
            bias = name.removesuffix("weight") + "bias"
            if name.endswith("weight") and bias in parameters:
                names = [*names, bias]
        return {name: parameters[name].data.clone() for name in names}

    def _restore(self, kept: dict[str, Tensor]) -> None:
        for name, value in kept.items():
            self._block.get_parameter(name).data.copy_(value)
