"""FlashInfer's place in a step: what it is told is what its documentation asks for. The package is stood in for; it needs a GPU."""

from __future__ import annotations

import itertools
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.kernels.gpu import flashinfer_attention
from octavo.kernels.gpu.device import pretend
from octavo.kernels.gpu.flashinfer_attention import FlashInfer, refuses
from octavo.kernels.paged_attention import AttentionPlan, paged_attention, reference
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.config import EngineConfig
from octavo.runtime.model_runner import ModelRunner

from .test_dummy_weights import config_folder

CPU = torch.device("cpu")


class Wrapper:
    """BatchPrefillWithPagedKVCacheWrapper by its documentation, computed in floats."""

    made: list[Wrapper]

    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8
        assert kv_layout == "HND"
        self.plans = 0
        self.made.append(self)

    def plan(
        self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor, paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int, *, causal: bool, sm_scale: float, window_left: int,
        logits_soft_cap: float, q_data_type: torch.dtype, kv_data_type: torch.dtype, non_blocking: bool,
    ) -> None:  # fmt: skip
        for tensor in (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len):
            assert tensor.dtype == torch.int32
            assert tensor.device == CPU
        assert causal
        assert non_blocking
        assert q_data_type == kv_data_type == torch.bfloat16
        self.plans += 1
        self.starts, self.ends, self.indices, self.last = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self.heads, self.page, self.scale, self.window, self.cap = num_qo_heads, page_size, sm_scale, window_left, logits_soft_cap
        assert (num_kv_heads, head_dim_qk) == (2, 64)

    def run(self, q: torch.Tensor, paged_kv_cache: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        assert q.is_contiguous()
        out = torch.empty_like(q)
        for b, (first, last) in enumerate(itertools.pairwise(self.starts.tolist())):
            pages = self.indices[self.ends[b] : self.ends[b + 1]].long()
            context = (len(pages) - 1) * self.page + int(self.last[b])
            k, v = (x[pages].transpose(0, 1).flatten(1, 2)[:, :context].float().repeat_interleave(2, 0) for x in paged_kv_cache)
            score = q[first:last].float().transpose(0, 1) @ k.transpose(1, 2) * self.scale
            if self.cap > 0:
                score = self.cap * torch.tanh(score / self.cap)
            own = torch.arange(context - (last - first), context)[:, None]
            key = torch.arange(context)[None]
            hidden = key > own
            if self.window >= 0:
                hidden |= key < own - self.window
            out[first:last] = (score.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1).to(q.dtype)
        return out


@pytest.fixture
def peer(monkeypatch: pytest.MonkeyPatch) -> FlashInfer:
    Wrapper.made = []
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_attention, "_WORKSPACE_BYTES", 16)
    return FlashInfer(CPU)


def test_a_step_attends_as_ours_does(peer: FlashInfer) -> None:
    source = torch.Generator().manual_seed(0)
    queries, contexts = [1, 5, 1, 20], [1, 5, 47, 48]
    starts = torch.tensor([0, *itertools.accumulate(queries)], dtype=torch.int32)
    table = torch.randperm(12, generator=source)[:12].view(4, 3).int()
    k_pages, v_pages = (torch.randn(12, 2, 16, 64, generator=source).bfloat16() for _ in range(2))
    q = torch.randn(30, 4 * 64 + 32, generator=source).bfloat16()[:, 16:-16].view(30, 4, 64)
    none = torch.empty(0, 0, dtype=torch.int64)
    for step in range(3):
        plan = AttentionPlan(
            starts, torch.tensor(contexts, dtype=torch.int32), table, 27, 4, 2, 64, none, 0, 1,
            peer=peer.plan(starts, torch.tensor(contexts, dtype=torch.int32), table, page_size=16),
        )  # fmt: skip
        for window, cap in ((None, None), (7, None), (1, 3.0), (None, None)):
            options: dict[str, Any] = {"scale": 0.125, "sliding_window": window, "soft_cap": cap}
            out, exact = torch.full_like(q, 9.0), torch.full_like(q, 9.0).float()
            with pretend(90):
                paged_attention(q, k_pages, v_pages, plan, out=out, **options)
            reference(q, k_pages, v_pages, plan, out=exact, **options)
            torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
            assert (out[27:] == 9.0).all(), "rows beyond the step stay as they are"
        assert len(Wrapper.made) == 3 * min(step + 1, 2), "one for each kind of layer, and two sets that take turns"
    assert [wrapper.plans for wrapper in Wrapper.made] == [2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"device": CPU}, "runs on NVIDIA GPUs, not on cpu"),
        ({"head_dim": 80}, "heads of 64, 128, 256 elements, not 80"),
        ({"kv_dtype": torch.float8_e4m3fn}, "--kv-cache-dtype auto"),
        ({"kv_dtype": torch.float16}, "--kv-cache-dtype auto"),
        ({"deterministic": True}, "leave out --deterministic"),
    ],
)
def test_what_it_cannot_do_is_told(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], words: str | None) -> None:
    usual = {"head_dim": 128, "kv_dtype": torch.bfloat16, "activation_dtype": torch.bfloat16, "deterministic": False}
    monkeypatch.setattr(flashinfer_attention.importlib.util, "find_spec", lambda name: name)
    reason = refuses(**{**usual, "device": torch.device("cuda"), **changes})
    assert reason is None if words is None else words in (reason or "")
    monkeypatch.setattr(flashinfer_attention.importlib.util, "find_spec", lambda name: None)
    assert "pip install flashinfer-python" in (refuses(**usual, device=torch.device("cuda")) or "")


def test_an_engine_that_cannot_have_it_says_so_at_start(tmp_path: Path) -> None:
    folder = config_folder(tmp_path, None)
    config = EngineConfig(model_path=str(folder), load_format="dummy", device="cpu", attention_backend="flashinfer", max_total_tokens=64)
    with pytest.raises(
        ValueError, match="--attention-backend flashinfer: FlashInfer runs on NVIDIA GPUs, not on cpu: leave the option out"
    ):
        ModelRunner(config.resolve(device="cpu"), resolve_model(str(folder), needs_weights=False), show_progress=False)
