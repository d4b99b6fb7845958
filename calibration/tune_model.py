"""The last pass over a whole model: its blocks as they were solved, tuned together. Knows which parameters; tuning.py knows how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from .float_model import FloatModel
from .streams import Hidden
from .tuning import TunedVector, TunedWeight, TuningSchedule, tune
from .walk import put
from .work import BlockResult

_BYTES_WITH_CODES, _BYTES_WITHOUT = 20, 8  # a quantized weight's in memory beside its own four: latent, two moments, gradient, copies


def bytes_needed(model: FloatModel, schedule: TuningSchedule, seqlen: int) -> int:
    """An estimate of what `tune_model` will hold: every parameter, what is kept to tune it, and the activations of one step."""
    per_weight = 4 + (_BYTES_WITH_CODES if schedule.code_rate else _BYTES_WITHOUT)
    of_blocks = sum(parameter.numel() for block in model.blocks for parameter in block.parameters())
    outside = sum(parameter.numel() for parameter in model.module.parameters()) - of_blocks
    widest = sum(sum(parameter.shape[-2:]) for block in model.blocks for parameter in block.parameters() if parameter.dim() > 1)
    return of_blocks * per_weight + outside * 4 + schedule.batch * seqlen * widest * 8


def tune_model(
    model: FloatModel,
    tokens: Tensor,
    targets: Hidden,
    results: Sequence[BlockResult],
    schedule: TuningSchedule,
    *,
    on_step: Callable[[float], object] = lambda kl: None,
) -> tuple[list[BlockResult], list[float]]:
    """The blocks with what tuning made of them, and the KL of every step before it.

    `targets` are the float model's hidden states behind the last block for `tokens` int64 [S, T]. All blocks are in memory meanwhile.
    """
    weights: dict[nn.Parameter, dict] = {}  # type: ignore[type-arg]
    vectors: dict[nn.Parameter, TunedVector] = {}
    for index, result in enumerate(results):
        block = model.load_block(index)
        originals = {site: site.weight(block).clone() for site in result.weights} if schedule.code_rate else {}
        put(block, result)
        for site, weight in result.weights.items():
            target = site.weight(block)
            one = TunedWeight(target, weight, originals.get(site, target), with_codes=schedule.code_rate > 0)
            one.show()
            weights.setdefault(block.get_parameter(site.parameter), {})[site] = one
        for name, parameter in block.named_parameters():
            if parameter.dim() == 1 and name.endswith(".weight"):
                vectors[parameter] = TunedVector(parameter, model.names.stored[model.block_prefix(index) + name])

    def forward(rows: Tensor) -> Tensor:
        hidden, calls = model.calls(rows)
        for block, call in zip(model.blocks, calls, strict=True):
            hidden = call.run(block, hidden)
        return hidden

    def logits_of(hidden: Tensor) -> Tensor:
        return model.logits(torch.zeros(1, len(hidden), dtype=torch.int64), hidden[None])[0]

    losses = tune(forward, logits_of, tokens, lambda rows: targets[rows], weights, vectors, schedule, on_step=on_step)
    tuned = []
    for index, result in enumerate(results):
        block = model.blocks[index]
        own = {site: weights[block.get_parameter(site.parameter)][site].result() for site in result.weights}
        norms = {name: vectors[parameter].result() for name, parameter in block.named_parameters() if parameter in vectors}
        tuned.append(replace(result, weights=own, parameters={**result.parameters, **norms}))
        model.free_block(index)
    return tuned, losses
