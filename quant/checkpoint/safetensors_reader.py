"""SafetensorsReader: tensors of one or many safetensors files. Knows no models and never unpickles.

The library checks the files; bytes are read into the tensors themselves. Its own tensors are views of a mapped file, whose pages stay in
the process's memory for as long as the file is open: who reads a model block by block would end with all of it resident.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .errors import CheckpointError
from .reader import TensorInfo, find_tensor, row_bounds

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


class SafetensorsReader:
    """A WeightReader over safetensors shards. `weight_map` (tensor -> file name) is checked against what the shards hold.

    Raises CheckpointError at construction for a missing, truncated or corrupt file, a dtype torch does not have, a tensor
    that is in two shards, or one that the index places in a shard that does not hold it.
    """

    def __init__(self, files: tuple[Path, ...], *, weight_map: Mapping[str, str] | None = None) -> None:
        self._tensors: dict[str, TensorInfo] = {}
        self._metadata: dict[str, Any] = {}
        self._files: dict[Path, FileIO] = {}
        self._starts: dict[str, int] = {}  # of tensors, in their files
        self._root = files[0].parent
        for file in files:
            self._add_file(file)
        for name, file_name in (weight_map or {}).items():
            info = self._tensors.get(name)
            if info is None or info.file.name != file_name:
                raise CheckpointError(
                    f"the index places tensor {name!r} in {self._root / file_name}, which does not hold it: download both again"
                )

    def _add_file(self, file: Path) -> None:
        starts, metadata = _read_header(file)
        for info, start in starts:
            other = self._tensors.get(info.name)
            if other is not None:
                raise CheckpointError(f"tensor {info.name!r} is in both {other.file} and {file}: remove the file that does not belong here")
            self._tensors[info.name] = info
            self._starts[info.name] = start
        self._metadata.update(metadata)
        try:
            safe_open(file, framework="pt", device="cpu")
            self._files[file] = FileIO(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a sound safetensors file ({error}): download it again") from error

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._metadata

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        info = find_tensor(self._tensors, name, self._root)
        if not self._files:
            raise ValueError(f"cannot read {name!r}: the reader is closed")
        shape, at = info.shape, self._starts[name]
        if rows is not None:
            start, stop = row_bounds(info, rows)
            at += start * (info.nbytes // info.shape[0] if info.shape[0] else 0)
            shape = (stop - start, *info.shape[1:])
        if 0 in shape:
            return torch.empty(shape, dtype=info.dtype)
        room = np.empty(math.prod(shape) * info.dtype.itemsize, dtype=np.uint8)
        left = room.data
        while left:
            count = os.preadv(self._files[info.file].fileno(), [left], at)
            if count == 0:
                raise CheckpointError(f"{info.file} ends within tensor {name!r}: it was cut while it was open. Download it again")
            left, at = left[count:], at + count
        return torch.from_numpy(room).view(info.dtype).reshape(shape)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _read_header(file: Path) -> tuple[list[tuple[TensorInfo, int]], dict[str, Any]]:
    """Parse and check the header against the file's size; gives where in the file each tensor starts.

    The format: 8 bytes of length, JSON, then the tensors' bytes.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file} is truncated or no safetensors file: {size} bytes, header of {length}. Download it again")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} has a corrupt header ({error}): download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} has a corrupt header (not an object): download it again")
    metadata = header.pop("__metadata__", None) or {}
    data_bytes = size - _LENGTH_BYTES - length
    infos = [_check_entry(file, name, entry, data_bytes) for name, entry in header.items()]
    wanted = sum(info.nbytes for info in infos)
    if wanted != data_bytes:
        raise CheckpointError(f"{file} holds {data_bytes} bytes of tensors where its header describes {wanted}: download it again")
    data = _LENGTH_BYTES + length
    return [(info, data + int(header[info.name]["data_offsets"][0])) for info in infos], metadata


def _check_entry(file: Path, name: str, entry: Any, data_bytes: int) -> TensorInfo:
    try:
        stored, shape = entry["dtype"], tuple(int(size) for size in entry["shape"])
        begin, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file} has a corrupt header entry for tensor {name!r}: {entry!r}. Download it again") from error
    dtype = DTYPES.get(stored)
    if dtype is None:
        raise CheckpointError(f"{file}: tensor {name!r} has dtype {stored!r}, which is not supported. Supported: {', '.join(DTYPES)}")
    if not 0 <= begin <= end <= data_bytes:
        raise CheckpointError(f"{file} is truncated: tensor {name!r} ends at byte {end} of {data_bytes}. Download it again")
    nbytes = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or nbytes != end - begin:
        raise CheckpointError(
            f"{file}: tensor {name!r} of shape {list(shape)} and dtype {stored} needs {nbytes} bytes but has {end - begin}"
        )
    return TensorInfo(name, shape, dtype, nbytes, file, stored)
