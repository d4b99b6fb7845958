"""Calibration samples: rows of tokens from a text, JSONL or chat file, a hub data set, or written by the model itself. Knows no method."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .recipe import MIN_SEQLEN

_TEXT_PART = 8 << 20  # characters of a file that are turned into tokens at once
_TEXT_KEYS = ("text", "content", "prompt", "document")
_FILE_ENDS = (".txt", ".json", ".jsonl", ".md")  # of what is meant to be a file, not a hub data set
_CHAT_KEYS = ("messages", "conversations", "conversation")


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    chat_template: Any
    bos_token_id: int | None

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any: ...

    def apply_chat_template(self, conversation: Any, *, tokenize: bool) -> Any: ...


class NotEnoughTextError(ValueError):
    """A calibration text that is too short."""


def rows_of(texts: Iterable[str], tokenizer: Tokenizer, *, samples: int, seqlen: int, where: str, of: int = 0, beside: int = 0) -> Tensor:
    """int64 [samples, seqlen]: the texts' tokens one after the other, cut into rows, each with the BOS token that a text gets.

    They are spread evenly over the first `of` rows of the text, as far as there are so many. `beside`: how many of them are not what
    --samples counts. Raises NotEnoughTextError, saying how many rows there would be.
    """
    start = list(tokenizer("").input_ids)[:1]
    if start and start[0] != tokenizer.bos_token_id:
        start = []
    room = seqlen - len(start)
    wanted = max(samples, of) * room
    tokens: list[int] = []
    for text in texts:
        if len(tokens) >= wanted:
            break
        tokens += tokenizer(text, add_special_tokens=False).input_ids
    rows = min(max(samples, of), len(tokens) // room)
    if rows < samples:
        fewer = rows * 8 // 9 if beside else rows  # an eighth of the samples more is held back
        shorter = len(tokens) // 3
        remedy = (
            f"give --samples {fewer}, a smaller --seqlen, " if fewer > 0 else f"give --seqlen {shorter}, " if shorter >= MIN_SEQLEN else ""
        )
        wanted_rows = f"{samples} are wanted" + (f", {beside} of them to measure on" if beside else "")
        raise NotEnoughTextError(
            f"{where} has {len(tokens)} tokens, which makes {rows} samples of {seqlen} where {wanted_rows}: "
            + (f"{remedy}or more text" if remedy else "give more text")
        )
    chosen = [i * rows // samples for i in range(samples)]
    return torch.tensor([start + tokens[i * room : (i + 1) * room] for i in chosen], dtype=torch.int64)


def read_texts(file: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of a file: a .jsonl or .json of objects with a text or a conversation, or the whole of any other file.

    Raises ValueError naming the line that is neither, the tokenizer that cannot write a conversation, or the file that is not UTF-8.
    """
    try:
        yield from _read_texts(file, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error.reason} at byte {error.start}): convert it, or give another file") from None


def _read_texts(file: Path, tokenizer: Tokenizer) -> Iterator[str]:
    if file.suffix.lower() not in (".jsonl", ".json"):
        is_empty = True
        with file.open(encoding="utf-8") as lines:
            while text := lines.read(_TEXT_PART) + lines.readline():
                is_empty = is_empty and not text.strip()
                yield text
        if is_empty:
            raise NotEnoughTextError(f"{file} is empty: give a text to calibrate on, or --calibration self")
        return
    for at, item in _items(file):
        yield _text_of(item, tokenizer, f"{file}: entry {at}")


def _items(file: Path) -> Iterator[tuple[int, Any]]:
    content = file.read_text(encoding="utf-8")
    number = 0
    try:
        if file.suffix.lower() == ".json":
            values = json.loads(content)
            yield from enumerate(values if isinstance(values, list) else [values], 1)
            return
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield number, json.loads(line)
    except json.JSONDecodeError as error:
        place = f"line {number or error.lineno}, column {error.colno}"
        raise ValueError(
            f"{file} is not sound JSON ({error.msg} at {place}): mend it, or name it .txt to have it read as plain text"
        ) from None


def _text_of(item: Any, tokenizer: Tokenizer, where: str) -> str:
    if isinstance(item, str):
        return item
    if isinstance(item, list):
        return _conversation(item, tokenizer, where)
    if isinstance(item, dict):
        for key in _CHAT_KEYS:
            if isinstance(item.get(key), list):
                return _conversation(item[key], tokenizer, where)
        for key in _TEXT_KEYS:
            if isinstance(item.get(key), str):
                text: str = item[key]
                return text
    raise ValueError(f"{where} holds no text and no conversation: it needs one of the keys {', '.join((*_TEXT_KEYS, *_CHAT_KEYS))}")


def _conversation(turns: Sequence[Any], tokenizer: Tokenizer, where: str) -> str:
    if not tokenizer.chat_template:
        raise ValueError(f"{where} is a conversation, and the model's tokenizer has no chat template: give plain text instead")
    names = {"human": "user", "gpt": "assistant"}
    try:
        messages = [
            {
                "role": names.get(turn.get("role", turn.get("from")), turn.get("role", turn.get("from"))),
                "content": turn.get("content", turn.get("value")),
            }
            for turn in turns
        ]
        text: str = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # templates are other people's programs and raise what they like
        raise ValueError(f"{where}: the tokenizer's chat template does not take this conversation ({error})") from error
    return text


def might_be_on_hub(name: str) -> bool:
    """Whether what is no file here can be meant to be a hub data set."""
    path = Path(name).expanduser()
    return not (path.is_dir() or path.is_absolute() or name.startswith((".", "~")) or path.suffix.lower() in _FILE_ENDS)


def hub_loader(name: str) -> Callable[..., Any]:
    """What reads hub data sets. Raises ValueError where it is not installed."""
    try:
        from datasets import load_dataset  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise ValueError(
            f"calibration {name!r} is no file here, and hub data sets are read with the package datasets, which is not installed: "
            "pip install datasets, give a file, or take --calibration self"
        ) from None
    found: Callable[..., Any] = load_dataset
    return found


def hub_texts(name: str, tokenizer: Tokenizer) -> Iterator[str]:
    """The texts of the train split of a hub data set, NAME or NAME:CONFIG, as many as are asked for.

    Raises ValueError where it, or the library that reads it, is not to be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        raise ValueError(f"calibration {name!r} is a folder: give a file of it")
    if not might_be_on_hub(name):
        raise ValueError(f"calibration {name!r}: there is no such file")
    load_dataset = hub_loader(name)
    try:
        dataset, _, config = name.partition(":")
        items = load_dataset(dataset, config or None, split="train", streaming=True)
        for at, item in enumerate(items, 1):
            yield _text_of(item, tokenizer, f"{name}: entry {at}")
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"calibration {name!r} is no file here, and the hub gave no such data set ({' '.join(str(error).split())[:200]})"
        ) from error
