"""What can go wrong between a caller and an engine. Plain exceptions: no HTTP, no tensors."""

from __future__ import annotations


class RequestRefused(ValueError):
    """The engine cannot take this request, and says why. `code` is OpenAI's error code or None; `status_code` is HTTP's."""

    def __init__(self, message: str, *, status_code: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.code = code
        self.param = param


class EngineDead(RuntimeError):
    """The engine is gone or no longer answers. The text says what is known of its end."""
