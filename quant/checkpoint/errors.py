"""CheckpointError: a model's files cannot be used. Knows no reader; every reader raises it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A model's files are missing, damaged or of a kind that is not supported. The text names the file and the remedy."""
