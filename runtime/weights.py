"""WeightSource: hands a model its tensors, one at a time, in the dtype it computes with. Knows no architecture."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

import torch
from tqdm import tqdm

from ..quant.checkpoint.errors import CheckpointError
from ..quant.checkpoint.reader import WeightReader


class WeightSource:
    """Reads from `reader`, checks shapes, converts to `weight_dtype`, and shows progress in bytes. A context manager.

    `activation_dtype` is what kernels take and give on `device`.
    """

    def __init__(
        self,
        reader: WeightReader,
        *,
        weight_dtype: torch.dtype,
        activation_dtype: torch.dtype,
        device: torch.device,
        show_progress: bool = True,
    ) -> None:
        self._reader = reader
        self._infos = reader.tensors()
        self.weight_dtype = weight_dtype
        self.activation_dtype = activation_dtype
        self.device = device
        self._unread = dict(self._infos)
        total = sum(info.nbytes for info in self._infos.values())
        self._bar = tqdm(
            total=total, desc="Loading weights", unit="B", unit_scale=True, unit_divisor=1024, disable=not show_progress, file=sys.stderr
        )

    def has(self, name: str) -> bool:
        return name in self._infos

    def read(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """One tensor on the CPU, of exactly `shape`, in `dtype` or the weights'. CheckpointError when absent or of another shape."""
        info = self._infos.get(name)
        if info is not None and info.shape != shape:
            raise CheckpointError(
                f"tensor {name!r} in {info.file} has shape {info.shape}, the config asks for {shape}: config and weights do not fit"
            )
        tensor = self._reader.read(name)
        if self._unread.pop(name, None) is not None and info is not None:
            self._bar.update(info.nbytes)
        wanted = dtype or self.weight_dtype
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"tensor {name!r} holds {tensor.dtype}, where a dense model has floating point: quantized checkpoints need a scheme"
            )
        return tensor.to(wanted)

    @property
    def unread(self) -> tuple[str, ...]:
        """Tensors of the checkpoint that nobody asked for."""
        return tuple(self._unread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()
        self._reader.close()
