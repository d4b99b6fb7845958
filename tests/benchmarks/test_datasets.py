"""Prompts have exactly the length asked for, share exactly the prefixes asked for, and are the same for the same seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest

from octavo.benchmarks.datasets import Dataset, IdVocabulary, WordVocabulary, random_prompts, shared_prefix_prompts


class LetterTokenizer:
    """Every two-letter word with a space before it is one token; so is everything else, letter by letter."""

    def __init__(self) -> None:
        words = [f" {a}{b}" for a in "abcde" for b in "abcde"]
        self._texts = [*"abcde ", *words]
        self.vocab_size = len(self._texts)

    def token_text(self, token_id: int) -> str:
        return self._texts[token_id]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._texts[token_id] for token_id in ids)

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        ids, rest = [], text
        while rest:
            length = 3 if rest[:3] in self._texts else 1
            ids.append(self._texts.index(rest[:length]))
            rest = rest[length:]
        return ids


class MergingTokenizer(LetterTokenizer):
    """Takes two words for one token, so that no text has the length asked for."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return super().encode(text, add_special_tokens=add_special_tokens)[::2]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def shared(seed: int = 0) -> Dataset:
    return shared_prefix_prompts(IdVocabulary(1000), rng(seed), num_prompts=10, num_prefixes=4, prefix_len=32, input_len=5)


def test_random_ids_have_the_length_and_stay_in_the_vocabulary() -> None:
    prompts = random_prompts(IdVocabulary(50, excluded=frozenset({0, 7})), rng(), num_prompts=20, input_len=33).prompts
    assert [len(prompt.content) for prompt in prompts] == [prompt.num_tokens for prompt in prompts] == [33] * 20
    used = {token for prompt in prompts for token in prompt.content}
    assert used <= set(range(50)) - {0, 7}
    assert len(used) > 40
    assert len({prompt.content for prompt in prompts}) == 20


def test_prefixes_are_shared_and_nothing_else_is() -> None:
    dataset = shared()
    bare = [prefix.content for prefix in dataset.prefixes]
    assert len(set(bare)) == 4
    assert sorted(Counter(prompt.prefix for prompt in dataset.prompts).values()) == [2, 2, 3, 3]
    for prompt in dataset.prompts:
        assert prompt.num_tokens == len(prompt.content) == 37
        assert prompt.prefix is not None
        assert prompt.content[:32] == bare[prompt.prefix]
    assert len({prompt.content[32:] for prompt in dataset.prompts}) == 10


def test_seed() -> None:
    assert shared(1) == shared(1)
    assert shared(1) != shared(2)


def test_text_has_the_length_and_the_prefix() -> None:
    tokenizer = LetterTokenizer()
    dataset = shared_prefix_prompts(WordVocabulary(tokenizer), rng(), num_prompts=6, num_prefixes=2, prefix_len=8, input_len=3)
    for prompt in dataset.prompts:
        assert isinstance(prompt.content, str)
        assert len(tokenizer.encode(prompt.content, add_special_tokens=False)) == prompt.num_tokens == 11
        assert prompt.content.startswith(str(dataset.prefixes[prompt.prefix or 0].content))


def test_text_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="a prompt of 10 words became 5 tokens"):
        random_prompts(WordVocabulary(MergingTokenizer()), rng(), num_prompts=1, input_len=10)


def test_an_empty_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves none to draw from"):
        IdVocabulary(2, excluded=[0, 1])
