"""WeightReader and TensorInfo: what every weight file offers. The protocol alone; who reads which format lives in other files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from .errors import CheckpointError


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint, known without reading it."""

    name: str  # Hugging Face naming
    shape: tuple[int, ...]
    dtype: torch.dtype  # of what `read` returns
    nbytes: int  # in the file
    file: Path
    stored: str  # the file's own type, such as "BF16" or "Q4_1"


class WeightReader(Protocol):
    """Reads one tensor at a time. Everything that can be checked without reading is checked at open."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its Hugging Face name."""
        ...

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor on the CPU, or some of its rows (first dimension, step 1). The tensor owns its memory and outlives the reader.

        Raises CheckpointError for a name that is not there, ValueError for rows with a step or on a scalar.
        """
        ...

    def close(self) -> None:
        """Let go of the files. Reading afterwards raises ValueError; tensors already read stay valid."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None: ...


def find_tensor(tensors: Mapping[str, TensorInfo], name: str, where: Path) -> TensorInfo:
    """Look a tensor up. Raises CheckpointError naming the checkpoint and the nearest names when it is absent."""
    info = tensors.get(name)
    if info is None:
        last = name.rsplit(".", 2)[-2:]
        near = [other for other in tensors if other.rsplit(".", 2)[-2:] == last][:3]
        hint = f"; there is {', '.join(near)}" if near else ""
        raise CheckpointError(f"{where} has no tensor {name!r} among its {len(tensors)}{hint}: the config does not fit these weights")
    return info


def row_bounds(info: TensorInfo, rows: slice) -> tuple[int, int]:
    """Start and stop of `rows` within the tensor's first dimension. Raises ValueError for a step or a scalar tensor."""
    if not info.shape:
        raise ValueError(f"tensor {info.name!r} is a scalar and has no rows: read it whole")
    start, stop, step = rows.indices(info.shape[0])
    if step != 1:
        raise ValueError(f"rows={rows} of {info.name!r} has a step: only whole ranges can be read")
    return start, max(start, stop)
