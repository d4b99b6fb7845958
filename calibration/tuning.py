"""Tuning: the last pass. Scales and norms of the whole model follow the float model's logits. Knows no method and no format.

Minimises KL(float model || quantized model) over calibration samples by Adam. Scales are tuned as EfficientQAT's second stage does (Chen
et al., 2024, arXiv 2407.11062), as what they will be written as; codes and zero points stay. Nothing changes in the format.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..kernels.grouped_linear import GroupedWeight
from .devices import CPU
from .grid import Grid, writable
from .sites import Site

_BETAS = (0.9, 0.95)
_TINY = 1e-12
LOGIT_ROWS = 512  # logits in memory at once


@dataclass(frozen=True, kw_only=True)
class TuningSchedule:
    """`steps` of `batch` samples: steps on one do more than half as many on two. Rates are about the largest change of a step, relative."""

    steps: int
    batch: int = 1
    scale_rate: float
    norm_rate: float
    seed: int = 0

    def rate(self, step: int) -> float:
        """The share of the rates at step 1 .. steps: a short rise, then half a cosine down to a twentieth."""
        rise = min(1.0, step / max(1, min(5, self.steps // 4)))
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps)))


class _Adam:
    """Adam's two moments of one tensor (Kingma and Ba, 2014, arXiv 1412.6980)."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)

    def direction(self, gradient: Tensor, step: int) -> Tensor:
        """What to go against, about 1 in size."""
        first, second = _BETAS
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        root = (self._square / (1 - second**step)).sqrt_().add_(_TINY)
        return (self._mean / (1 - first**step)).div_(root)


class TunedWeight:
    """One quantized weight: `target` [N, K] is where the model has its values, as a view."""

    def __init__(self, target: Tensor, weight: GroupedWeight) -> None:
        self._weight, self._target = weight, target
        self._grid = Grid(weight.bits, weight.group_size, weight.zeros is None, weight.scale.dtype)
        zero = weight.zeros.float() if weight.zeros is not None else torch.full(weight.scale.shape, float(weight.zero))
        self._levels = weight.codes.float().view(*weight.scale.shape, -1) - zero[..., None]
        self._scale = weight.scale.float()
        self._size = self._scale.abs()
        self._adam = _Adam(self._scale)

    def update(self, gradient: Tensor, step: int, schedule: TuningSchedule) -> None:
        """Go against `gradient` [N, K] of the loss by the weight's values, and give the model the new ones."""
        of_scale = (gradient.reshape(self._levels.shape) * self._levels).sum(-1) * self._size
        rate = schedule.scale_rate * schedule.rate(step)
        self._scale.sub_(self._adam.direction(of_scale, step).mul_(rate).mul_(self._size))
        scale = writable(self._scale, self._grid)
        self._target.copy_((self._levels * scale[..., None]).view(self._target.shape))

    def result(self) -> GroupedWeight:
        return replace(self._weight, scale=writable(self._scale, self._grid).to(self._weight.scale.dtype))


class TunedVector:
    """A norm's weight, kept as what it is written as."""

    def __init__(self, parameter: nn.Parameter, stored: torch.dtype) -> None:
        self._parameter, self._stored = parameter, stored
        self._exact = parameter.data.clone()
        self._size = self._exact.abs().mean().clamp(min=1e-6)
        self._adam = _Adam(self._exact)

    def update(self, gradient: Tensor, step: int, schedule: TuningSchedule) -> None:
        self._exact.sub_(self._adam.direction(gradient, step).mul_(schedule.norm_rate * schedule.rate(step)).mul_(self._size))
        self._parameter.data.copy_(self._exact.to(self._stored))

    def result(self) -> Tensor:
        return self._parameter.data.clone()


Forward = Callable[[Tensor], Tensor]  # tokens [B, T] to the last hidden state [B, T, H], which the head turns into logits


def tune(
    forward: Forward,
    logits_of: Callable[[Tensor], Tensor],
    tokens: Tensor,
    targets: Callable[[list[int]], Tensor],
    weights: Mapping[nn.Parameter, Mapping[Site, TunedWeight]],
    vectors: Mapping[nn.Parameter, TunedVector],
    schedule: TuningSchedule,
    *,
    on_step: Callable[[float], object] = lambda kl: None,
) -> list[float]:
    """Tune in place; gives the KL of each step's samples before it, nats a token.

    `targets`: rows [B, T, H] of the float model's last hidden state for rows of `tokens` int64 [S, T]; `logits_of` turns rows of either
    into logits and must be linear but for a monotonous cap. `weights`: what a parameter's gradient goes to, site by site.
    """
    draw = torch.Generator().manual_seed(schedule.seed)
    losses: list[float] = []
    waiting: list[int] = []

    def use(parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        step = len(losses) + 1
        if parameter in vectors:
            vectors[parameter].update(gradient, step, schedule)
        else:
            for site, tuned in weights[parameter].items():
                tuned.update(site.part(gradient), step, schedule)

    parameters = [*weights, *vectors]
    handles = []
    for parameter in parameters:
        parameter.requires_grad_(True)
        handles.append(parameter.register_post_accumulate_grad_hook(use))  # type: ignore[no-untyped-call]
    try:
        for _ in range(schedule.steps):
            while len(waiting) < min(schedule.batch, len(tokens)):
                waiting += torch.randperm(len(tokens), generator=draw, device=CPU).tolist()
            chosen, waiting = waiting[: schedule.batch], waiting[schedule.batch :]
            with torch.enable_grad():
                hidden = forward(tokens[chosen])
                kl, gradient = kl_and_gradient(hidden.detach(), targets(chosen), logits_of)
                hidden.backward(gradient)  # type: ignore[no-untyped-call]
            losses.append(kl)
            on_step(kl)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in parameters:
            parameter.requires_grad_(False)
    return losses


def kl_and_gradient(hidden: Tensor, target: Tensor, logits_of: Callable[[Tensor], Tensor]) -> tuple[float, Tensor]:
    """Mean KL(target || hidden) over the tokens of [B, T, ...], nats, and its gradient by `hidden`. Logits are made a part at a time."""
    rows, wanted = hidden.flatten(0, 1), target.flatten(0, 1)
    gradient = torch.empty_like(rows)
    total = 0.0
    for at in range(0, len(rows), LOGIT_ROWS):
        part = slice(at, at + LOGIT_ROWS)
        with torch.no_grad():
            reference = logits_of(wanted[part]).log_softmax(-1)
            share = reference.exp()
        leaf = rows[part].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = logits_of(leaf)
        with torch.no_grad():
            ours = logits.log_softmax(-1)
            total += float(((reference - ours) * share).sum(dtype=torch.float64))
            ours.exp_().sub_(share).div_(len(rows))
        (gradient[part],) = torch.autograd.grad(logits, leaf, ours)
    return total / len(rows), gradient.view(hidden.shape)
