"""ChunkPacer: how much of a long prompt goes into a step beside requests that decode. Knows no queue and no device."""

from __future__ import annotations

STRETCH = 2.2  # times its usual that a step of decoding requests may take beside a long prompt
LEAST = 4  # tokens, so that the prompt gets on
_NEW = 0.3  # the weight of what was seen last


class ChunkPacer:
    """Learns from the seconds that steps take: decoding alone, by how many requests, and what a prompt's token adds.

    The token's share grows as the prompt does, whose keys each must be looked at, so what was seen last counts most.
    """

    def __init__(self, start: int, most: int) -> None:
        """`size` is `start` until there is something to go by, and never above `most`."""
        self.size = start
        self._most = most
        self._usual_s: dict[int, float] = {}  # by requests
        self._token_s: float | None = None

    def note(self, *, decoding: int, prompt_tokens: int, seconds: float) -> None:
        """A step of `decoding` requests and of `prompt_tokens` of one prompt took so long."""
        if decoding == 0:
            return
        if prompt_tokens == 0:
            before = self._usual_s.get(decoding)
            self._usual_s[decoding] = seconds if before is None else (1 - _NEW) * before + _NEW * seconds
            return
        if not self._usual_s:
            return
        usual = self._usual_s[min(self._usual_s, key=lambda known: abs(known - decoding))]
        added = max(seconds - usual, 0.1 * usual) / prompt_tokens
        self._token_s = added if self._token_s is None else (1 - _NEW) * self._token_s + _NEW * added
        wanted = int((STRETCH - 1) * usual / self._token_s)
        self.size = max(LEAST, min(wanted, 2 * self.size, self._most))
