"""Which modules a list of names or patterns means. Knows module paths and no config's keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..linear_format import DENSE, LinearFormat
from .quantization_fields import Fields

# Engines merge these parts into one linear, and some writers name the merged one.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


def names_of(module: str) -> tuple[str, ...]:
    """A module's own path, and the path of the merged linear that it is a part of."""
    parent, dot, last = module.rpartition(".")
    fused = _FUSED.get(last)
    return (module,) if fused is None else (module, f"{parent}{dot}{fused}")


def is_named(module: str, entries: Iterable[str]) -> bool:
    """Whether an entry is the module's path, a prefix or a suffix of whole path components, or names the merged linear around it."""
    paths = [f".{name}." for name in names_of(module)]
    wanted = [f".{entry.strip('.')}." for entry in entries if entry.strip(".")]
    return any(path.startswith(entry) or path.endswith(entry) for path in paths for entry in wanted)


def contains_components(module: str, entries: Iterable[str]) -> bool:
    """Whether an entry's path components stand in the module's path one after the other, such as "self_attn.q_proj"."""
    return any(f".{entry}." in f".{module}." for entry in entries)


def is_lm_head(module: str) -> bool:
    return module.rpartition(".")[2] == "lm_head"


@dataclass(frozen=True)
class DynamicRule:
    """One entry of GPTQModel's `dynamic`: the modules whose path the pattern matches from its beginning are stored so."""

    pattern: re.Pattern[str]
    stored: LinearFormat  # DENSE for "-:"


def dynamic_rules(fields: Fields, build: Callable[[Fields], LinearFormat]) -> tuple[DynamicRule, ...]:
    """Read `dynamic`: {"-:regex": {}} leaves modules dense, {"+:regex": {...}} or {"regex": {...}} overrides keys of the config.

    `build` makes a format of the config's keys with a rule's overrides laid over them. Each rule is checked here, matched or not.
    """
    section = fields.section("dynamic")
    rules = []
    for key in section.values:
        sign, regex = (key[:2], key[2:]) if key[:2] in ("+:", "-:") else ("+:", key)
        pattern = section.pattern(key, regex)
        if sign == "-:":
            rules.append(DynamicRule(pattern, DENSE))
            continue
        rules.append(DynamicRule(pattern, build(overlay(fields, section.section(key)))))
    return tuple(rules)


def overlay(fields: Fields, overrides: Fields) -> Fields:
    """The keys of a config with some laid over them; each keeps the name of the place it comes from."""
    changed = {key: value for key, value in overrides.values.items() if value is not None}
    labels = {**fields.labels, **{key: overrides.label(key) for key in changed}}
    return Fields({**fields.values, **changed}, fields.source, fields.prefix, labels)


def by_rules(module: str, rules: tuple[DynamicRule, ...], default: LinearFormat) -> LinearFormat:
    """What the first rule that matches says, else the default."""
    return next((rule.stored for rule in rules if rule.pattern.match(module)), default)
