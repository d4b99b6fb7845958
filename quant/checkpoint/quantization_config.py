"""read_quantization_config: finds what a checkpoint says about its quantization and has it read. Knows files and methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .hf_config import read_json
from .quantization_autoround import read_autoround
from .quantization_awq import read_awq
from .quantization_base import KVCacheFormat, QuantizationConfig
from .quantization_compressed import read_compressed_tensors
from .quantization_fields import Fields
from .quantization_fp8 import read_fp8
from .quantization_gptq import read_gptq
from .quantization_look import PACKINGS, Look, look_at
from .quantization_modelopt import flat_modelopt, read_modelopt
from .reader import TensorInfo
from .resolve import ModelFiles

__all__ = ["KVCacheFormat", "QuantizationConfig", "read_quantization_config"]

_READERS: dict[str, Callable[[Fields], QuantizationConfig]] = {
    "awq": read_awq,
    "gptq": read_gptq,
    "compressed-tensors": read_compressed_tensors,
    "fp8": read_fp8,
    "modelopt": read_modelopt,
    "auto-round": read_autoround,
}
_SPELLINGS = {
    "compressed_tensors": "compressed-tensors",
    "modelopt_fp8": "modelopt",
    "auto_round": "auto-round",
    "autoround": "auto-round",
    "intel/auto-round": "auto-round",
}
# Files beside config.json, and the method of one that does not name it.
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
    "quantization_config.json": None,
}
_ALIASES: dict[str, dict[str, str]] = {
    "awq": {"w_bit": "bits", "q_group_size": "group_size", "format": "version", "checkpoint_format": "version"},
    "gptq": {"format": "checkpoint_format"},
}
# Keys of which two sources must not say different things.
_DECISIVE = {
    "awq": ("bits", "group_size", "zero_point", "version", "modules_to_not_convert", "dynamic", "lm_head"),
    "gptq": ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "modules_in_block_to_quantize", "dynamic", "lm_head"),
    "compressed-tensors": ("format", "config_groups", "ignore", "kv_cache_scheme"),
    "fp8": ("activation_scheme", "weight_block_size", "ignored_layers", "modules_to_not_convert"),
    "modelopt": ("quant_algo", "kv_cache_quant_algo", "exclude_modules"),
    "auto-round": ("bits", "group_size", "sym", "packing_format", "data_type", "extra_config", "block_name_to_quantize"),
}


@dataclass(frozen=True)
class _Source:
    """One place that describes the quantization, with its keys in their usual spelling."""

    path: Path
    where: str  # path to the object inside the file, such as "quantization_config."
    method: str
    values: Mapping[str, Any]
    spelled: Mapping[str, str]  # usual spelling -> as the file has it

    def label(self, key: str) -> str:
        return f"{self.path}: {self.where}{self.spelled.get(key, key)}"


def read_quantization_config(
    files: ModelFiles, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None
) -> QuantizationConfig | None:
    """How the checkpoint's linears are stored; None for a dense one, and for GGUF, whose types are per tensor.

    `config` is what read_config returned. Read are its `quantization_config` or `compression_config`, quantize_config.json (GPTQModel,
    AutoGPTQ), quant_config.json (older AWQ), hf_quant_config.json (ModelOpt) and quantization_config.json (AutoRound); sources may add to
    each other. Raises CheckpointError when two contradict each other, and for anything that is not supported. With `tensors`, the
    checkpoint's, also when they are quantized and nothing says how, or are packed as another method packs.
    """
    if files.kind == "gguf":
        return None
    look = look_at(tensors or {})
    sources = [*_from_config(files, config), *_from_side_files(files.root)]
    if not sources:
        if look is not None:
            raise _no_config(files.config_path or files.root / "config.json", look)
        return None
    fields = _merge(sources)
    if look is not None:
        _refuse_other_packing(fields, sources[0].method, look)
    return _READERS[sources[0].method](fields)


def _no_config(path: Path, look: Look) -> CheckpointError:
    return CheckpointError(
        f"{path} has no quantization_config, but the weights are quantized: {look.module} in {look.file} has {look.tensors}, "
        f"which looks like {look.format}. Take config.json from the original checkpoint again, or add the quantization_config"
    )


def _refuse_other_packing(fields: Fields, method: str, look: Look) -> None:
    """Raises when a config calls GPTQ what is packed as AWQ packs, or the other way round: each would read noise from the other."""
    key = "packing_format" if method == "auto-round" else "quant_method"
    claimed = str(fields.values.get(key)).rpartition("auto_")[2] if method == "auto-round" else method
    if {claimed, look.packing} != {"awq", "gptq"}:
        return
    said = fields.said(key) if fields.has(key) else f"{fields.source}, a file of {claimed} models,"
    value = f"auto_round:auto_{look.packing}" if method == "auto-round" else look.packing
    raise CheckpointError(
        f"{said} contradicts the weights: {look.module} in {look.file} has {look.tensors}, which is the layout of {look.format}. "
        f"{PACKINGS['gptq']}, {PACKINGS['awq']}. Set {key} to {value!r}, or take config.json from the original checkpoint again"
    )


def _from_config(files: ModelFiles, config: Mapping[str, Any]) -> list[_Source]:
    path = files.config_path or files.root / "config.json"
    inner = config.get("text_config")
    places = [("", config), ("text_config.", inner if isinstance(inner, dict) else {})]
    found = []
    for prefix, owner in places:
        for key in ("quantization_config", "compression_config"):
            values = owner.get(key)
            if values is not None and not isinstance(values, dict):
                raise CheckpointError(f"{path}: {prefix}{key}={values!r} is a {type(values).__name__}, but must be an object")
            if values:
                found.append(_source(path, f"{prefix}{key}.", values, None))
    return found


def _from_side_files(root: Path) -> list[_Source]:
    paths = [(root / name, method) for name, method in _SIDE_FILES.items()]
    return [_source(path, "", read_json(path), method) for path, method in paths if path.is_file()]


def _source(path: Path, where: str, values: Mapping[str, Any], usual_method: str | None) -> _Source:
    method = _method(Fields(values, path, f"{path}: {where}"), usual_method)
    if method == "modelopt":
        where = f"{where}quantization." if isinstance(values.get("quantization"), dict) else where
        values = flat_modelopt(values)
    renamed: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for written, value in values.items():
        key = _ALIASES.get(method, {}).get(written, written)
        if value is None:
            continue
        if key in renamed and _comparable(renamed[key]) != _comparable(value):
            other = f"{spelled[key]}={renamed[key]!r}"
            raise CheckpointError(f"{path}: {where}{written}={value!r} contradicts {other} in the same file: remove the wrong one")
        renamed.setdefault(key, value)
        spelled.setdefault(key, written)
    return _Source(path, where, method, renamed, spelled)


def _method(fields: Fields, usual: str | None) -> str:
    """The method a source names, or shows by its keys, or that its file is always for."""
    if fields.has("quant_method"):
        written = fields.text("quant_method")
        method = _SPELLINGS.get(written, written)
    elif fields.has("config_groups") and not fields.has("quant_algo"):
        method = "compressed-tensors"
    elif fields.has("quant_algo") or usual == "modelopt":
        method = "modelopt"
    elif fields.values.get("load_in_8bit") or fields.values.get("load_in_4bit"):
        method = "bitsandbytes"
    elif usual is not None:
        method = usual
    else:
        raise fields.missing("quant_method", f"it must be one of {', '.join(_READERS)}")
    if method not in _READERS:
        raise CheckpointError(
            f"{fields.label('quant_method')}={method!r} is not supported. Supported: {', '.join(_READERS)}, and GGUF files. "
            "Use the dense original of the model (--quantization fp8, int8 or int4 quantizes it while it loads), "
            "or a checkpoint in one of these formats"
        )
    return method


def _merge(sources: list[_Source]) -> Fields:
    """One set of keys, the first source's first. Raises when the method or a decisive key differs."""
    first = sources[0]
    merged = dict(first.values)
    labels = {key: first.label(key) for key in first.spelled}
    for other in sources[1:]:
        if other.method != first.method:
            raise _contradiction(first.label("quant_method"), first.method, other.label("quant_method"), other.method)
        for key, value in other.values.items():
            if key not in merged:
                merged[key], labels[key] = value, other.label(key)
            elif key in _DECISIVE[first.method] and _comparable(merged[key]) != _comparable(value):
                raise _contradiction(labels[key], merged[key], other.label(key), value)
    return Fields(merged, first.path, first.label(""), labels)


def _contradiction(label: str, value: Any, other_label: str, other_value: Any) -> CheckpointError:
    return CheckpointError(
        f"{label}={value!r} contradicts {other_label}={other_value!r}: "
        "remove the file, or correct the key, that does not belong to these weights"
    )


def _comparable(value: Any) -> Any:
    """Equal for spellings that mean the same: letter case, and the order of a list of names."""
    if isinstance(value, str):
        return value.lower()
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return sorted(value)
    return (type(value).__name__, value) if isinstance(value, bool) else value
