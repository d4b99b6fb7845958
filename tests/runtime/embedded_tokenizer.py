"""The embedded model's tokenizer, and Hugging Face folders that hold it, for the tokenizer's tests."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from safetensors.torch import save_file

from octavo.quant.checkpoint.gguf_header import read_gguf_header
from octavo.quant.checkpoint.resolve import ModelFiles, resolve_model
from octavo.runtime.gguf_tokenizer import build_gguf_tokenizer
from octavo.runtime.tokenizer import Tokenizer, load_tokenizer


@cache
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@cache
def smollm2_backend() -> tokenizers.Tokenizer:
    files = resolve_model(None)
    assert files.gguf_file is not None
    return build_gguf_tokenizer(read_gguf_header(files.gguf_file))


def write_folder(folder: Path) -> Path:
    """Make a Hugging Face folder with the embedded model's tokenizer."""
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    save_file({"t": torch.zeros(1)}, folder / "model.safetensors")
    smollm2_backend().save(str(folder / "tokenizer.json"))
    return folder


def write_config(folder: Path, **config: Any) -> ModelFiles:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return resolve_model(str(folder))
