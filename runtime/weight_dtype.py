"""weight_dtype: what dense weights are held in, by the flag, the config or the files. Reads no weights."""

from __future__ import annotations

import torch

from ..quant.checkpoint.open_reader import open_reader
from ..quant.checkpoint.resolve import ModelFiles
from .config import EngineConfig
from .models.config import ModelConfig


def weight_dtype(config: EngineConfig, files: ModelFiles, model: ModelConfig) -> torch.dtype:
    """What dense weights are held in: `--dtype`, or the checkpoint's own. Raises CheckpointError for files that are no weights."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)  # type: ignore[no-any-return]
    if files.kind == "gguf":
        return torch.bfloat16
    stored = (model.stored_dtype or _dtype_of_files(config, files)).removeprefix("torch.")
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(stored, torch.bfloat16)


def _dtype_of_files(config: EngineConfig, files: ModelFiles) -> str:
    """What most of the checkpoint's floats are, where its config does not say."""
    if not config.needs_weights:
        return "float32"
    sizes: dict[torch.dtype, int] = {}
    with open_reader(files) as reader:
        for info in reader.tensors().values():
            if info.dtype.is_floating_point and info.dtype.itemsize > 1:
                sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return str(max(sizes, key=sizes.__getitem__, default=torch.float32))
