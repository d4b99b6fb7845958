"""ServedModel: the names that the model answers to, and its entry in /v1/models. Knows no engine state."""

from __future__ import annotations

import time
from pathlib import PurePath
from typing import Any

from ..runtime.client import ModelInfo
from .errors import ApiError
from .options import ServerOptions


class ServedModel:
    """One model under its served name; its path, the path's last part and `default` lead to it too."""

    def __init__(self, info: ModelInfo, options: ServerOptions) -> None:
        self.name = options.served_model_name or info.served_name
        self._aliases = {self.name, "default", info.served_name, info.model_path, PurePath(info.model_path).name}
        self._strict = options.strict_model_names
        self._info = info
        self._created = int(time.time())

    def check(self, name: str | None) -> None:
        """Raises ApiError 404 for a name that is not served, when names are strict."""
        if self._strict and name and name not in self._aliases:
            raise self._not_found(name)

    def entry(self, name: str | None = None) -> dict[str, Any]:
        """OpenAI's model object. Raises ApiError 404 when `name` is given and not served."""
        if name is not None and name not in self._aliases:
            raise self._not_found(name)
        return {
            "id": self.name,
            "object": "model",
            "created": self._created,
            "owned_by": "octavo",
            "root": self._info.model_path,
            "parent": None,
            "max_model_len": self._info.context_length,
        }

    def _not_found(self, name: str) -> ApiError:
        shown = name if len(name) <= 100 else name[:97] + "..."
        return ApiError(
            f"the model {shown!r} is not served here; this server serves {self.name!r}",
            status_code=404,
            param="model",
            code="model_not_found",
        )
