"""Scratch memory that all launches on one device share, in stream order. Knows no operation.

It grows to what was asked for and never shrinks; a run over the greatest batch, before serving, makes it large enough for good.
"""

from __future__ import annotations

from typing import Final, Literal

import torch
from torch import Tensor

Purpose = Literal["inputs", "parts", "weights", "sampling"]  # inputs as codes; partial sums; weights as they are multiplied; states of rows
MAX_TILES: Final = 1 << 16  # counters of tiles whose parts arrive one by one


class Workspace:
    """Bytes by purpose, and `arrived` int32 counters, which are zero between launches."""

    def __init__(self, device: torch.device) -> None:
        self.arrived = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        self._device = device
        self._buffers: dict[Purpose, Tensor] = {}
        self._outgrown: list[Tensor] = []  # captured graphs may hold their addresses

    def take(self, purpose: Purpose, num_bytes: int) -> Tensor:
        """The first `num_bytes` for a purpose, uint8; valid until the next launch that takes for it. Raises RuntimeError while a graph is
        captured and there are fewer."""
        buffer = self._buffers.get(purpose)
        if buffer is None or buffer.numel() < num_bytes:
            if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(f"{num_bytes} bytes of scratch for {purpose} are wanted while a graph is captured: run it once before")
            if buffer is not None:
                self._outgrown.append(buffer)
            size = num_bytes if buffer is None else max(num_bytes, 2 * buffer.numel())
            self._buffers[purpose] = buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
        return buffer[:num_bytes]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(buffer.nbytes for buffer in (*self._buffers.values(), *self._outgrown)) + self.arrived.nbytes


_WORKSPACES: dict[torch.device, Workspace] = {}


def workspace_of(device: torch.device) -> Workspace:
    """The one of a device."""
    if device not in _WORKSPACES:
        _WORKSPACES[device] = Workspace(device)
    return _WORKSPACES[device]
