"""What a step of the greatest size takes beside weights and pages: found by computing one, before the pool is made. Knows no queue."""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np
import torch

from .batch import Batch, BatchRow
from .request import Request
from .sampler import Sampler, SampleRow, launch_prompt_logprobs
from .sampling_params import SamplingParams
from .transfer import to_device

# Everything that a request can make the sampler do.
_DEMANDING = SamplingParams(
    top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logit_bias={0: 1.0}, logprobs=20, prompt_logprobs=20, seed=0
)


def largest_step(*, prompt_tokens: int, max_running_requests: int, context_length: int, page_size: int) -> Batch:
    """A batch of `max_running_requests` rows: prompts of `prompt_tokens` in all, or as many as they can hold, the rest decoding.

    All rows lie in the same pages, the first ones: what they write is for nobody.
    """
    rows: list[BatchRow] = []
    left = prompt_tokens
    for number in range(max_running_requests):
        count = max(1, min(left, context_length))
        left -= count
        pages = array("i", range(-(-count // page_size)))
        request = Request(f"profile-{number}", count, [0] * count, _DEMANDING, 1, frozenset(), pages=pages)
        rows.append(BatchRow(request, 0, count, samples=True))
    return Batch(tuple(rows))


def compute_step(batch: Batch, forward: Callable[[Batch], torch.Tensor], device: torch.device, *, samples: bool = True) -> None:
    """Compute and, where this rank does, sample a batch, and throw away what it gives."""
    sampler = Sampler(device=device, random_seed=0)
    for row in batch.rows:
        sampler.add(row.request.request_id, row.request.params, row.request.tokens, ())
    logits = forward(batch)
    if not samples:
        return
    ends, at = [], -1
    for row in batch.rows:
        at += len(row.request.scored_positions(row.start, row.count)) + 1
        ends.append(at)
    (wanted,) = to_device([np.array(ends, dtype=np.int64)], device)
    launch_prompt_logprobs(logits, [0] * logits.shape[0], k=20).wait()
    sampler.sample(logits.index_select(0, wanted), [SampleRow(row.request.request_id, 0) for row in batch.rows])


def measured_bytes(compute: Callable[[], None], device: torch.device) -> int:
    """The most that `compute` allocates at a time beyond what was allocated before, on a CUDA device; the second time it runs.

    What stays after the first time (kernels' scratch memory) counts as used.
    """
    compute()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    compute()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    return peak
