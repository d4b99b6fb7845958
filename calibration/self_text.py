"""Calibration text that the model writes itself, so that none need be downloaded (after Liu et al., 2023, LLM-QAT, arXiv 2305.17888).

What it writes has the distribution that it will be used on: it is drawn at temperature 1, neither cut off nor penalised. Many short texts
serve better than few long ones, in which small models lose themselves (benchmarks/README.md). Knows how to ask for text, and nothing of
who generates it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .openings import OPENINGS, PASSAGES

QUESTIONS = (
    "Explain how vaccines work.",
    "Write a short story about a lighthouse keeper.",
    "What were the main causes of the First World War?",
    "Give me a recipe for vegetable soup.",
    "Write a Python function that checks whether a number is prime.",
    "Summarise the plot of Romeo and Juliet.",
    "How do I prepare for a job interview?",
    "Describe the water cycle for a child.",
    "What is the difference between a virus and a bacterium?",
    "Translate 'good morning, how are you?' into French and German.",
    "Write an email asking for a day off.",
    "What is 17 times 24? Show each step.",
)
TEMPERATURE = 1.0
ANSWER_TOKENS = 64  # at most, after an opening, a passage or a question
_LEAST_TOKENS = 8  # that a model draws, on average, of the first so many texts; of one that draws fewer, what it is asked is most
_JUDGED_TEXTS = 64
_DATE = "26 Jul 2024"  # for Llama's templates, which tell the model today's: the same run gives the same text tomorrow
_CHAT_SHARE = 16  # every so-manieth prompt is a question, where there is a chat template
_PASSAGE_SHARE = 3  # and every so-manieth a passage

Generate = Callable[[Sequence[Sequence[int]], int, int], Sequence[Sequence[int]]]  # prompts, tokens to draw, seed -> what follows each


class SilentModelError(ValueError):
    """A model that writes too little."""


@dataclass
class OwnText:
    """What the model has written: `tokens`, one text after the other, of the first `asked` prompts; `drawn` of the tokens are its own."""

    tokens: list[int] = field(default_factory=list)
    asked: int = 0
    drawn: int = 0


def write_samples(
    generate: Generate,
    tokenizer: Any,
    *,
    samples: int,
    seqlen: int,
    seed: int,
    batch: int,
    text: OwnText | None = None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """int64 [samples, seqlen]: openings, passages and questions with what `generate` draws after each, one after the other, cut into rows.

    With `text`, what it holds is taken first, and what is drawn is added to it. Raises SilentModelError for a model that writes nothing.
    """
    text = OwnText() if text is None else text
    start = list(tokenizer("").input_ids)[:1]
    start = start if start and start[0] == tokenizer.bos_token_id else []
    room = seqlen - len(start)
    wanted, known = samples * room, 0
    while True:
        on_tokens(min(len(text.tokens), wanted) - known)
        known = min(len(text.tokens), wanted)
        if known == wanted:
            break
        if text.asked >= _JUDGED_TEXTS and text.drawn < _LEAST_TOKENS * text.asked:
            raise SilentModelError(f"the model ends its texts at once: after {text.asked} openings it wrote {text.drawn} tokens")
        prompts = [_prompt(tokenizer, text.asked + i, max(1, room // 2)) for i in range(batch)]
        for prompt, answer in zip(prompts, generate(prompts, min(room, ANSWER_TOKENS), seed + text.asked), strict=True):
            text.tokens += [token for token in (*prompt, *answer) if token != tokenizer.bos_token_id]
            text.drawn += len(answer)
        text.asked += batch
    return torch.tensor([start + text.tokens[i * room : (i + 1) * room] for i in range(samples)], dtype=torch.int64)


def _prompt(tokenizer: Any, number: int, most: int) -> list[int]:
    """The tokens of prompt `number`; of a passage, `most` of them at most."""
    if tokenizer.chat_template and number % _CHAT_SHARE == _CHAT_SHARE - 1:
        asked = _chat(tokenizer, QUESTIONS[number // _CHAT_SHARE % len(QUESTIONS)])
        if asked is not None:
            return list(tokenizer(asked, add_special_tokens=False).input_ids)
    passages, place = divmod(number, _PASSAGE_SHARE)  # before this one
    if place == _PASSAGE_SHARE - 1:
        return list(tokenizer(PASSAGES[passages % len(PASSAGES)]).input_ids)[:most]
    return list(tokenizer(OPENINGS[(number - passages) % len(OPENINGS)]).input_ids)


def _chat(tokenizer: Any, question: str) -> str | None:
    """The question as the model's template puts it; None of a template that does not take it."""
    turns = [{"role": "user", "content": question}]
    try:
        text: str = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=_DATE)
    except Exception:  # templates are other people's programs and raise what they like
        return None
    return text
