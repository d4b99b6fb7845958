"""The last pass over a whole model: its blocks as they were solved, tuned together. Knows which parameters; tuning.py knows how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .float_model import FloatModel
from .sites import Site
from .streams import Hidden
from .tuning import LOGIT_ROWS, TunedVector, TunedWeight, TuningSchedule, kl_and_gradient, tune
from .walk import put
from .work import BlockResult

_BYTES_A_WEIGHT = 12  # its value, its levels, and its gradient while that is there
_LOGIT_COPIES = 8  # of a part's logits at once: both models', their logarithms, shares, gradients
_MOST_HELD_BACK = 4  # samples


def bytes_needed(model: FloatModel, schedule: TuningSchedule, seqlen: int) -> int:
    """An estimate of what `tune_model` will hold: every parameter, what is kept to tune it, and the activations of one step."""
    of_blocks = sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    outside = sum(parameter.numel() for parameter in model.module.parameters()) - of_blocks
    widest = sum(sum(parameter.shape[-2:]) for block in model.blocks for parameter in block.parameters() if parameter.dim() > 1)
    logits = LOGIT_ROWS * model.vocab_size * _LOGIT_COPIES * 4
    return of_blocks * _BYTES_A_WEIGHT + outside * 4 + schedule.batch * seqlen * widest * 8 + logits


@dataclass(frozen=True, eq=False)
class Tuned:
    """`blocks` are None where tuning did not help. KL in nats a token on samples that were not tuned on, before and after."""

    blocks: list[BlockResult] | None
    kl_before: float
    kl_after: float


def tune_model(
    model: FloatModel,
    tokens: Tensor,
    num_given: int,
    targets: Hidden,
    results: Sequence[BlockResult],
    schedule: TuningSchedule,
    *,
    on_step: Callable[[float], object] = lambda kl: None,
) -> Tuned:
    """Tune scales and norms on `tokens` int64 [S, T]. The first `num_given` are what was given to calibrate on: the last few of those are
    held back, and judge whether it helped.

    `targets` are the float model's hidden states behind the last block for `tokens`. All blocks are in memory meanwhile.
    """
    weights: dict[nn.Parameter, dict[Site, TunedWeight]] = {}
    vectors: dict[nn.Parameter, TunedVector] = {}
    for index, result in enumerate(results):
        block = model.load_block(index)
        put(block, result)
        for site, weight in result.weights.items():
            target = site.weight(block)
            weights.setdefault(block.get_parameter(site.parameter), {})[site] = TunedWeight(target, weight.to(target.device))
        for name, parameter in block.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                vectors[parameter] = TunedVector(parameter, model.names.stored[model.block_prefix(index) + name])

    def forward(rows: Tensor) -> Tensor:
        hidden, calls = model.calls(rows)
        with model.quickly():
            for block, call in zip(model.blocks, calls, strict=True):
                hidden = call.run(block, hidden)
        return hidden.float()

    def logits_of(hidden: Tensor) -> Tensor:
        return model.logits(torch.zeros(1, len(hidden), dtype=torch.int64), hidden[None])[0]

    held = range(num_given - max(1, min(_MOST_HELD_BACK, num_given // 8)), num_given)

    @torch.no_grad()
    def judge() -> float:
        return sum(kl_and_gradient(forward(tokens[[row]]), targets[[row]], logits_of)[0] for row in held) / len(held)

    before = judge()
    drawn = [row for row in range(len(tokens)) if row not in held] or list(held)
    tune(
        forward,
        logits_of,
        tokens[drawn],
        lambda rows: targets[[drawn[row] for row in rows]],
        weights,
        vectors,
        schedule,
        on_step=on_step,
    )
    after = judge()
    blocks = []
    for index, result in enumerate(results):
        block = model.blocks[index]
        tuned = {site: weights[block.get_parameter(site.parameter)][site].result() for site in result.weights}
        norms = {name: vectors[parameter].result() for name, parameter in block.named_parameters() if parameter in vectors}
        blocks.append(replace(result, weights=tuned, parameters={**result.parameters, **norms}))
        model.free_block(index)
    return Tuned(blocks if after < before else None, before, after)
