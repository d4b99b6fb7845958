"""Sites: where a block multiplies an activation with one of its parameters, found by watching it run. Knows no architecture.

A site is a parameter, or one expert of a three-dimensional one, whatever module holds it: nn.Linear, Conv1D, a plain parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_LINEAR = {torch.nn.functional.linear}
_ADDED = {torch.addmm, Tensor.addmm, torch.baddbmm, Tensor.baddbmm}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm}


@dataclass(frozen=True, order=True)
class Site:
    """`y = x @ W.T` with W [N, K] = the parameter, or `parameter[expert]`; `transposed`: stored as [K, N]."""

    parameter: str  # its name in the block
    expert: int | None = None
    transposed: bool = False

    def weight(self, block: nn.Module) -> Tensor:
        """W [N, K] as a view: what is written to it changes the block."""
        return self.part(block.get_parameter(self.parameter).data)

    def part(self, whole: Tensor) -> Tensor:
        """[N, K] of what has the parameter's shape, such as its gradient, as a view."""
        own = whole if self.expert is None else whole[self.expert]
        return own.t() if self.transposed else own

    def __str__(self) -> str:
        path = self.parameter.removesuffix(".weight")
        return path if self.expert is None else f"{path}[{self.expert}]"


Watcher = Callable[[Site, Tensor], None]  # a site and its input [..., K], or its output [..., N]


def _storage_of(tensor: Tensor) -> int:
    """What tensors share that are views of one another."""
    return int(tensor.untyped_storage()._cdata)


def _span(tensor: Tensor) -> int:
    """How many numbers of its memory a tensor reaches over."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def is_same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same part of the same memory."""
    return bool(_storage_of(a) == _storage_of(b) and a.storage_offset() == b.storage_offset() and a.shape == b.shape)


class _Watch(TorchFunctionMode):
    def __init__(self, block: nn.Module, watcher: Watcher, outputs: bool) -> None:
        super().__init__()
        self._by_storage: dict[int, list[tuple[str, Tensor]]] = {}  # several where one tensor of the checkpoint was cut into them
        for name, parameter in block.named_parameters():
            if parameter.dim() in (2, 3):
                self._by_storage.setdefault(_storage_of(parameter), []).append((name, parameter))
        self._watcher, self._outputs = watcher, outputs

    def __torch_function__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        x: Any = None
        sites: list[Site] = []
        if func in _LINEAR:
            x = args[0] if args else (kwargs or {})["input"]
            sites = self._sites(x, args[1] if len(args) > 1 else (kwargs or {})["weight"])
        elif (func in _PRODUCTS and len(args) == 2) or (func in _ADDED and len(args) == 3):
            x, weight = args[-2:]
            sites = self._sites(x, weight.mT if isinstance(weight, Tensor) and weight.dim() > 1 else None)
        if not self._outputs:
            self._tell(sites, x)
        out = func(*args, **(kwargs or {}))
        if self._outputs:
            self._tell(sites, out)
        return out

    def _sites(self, x: Any, weight: Any) -> list[Site]:
        """One; or of weights [E, N, K], where x is [E, T, K], every expert's."""
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or x.is_meta:
            return []
        at = weight.storage_offset()
        near = [
            (name, held) for name, held in self._by_storage.get(_storage_of(weight), ()) if 0 <= at - held.storage_offset() < _span(held)
        ]
        if not near:
            return []
        name, parameter = near[0]
        if weight.dim() > parameter.dim() or weight.dim() < 2:
            return []
        transposed = weight.stride(-1) != 1
        if weight.dim() == 3:
            return [Site(name, expert, transposed) for expert in range(weight.shape[0])]
        if parameter.dim() == 3:
            whole = weight.numel() * parameter.shape[0] == parameter.numel()
            return [Site(name, int(at - parameter.storage_offset()) // parameter.stride(0), transposed)] if whole else []
        return [Site(name, None, transposed)] if weight.numel() == parameter.numel() else []

    def _tell(self, sites: Sequence[Site], rows: Tensor) -> None:
        every = bool(sites) and sites[0].expert is not None and rows.dim() == 3 and len(rows) == len(sites)
        for number, site in enumerate(sites):
            self._watcher(site, rows[number] if every else rows)


@contextmanager
def watching(block: nn.Module, watcher: Watcher, *, outputs: bool = False) -> Iterator[None]:
    """Inside, `watcher` is told of every product of an activation with a parameter of `block`, whose weights must be loaded: of the
    activation, or of the product."""
    with _Watch(block, watcher, outputs):
        yield


def find_sites(block: nn.Module, run: Callable[[], Tensor]) -> list[Site]:
    """The sites that `run()` passes, in the order in which it first does; all experts of a parameter where it passes one of them."""
    seen: dict[Site, None] = {}
    with watching(block, lambda site, _: seen.setdefault(site)), torch.no_grad():
        run()
    sites: dict[Site, None] = {}
    for site in seen:
        if site.expert is None:
            sites.setdefault(site)
        else:
            for expert in range(block.get_parameter(site.parameter).shape[0]):
                sites.setdefault(Site(site.parameter, expert, site.transposed))
    return list(sites)
