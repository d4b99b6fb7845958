"""StopMatcher: finds the first stop string in text that arrives in pieces. Knows no tokens.

One Knuth-Morris-Pratt automaton a stop string: constant time a character whatever the strings, and its state is the number of
characters at the end of the text that could still begin the string, which is what must be held back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StopMatch:
    """`end` counts characters from the start of the piece just fed; the match may have begun in earlier pieces."""

    text: str
    end: int


class StopMatcher:
    """The match that is complete first wins, of those the longest, so the result does not depend on how text was cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(dict.fromkeys(stops), key=len, reverse=True)
        self._fallbacks = [_fallbacks(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)

    @property
    def held(self) -> int:
        """Characters at the end of all text so far that could begin a stop string."""
        return max(self._states, default=0)

    def feed(self, piece: str, *, armed: bool = True) -> StopMatch | None:
        """Take in new text; the first match that ends in it, or None. What follows a match is not looked at.

        Matches are passed over while not `armed`; one that has begun by then and ends later counts.
        """
        for position, character in enumerate(piece, start=1):
            matched: str | None = None
            for index, stop in enumerate(self._stops):
                state = self._advance(index, character)
                if state == len(stop):
                    matched = matched or stop
                    state = self._fallbacks[index][state]
                self._states[index] = state
            if matched is not None and armed:
                return StopMatch(matched, position)
        return None

    def _advance(self, index: int, character: str) -> int:
        stop, fallbacks, state = self._stops[index], self._fallbacks[index], self._states[index]
        while state and stop[state] != character:
            state = fallbacks[state]
        return state + 1 if stop[state] == character else 0


def _fallbacks(stop: str) -> list[int]:
    """For each matched length, the longest shorter one that is also a beginning of the string."""
    table = [0] * (len(stop) + 1)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[position] != stop[length]:
            length = table[length]
        if stop[position] == stop[length]:
            length += 1
        table[position + 1] = length
    return table
