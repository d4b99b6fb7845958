"""`auto` with a gate: from cheap to thorough until it holds, then with the blocks that lose most left alone. Computes nothing."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from .recipe import Effort, Recipe

logger = logging.getLogger(__name__)

_EFFORTS: tuple[Effort, ...] = ("fast", "default", "best")
_KEPT_SHARES = (1 / 16, 1 / 8, 1 / 4)  # of the blocks


class Tried(Protocol):
    """What one attempt came to."""

    @property
    def holds(self) -> bool: ...

    @property
    def block_errors(self) -> Mapping[str, float]:
        """What each block adds to the error of the hidden state, by its path."""
        ...


Result = TypeVar("Result", bound=Tried)


def rungs(recipe: Recipe) -> list[Recipe]:
    """What is tried one after the other: a recipe alone, unless it is `auto` and has a gate. An effort that was asked for is the first."""
    if not is_gated(recipe):
        return [recipe]
    first = 0 if recipe.effort == "default" else _EFFORTS.index(recipe.effort)
    return [replace(recipe, effort=effort) for effort in _EFFORTS[first:]]


def is_gated(recipe: Recipe) -> bool:
    """Whether there is anything to climb for."""
    return recipe.method == "auto" and (recipe.max_ppl_increase is not None or recipe.max_kl is not None)


def climb(attempt: Callable[[Recipe], Result], recipe: Recipe) -> Result:
    """The first attempt whose gate holds, or the last."""
    ladder = rungs(recipe)
    result = attempt(ladder[0])
    for rung in ladder[1:]:
        if result.holds:
            return result
        logger.warning("the gate does not hold with effort %s: trying %s", ladder[ladder.index(rung) - 1].effort, rung.effort)
        result = attempt(rung)
    if not is_gated(recipe):
        return result
    errors = result.block_errors
    for count in sorted({max(1, round(share * len(errors))) for share in _KEPT_SHARES}):
        if result.holds:
            return result
        kept = worst_blocks(errors, count)
        logger.warning("the gate does not hold with the best effort: leaving as they are: %s", ", ".join(kept))
        result = attempt(replace(ladder[-1], ignore=(*recipe.ignore, *(f"^{re.escape(path)}\\." for path in kept))))
    return result


def worst_blocks(errors: Mapping[str, float], count: int) -> Sequence[str]:
    """Paths of the blocks that add most."""
    return sorted(sorted(errors, key=lambda path: -errors[path])[:count])
