"""Prompts of exact token counts, random or with shared prefixes, the same for the same seed. Knows no server.

Without a tokenizer a prompt is a list of token ids. With one it can be text, of words that are one token each, so that its length is exact.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

_NUM_WORDS = 4096
_PLAIN_WORD = re.compile(r" [a-z]{2,}")

Content = tuple[int, ...] | str


class TokenizerLike(Protocol):
    """The part of a tokenizer that prompts of words need."""

    vocab_size: int

    def token_text(self, token_id: int) -> str: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...


@dataclass(frozen=True)
class Prompt:
    """One prompt, as token ids or as text. `num_tokens` leaves out what a chat template adds, `prefix` numbers the shared prefix."""

    content: Content
    num_tokens: int
    prefix: int | None = None


class Vocabulary(Protocol):
    """Where random content comes from."""

    def sample(self, rng: np.random.Generator, num_tokens: int) -> list[int]: ...
    def render(self, tokens: Sequence[int]) -> Content: ...


class IdVocabulary:
    """Token ids below `size`, sent as they are."""

    def __init__(self, size: int, *, excluded: Iterable[int] = ()) -> None:
        self._ids = np.setdiff1d(np.arange(size), np.asarray(sorted(excluded), dtype=np.int64))
        if len(self._ids) == 0:
            raise ValueError(f"a vocabulary of {size} tokens leaves none to draw from: give the model's own size")

    def sample(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        return [int(token) for token in rng.choice(self._ids, num_tokens)]

    def render(self, tokens: Sequence[int]) -> Content:
        return tuple(tokens)


class WordVocabulary:
    """Common words that a tokenizer keeps as one token each, sent as text."""

    def __init__(self, tokenizer: TokenizerLike) -> None:
        self._tokenizer = tokenizer
        words = (i for i in range(tokenizer.vocab_size) if _PLAIN_WORD.fullmatch(tokenizer.token_text(i)))
        self._ids = np.fromiter(islice(words, _NUM_WORDS), dtype=np.int64)
        if len(self._ids) == 0:
            raise ValueError(
                "this tokenizer has no tokens that are whole words, so text of an exact length cannot be made: use --endpoint completions"
            )

    def sample(self, rng: np.random.Generator, num_tokens: int) -> list[int]:
        return [int(token) for token in rng.choice(self._ids, num_tokens)]

    def render(self, tokens: Sequence[int]) -> Content:
        text = self._tokenizer.decode(list(tokens))
        length = len(self._tokenizer.encode(text, add_special_tokens=False))
        if length != len(tokens):
            raise ValueError(
                f"a prompt of {len(tokens)} words became {length} tokens with this tokenizer: use --endpoint completions, which sends ids"
            )
        return text


@dataclass(frozen=True)
class Dataset:
    """The prompts of one run, and the bare prefixes that they share (none for random prompts)."""

    prompts: tuple[Prompt, ...]
    prefixes: tuple[Prompt, ...] = ()


def random_prompts(vocabulary: Vocabulary, rng: np.random.Generator, *, num_prompts: int, input_len: int) -> Dataset:
    """Prompts of `input_len` tokens with nothing in common."""
    contents = (vocabulary.render(vocabulary.sample(rng, input_len)) for _ in range(num_prompts))
    return Dataset(tuple(Prompt(content, input_len) for content in contents))


def shared_prefix_prompts(
    vocabulary: Vocabulary, rng: np.random.Generator, *, num_prompts: int, num_prefixes: int, prefix_len: int, input_len: int
) -> Dataset:
    """Prompts of `prefix_len` shared and `input_len` own tokens. Every prefix is used equally often (give or take one), in random order."""
    prefixes = [vocabulary.sample(rng, prefix_len) for _ in range(num_prefixes)]
    prompts = []
    for prefix in rng.permutation(np.arange(num_prompts) % num_prefixes):
        tokens = prefixes[prefix] + vocabulary.sample(rng, input_len)
        prompts.append(Prompt(vocabulary.render(tokens), len(tokens), int(prefix)))
    bare = (Prompt(vocabulary.render(tokens), prefix_len, number) for number, tokens in enumerate(prefixes))
    return Dataset(tuple(prompts), tuple(bare))
