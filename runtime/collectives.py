"""What the ranks of an engine do together, over torch.distributed: NCCL between GPUs, Gloo between CPUs. Knows no model and no plan.

The process group is no default one: a program may have several engines, and its own uses of torch.distributed.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

_LOOPBACK = "lo"  # where ranks of one machine meet: nobody else is to reach them, and a machine's own name may not be known to it


def open_store(folder: Path, num_ranks: int) -> FileStore:
    """Where the ranks of one machine find each other: a file in `folder`, which they alone can enter. Raises RuntimeError."""
    return FileStore(str(folder / "store"), num_ranks)


class ProcessGroup:
    """Collectives (see runtime/layers/parallel.py) of `size` ranks. Raises RuntimeError where one does not come, or is gone."""

    def __init__(self, store: FileStore, *, rank: int, size: int, device: torch.device, timeout_s: float) -> None:
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
            options._devices = [dist.ProcessGroupGloo.create_device(interface=_LOOPBACK)]
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

    def abort(self) -> None:
        """End what this rank waits for on a GPU, whose result is then worth nothing; on the CPU, a socket that closes ends it."""
        if self._device.type == "cuda":
            self._group.abort()

    def smallest(self, number: int) -> int:
        """The least of the ranks' numbers."""
        held = torch.tensor([number], device=self._device)
        options = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.MIN  # type: ignore[assignment]
        self._group.allreduce([held], options).wait()
        return int(held.item())


def _to_first() -> dist.GatherOptions:
    options = dist.GatherOptions()
    options.rootRank = 0
    return options
