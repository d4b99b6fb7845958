"""`octavo serve --explain-quant`: loads the model as a start would, and tells which kernel computes what. Serves nothing."""

from __future__ import annotations

from dataclasses import replace

from ..runtime.config import EngineConfig
from ..runtime.start import load_core

_TOKENS = 64  # of KV cache, which nobody fills: enough for the few tokens that prove that the kernels run


def explain_quantization(config: EngineConfig, *, every_refusal: bool) -> str:
    """The table of linears, kernels and refusals; see LinearReport.table. Raises what a start with `config` would raise.

    The model is loaded in this process, checked and run once as at any start, but with next to no KV cache.
    """
    small = replace(config, max_total_tokens=max(_TOKENS, config.page_size), mem_fraction_static=None, max_running_requests=1)
    core = load_core(small)
    try:
        return str(core.runner.linear_report.table(every_refusal=every_refusal))
    finally:
        core.close()
