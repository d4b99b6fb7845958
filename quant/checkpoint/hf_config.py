"""A model's config and generation config in Hugging Face terms, whatever the file format. Knows no model code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .gguf_config import gguf_config, gguf_generation_config
from .gguf_header import read_gguf_header
from .resolve import ModelFiles


def read_config(files: ModelFiles) -> dict[str, Any]:
    """The config as config.json has it, or built from GGUF metadata.

    Rotary settings are given in both spellings: `rope_theta` and `rope_scaling`, and transformers 5's `rope_parameters`.
    Raises CheckpointError naming file and position when config.json is not valid JSON.
    """
    if files.config_path is not None:
        config = read_json(files.config_path)
    elif files.gguf_file is not None:
        config = gguf_config(read_gguf_header(files.gguf_file))
    else:
        raise CheckpointError(f"{files.root} has no config.json: copy it from the original model")
    return _with_both_rope_spellings(config)


def read_generation_config(files: ModelFiles) -> dict[str, Any]:
    """generation_config.json, {} when there is none; for GGUF the end tokens and recommended sampling of the metadata."""
    if files.gguf_file is not None:
        return gguf_generation_config(read_gguf_header(files.gguf_file))
    path = files.root / "generation_config.json"
    return read_json(path) if path.is_file() else {}


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises CheckpointError naming file, line and column."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(
            f"{path} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}. Download it again or correct it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__} where an object is needed")
    return content


def _with_both_rope_spellings(config: dict[str, Any]) -> dict[str, Any]:
    new = config.get("rope_parameters")
    if isinstance(new, dict) and "rope_theta" in new and "rope_theta" not in config:
        scaling = {key: value for key, value in new.items() if key != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default"
        return {**config, "rope_theta": new["rope_theta"], "rope_scaling": None if plain else scaling}
    if new is None and "rope_theta" in config:
        scaling = dict(config.get("rope_scaling") or {"rope_type": "default"})
        scaling.setdefault("rope_type", scaling.get("type", "default"))
        return {**config, "rope_parameters": {**scaling, "rope_theta": config["rope_theta"]}}
    return config
