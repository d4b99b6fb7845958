"""AutoRound's own config, for the packings that are GPTQ's or AWQ's under another name. Knows no tensors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from ..linear_format import DENSE, LinearFormat
from .quantization_awq import awq_format
from .quantization_base import QuantizationConfig
from .quantization_fields import Fields
from .quantization_gptq import gptq_format
from .quantization_matching import is_lm_head, overlay

_PACKINGS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
_REGEX_SIGNS = re.compile(r"[*+?^$()\[\]{}|\\]")
_UNQUANTIZED_BITS = 16


@dataclass(frozen=True)
class AutoRoundConfig(QuantizationConfig):
    """`method` is the packing's: "gptq" or "awq"."""

    default: LinearFormat
    named: tuple[tuple[str, LinearFormat], ...]  # extra_config: modules by name
    matched: tuple[tuple[re.Pattern[str], LinearFormat], ...]  # extra_config: modules by regular expression
    blocks: tuple[str, ...]  # parts of the paths of quantized blocks; () means all

    def _stored(self, module: str) -> LinearFormat:
        for name, stored in self.named:
            if name == module:
                return stored
        for pattern, stored in self.matched:
            if pattern.search(module):
                return stored
        if self.blocks:
            return self.default if any(block in module for block in self.blocks) else DENSE
        return DENSE if is_lm_head(module) else self.default

    def _formats(self) -> tuple[LinearFormat, ...]:
        return (self.default, *(stored for _, stored in (*self.named, *self.matched)))


def read_autoround(fields: Fields) -> AutoRoundConfig:
    """Raises CheckpointError for packings of AutoRound's own, data types other than int, and quantized activations."""
    remedy = "Export the model again with --format auto_gptq, auto_awq or llm_compressor"
    method = _PACKINGS[fields.choice("packing_format", _PACKINGS, remedy=remedy)]
    named, matched = [], []
    section = fields.section("extra_config")
    for name in section.values:
        stored = _format(overlay(fields, section.section(name)), method)
        if _REGEX_SIGNS.search(name):
            matched.append((section.pattern(name, name), stored))
        else:
            named.append((name, stored))
    return AutoRoundConfig(method, fields.source, None, _format(fields, method), tuple(named), tuple(matched), _blocks(fields))


def _format(fields: Fields, method: str) -> LinearFormat:
    """AutoRound writes GPTQ's first format without act-order, and AWQ with `sym` where AWQ's own files have `zero_point`."""
    if fields.integer("bits") >= _UNQUANTIZED_BITS:
        return DENSE
    fields.choice("data_type", ("int",), default="int")
    if fields.has("act_bits") and fields.integer("act_bits") < _UNQUANTIZED_BITS:
        raise fields.fault("act_bits", "is not supported: only the weights may be quantized")
    symmetric = fields.boolean("sym", default=False)
    keys = {"bits": fields.values["bits"], "group_size": fields.values.get("group_size"), "sym": symmetric, "desc_act": False}
    plain = Fields({**keys, "zero_point": not symmetric}, fields.source, fields.prefix, fields.labels)
    stored = gptq_format(plain) if method == "gptq" else awq_format(plain)
    return replace(stored, said={**stored.said, "symmetric": fields.said("sym")})


def _blocks(fields: Fields) -> tuple[str, ...]:
    """`block_name_to_quantize` is a list, or one string with commas."""
    for key in ("block_name_to_quantize", "to_quant_block_names"):
        value = fields.values.get(key)
        if isinstance(value, str):
            return tuple(part.strip() for part in value.split(",") if part.strip())
        if value is not None:
            return fields.names(key)
    return ()
