"""Moments: what calibration keeps of the inputs of a block's sites. Sites that are given one and the same tensor share one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .sites import Site, is_same, watching

KEPT_ROWS = 256
_KEPT_OF_A_CHUNK = 64


class Moments:
    """Sums over the rows x [K] of an input: how many, x x^T, |x| and the largest |x|; some of the rows themselves. float32."""

    def __init__(self, k: int) -> None:
        self.count = 0
        self._products = torch.zeros(k, k)
        self._magnitudes = torch.zeros(k)
        self.largest = torch.zeros(k)
        self._rows: list[Tensor] = []
        self._num_rows = 0

    def add(self, x: Tensor, importance: Tensor | None = None) -> None:
        """More rows, [R, K]. `importance` [R]: how often each counts in x x^T."""
        self.count += len(x)
        if self._num_rows < KEPT_ROWS and len(x):
            some = x[:: max(1, len(x) // _KEPT_OF_A_CHUNK)][: KEPT_ROWS - self._num_rows].clone()
            self._rows.append(some)
            self._num_rows += len(some)
        weighed = x if importance is None else x * importance.sqrt().to(x.device)[:, None]
        self._products.addmm_(weighed.t(), weighed)
        magnitude = x.abs()
        self._magnitudes.add_(magnitude.sum(0))
        if len(x):
            self.largest = torch.maximum(self.largest, magnitude.amax(0))

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T [K, K]; the identity where no row was seen."""
        return self._products / self.count if self.count else torch.eye(len(self._products))

    @property
    def magnitude(self) -> Tensor:
        """Mean of |x| [K]; 1 where no row was seen."""
        return self._magnitudes / self.count if self.count else torch.ones_like(self._magnitudes)

    @property
    def rows(self) -> Tensor:
        """Some of the rows, [R, K]."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, len(self.largest))

    def rescaled(self, factors: Tensor) -> None:
        """The input is now divided by `factors` [K]."""
        self._products.div_(factors[:, None] * factors)
        self._magnitudes.div_(factors)
        self.largest = self.largest / factors
        self._rows = [rows / factors for rows in self._rows]


class Collector:
    """Gathers Moments while a block runs inside `collecting`."""

    def __init__(self, sites: Sequence[Site], importance: Mapping[Site, Tensor] | None = None) -> None:
        """`importance` [S, T] of what sites are given, sample by sample: they share no moments with others."""
        self._wanted = set(sites)
        self._importance = {site: sizes.flatten() for site, sizes in (importance or {}).items()}
        self._next: dict[Site, int] = {}  # the token whose row comes next
        self._shared: dict[Site, Site] = {}  # a site -> the first that was given the same tensor
        self._moments: dict[Site, Moments] = {}
        self._last: tuple[Site, Tensor] | None = None

    def watch(self, site: Site, x: Tensor) -> None:
        """A watcher of sites."""
        if site not in self._wanted:
            return
        if site in self._importance:
            rows = x.reshape(-1, x.shape[-1])
            at = self._next.get(site, 0)
            self._next[site] = at + len(rows)
            self._shared[site] = site
            self._moments.setdefault(site, Moments(rows.shape[1])).add(rows, self._importance[site][at : at + len(rows)])
            return
        first = self._shared.get(site)
        if first is None:
            same = self._last is not None and is_same(self._last[1], x)
            first = self._shared[site] = self._last[0] if same and self._last is not None else site
        if first == site:
            rows = x.reshape(-1, x.shape[-1])
            self._moments.setdefault(site, Moments(rows.shape[1])).add(rows)
            self._last = (site, x)

    def collecting(self, block: nn.Module) -> AbstractContextManager[None]:
        """The context in which `block` is to be run."""
        return watching(block, self.watch)

    def of(self, site: Site, k: int) -> Moments:
        """The moments of a site's input; empty ones for a site that saw nothing."""
        first = self._shared.get(site)
        return Moments(k) if first is None else self._moments[first]

    def groups(self, sites: Sequence[Site]) -> list[list[Site]]:
        """`sites` by the input that they share."""
        by_input: dict[Site, list[Site]] = {}
        for site in sites:
            by_input.setdefault(self._shared.get(site, site), []).append(site)
        return list(by_input.values())
