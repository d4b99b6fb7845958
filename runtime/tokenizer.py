"""Tokenizer: text to token ids and back, and conversations to token ids. Knows no requests and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from ..quant.checkpoint.resolve import ModelFiles
from .chat_template import ChatTemplate, TemplateError
from .token_bytes import TextStream, TokenBytes
from .tokenizer_files import read_tokenizer_parts

__all__ = ["TemplateError", "Tokenizer", "load_tokenizer"]


def load_tokenizer(files: ModelFiles, *, tokenizer_path: str | None = None, chat_template: str | None = None) -> Tokenizer:
    """The tokenizer of a model. `tokenizer_path` names another (folder, tokenizer.json, .gguf or hub id); `chat_template`, a file
    or a template's text, replaces the model's. Raises CheckpointError with what was looked for when there is none.
    """
    parts = read_tokenizer_parts(files, tokenizer_path=tokenizer_path, chat_template=chat_template)
    return Tokenizer(
        parts.backend,
        eos_token_ids=parts.eos_token_ids,
        special_tokens=parts.special_tokens,
        chat_templates=parts.chat_templates,
    )


class Tokenizer:
    """One model's tokenizer. Threads may encode and decode side by side.

    `special_tokens` are texts by role (bos_token, eos_token, ...); `chat_templates` templates by name, empty for a model
    without. Raises CheckpointError when the tokenizer's decoder is of an unknown kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Sequence[int],
        special_tokens: Mapping[str, str],
        chat_templates: Mapping[str, str],
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._bytes = TokenBytes(backend)
        self._chat = ChatTemplate(chat_templates, special_tokens) if chat_templates else None
        bos = special_tokens.get("bos_token")
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)
        self.bos_token_id: int | None = backend.token_to_id(bos) if bos is not None else None

    @property
    def special_token_ids(self) -> frozenset[int]:
        """Tokens that `skip_special_tokens` hides."""
        return self._bytes.special_ids

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Special tokens written out in it become those tokens, as in every chat prompt."""
        # A batch of one: unlike `encode`, it leaves other threads the interpreter, and it keeps no offsets.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a sequence of tokens, U+FFFD for bytes that are no character. Ids that the tokenizer lacks stand for nothing."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.push_all(ids) + stream.flush()

    def stream(self, *, skip_special_tokens: bool = True) -> TextStream:
        """Decode a growing sequence: what it returns adds up to `decode` of the whole."""
        return TextStream(self._bytes, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str:
        """One token as text, U+FFFD where it is a part of a character. Special tokens are shown."""
        return self._bytes.of(token_id).decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for."""
        return self._bytes.of(token_id)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation. Raises TemplateError when the model has no template or the template refuses it."""
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
        return self.encode(text, add_special_tokens=False)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The same conversation as text."""
        if self._chat is None:
            raise TemplateError("this model has no chat template: use completions, or give one with --chat-template FILE")
        return self._chat.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            chat_template_kwargs=chat_template_kwargs,
        )
