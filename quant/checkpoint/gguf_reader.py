"""GgufReader: tensors of a GGUF file under Hugging Face names, dequantized or as raw blocks. Knows no models and no kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType

from .errors import CheckpointError
from .gguf_config import check_architecture, head_counts
from .gguf_header import GgufTensor, read_gguf_header
from .gguf_names import heads_to_unpermute, hf_name, is_derived
from .reader import TensorInfo, find_tensor, row_bounds

_FLOATS = {"F32", "F16", "BF16"}
_BLOCKS = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"}
_K_QUANTS = {"Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"}
_I_QUANTS = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"}
SUPPORTED_TYPES: frozenset[str] = frozenset(_FLOATS | _BLOCKS | _K_QUANTS | _I_QUANTS)
_TYPED = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}


class GgufReader:
    """A WeightReader over one GGUF file. `read` gives float32; `read_raw` the stored blocks.

    Rows of q and k are given in Hugging Face's order: llama.cpp's converter interleaves the two halves of each head for some
    architectures, which is undone here on whole rows, so that raw blocks stay bit for bit what the file holds.
    Raises CheckpointError at construction for a damaged file, an unsupported architecture, tensor or tensor type.
    """

    def __init__(self, path: Path) -> None:
        self._header = read_gguf_header(path)
        check_architecture(self._header)
        self._entries: dict[str, GgufTensor] = {}
        self._tensors: dict[str, TensorInfo] = {}
        for entry in self._header.tensors.values():
            if not is_derived(entry.name):
                self._add(entry)
        self._data: np.memmap[Any, np.dtype[np.uint8]] | None = np.memmap(path, dtype=np.uint8, mode="r")

    def _add(self, entry: GgufTensor) -> None:
        path, name = self._header.path, hf_name(entry.name)
        if name is None:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} is not part of a {self._header.architecture} model as Octavo knows it "
                "(mixtures of experts and fused projections are not supported in GGUF): use the model's safetensors"
            )
        if entry.type.name not in SUPPORTED_TYPES:
            raise CheckpointError(
                f"{path}: tensor {entry.name!r} has type {entry.type.name}, which is not supported. "
                f"Supported: {', '.join(sorted(SUPPORTED_TYPES))}"
            )
        heads = self._interleaved_heads(entry)
        if heads is not None and (heads <= 0 or entry.shape[0] % (2 * heads)):
            raise CheckpointError(f"{path}: tensor {entry.name!r} has {entry.shape[0]} rows, which {heads} heads do not divide")
        self._entries[name] = entry
        self._tensors[name] = TensorInfo(name, entry.shape, torch.float32, entry.nbytes, path, entry.type.name)

    def _interleaved_heads(self, entry: GgufTensor) -> int | None:
        num_heads, num_kv_heads = head_counts(self._header)
        return heads_to_unpermute(entry.name, self._header.architecture, num_heads, num_kv_heads)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._header.metadata

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._tensors

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """The tensor in float32. See WeightReader.read."""
        raw, kind = self.read_raw(name, rows)
        values = raw if kind == GGMLQuantizationType.F32 else gguf.dequantize(raw, kind)
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))

    def read_raw(self, name: str, rows: slice | None = None) -> tuple[np.ndarray[Any, np.dtype[Any]], GGMLQuantizationType]:
        """The stored bytes, copied: [rows, bytes per row] uint8 of whole blocks, or the values for F32 and F16."""
        info = find_tensor(self._tensors, name, self._header.path)
        if self._data is None:
            raise ValueError(f"cannot read {name!r}: the reader is closed")
        entry = self._entries[name]
        start, stop = (0, entry.shape[0]) if rows is None else row_bounds(info, rows)
        stored = self._data[entry.offset : entry.offset + entry.nbytes]
        if entry.type in _TYPED:
            view = stored.view(_TYPED[entry.type]).reshape(entry.shape)
        elif len(entry.shape) == 1:  # blocks do not follow the rows of a vector
            if (start, stop) != (0, entry.shape[0]):
                raise ValueError(f"{name!r} is a vector of {entry.type.name} blocks: read it whole")
            return np.array(stored), entry.type
        else:
            view = stored.reshape(*entry.shape[:-1], -1)
        heads = self._interleaved_heads(entry)
        if heads is None:
            return np.array(view[start:stop]), entry.type
        return np.asarray(view[_file_rows(entry.shape[0], heads)[start:stop]]), entry.type

    def close(self) -> None:
        self._data = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def _file_rows(num_rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.intp]]:
    """For each row in Hugging Face's order, the row of the file: halves [0..d/2), [d/2..d) of a head lie interleaved there."""
    half = num_rows // heads // 2
    return np.arange(num_rows).reshape(heads, half, 2).swapaxes(1, 2).reshape(-1)
