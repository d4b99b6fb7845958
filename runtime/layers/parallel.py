"""TensorParallelGroup: the ranks that share one layer, and what each holds. Of size 1 it does nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TensorParallelGroup:
    """`size` ranks, of which this is number `rank`."""

    size: int = 1
    rank: int = 0

    def share(self, what: str, count: int) -> int:
        """How many of `count` a rank holds. Raises ValueError when they do not divide, naming sizes that work."""
        if count % self.size:
            legal = [size for size in range(1, count + 1) if count % size == 0]
            raise ValueError(
                f"{what} ({count}) cannot be split over {self.size} ranks: sizes that work are {', '.join(map(str, legal[:12]))}"
            )
        return count // self.size

    def slice_of(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's equal part of `tensor` along `dim`."""
        part = self.share(f"dimension {dim} of a tensor {tuple(tensor.shape)}", tensor.shape[dim])
        return tensor.narrow(dim, self.rank * part, part)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place. On meta tensors, which kernels are compiled ahead with, nothing is there to be summed."""
        if self.size > 1 and not tensor.is_meta:
            torch.distributed.all_reduce(tensor)
        return tensor
