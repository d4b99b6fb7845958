"""ModuleFormats: how each linear of a model is stored, or made while loading. Knows configs and file types, and no tensor."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from .checkpoint.errors import CheckpointError
from .checkpoint.method_names import canonical_method, check_method
from .checkpoint.quantization_base import QuantizationConfig
from .checkpoint.quantization_config import read_quantization_config
from .checkpoint.reader import TensorInfo
from .checkpoint.resolve import ModelFiles
from .linear_format import DENSE, LinearFormat
from .schemes.gguf import BLOCKS
from .schemes.load_time import load_time_format
from .schemes.pack_quantized import has_padded_words

logger = logging.getLogger("octavo.quant")

LOAD_TIME = ("fp8", "int8", "int4")
_FLOATS = ("F32", "F16", "BF16")
# Not linears of the layers: they stay as they are when a dense model is quantized while it loads.
_ENDS = ("model.embed_tokens", "lm_head")


class ModuleFormats:
    """What `--quantization` and the checkpoint together mean for every linear.

    Raises ValueError when the two contradict each other, CheckpointError for a config that cannot be right.
    """

    def __init__(self, files: ModelFiles, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, quantization: str = "auto"):
        self._tensors = tensors
        self._config: QuantizationConfig | None = None
        source: Path | None
        if files.kind == "gguf":
            method, source, types = self._gguf_method(), files.gguf_file, frozenset[str]()
        else:
            self._config = read_quantization_config(files, config, tensors)
            method = None if self._config is None else self._config.method
            source = files.config_path if self._config is None else self._config.source
            types = frozenset() if self._config is None else self._config.weight_types
        check_method(quantization, method, source, weight_types=types)
        wanted = canonical_method(quantization)
        self._load_time = wanted if method is None and wanted in LOAD_TIME else None
        self.method = method or self._load_time  # None: dense
        self._dequantized: set[str] = set()
        self._has_warned_of_zero_points = False

    def _gguf_method(self) -> str | None:
        return "gguf" if any(info.stored not in _FLOATS for info in self._tensors.values()) else None

    @property
    def config(self) -> QuantizationConfig | None:
        """The checkpoint's own description."""
        return self._config

    def of(self, module: str, *, in_features: int, out_features: int) -> LinearFormat:
        """The format of one unfused module, such as "model.layers.0.self_attn.q_proj"."""
        weight = self._tensors.get(f"{module}.weight")
        if weight is not None and weight.stored in BLOCKS:
            _, per_block, bits, size = BLOCKS[weight.stored]
            if in_features % per_block == 0:
                return LinearFormat("gguf", bits, "group", group_size=size, gguf_type=weight.stored)
        if weight is not None and self.method == "gguf" and weight.stored not in _FLOATS and weight.stored not in self._dequantized:
            self._dequantized.add(weight.stored)
            logger.warning(
                "GGUF type %s (%s) has no kernel: its weights are held dense, at several times their size", weight.stored, module
            )
        if self._load_time is not None and module not in _ENDS:
            return load_time_format(self._load_time, in_features)
        if self._config is None or module == "model.embed_tokens":
            return DENSE
        stored = self._config.for_linear(module, in_features=in_features, out_features=out_features, tensors=self._tensors)
        if module == "lm_head" and weight is not None and weight.stored in _FLOATS:
            return DENSE  # named by a config that says "Linear" and means the layers'
        packed = self._tensors.get(f"{module}.weight_packed")
        if stored.layout == "pack-quantized" and stored.bits == 3 and packed is not None and len(packed.shape) == 2:
            return replace(stored, padded_words=self._has_padded_words(packed, in_features))
        return stored

    def warn_of_zero_points(self, fault: str) -> None:
        """Log that zero points contradict the config. Once for a model: its other layers would say the same."""
        if not self._has_warned_of_zero_points:
            self._has_warned_of_zero_points = True
            logger.warning("%s. They are used as stored: correct the key, or take config and weights from one checkpoint again", fault)

    @staticmethod
    def _has_padded_words(packed: TensorInfo, in_features: int) -> bool:
        try:
            return has_padded_words(packed.shape[1], in_features)
        except ValueError as error:
            raise CheckpointError(f"tensor {packed.name!r} in {packed.file}: {error}") from error
