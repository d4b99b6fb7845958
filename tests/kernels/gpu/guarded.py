"""Tensors between guard bands, so that a store outside of them is seen: the interpreter itself checks no bounds."""

from __future__ import annotations

import torch

_GUARD = 256  # bytes before and behind
_POISON = 0xAB


class Guarded:
    """`tensor` of a shape and dtype, filled with NaN (or the greatest code), rows `stride` apart; `check` looks at what lies around."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, *, stride: int | None = None) -> None:
        rows, columns = shape
        self._columns, self._stride = columns, columns if stride is None else stride
        num_bytes = rows * self._stride * dtype.itemsize
        self._raw = torch.full((num_bytes + 2 * _GUARD,), _POISON, dtype=torch.uint8)
        body = self._raw[_GUARD : _GUARD + num_bytes].view(dtype).view(rows, self._stride)
        self.tensor = body[:, :columns]
        if dtype.is_floating_point and dtype.itemsize > 1:
            self.tensor.fill_(float("nan"))
        self._body, self._dtype = body, dtype

    def check(self) -> None:
        """Raises AssertionError where a byte outside of the tensor changed."""
        around = torch.cat([self._raw[:_GUARD], self._raw[-_GUARD:]])
        assert bool((around == _POISON).all()), "a store fell outside of the tensor"
        between = self._body[:, self._columns :].contiguous().view(torch.uint8)
        assert bool((between == _POISON).all()), "a store fell between the rows of the tensor"
