"""TensorParallelGroup: the ranks that share one layer, and what each holds. Of size 1 it does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

_VOCABULARY_UNIT = 32  # rows of a vocabulary that stay together: packed formats store up to so many as one


class Collectives(Protocol):
    """What ranks do together. Every rank calls the same ones in the same order. Tensors are contiguous, and alike on all ranks."""

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        ...

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor] | None:
        """Every rank's tensor on the first one, in order; None on the others."""
        ...

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The first rank's tensor, in place."""
        ...


@dataclass(frozen=True)
class HeadShare:
    """What a rank holds of attention: heads, and key-value heads from number `first_kv_head` on, which `copies` ranks hold as well."""

    heads: int
    kv_heads: int
    first_kv_head: int
    copies: int


@dataclass(frozen=True)
class TensorParallelGroup:
    """`size` ranks, of which this is number `rank`. Without `collectives` it knows its share and nothing is summed (meta tensors)."""

    size: int = 1
    rank: int = 0
    collectives: Collectives | None = None

    def heads(self, num_heads: int, num_kv_heads: int) -> HeadShare:
        """This rank's heads. Key-value heads that are fewer than ranks lie on several. Raises ValueError where they cannot be shared."""
        if num_heads % self.size or (num_kv_heads % self.size and self.size % num_kv_heads):
            raise ValueError(f"{num_heads} attention heads with {num_kv_heads} key-value heads cannot be shared by {self.size} ranks")
        copies = max(1, self.size // num_kv_heads)
        kv_heads = max(1, num_kv_heads // self.size)
        return HeadShare(num_heads // self.size, kv_heads, self.rank // copies * kv_heads, copies)

    def vocabulary_share(self, size: int) -> int:
        """Rows of a vocabulary that each rank has room for; the last ones may hold fewer."""
        share = -(-size // self.size)
        rounded = -(-share // _VOCABULARY_UNIT) * _VOCABULARY_UNIT
        return rounded if rounded * (self.size - 1) < size else share

    def vocabulary(self, size: int) -> tuple[int, int]:
        """The first row of this rank's part of a vocabulary, and the row after its last."""
        share = self.vocabulary_share(size)
        return min(self.rank * share, size), min((self.rank + 1) * share, size)

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place."""
        if self.collectives is not None:
            self.collectives.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: torch.Tensor) -> None:
        """The first rank's tensor, in place."""
        if self.collectives is not None:
            self.collectives.broadcast(tensor)

    def gather_columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Every rank's [R, n] side by side, [R, size * n], on the first rank; the tensor itself on the others."""
        if self.size == 1:
            return tensor
        if self.collectives is None:
            return tensor.repeat(1, self.size)
        parts = self.collectives.gather(tensor)
        return tensor if parts is None else torch.cat(parts, 1)
