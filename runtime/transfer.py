"""Arrays on their way to the device and tensors on their way back, neither of which makes the host wait before it must."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

_ALIGNMENT = 16
_TORCH_DTYPES: dict[type[Any], torch.dtype] = {
    np.int64: torch.int64,
    np.int32: torch.int32,
    np.float64: torch.float64,
    np.float32: torch.float32,
}


class Arrival(Protocol):
    """Tensors that were asked for and come later."""

    def wait(self) -> list[torch.Tensor]:
        """The tensors on the host, once they are there."""


Fetch = Callable[[Sequence[torch.Tensor]], Arrival]


class HostCopy:
    """Copies of tensors to the host, begun on construction and complete when all that was launched before them is done.

    On the CPU, where whatever was launched is done, these are the tensors themselves.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._tensors = [_pinned_copy(tensor) if tensor.is_cuda else tensor for tensor in tensors]
        self._event: torch.cuda.Event | None = torch.cuda.Event() if any(tensor.is_cuda for tensor in tensors) else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def wait(self) -> list[torch.Tensor]:
        if self._event is not None:
            self._event.synchronize()
        return self._tensors


def _pinned_copy(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays as tensors on a device, in one copy; to CUDA from pinned memory, so that the host does not wait for it."""
    starts = [0]
    for array in arrays:
        starts.append(-(-(starts[-1] + array.nbytes) // _ALIGNMENT) * _ALIGNMENT)
    packed = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    moved = packed.to(device, non_blocking=True)
    return [
        moved[start : start + array.nbytes].view(_TORCH_DTYPES[array.dtype.type]).view(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]
