"""Octavo: quantize a model, prove what it cost, pick the best kernel for this machine, serve it. Public names load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "Engine": "octavo.runtime.engine",
    "EvalResult": "octavo.calibration.eval_run",
    "SamplingParams": "octavo.runtime.sampling_params",
    "QuantizeResult": "octavo.calibration.quantize_result",
    "Recipe": "octavo.calibration.recipe",
    "evaluate": "octavo.calibration.eval_run",
    "quantize": "octavo.calibration.quantize_run",
}
__all__ = ["Engine", "EvalResult", "QuantizeResult", "Recipe", "SamplingParams", "__version__", "evaluate", "quantize"]

if TYPE_CHECKING:
    from octavo.calibration.eval_run import EvalResult, evaluate
    from octavo.calibration.quantize_result import QuantizeResult
    from octavo.calibration.quantize_run import quantize
    from octavo.calibration.recipe import Recipe
    from octavo.runtime.engine import Engine
    from octavo.runtime.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
