"""Verify: a quantized folder is read back as any engine reads it, and held against what was meant. Knows schemes, and no method."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ..kernels.grouped_linear import GroupedWeight, dequantize
from ..quant.checkpoint.hf_config import read_config
from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.reader import TensorInfo
from ..quant.checkpoint.resolve import resolve_model
from ..quant.module_formats import ModuleFormats
from ..quant.schemes.base import Module, Slice
from ..quant.schemes.registry import scheme_of


class VerificationError(RuntimeError):
    """What was written does not read back as what was meant."""


class DequantizingReader:
    """A quantized folder as a WeightReader of float weights, under the names and shapes of `original`'s tensors.

    `transposed`: those of them that are stored [K, N], where a quantized module is [N, K].
    """

    def __init__(self, folder: Path, original: Mapping[str, TensorInfo], transposed: Collection[str] = ()) -> None:
        self._transposed = frozenset(transposed)
        files = resolve_model(str(folder))
        self._reader = open_reader(files)
        self._formats = ModuleFormats(files, read_config(files), self._reader.tensors())
        self._infos = {
            name: info if name in self._reader.tensors() else replace(info, dtype=torch.float32, stored="F32")
            for name, info in original.items()
        }

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._reader.metadata

    def tensors(self) -> Mapping[str, TensorInfo]:
        return self._infos

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        tensor = self._whole(name)
        return tensor if rows is None else tensor[rows]

    def _whole(self, name: str) -> Tensor:
        shape = self._infos[name].shape
        path = name.removesuffix(".weight")
        if len(shape) == 3 and name not in self._reader.tensors():
            parent, _, leaf = path.rpartition(".")
            experts = [dequantize(self.weight(f"{parent}.{expert}.{leaf}")) for expert in range(shape[0])]
            stacked = torch.stack(experts)
            return stacked.mT.contiguous() if name in self._transposed else stacked
        if name in self._reader.tensors() and len(self.module_tensors(path)) < 2:
            return self._reader.read(name)
        values = dequantize(self.weight(path))
        return values.t().contiguous() if name in self._transposed else values

    def module_tensors(self, path: str) -> dict[str, str]:
        """What a module's tensors are called, by what they are: "qweight", "scales" ... without its bias."""
        known = self._reader.tensors()
        names = (
            "qweight",
            "qzeros",
            "scales",
            "g_idx",
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "input_scale",
        )
        return {key: f"{path}.{key}" for key in names if f"{path}.{key}" in known}

    def weight(self, path: str) -> GroupedWeight:
        """A quantized module's weight, by its scheme. Raises VerificationError where it is not quantized."""
        tensors = {key: self._reader.read(name) for key, name in self.module_tensors(path).items()}
        n, k = self._shape(path, tensors)
        stored = self._formats.of(path, in_features=k, out_features=n)
        scheme = scheme_of(stored)
        module = Module(stored, k, n, False, torch.float32)
        known = {spec.name for spec in scheme.create_weights(module)}
        weight = scheme.to_canonical({key: value for key, value in tensors.items() if key in known}, module, Slice.whole(module)).weight
        if not isinstance(weight, GroupedWeight):
            raise VerificationError(f"{path} reads back as a dense weight: its entry in quantization_config is wrong")
        return weight

    @staticmethod
    def _shape(path: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """[N, K] from the tensors alone."""
        if "weight_shape" in tensors:
            n, k = tensors["weight_shape"].tolist()
            return int(n), int(k)
        if "weight" in tensors:
            return int(tensors["weight"].shape[0]), int(tensors["weight"].shape[1])
        if "g_idx" in tensors:
            return int(tensors["scales"].shape[1]), len(tensors["g_idx"])
        if "qweight" in tensors:
            return int(tensors["scales"].shape[1]), int(tensors["qweight"].shape[0])
        raise VerificationError(f"{path} has no quantized weight in what was written")

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()


def check_module(reader: DequantizingReader, path: str, meant: GroupedWeight) -> None:
    """Raises VerificationError where the module's weight is not bit for bit what was meant."""
    found, wanted = dequantize(reader.weight(path)), dequantize(meant)
    if found.shape != wanted.shape or not torch.equal(found, wanted):
        off = float("nan") if found.shape != wanted.shape else float((found - wanted).abs().max())
        raise VerificationError(
            f"{path} reads back differently from what was solved (largest difference {off:g}): a fault of Octavo, please report it"
        )


def check_logits(found: Tensor, meant: Tensor) -> float:
    """The largest difference of two models' logits, relative to the largest logit. Raises VerificationError where it is not rounding."""
    size = max(float(meant.abs().max()), 1e-30)
    off = float((found - meant).abs().max()) / size
    if not math.isfinite(off) or off > 1e-4:
        raise VerificationError(
            f"the written model's logits differ from what was solved by {off:.2g} of the largest: a fault of Octavo, please report it"
        )
    return off
