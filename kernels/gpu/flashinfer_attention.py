"""FlashInfer's attention over our pages, where the package is installed and it was asked for. Knows no model.

Written for flashinfer-python 0.6 and 0.7 (https://docs.flashinfer.ai/api/attention.html). It plans a step on the host, from lengths that
the host knows, so its steps are not captured in graphs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Hashable
from typing import Any, Final

import torch
from torch import Tensor

MODULE: Final = "flashinfer"
HEAD_DIMS: Final = (64, 128, 256)
_WORKSPACE_BYTES: Final = 128 << 20


def refuses(
    *, head_dim: int, kv_dtype: torch.dtype, activation_dtype: torch.dtype, deterministic: bool, device: torch.device
) -> str | None:
    """Why FlashInfer cannot attend for such a model here, with the remedy; None when it can."""
    if device.type != "cuda":
        return f"FlashInfer runs on NVIDIA GPUs, not on {device.type}: leave the option out"
    if importlib.util.find_spec(MODULE) is None:
        return "FlashInfer is not installed: pip install flashinfer-python, or leave the option out"
    if head_dim not in HEAD_DIMS:
        return f"FlashInfer takes heads of {', '.join(map(str, HEAD_DIMS))} elements, not {head_dim}: leave the option out"
    if kv_dtype not in (torch.bfloat16, torch.float16) or kv_dtype != activation_dtype:
        return f"FlashInfer reads pages in the activations' own 16 bits, not {kv_dtype} for {activation_dtype}: give --kv-cache-dtype auto"
    if deterministic:
        return "FlashInfer's sums depend on what else is in the batch: leave out --deterministic or the option"
    return None


class FlashInfer:
    """Wrappers and their memory, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._module = importlib.import_module(MODULE)
        self._memory = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers: dict[Hashable, Any] = {}
        self._step = 0

    def plan(self, query_start: Tensor, contexts: Tensor, table: Tensor, *, page_size: int) -> FlashInferStep:
        """A step, from int32 [B + 1], [B] and [B, pages] on the host. What it copies to the device must stay until it has run, while the
        host plans the next: so steps take turns with two sets of wrappers, and at most two may be on their way."""
        self._step += 1
        counts = (contexts + page_size - 1) // page_size
        ends = torch.cat((torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)))
        indices = table[torch.arange(table.shape[1]) < counts[:, None]]
        last = (contexts - 1) % page_size + 1
        return FlashInferStep(self, self._step % 2, (query_start, ends, indices, last.to(torch.int32)), page_size)

    def wrapper(self, turn: int, kind: Hashable) -> Any:
        """The wrapper of a turn for layers of one kind."""
        if (turn, kind) not in self._wrappers:
            self._wrappers[turn, kind] = self._module.BatchPrefillWithPagedKVCacheWrapper(self._memory, "HND")
        return self._wrappers[turn, kind]


class FlashInferStep:
    """One step; planned when the first layer of each kind asks."""

    def __init__(self, owner: FlashInfer, turn: int, arrays: tuple[Tensor, ...], page_size: int) -> None:
        self._owner, self._turn, self._arrays, self._page_size = owner, turn, arrays, page_size
        self._planned: dict[Hashable, Any] = {}

    def attend(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, *, scale: float, sliding_window: int | None, soft_cap: float | None, out: Tensor
    ) -> None:
        """kernels/paged_attention.py's operation, whose arguments it has checked."""
        tokens = int(self._arrays[0][-1])
        kind = (scale, sliding_window, soft_cap, q.shape[1:], k_pages.shape[1], q.dtype, k_pages.dtype)
        wrapper = self._planned.get(kind)
        if wrapper is None:
            wrapper = self._planned[kind] = self._owner.wrapper(self._turn, kind)
            wrapper.plan(
                *self._arrays,
                num_qo_heads=q.shape[1],
                num_kv_heads=k_pages.shape[1],
                head_dim_qk=q.shape[2],
                page_size=self._page_size,
                causal=True,
                sm_scale=scale,
                window_left=-1 if sliding_window is None else sliding_window - 1,  # keys before the own one
                logits_soft_cap=soft_cap or 0.0,
                q_data_type=q.dtype,
                kv_data_type=k_pages.dtype,
                non_blocking=True,
            )
        out[:tokens].copy_(wrapper.run(q[:tokens].contiguous(), (k_pages, v_pages)))
