"""open_reader: the reader that fits a model's files. Knows which class reads which format, and nothing of what is in them."""

from __future__ import annotations

from .gguf_reader import GgufReader
from .reader import WeightReader
from .resolve import ModelFiles
from .safetensors_reader import SafetensorsReader


def open_reader(files: ModelFiles) -> WeightReader:
    """Open and check a model's weight files; use it as a context manager. Raises CheckpointError when a file is damaged."""
    if files.gguf_file is not None:
        return GgufReader(files.gguf_file)
    return SafetensorsReader(files.weight_files, weight_map=files.weight_map)
