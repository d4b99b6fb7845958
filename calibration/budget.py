"""Budget: how much is computed for a method and an effort. The one place for these numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from .recipe import Method, Recipe
from .solve import Steps
from .tuning import TuningSchedule


@dataclass(frozen=True, kw_only=True)
class Budget:
    """`solve_samples` go through the blocks quantized; the last pass, where there is one, draws from `samples`, and from `own_samples`
    that the model writes itself, so that a long one sees hardly any twice: what it gains on samples that it has seen, others hardly gain.
    """

    steps: Steps
    solve_samples: int
    samples: int
    own_samples: int
    schedule: TuningSchedule | None

    @property
    def weighs(self) -> bool:
        """Whether blocks are solved for what the whole model makes of their errors: it must fit in memory, as for the last pass."""
        return self.schedule is not None

    def without_tuning(self) -> Budget:
        """For a model that does not fit in memory whole."""
        return replace(self, schedule=None, own_samples=0)


def budget_of(recipe: Recipe) -> Budget:
    """What a recipe is worth. More of its text than the recipe's samples is never taken."""
    effort = "best" if recipe.method == "best" else recipe.effort
    solve = _EIGHT_BIT_SAMPLES if recipe.eight_bit else _SOLVE_SAMPLES[effort]
    steps = _TUNING_STEPS[effort] if recipe.method in ("auto", "best") else 0
    rate = _TUNING_RATES[effort]
    schedule = TuningSchedule(steps=steps, seed=recipe.seed, scale_rate=rate, norm_rate=rate) if steps else None
    solve = min(solve, recipe.samples)
    samples = solve if schedule is None else min(recipe.samples, max(solve, _TUNING_SAMPLES[effort]))
    own = max(0, steps - samples) if effort == "best" else 0
    return Budget(steps=_steps(recipe), solve_samples=solve, samples=samples, own_samples=own, schedule=schedule)


_ALL = 1 << 30
_SOLVE_SAMPLES = {"fast": 16, "default": 32, "best": 64}
_EIGHT_BIT_SAMPLES = 16
_TUNING_SAMPLES = {"fast": 0, "default": 48, "best": _ALL}
_TOWARD_FLOAT = 0.3  # the whole costs more than it gains (benchmarks/README.md)
_TUNING_STEPS = {"fast": 0, "default": 48, "best": 256}
_TUNING_RATES = {"fast": 0.0, "default": 3e-4, "best": 1e-3}  # 48 steps at 1e-3 lost what they gained (benchmarks/README.md)


def _steps(recipe: Recipe) -> Steps:
    return replace(_METHODS[recipe.method](recipe), kv_scales=recipe.kv_cache is not None)


_METHODS: Mapping[Method, Callable[[Recipe], Steps]] = {
    "rtn": lambda recipe: Steps(),
    "awq": lambda recipe: Steps(scale=True),
    "gptq": lambda recipe: Steps(orders=("groups",)),
    "auto": lambda recipe: Steps(scale=True, orders=("groups",), toward_float=0.0 if recipe.effort == "fast" else _TOWARD_FLOAT),
    "best": lambda recipe: Steps(
        scale=True, orders=("groups", "columns"), damps=(0.003, 0.01), refine_rounds=3, toward_float=_TOWARD_FLOAT
    ),
    "fp8": lambda recipe: Steps(kind="fp8", granularity=recipe.weight_scales, static_inputs=recipe.static_inputs),
    "int8": lambda recipe: Steps(kind="int8", scale=True),
}
