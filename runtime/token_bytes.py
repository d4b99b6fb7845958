"""TokenBytes and TextStream: the bytes each token stands for, and text from them as they arrive. Knows no templates and no requests."""

from __future__ import annotations

import codecs
import json
from collections.abc import Sequence
from typing import Any

from tokenizers import Tokenizer

from ..quant.checkpoint.errors import CheckpointError


class TokenBytes:
    """The bytes of every token of a tokenizer whose text is the bytes of its tokens, one after the other.

    That holds for byte-level BPE and for sentencepiece with byte fallback, which is every model family served here. Text is
    the UTF-8 of the bytes, U+FFFD for what is no character. Raises CheckpointError for a tokenizer with any other decoder.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._known: dict[int, bytes] = {token_id: token.content.encode("utf-8") for token_id, token in added.items()}
        self._byte_level = False
        self._byte_fallback = False
        self._replacements: list[tuple[str, str]] = []
        self.drops_leading_space = False  # sentencepiece puts a space before every text, which is not shown
        state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__()) if tokenizer.decoder is not None else {"type": None}
        steps: list[dict[str, Any]] = state["decoders"] if state["type"] == "Sequence" else [state]
        fused = False
        for step in steps:
            fused = self._add_step(step, fused)

    def _add_step(self, step: dict[str, Any], fused: bool) -> bool:
        """Take in one step of the tokenizer's decoder; returns whether the steps so far join the tokens."""
        match step:
            case {"type": "ByteLevel"}:
                self._byte_level = True
            case {"type": "ByteFallback"}:
                self._byte_fallback = True
            case {"type": "Fuse"}:
                return True
            case {"type": "Replace", "pattern": {"String": old}, "content": new} if not fused:
                self._replacements.append((old, new))
            case {"type": "Metaspace", "replacement": mark, **rest}:
                self._replacements.append((mark, " "))
                self.drops_leading_space = rest.get("prepend_scheme", "always") != "never"
            case {"type": "Strip", "content": " ", "start": 1, "stop": 0} if fused:
                self.drops_leading_space = True
            case _:
                raise CheckpointError(
                    f"the tokenizer's decoder has the step {step!r}, which is not supported. Supported: ByteLevel, Metaspace, and "
                    "Replace, ByteFallback, Fuse and Strip as sentencepiece tokenizers have them"
                )
        return fused

    def of(self, token_id: int) -> bytes:
        """The bytes of one token; none for an id that the tokenizer does not have."""
        known = self._known.get(token_id)
        if known is None:
            token = self._tokenizer.id_to_token(token_id) if token_id >= 0 else None
            known = self._known[token_id] = b"" if token is None else self._spell(token)
        return known

    def _spell(self, token: str) -> bytes:
        if self._byte_level:
            values = [_BYTE_OF.get(character) for character in token]
            if None not in values:
                return bytes(value for value in values if value is not None)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes.fromhex(token[3:5])
        for old, new in self._replacements:
            token = token.replace(old, new)
        return token.encode("utf-8")


class TextStream:
    """Text of a growing sequence of tokens. The pieces that `push` and `flush` return add up to the decoded whole."""

    def __init__(self, tokens: TokenBytes, *, skip_special_tokens: bool) -> None:
        self._tokens = tokens
        self._hidden: frozenset[int] = tokens.special_ids if skip_special_tokens else frozenset()
        self._drop_space = tokens.drops_leading_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes; empty while one is incomplete."""
        return "" if token_id in self._hidden else self._take(self._tokens.of(token_id))

    def push_all(self, token_ids: Sequence[int]) -> str:
        """The same for many tokens at once."""
        hidden, of = self._hidden, self._tokens.of
        return self._take(b"".join([of(token_id) for token_id in token_ids if token_id not in hidden]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never got complete."""
        return self._decoder.decode(b"", final=True)

    def _take(self, data: bytes) -> str:
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: those that print stand for themselves, the others for the characters from U+0100 on, in order."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(0x100 + index): byte for index, byte in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
