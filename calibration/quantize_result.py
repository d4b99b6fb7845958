"""What a quantization comes to: what was written, and what it cost. Computes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .quality import Quality, Speed
from .recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class QuantizeResult:
    """What was written, and what it cost. `modules`: by path, the relative output error, how it was rounded, the tokens that
    it saw, the largest weight and the largest input."""

    out: Path
    model: str
    recipe: Recipe
    group_size: int
    modules: Mapping[str, Mapping[str, Any]]
    block_errors: Mapping[str, float]  # what each block adds to the relative error of the hidden state
    kept: tuple[str, ...]  # modules of the blocks that stayed as they were, routers among them, by the checkpoint's names
    notes: tuple[str, ...]  # what was left out, and why
    engines: tuple[str, ...]  # of octavo, vllm and sglang, those that are known to read such a folder
    groups: Mapping[str, Mapping[str, int]]  # bytes before and after, by kind of tensor
    bits_per_weight: float  # of the quantized linears, scales and zero points included
    quality: Quality
    speed_before: Speed | None
    speed_after: Speed | None
    verified: float  # largest difference of the logits as read back, relative to the largest logit
    estimated_peak_bytes: int  # before the start
    peak_bytes: int  # the most that was resident, of the process
    device: str  # that blocks were computed on
    device_peak_bytes: int  # the most of a GPU's memory; 0 on the CPU
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def gate(self) -> str | None:
        """Why the recipe's gate does not hold; None where it does."""
        recipe, quality = self.recipe, self.quality
        over = []
        if recipe.max_ppl_increase is not None and not quality.ppl_increase <= recipe.max_ppl_increase:
            rise = f"from {quality.original_perplexity:.3f} to {quality.perplexity:.3f}"
            over.append(f"perplexity rose by {quality.ppl_increase:.2%} ({rise}), above {recipe.max_ppl_increase:.2%}")
        if recipe.max_kl is not None and not quality.kl_mean <= recipe.max_kl:
            over.append(f"KL is {quality.kl_mean:.4f} nats a token, above {recipe.max_kl:g}")
        return " and ".join(over) or None

    @property
    def holds(self) -> bool:
        """Whether the gate does, or there is none."""
        return self.gate is None

    @property
    def next_step(self) -> str:
        """What to try where the gate does not hold."""
        if self.recipe.eight_bit:
            return "Leave the worst as they are (ignore)"
        thorough = "8 bits" if self.recipe.method in ("auto", "best") else "method auto, which climbs until the gate holds"
        return f"Try {thorough}, or leave the worst as they are (ignore)"

    @property
    def worst(self) -> list[tuple[str, float]]:
        """Modules by their error, the largest first."""
        return sorted(((name, float(note["error"])) for name, note in self.modules.items()), key=lambda item: -item[1])


class GateError(RuntimeError):
    """The quantized model costs more quality than the recipe allows. It was written all the same; `result` tells of it."""

    def __init__(self, message: str, result: QuantizeResult) -> None:
        super().__init__(message)
        self.result = result
