"""GPTQ's config keys, as AutoGPTQ, GPTQModel, optimum and AutoRound write them. Knows no tensors; AWQ's keys are next door."""

from __future__ import annotations

from dataclasses import dataclass

from ..linear_format import DENSE, LinearFormat
from .quantization_base import QuantizationConfig
from .quantization_fields import Fields
from .quantization_matching import DynamicRule, by_rules, contains_components, dynamic_rules, is_lm_head

_ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}
_REPACK = "Save it again in checkpoint_format gptq or gptq_v2"
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class GptqConfig(QuantizationConfig):
    default: LinearFormat
    rules: tuple[DynamicRule, ...]
    only: tuple[str, ...]  # modules_in_block_to_quantize; () means all
    lm_head: bool

    def _stored(self, module: str) -> LinearFormat:
        if is_lm_head(module):
            return by_rules(module, self.rules, self.default) if self.lm_head else DENSE
        if self.only and not contains_components(module, self.only):
            return DENSE
        return by_rules(module, self.rules, self.default)

    def _formats(self) -> tuple[LinearFormat, ...]:
        return (self.default, *(rule.stored for rule in self.rules))


def read_gptq(fields: Fields) -> GptqConfig:
    """Raises CheckpointError for packings other than GPTQ's two formats, and for values that make no sense."""
    return GptqConfig(
        "gptq",
        fields.source,
        None,
        gptq_format(fields),
        dynamic_rules(fields, gptq_format),
        fields.names("modules_in_block_to_quantize"),
        fields.boolean("lm_head", default=False),
    )


def gptq_format(fields: Fields) -> LinearFormat:
    """One module's format. Zero points and g_idx are always stored, so a key that is absent is read as "look at the tensors".

    With desc_act, g_idx decides which group a column is in, whatever static_groups says; one group over all columns has no order.
    """
    refuse_packing(fields)
    checkpoint_format = fields.choice("checkpoint_format", _ZERO_OFFSETS, default="gptq", remedy=_REPACK)
    bits = fields.integer("bits", allowed=BITS)
    group_size = fields.group_size("group_size")
    return LinearFormat(
        "gptq",
        bits,
        "channel" if group_size is None else "group",
        group_size=group_size,
        symmetric=fields.boolean("sym", default=False),
        act_order=group_size is not None and fields.boolean("desc_act", default=True),
        zero_offset=_ZERO_OFFSETS[checkpoint_format],
        said={"bits": fields.said("bits"), "group_size": fields.said("group_size"), "symmetric": fields.said("sym")},
    )


def refuse_packing(fields: Fields) -> None:
    """Raises for what GPTQModel and AutoGPTQ can write that changes the tensors or what must be computed with them."""
    fields.refuse("is_marlin_format", f"Marlin's tile order is no checkpoint layout. {_REPACK}")
    fields.choice("pack_dtype", ("int32",), default="int32", remedy="Save it again with pack_dtype int32")
    fields.refuse("adapter", "an adapter that belongs to the quantized weights would be lost. Quantize without it")
    fields.refuse("rotation", "weights that are rotated need a rotation while the model runs. Quantize without it")
