"""Phases: how long the parts of a start took. Knows none of them."""

from __future__ import annotations

import time


class Phases:
    """Seconds by phase, in the order in which they ended: each lasts from the end of the one before."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since_s = time.perf_counter()

    def ends(self, name: str) -> None:
        """The phase `name` ends now; the next begins."""
        now = time.perf_counter()
        self.seconds[name] = now - self._since_s
        self._since_s = now
