"""Tensors between guard bands, so that a store outside of them is seen. Knows no kernel."""

from __future__ import annotations

import torch
from torch import Tensor

_GUARD = 256  # bytes before and behind
_POISON = 0xAB


class Guarded:
    """`tensor` of a shape and dtype, poisoned (`poison`), rows `stride` apart; `check` looks at what lies around it."""

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, *, stride: int | None = None, device: torch.device | None = None
    ) -> None:
        rows, columns = shape
        self._columns, self._stride = columns, columns if stride is None else stride
        num_bytes = rows * self._stride * dtype.itemsize
        self._raw = torch.full((num_bytes + 2 * _GUARD,), _POISON, dtype=torch.uint8, device=device)
        self._body = self._raw[_GUARD : _GUARD + num_bytes].view(dtype).view(rows, self._stride)
        self.tensor: Tensor = self._body[:, :columns]
        self.poison()

    def poison(self) -> None:
        """Floats of 16 bits and more become NaN, all else the guard's bytes: what no kernel leaves by chance."""
        if self.tensor.is_floating_point() and self.tensor.itemsize > 1:
            self.tensor.fill_(float("nan"))
        else:
            self.tensor.view(torch.uint8).fill_(_POISON)

    def check(self) -> None:
        """Raises AssertionError where a byte outside of the tensor changed."""
        around = torch.cat([self._raw[:_GUARD], self._raw[-_GUARD:]])
        assert bool((around == _POISON).all()), "a store fell outside of the tensor"
        between = self._body[:, self._columns :].contiguous().view(torch.uint8)
        assert bool((between == _POISON).all()), "a store fell between the rows of the tensor"
