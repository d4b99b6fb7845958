"""The windows that a text is cut into. Knows no model.

The definition is everybody's: each window is computed by itself, and a token counts once, under the longest context that a window gives
it. A window's first token is context alone.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Window:
    """Tokens `start` to `end` - 1, computed together. Those from `first_scored` on are scored, the others are context."""

    start: int
    end: int
    first_scored: int

    @property
    def num_scored(self) -> int:
        return self.end - self.first_scored


def check_windows(*, seqlen: int, stride: int) -> None:
    """Raises ValueError for seqlen < 2 or a stride outside 1 .. seqlen."""
    if seqlen < 2:
        raise ValueError(f"seqlen {seqlen} is not valid: a window needs at least 2 tokens, one to score and one before it")
    if not 1 <= stride <= seqlen:
        raise ValueError(f"stride {stride} is not valid: give 1 to {seqlen}, the seqlen, so that no token is left out")


def windows_of(num_tokens: int, *, seqlen: int, stride: int) -> list[Window]:
    """Windows of `seqlen` tokens (the last may be shorter) that begin every `stride` tokens and score each token they can once.

    With stride = seqlen they do not overlap. Raises ValueError for fewer than 2 tokens, and as `check_windows` does.
    """
    check_windows(seqlen=seqlen, stride=stride)
    if num_tokens < 2:
        raise ValueError(f"there are {num_tokens} tokens, and perplexity needs at least 2: give a longer text")
    windows: list[Window] = []
    scored = 0
    for start in range(0, num_tokens, stride):
        end = min(start + seqlen, num_tokens)
        window = Window(start, end, max(scored, start + 1))
        if window.num_scored > 0:
            windows.append(window)
        scored = end
        if end == num_tokens:
            break
    return windows
