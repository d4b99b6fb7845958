"""Where a process's log lines go and how they look: stderr, and a file that is rotated. The same for the server and its engine."""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from typing import Literal

LogFormat = Literal["text", "json"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_MAX_BYTES, _KEPT = 100 << 20, 5
_COMPLAIN_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """`level` of Octavo's own loggers: others tell warnings and worse."""

    level: str = "info"
    format: LogFormat = "text"
    file: str | None = None  # beside stderr; rotated at 100 MiB, with five old ones kept


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC, ISO 8601), level, logger, message, what `extra={"fields": ...}` adds, and exception where there
    is one."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        told: dict[str, object] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage(),
        }
        told |= getattr(record, "fields", {})
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


class _Complaints:
    """A disk that is full must not end a server, nor fill stderr: it is told once a minute."""

    def __init__(self) -> None:
        self._told = -_COMPLAIN_EVERY_S

    def tell(self, file: str) -> None:
        now = time.monotonic()
        if now - self._told >= _COMPLAIN_EVERY_S:
            self._told = now
            print(f"the log file {file} cannot be written ({sys.exc_info()[1]}): lines are lost there", file=sys.stderr, flush=True)


class _Rotating(RotatingFileHandler):
    _complaints = _Complaints()

    def doRollover(self) -> None:  # noqa: N802  (logging's name)
        try:
            super().doRollover()
        except OSError:  # a folder that is not ours to rename in: the file grows on
            self._complaints.tell(self.baseFilename)
            if self.stream is None:
                self.stream = self._open()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        self._complaints.tell(self.baseFilename)


class _Following(WatchedFileHandler):
    """Appends to a file that another process rotates."""

    _complaints = _Complaints()

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  (logging's name)
        self._complaints.tell(self.baseFilename)


def set_up_logging(settings: LogSettings, *, rotates: bool) -> None:
    """Replace all handlers. One process of those that share a file `rotates` it. Raises OSError where the file cannot be opened."""
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if settings.file is not None:
        file = _Rotating(settings.file, maxBytes=_MAX_BYTES, backupCount=_KEPT, encoding="utf-8") if rotates else None
        handlers.append(file or _Following(settings.file, encoding="utf-8"))
    formatter = JsonFormatter() if settings.format == "json" else logging.Formatter(_TEXT)
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level="WARNING", handlers=handlers, force=True)
    logging.getLogger("octavo").setLevel(settings.level.upper())
