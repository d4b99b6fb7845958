"""ServerOptions: what the HTTP server itself is told, each default once. Knows no engine option and no command line."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..runtime.config import one_of
from ..runtime.logs import LogFormat, LogSettings

LogLevel = Literal["debug", "info", "warning", "error", "critical"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """How the server listens, whom it lets in and how long it waits when it stops. Raises ValueError on construction."""

    host: str = "127.0.0.1"
    port: int = 30000  # 0 takes any free port
    api_keys: tuple[str, ...] = ()  # none: everybody may ask
    admin_api_keys: tuple[str, ...] = ()  # for what changes the server, which is closed where there are api_keys alone
    cors_origins: tuple[str, ...] = ()  # from which pages of a browser may ask; none: no page of another origin
    enable_metrics: bool = True
    served_model_name: str | None = None  # None: the name the engine gives
    strict_model_names: bool = False  # True: 404 for a model name that is not served
    log_level: LogLevel = "info"
    log_file: str | None = None
    log_format: LogFormat = "text"
    log_requests: bool = False
    max_body_mib: int = 64
    shutdown_timeout_s: float = 5.0  # running requests may finish for so long before they are cut
    dead_engine_linger_s: float = 3.0  # how long 503s are still answered after the engine died

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"--port {self.port} is not valid: give a number from 1 to 65535, or 0 for any free port")
        if not self.host:
            raise ValueError("--host '' is not valid: give 127.0.0.1 for this machine only or 0.0.0.0 for every interface")
        for flag, keys in (("--api-key", self.api_keys), ("--admin-api-key", self.admin_api_keys)):
            if any(not key.strip() or not key.isascii() for key in keys):
                raise ValueError(f"{flag} is not valid, it is empty or not ASCII: give one that HTTP headers can carry")
            if any(key != key.strip() or not key.isprintable() for key in keys):
                raise ValueError(f"{flag} is not valid, it begins or ends with a space or holds a control character, such as a line's end")
        if self.served_model_name is not None and not self.served_model_name.strip():
            raise ValueError(f"--served-model-name {self.served_model_name!r} is not valid: give a name or leave it out")
        if self.log_level not in get_args(LogLevel):
            raise ValueError(f"--log-level {self.log_level!r} is not valid: give {one_of(get_args(LogLevel))}")
        if self.log_format not in get_args(LogFormat):
            raise ValueError(f"--log-format {self.log_format!r} is not valid: give {one_of(get_args(LogFormat))}")
        if self.log_file is not None and not self.log_file.strip():
            raise ValueError("--log-file '' is not valid: give a file, or leave it out")
        if self.max_body_mib < 1:
            raise ValueError(f"--max-body-mib {self.max_body_mib} is not valid: give at least 1")
        if not 0 <= self.shutdown_timeout_s < math.inf:
            raise ValueError(
                f"--shutdown-timeout {self.shutdown_timeout_s:g} is not valid: give seconds, 0 to cut running requests at once"
            )

    @property
    def logs(self) -> LogSettings:
        """Where and how to log."""
        return LogSettings(level=self.log_level, format=self.log_format, file=self.log_file)
