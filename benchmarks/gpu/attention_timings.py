"""Attention over pages, timed: decoding against the bandwidth of memory, prompts against the matrix units, and torch's own beside both.

Shapes are those of Llama-3 8B: 32 heads of 128 that share 8 keys, pages of 16. torch reads keys and values that lie together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octavo.kernels.paged_attention import AttentionPlan, paged_attention, plan_attention
from octavo.kernels.pages import row_width, split_rows, storage_dtype

from . import clock
from .attention_cases import KV, KV_DTYPES
from .checks import Place
from .clock import ROTATED_BYTES, Call
from .correctness import device_answers
from .record import Budget, Record, one_line

HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
SDPA = "sdpa"  # torch's, over bfloat16
_SECONDS = 20.0
_TOLERANCE = 2e-2  # of the result's norm, between ours and torch's over the same bfloat16 numbers


@dataclass(frozen=True)
class Step:
    """`sequences` of `context` tokens in the pages, the last `queries` of them new."""

    sequences: int
    queries: int
    context: int

    @property
    def label(self) -> str:
        kind = "decode" if self.queries == 1 else "prefill"
        return f"{kind} {self.sequences} x {self.context}" + (f", {self.queries} new" if 1 < self.queries < self.context else "")

    @property
    def flops(self) -> float:
        """Of both products, of visible pairs alone."""
        seen = self.queries * (self.context - self.queries) + self.queries * (self.queries + 1) / 2
        return 4.0 * self.sequences * HEADS * DIM * seen

    def bytes_read(self, kind: torch.dtype) -> float:
        """Keys and values of the context, scales included."""
        return 2.0 * self.sequences * self.context * KV_HEADS * row_width(DIM, kind) * storage_dtype(kind).itemsize


STEPS = (
    Step(1, 1, 2048), Step(16, 1, 2048), Step(64, 1, 512), Step(64, 1, 2048), Step(16, 1, 8192), Step(256, 1, 2048),
    Step(1, 2048, 2048), Step(1, 8192, 8192), Step(4, 2048, 2048), Step(1, 512, 8192),
)  # fmt: skip


def run(record: Record, place: Place, budget: Budget, *, save: Callable[[], None], steps: Sequence[Step] = STEPS) -> None:
    """Every step that has not been timed yet, while the budget lasts."""
    for step in steps:
        if step.label in record.attention:
            continue
        if not budget.has(_SECONDS):
            print("  out of time: run the same command again, it goes on from here")
            return
        found = record.attention[step.label] = time_step(step, place)
        print(f"timed {step.label}", flush=True)
        save()
        if found["faults"] and place.is_gpu and not device_answers():
            return


def time_step(step: Step, place: Place) -> dict[str, Any]:
    """Microseconds by kind of pages, and torch's; faults by the same names."""
    kinds: tuple[KV, ...] = ("bf16", "fp8_e4m3", "int8")
    tokens = step.sequences * step.queries
    q = torch.randn(tokens, HEADS, DIM, device=place.device).bfloat16()
    faults: dict[str, str] = {}
    calls: dict[str, list[Call]] = {}
    result: dict[str, Any] = {**vars(step), "flops": step.flops, "bytes": {}, "faults": faults}
    with place.pretended():
        for kv in kinds:
            kind = KV_DTYPES[kv]
            result["bytes"][kv] = step.bytes_read(kind)
            try:
                calls[kv] = _calls(step, kind, q, place)
            except Exception as error:  # told, and the others go on
                faults[kv] = one_line(error)
        pairs = [
            [torch.randn(step.sequences, KV_HEADS, step.context, DIM, device=place.device).bfloat16() for _ in range(2)]
            for _ in range(_copies(step, torch.bfloat16, place))
        ]
        k, v = pairs[0]
        calls[SDPA] = [partial(_sdpa, q, keys, values, step) for keys, values in pairs]
        fault = _fault(step, q, k, v, place)
        if fault is not None:
            faults["bf16"] = fault
            print(f"  WRONG {step.label}: {fault}")
        timed, failed = clock.time_in_turn({name: found for name, found in calls.items() if name not in faults}, place.device)
    result["us"] = {name: timing.us for name, timing in timed.items()}
    result["bytes"][SDPA] = step.bytes_read(torch.bfloat16)
    faults |= failed
    return result


def _plan(step: Step, kind: torch.dtype, place: Place) -> AttentionPlan:
    pages = -(-step.context // PAGE)
    table = torch.randperm(step.sequences * pages).int().view(step.sequences, pages)
    starts = torch.arange(0, (step.sequences + 1) * step.queries, step.queries, dtype=torch.int32)
    contexts = torch.full((step.sequences,), step.context, dtype=torch.int32)
    return plan_attention(
        starts.to(place.device), contexts.to(place.device), table.to(place.device), num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM,
        kv_dtype=kind, num_tokens=step.sequences * step.queries,
    )  # fmt: skip


def _copies(step: Step, kind: torch.dtype, place: Place) -> int:
    """How many pairs of keys and values exceed the cache."""
    return max(2, int(-(-ROTATED_BYTES // step.bytes_read(kind)))) if place.is_gpu else 1


def _calls(step: Step, kind: torch.dtype, q: Tensor, place: Place) -> list[Call]:
    """Through as many pairs of pages as exceed the cache."""
    plan, out = _plan(step, kind, place), torch.empty_like(q)
    shape = (step.sequences * -(-step.context // PAGE), KV_HEADS, PAGE, row_width(DIM, kind))
    pairs = [[_pages(shape, kind, place.device) for _ in range(2)] for _ in range(_copies(step, kind, place))]
    return [partial(paged_attention, q, k, v, plan, scale=DIM**-0.5, kv_dtype=kind, out=out) for k, v in pairs]


def _pages(shape: tuple[int, ...], kind: torch.dtype, device: torch.device) -> Tensor:
    """Random numbers; of codes all bytes, and scales of 0.01."""
    if storage_dtype(kind) == kind:
        return torch.randn(shape, device=device).to(kind)
    pages = torch.randint(0, 120, shape, dtype=torch.uint8, device=device)
    split_rows(pages, kind)[1].fill_(0.01)
    return pages


def _sdpa(q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
    heads = q.view(step.sequences, step.queries, HEADS, DIM).transpose(1, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    if step.queries in (1, step.context):
        return attend(heads, k, v, is_causal=step.queries > 1, enable_gqa=True)
    mask = torch.ones(step.queries, step.context, dtype=torch.bool, device=q.device).tril(step.context - step.queries)
    return attend(heads, k, v, attn_mask=mask, enable_gqa=True)


def _fault(step: Step, q: Tensor, k: Tensor, v: Tensor, place: Place) -> str | None:
    """Whether ours differs from torch's over the same bfloat16 keys and values."""
    plan = _plan(step, torch.bfloat16, place)
    pages = -(-step.context // PAGE)
    k_pages, v_pages = (torch.zeros(step.sequences * pages, KV_HEADS, PAGE, DIM, dtype=torch.bfloat16, device=q.device) for _ in range(2))
    for into, numbers in ((k_pages, k), (v_pages, v)):
        padded = torch.nn.functional.pad(numbers, (0, 0, 0, pages * PAGE - step.context))
        into[plan.page_table.flatten().long()] = padded.view(step.sequences, KV_HEADS, pages, PAGE, DIM).transpose(1, 2).flatten(0, 1)
    out = torch.full_like(q, torch.nan)
    try:
        paged_attention(q, k_pages, v_pages, plan, scale=DIM**-0.5, out=out)
        wanted = _sdpa(q, k, v, step).transpose(1, 2).reshape_as(q).float()
        off = float((out.float() - wanted).norm() / wanted.norm())
    except Exception as error:
        return one_line(error)
    return None if off <= _TOLERANCE else f"off by {off:.2g} of the result's norm, allowed {_TOLERANCE}"
