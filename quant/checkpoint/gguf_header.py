"""GgufHeader: metadata and tensor directory of a GGUF file. Knows no architectures, no Hugging Face names and reads no weights.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian. Parsed here because the
`gguf` package takes seconds for a vocabulary (one NumPy view per string) and does not tell a truncated file from a sound one.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf

from .errors import CheckpointError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_STRING, _ARRAY = 8, 9
# GGUF value type -> struct code. 7 is a boolean of one byte.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


@dataclass(frozen=True)
class GgufTensor:
    """Directory entry of one tensor. `shape` is row-major (the file's dimensions reversed); `offset` counts from the file's start."""

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Everything of a GGUF file but the weights. Treat the mappings as read-only: they are shared."""

    path: Path
    metadata: Mapping[str, Any]  # GGUF keys; arrays as lists
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    def value(self, key: str, default: Any = None) -> Any:
        """Metadata under the architecture's prefix, such as value("block_count")."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


class _Cursor:
    """Walks the mapped bytes; every step is checked against the end of the file."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at, self.end = data, path, 0, len(data)

    def _advance(self, count: int, what: str) -> int:
        start = self.at
        if count > self.end - start:
            raise CheckpointError(
                f"{self.path} is truncated or corrupt: {what} at byte {start} needs {count} bytes of {self.end}. Download it again"
            )
        self.at = start + count
        return start

    def unpack(self, code: str, what: str, count: int = 1) -> tuple[Any, ...]:
        start = self._advance(count * struct.calcsize(f"<{code}"), what)
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def string(self, what: str) -> str:
        (length,) = self.unpack("Q", what)
        start = self._advance(length, what)
        return self.data[start : start + length].decode("utf-8", errors="replace")

    def strings(self, count: int, what: str) -> list[str]:
        if count * 8 > self.end - self.at:
            raise CheckpointError(f"{self.path} is corrupt: {what} claims {count} strings. Download it again")
        found, data, at, end, length_of = [], self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at + 8 > end or (stop := at + 8 + length_of(data, at)[0]) > end:
                self.at = at
                self._advance(end, what)  # raises: runs past the end
            found.append(data[at + 8 : stop].decode("utf-8", errors="replace"))
            at = stop
        self.at = at
        return found

    def value(self, value_type: int, what: str) -> Any:
        if value_type == _STRING:
            return self.string(what)
        if value_type != _ARRAY:
            return self.unpack(self._code(value_type, what), what)[0]
        item_type, count = self.unpack("I", what)[0], self.unpack("Q", what)[0]
        if item_type == _STRING:
            return self.strings(count, what)
        if item_type == _ARRAY:
            raise CheckpointError(f"{self.path}: {what} is an array of arrays, which no supported architecture has")
        return list(self.unpack(self._code(item_type, what), what, count))

    def _code(self, value_type: int, what: str) -> str:
        if value_type not in _SCALARS:
            raise CheckpointError(f"{self.path} is corrupt: {what} has value type {value_type}. Download it again")
        return _SCALARS[value_type]


def read_gguf_header(path: Path) -> GgufHeader:
    """Parse and check a GGUF file's header; the same file is parsed once. Raises CheckpointError when it is damaged or foreign."""
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return _parse(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4)
def _parse(path: Path, size: int, mtime_ns: int) -> GgufHeader:
    if size < 24:
        raise CheckpointError(f"{path} is truncated: {size} bytes are no GGUF file. Download it again")
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _parse_bytes(_Cursor(data, path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse_bytes(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    magic = cursor.unpack("s", "magic", 4)[0]
    if magic != _MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it begins with {magic!r}, not {_MAGIC!r}")
    (version,) = cursor.unpack("I", "version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        kind = "big-endian" if swapped else f"version {version}"
        raise CheckpointError(f"{path} is {kind} GGUF, but only little-endian versions 2 and 3 are supported: convert the model again")
    num_tensors, num_fields = cursor.unpack("Q", "counts", 2)
    metadata: dict[str, Any] = {}
    for index in range(num_fields):
        key = cursor.string(f"metadata key {index}")
        (value_type,) = cursor.unpack("I", key)
        if key in metadata:
            raise CheckpointError(f"{path} has metadata key {key!r} twice: convert the model again")
        metadata[key] = cursor.value(value_type, key)
    entries = [_read_entry(cursor, index) for index in range(num_tensors)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{path} has general.alignment={alignment!r}, which is not a power of two: download it again")
    data_start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, type_id, offset in entries:
        if name in tensors:
            raise CheckpointError(f"{path} has tensor {name!r} twice: convert the model again")
        tensors[name] = _check_entry(cursor, name, shape, type_id, data_start + offset)
    return GgufHeader(path, metadata, tensors)


def _read_entry(cursor: _Cursor, index: int) -> tuple[str, tuple[int, ...], int, int]:
    name = cursor.string(f"tensor entry {index}")
    (num_dims,) = cursor.unpack("I", name)
    if num_dims > 8:
        raise CheckpointError(f"{cursor.path} is corrupt: tensor {name!r} has {num_dims} dimensions. Download it again")
    dims = cursor.unpack("Q", name, num_dims)
    (type_id,) = cursor.unpack("I", name)
    (offset,) = cursor.unpack("Q", name)
    return name, tuple(reversed(dims)), type_id, offset


def _check_entry(cursor: _Cursor, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GgufTensor:
    try:
        kind = gguf.GGMLQuantizationType(type_id)
    except ValueError as error:
        raise CheckpointError(f"{cursor.path}: tensor {name!r} has the unknown type {type_id}: update the gguf package") from error
    block_values, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] if shape else 1
    if row % block_values:
        raise CheckpointError(
            f"{cursor.path} is corrupt: rows of tensor {name!r} have {row} values, not whole {kind.name} blocks of {block_values}"
        )
    nbytes = math.prod(shape) // block_values * block_bytes
    if offset + nbytes > cursor.end:
        raise CheckpointError(
            f"{cursor.path} is truncated: tensor {name!r} ends at byte {offset + nbytes} of {cursor.end}. Download it again"
        )
    return GgufTensor(name, shape, kind, offset, nbytes)
