"""What ranks do together, over torch.distributed: NCCL between GPUs, Gloo between CPUs. Knows no model and no plan.

The process group is no default one: a program may have several engines, and its own uses of torch.distributed.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from .layers.parallel import TensorParallelGroup
from .pipeline import Pipeline, Place, Sending

_LOOPBACK = "lo"  # where ranks of one machine meet: nobody else is to reach them, and a machine's own name may not be known to it
_CONNECT_S = 60.0
COLLECTIVE_S = 1800.0  # the longest wait for another rank, which may read its weights from a slow disk; one that is gone is noticed sooner


def open_store(folder: Path, num_ranks: int, *, address: str | None = None) -> tuple[Store, str]:
    """Where ranks find each other, and what names it. Raises RuntimeError.

    A file in `folder`, which they alone can enter, or a port of this machine's `address`.
    """
    if address is None:
        return FileStore(str(folder / "store"), num_ranks), str(folder / "store")
    store = listening_store(address, 0, timeout_s=COLLECTIVE_S)
    return store, f"{address}:{store.port}"


def listening_store(address: str, port: int, *, timeout_s: float) -> TCPStore:
    """A store on one address of this machine, where left to itself it would listen on all; port 0: any. Raises OSError, RuntimeError."""
    listener = socket.create_server((address, port), backlog=1024)
    return TCPStore(
        address, listener.getsockname()[1], is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s),
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def find_store(name: str, num_ranks: int) -> Store:
    """What the first rank has opened. Raises RuntimeError where it cannot be reached."""
    if name.startswith("/"):
        return FileStore(name, num_ranks)
    host, _, port = name.rpartition(":")
    return TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=_CONNECT_S))


@dataclass(frozen=True)
class Together:
    """What one rank has of the others: those that share its layers, and all."""

    group: TensorParallelGroup
    pipeline: Pipeline
    process_groups: tuple[ProcessGroup, ...]

    def abort(self) -> None:
        """End what this rank waits for, see ProcessGroup.abort."""
        for group in self.process_groups:
            group.abort()


def meet(store: Store, place: Place, *, device: torch.device, timeout_s: float, address: str | None = None) -> Together:
    """Find the other ranks by a store that all of them have. `address` is where those of other machines reach this one.

    Raises RuntimeError where one does not come.
    """
    size = place.tp_size * place.pp_size
    about: dict[str, Any] = {"device": device, "timeout_s": timeout_s, "address": address}
    everyone = ProcessGroup(PrefixStore("all", store), rank=place.rank, size=size, **about)
    sharing = everyone
    groups: tuple[ProcessGroup, ...] = (everyone,)
    if place.pp_size > 1 and place.tp_size > 1:
        own = PrefixStore(f"stage {place.stage}", store)
        sharing = ProcessGroup(own, rank=place.tp_rank, size=place.tp_size, **about)
        groups = (everyone, sharing)
    group = TensorParallelGroup(place.tp_size, place.tp_rank, sharing if place.tp_size > 1 else None)
    return Together(group, Pipeline(place, everyone), groups)


class ProcessGroup:
    """`size` ranks, as layers/parallel.py and pipeline.py want them. Raises RuntimeError where one does not come, or is gone."""

    def __init__(self, store: Store, *, rank: int, size: int, device: torch.device, timeout_s: float, address: str | None = None) -> None:
        self._rank, self._size, self._device = rank, size, device
        timeout = timedelta(seconds=timeout_s)
        store.set_timeout(timeout)
        self._group: Any  # torch's stubs do not know what it can do
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._group = dist.ProcessGroupNCCL(store, rank, size, options)
            self.smallest(0)  # which makes NCCL meet now, as Gloo does by itself
        else:
            options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._timeout = timeout
            where = {"interface": _LOOPBACK} if address is None else {"hostname": address}
            options._devices = [dist.ProcessGroupGloo.create_device(**where)]
            self._group = dist.ProcessGroupGloo(store, rank, size, options)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        self._group.allreduce([tensor]).wait()

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's tensor on the first one, in order; None on the others."""
        parts = [torch.empty_like(tensor) for _ in range(self._size)] if self._rank == 0 else None
        self._group.gather([] if parts is None else [parts], [tensor], _to_first()).wait()
        return parts

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The first rank's tensor, in place."""
        self._group.broadcast([tensor]).wait()

    def send(self, tensor: torch.Tensor, to: int) -> Sending:
        """Begin to send a contiguous tensor to a rank, which receives as many in the same order. It is not to change before `wait`."""
        sending: Sending = self._group.send([tensor], to, 0)
        return sending

    def receive(self, tensor: torch.Tensor, source: int) -> None:
        """What a rank sends next, in place: a contiguous tensor of the same shape and dtype."""
        self._group.recv([tensor], source, 0).wait()

    def abort(self) -> None:
        """End what this rank waits for on a GPU, whose result is then worth nothing; on the CPU, a socket that closes ends it."""
        if self._device.type == "cuda":
            self._group.abort()

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers."""
        held = torch.tensor([number], device=self._device)
        options = dist.AllreduceOptions()
        setting: Any = dist.ReduceOp.MIN  # what it is typed as depends on torch's version
        options.reduceOp = setting
        self._group.allreduce([held], options).wait()
        return int(held.item())


def _to_first() -> dist.GatherOptions:
    options = dist.GatherOptions()
    options.rootRank = 0
    return options
