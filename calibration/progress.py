"""A progress bar on a terminal; in a log file a line now and then. Knows nothing of what goes on."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from tqdm import tqdm

_EVERY_S = 30.0


class Progress:
    """`total` steps of something. A context manager."""

    def __init__(self, what: str, total: int, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._bar = tqdm(total=total, desc=what, unit=unit, file=sys.stderr, disable=None)
        self._done, self._note = 0, ""
        self._started = self._told = time.monotonic()

    def step(self, count: int = 1, note: str = "") -> None:
        """So many more are done."""
        self._done += count
        self._note = note or self._note
        if not self._bar.disable:
            self._bar.set_postfix_str(self._note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._told >= _EVERY_S or self._done >= self._total:
            self._told = time.monotonic()
            left = (self._told - self._started) / max(self._done, 1) * (self._total - self._done)
            print(
                f"{self._what}: {self._done}/{self._total} {self._unit}, {left:.0f} s left; {self._note}".rstrip("; "),
                file=sys.stderr,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None) -> None:
        self._bar.close()
