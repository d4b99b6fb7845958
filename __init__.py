"""Octavo: quantize a model, prove what it cost, pick the best kernel for this machine, serve it. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Engine": "octavo.runtime.engine",
    "EvalResult": "octavo.calibration.eval_run",
    "SamplingParams": "octavo.runtime.sampling_params",
    "evaluate": "octavo.calibration.eval_run",
}
__all__ = ["Engine", "EvalResult", "SamplingParams", "__version__", "evaluate"]

if TYPE_CHECKING:
    from octavo.calibration.eval_run import EvalResult, evaluate
    from octavo.runtime.engine import Engine
    from octavo.runtime.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
