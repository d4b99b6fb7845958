"""compressed-tensors' config: which group a module belongs to, what is ignored. One group's format is read next door."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..linear_format import DENSE, LinearFormat
from .quantization_base import QuantizationConfig
from .quantization_compressed_group import read_group, read_kv_cache
from .quantization_fields import Fields

_CLASSES = ("Linear", "Module")  # what torch.nn.Linear answers to
_STATUSES = ("compressed", "frozen", "calibration", "initialized", "decompressed")
_SAME_NAME = ("float-quantized", "int-quantized")  # `weight` before and after compression


@dataclass(frozen=True)
class Target:
    """An entry of `targets` or `ignore`: a module's path, a regular expression after "re:", or a class name."""

    text: str
    pattern: re.Pattern[str] | None

    def matches(self, module: str) -> bool:
        """The pattern is matched from the path's beginning; every module asked about is a Linear."""
        if self.pattern is not None:
            return self.pattern.match(module) is not None
        return self.text == module or self.text in _CLASSES

    @property
    def rank(self) -> tuple[int, str]:
        """Sorts as the compressed-tensors package prefers: paths, then regular expressions by their text, then classes."""
        return (1 if self.pattern is not None else 2 if self.text in _CLASSES else 0, self.text)


@dataclass(frozen=True)
class CompressedTensorsConfig(QuantizationConfig):
    targets: tuple[tuple[Target, LinearFormat], ...]  # in order of preference
    ignored: tuple[Target, ...]

    def _stored(self, module: str) -> LinearFormat:
        if any(entry.matches(module) for entry in self.ignored):
            return DENSE
        return next((stored for target, stored in self.targets if target.matches(module)), DENSE)

    def _formats(self) -> tuple[LinearFormat, ...]:
        return tuple(stored for _, stored in self.targets)


def read_compressed_tensors(fields: Fields) -> CompressedTensorsConfig:
    """A group's own `format` wins over the file's, which "mixed-precision" leaves to the groups.

    Raises CheckpointError for sparsity, rotations, uncompressed files, formats that are not supported, and a target of two groups
    that differ.
    """
    _refuse_beyond_quantization(fields)
    targets: dict[str, tuple[Target, LinearFormat]] = {}
    groups = fields.section("config_groups")
    for name in groups.values:
        if isinstance(groups.values[name], list):
            raise groups.fault(name, "is a preset's name with its targets: write the preset out, with weights and input_activations")
        group = groups.section(name)
        stored = read_group(group, fields)
        _check_status(fields, stored)
        for text in group.names("targets"):
            other = targets.get(text)
            if other is not None and other[1] != stored:
                raise group.fault(
                    "targets", f"holds {text!r}, which another group has too: {other[1].describe()} there, {stored.describe()} here"
                )
            targets[text] = (_target(group, "targets", text), stored)
    ignored = tuple(_target(fields, "ignore", text) for text in fields.names("ignore"))
    ordered = tuple(sorted(targets.values(), key=lambda entry: entry[0].rank))
    return CompressedTensorsConfig("compressed-tensors", fields.source, read_kv_cache(fields), ordered, ignored)


def _target(fields: Fields, key: str, text: str) -> Target:
    return Target(text, fields.pattern(key, text.removeprefix("re:")) if text.startswith("re:") else None)


def _refuse_beyond_quantization(fields: Fields) -> None:
    sparsity = fields.section("sparsity_config")
    if sparsity.values:
        sparsity.choice("format", ("dense",), default="dense", remedy="Sparse weights cannot be read: save the model without sparsity")
    transforms = fields.section("transform_config").values
    if transforms.get("config_groups", transforms):
        raise fields.fault("transform_config", "is not supported: weights that are rotated need transforms while the model runs")
    fields.refuse("moe_sparsity_config", "models with pruned experts cannot be read")


def _check_status(fields: Fields, stored: LinearFormat) -> None:
    """Files whose weights have one name either way were also written as "frozen"; a tensor's dtype then tells what it is."""
    allowed = ("compressed", "frozen") if stored.layout in _SAME_NAME else ("compressed",)
    status = fields.choice("quantization_status", _STATUSES, default="compressed")
    if status not in allowed:
        raise fields.fault(
            "quantization_status", "is not supported: the weights are not compressed. Save the model again with save_compressed=True"
        )
