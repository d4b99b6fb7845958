"""The config keys of NVIDIA's ModelOpt, in hf_quant_config.json and in config.json. Knows no tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from ..linear_format import DENSE, ActivationFormat, LinearFormat
from .quantization_base import KVCacheFormat, QuantizationConfig
from .quantization_fields import Fields
from .quantization_matching import is_named, names_of

# FP8_PER_CHANNEL_PER_TOKEN stores weight_scale [N] and no input_scale; FP8_PB_WO weight_scale [N/128, 1, K/128, 1], weights only.
_ALGORITHMS = {
    "fp8": LinearFormat("modelopt-fp8", 8, "tensor", activation=ActivationFormat("fp8_e4m3", "tensor", dynamic=False)),
    "fp8_per_channel_per_token": LinearFormat("modelopt-fp8", 8, "channel", activation=ActivationFormat("fp8_e4m3", "token", dynamic=True)),
    "fp8_pb_wo": LinearFormat("modelopt-fp8", 8, "block", block=(128, 128)),
}


@dataclass(frozen=True)
class ModelOptConfig(QuantizationConfig):
    default: LinearFormat
    excluded: tuple[str, ...]  # wildcards

    def _stored(self, module: str) -> LinearFormat:
        wild = any(fnmatchcase(name, entry) for name in names_of(module) for entry in self.excluded)
        return DENSE if wild or is_named(module, self.excluded) else self.default

    def _formats(self) -> tuple[LinearFormat, ...]:
        return (self.default,)


def read_modelopt(fields: Fields) -> ModelOptConfig:
    """`exclude_modules` are shell wildcards over module paths; a plain entry also means what lies below it.

    Raises CheckpointError for algorithms other than the three of FP8, and KV caches other than FP8.
    """
    algorithm = fields.choice("quant_algo", _ALGORITHMS, remedy="Export the model as FP8")
    kv_algorithm = fields.choice("kv_cache_quant_algo", ("fp8", "none"), default="none", remedy="Export the model with an FP8 KV cache")
    kv_cache = KVCacheFormat("fp8_e4m3", "tensor", dynamic=False) if kv_algorithm == "fp8" else None
    return ModelOptConfig("modelopt", fields.source, kv_cache, _ALGORITHMS[algorithm], fields.names("exclude_modules"))


def flat_modelopt(values: Mapping[str, Any]) -> dict[str, Any]:
    """hf_quant_config.json's keys, from either file: config.json has `ignore` and `kv_cache_scheme` for the same things."""
    nested = values.get("quantization")
    flat = dict(nested) if isinstance(nested, dict) else dict(values)
    if "ignore" in flat:
        flat.setdefault("exclude_modules", flat.pop("ignore"))
    scheme = flat.pop("kv_cache_scheme", None)
    if scheme is not None:
        plain = isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8) and not scheme.get("dynamic")
        flat.setdefault("kv_cache_quant_algo", "FP8" if plain else f"kv_cache_scheme {scheme}")
    return flat
