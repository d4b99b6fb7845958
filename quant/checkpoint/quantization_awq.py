"""AWQ's config keys, as AutoAWQ, llm-awq, transformers and GPTQModel write them. Knows no tensors."""

from __future__ import annotations

from dataclasses import dataclass

from ..linear_format import DENSE, LinearFormat
from .quantization_base import QuantizationConfig
from .quantization_fields import Fields
from .quantization_gptq import refuse_packing
from .quantization_matching import DynamicRule, by_rules, dynamic_rules, is_lm_head

_REPACK = "Quantize the model again with version gemm"


@dataclass(frozen=True)
class AwqConfig(QuantizationConfig):
    default: LinearFormat
    rules: tuple[DynamicRule, ...]
    skipped: tuple[str, ...]  # substrings of module paths
    lm_head: bool

    def _stored(self, module: str) -> LinearFormat:
        if any(part in module for part in self.skipped) or (is_lm_head(module) and not self.lm_head):
            return DENSE
        return by_rules(module, self.rules, self.default)

    def _formats(self) -> tuple[LinearFormat, ...]:
        return (self.default, *(rule.stored for rule in self.rules))


def read_awq(fields: Fields) -> AwqConfig:
    """Entries of `modules_to_not_convert` are substrings of module paths, as vLLM and SGLang read them.

    Raises CheckpointError for packings other than "gemm", and for values that make no sense.
    """
    if fields.has("backend") and fields.text("backend") == "llm-awq":
        raise fields.fault("backend", f"is not supported: llm-awq packs for its gemv_fast kernel. {_REPACK}")
    return AwqConfig(
        "awq",
        fields.source,
        None,
        awq_format(fields),
        dynamic_rules(fields, awq_format),
        tuple(part for part in fields.names("modules_to_not_convert") if part),
        fields.boolean("lm_head", default=False),
    )


def awq_format(fields: Fields) -> LinearFormat:
    """One module's format. `zero_point` decides on symmetry; GPTQModel's `sym` stands beside it without meaning."""
    refuse_packing(fields)
    fields.choice("version", ("gemm",), default="gemm", remedy=_REPACK)
    group_size = fields.group_size("group_size")
    return LinearFormat(
        "awq",
        fields.integer("bits", allowed=(4,)),
        "channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=not fields.boolean("zero_point", default=True),
        said={"bits": fields.said("bits"), "group_size": fields.said("group_size"), "symmetric": fields.said("zero_point")},
    )
