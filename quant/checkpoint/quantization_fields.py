"""Fields: typed access to the keys of a quantization config. Knows JSON and error texts, and no format."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import CheckpointError


@dataclass(frozen=True)
class Fields:
    """The keys of one JSON object. A key that is null counts as absent. Every getter raises CheckpointError with file, key and value."""

    values: Mapping[str, Any]
    source: Path
    prefix: str  # what messages put before a key: the file and the path inside it, such as "config.json: quantization_config."
    labels: Mapping[str, str] = field(default_factory=dict)  # of keys that come from elsewhere

    def label(self, key: str) -> str:
        """How messages name a key: its file, and its path inside the file."""
        return self.labels.get(key, self.prefix + key)

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def said(self, key: str) -> str:
        """How messages quote a key: file, key, value."""
        return f"{self.label(key)}={self.values.get(key)!r}"

    def fault(self, key: str, reason: str) -> CheckpointError:
        """The error to raise about a key: file, key, value, then `reason`."""
        return CheckpointError(f"{self.said(key)} {reason}")

    def missing(self, key: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.label(key)} is missing: {what}. Take the file from the original checkpoint again, or add the key")

    def integer(self, key: str, *, allowed: Collection[int] | None = None) -> int:
        """A required whole number; `allowed` lists the supported ones."""
        listed = ", ".join(map(str, allowed or ()))
        choices = "a whole number" if allowed is None else f"one of {listed}" if len(allowed) > 1 else listed
        if not self.has(key):
            raise self.missing(key, f"it must be {choices}")
        value = self.values[key]
        if not _is_integer(value):
            raise self.fault(key, f"is a {type(value).__name__}, but must be a number: {choices}")
        if allowed is not None and value not in allowed:
            raise self.fault(key, f"is not supported: it must be {choices}")
        return int(value)

    def group_size(self, key: str) -> int | None:
        """A required group size: positive, or None for -1, which means one group over all input features."""
        value = self.integer(key)
        if value != -1 and value <= 0:
            raise self.fault(key, "is no group size: it must be positive, or -1 for one group over all input features")
        return None if value == -1 else value

    def boolean(self, key: str, *, default: bool) -> bool:
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, bool):
            raise self.fault(key, f"is a {type(value).__name__}, but must be true or false")
        return value

    def text(self, key: str, *, default: str | None = None, wanted: str = "a string") -> str:
        """A string, in lower case. Required when there is no default."""
        if not self.has(key) and default is None:
            raise self.missing(key, f"it must be {wanted}")
        value = self.values[key] if self.has(key) else default
        if not isinstance(value, str):
            raise self.fault(key, f"is a {type(value).__name__}, but must be {wanted}")
        return value.lower()

    def choice(self, key: str, allowed: Collection[str], *, default: str | None = None, remedy: str = "") -> str:
        """A string out of `allowed`, in lower case."""
        wanted = f"one of {', '.join(allowed)}" if len(allowed) > 1 else ", ".join(allowed)
        value = self.text(key, default=default, wanted=wanted)
        if value not in allowed:
            raise self.fault(key, f"is not supported: it must be {wanted}{'. ' + remedy if remedy else ''}")
        return value

    def names(self, *keys: str) -> tuple[str, ...]:
        """The strings of lists, nested ones flattened; () for keys that are absent."""
        found: list[str] = []
        for key in keys:
            pending = list(self._typed(key, list) or [])
            while pending:
                entry = pending.pop(0)
                if isinstance(entry, list):
                    pending[:0] = entry
                elif isinstance(entry, str):
                    found.append(entry)
                else:
                    raise self.fault(key, f"holds {entry!r}, but must be a list of strings")
        return tuple(found)

    def section(self, key: str) -> Fields:
        """The object under a key; one without keys when it is absent."""
        return Fields(self._typed(key, dict) or {}, self.source, f"{self.label(key)}.")

    def refuse(self, key: str, reason: str) -> None:
        """Raises unless the key is absent, false or empty: it asks for something that cannot be done."""
        if self.values.get(key):
            raise self.fault(key, f"is not supported: {reason}")

    def pattern(self, key: str, regex: str) -> re.Pattern[str]:
        """Compile a regular expression that stands under (or as) a key."""
        try:
            return re.compile(regex)
        except re.error as error:
            raise CheckpointError(f"{self.label(key)}: {regex!r} is no regular expression: {error}") from error

    def _typed(self, key: str, kind: type) -> Any:
        value = self.values.get(key)
        if value is not None and not isinstance(value, kind):
            wanted = {"list": "a list of strings", "dict": "an object"}[kind.__name__]
            raise self.fault(key, f"is a {type(value).__name__}, but must be {wanted}")
        return value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
