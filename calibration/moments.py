"""Moments: what calibration keeps of the inputs of a block's sites. Sites that are given one and the same tensor share one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from .devices import exact_products
from .sites import Site, is_same, watching

KEPT_ROWS = 256
_KEPT_OF_A_CHUNK = 64


class Moments:
    """Sums over the rows x [K] of an input: how many, x x^T, |x| and the largest |x|; some of the rows themselves. float32.

    And m x^T, where it is known of each row what the float model has in its place, m.
    """

    def __init__(self, k: int) -> None:
        self.count = 0
        self._products = torch.zeros(k, k)
        self._crossed: Tensor | None = None
        self._magnitudes = torch.zeros(k)
        self.largest = torch.zeros(k)
        self._rows: list[Tensor] = []
        self._num_rows = 0

    def add(self, x: Tensor, importance: Tensor | None = None, meant: Tensor | None = None) -> None:
        """More rows, [R, K]. `importance` [R]: how often each counts in products. `meant` [R, K]: the float model's, always or never."""
        self.count += len(x)
        if self._num_rows < KEPT_ROWS and len(x):
            some = x[:: max(1, len(x) // _KEPT_OF_A_CHUNK)][: KEPT_ROWS - self._num_rows].clone()
            self._rows.append(some)
            self._num_rows += len(some)
        weighed = x if importance is None else x * importance.sqrt().to(x.device)[:, None]
        self._products.addmm_(weighed.t(), weighed)
        if meant is not None:
            if self._crossed is None:
                self._crossed = torch.zeros_like(self._products)
            self._crossed.addmm_((meant if importance is None else meant * importance.to(x.device)[:, None]).t(), x)
        magnitude = x.abs()
        self._magnitudes.add_(magnitude.sum(0))
        if len(x):
            self.largest = torch.maximum(self.largest, magnitude.amax(0))

    @property
    def hessian(self) -> Tensor:
        """Mean of x x^T [K, K]; the identity where no row was seen."""
        return self._products / self.count if self.count else torch.eye(len(self._products))

    @property
    def crossed(self) -> Tensor | None:
        """Mean of m x^T [K, K], where m is what the float model has in the place of x; None where that is not known."""
        return None if self._crossed is None else self._crossed / self.count

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
        self._calls: Counter[Site] = Counter()
        self._rows: Counter[Site] = Counter()
        self._shared: dict[Site, Site] = {}  # a site -> the first that was given the same tensor
        self._owners: dict[Site, Site] = {}  # of those that share a tensor the first -> the first whose tokens count the same
        self._moments: dict[Site, Moments] = {}
        self._last: tuple[Site, Tensor] | None = None

    def watch(self, site: Site, x: Tensor, meant: Tensor | None = None) -> None:
        """A watcher of sites. `meant`, of x's shape: what the float model gives the site in the place of x."""
        if site not in self._wanted:
            return
        rows, at = x.reshape(-1, x.shape[-1]), self._rows[site]
        self._calls[site] += 1
        self._rows[site] += len(rows)
        first = self._shared.get(site)
        if first is None:
            same = self._last is not None and is_same(self._last[1], x)
            first = self._shared[site] = self._last[0] if same and self._last is not None else site
        if first == site:
            self._last = (site, x)
        if self._owner(site) != site:
            return
        with exact_products(x.device):
            importance = self._importance[site][at : at + len(rows)] if site in self._importance else None
            wanted = None if meant is None else meant.reshape(rows.shape).float()
            self._moments.setdefault(site, Moments(rows.shape[1])).add(rows.float(), importance, wanted)

    def _owner(self, site: Site) -> Site:
        """Whose moments are those of a site that was seen."""
        return site if site in self._importance else self._owners.setdefault(self._shared[site], site)

    def collecting(self, block: nn.Module) -> AbstractContextManager[None]:
        """The context in which `block` is to be run."""
        return watching(block, self.watch)

    def of(self, site: Site, k: int) -> Moments:
        """The moments of a site's input; empty ones for a site that saw nothing."""
        return self._moments[self._owner(site)] if site in self._shared else Moments(k)

    def forget(self, sites: Sequence[Site]) -> None:
        """Let the moments of sites go, and of those that share them."""
        for site in sites:
            self._moments.pop(self._owner(site), None)

    def sees_each_token(self, site: Site, calls: int, rows: int) -> bool:
        """Whether a site was given a row for each token: `rows` in `calls` of the block. One of an expert is not."""
        return site.expert is None and (self._calls[site], self._rows[site]) == (calls, rows)

    def groups(self, sites: Sequence[Site]) -> list[list[Site]]:
        """`sites` by the moments that they share."""
        return _grouped(sites, lambda site: self._owner(site) if site in self._shared else site)

    def by_input(self, sites: Sequence[Site]) -> list[list[Site]]:
        """`sites` by the input that they share, whatever counts for them."""
        return _grouped(sites, lambda site: self._shared.get(site, site))


def _grouped(sites: Sequence[Site], first: Callable[[Site], Site]) -> list[list[Site]]:
    found: dict[Site, list[Site]] = {}
    for site in sites:
        found.setdefault(first(site), []).append(site)
    return list(found.values())
