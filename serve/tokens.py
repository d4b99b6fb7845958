"""POST /tokenize and /detokenize: text, or a conversation, to token ids and back, as the model's prompts are made. Knows no engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, cast

from fastapi import Request
from fastapi.responses import Response

from .context import ServeContext
from .errors import ApiError
from .messages import template_messages
from .request_body import Body, List, parse_body
from .sampling import check_token_ids
from .streaming import json_response


class TokenizeRequest(Body):
    """POST /tokenize: a prompt, or messages that go through the chat template."""

    expected: ClassVar[Mapping[str, str]] = {"prompt": "a string or a list of strings", "messages": "a list of messages"}

    model: str | None = None
    prompt: str | List[str] | None = None
    messages: List[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None  # None: yes for a prompt; a template writes its own
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    expected: ClassVar[Mapping[str, str]] = {"tokens": "a list of token ids or a list of lists of token ids"}

    model: str | None = None
    tokens: List[int] | List[List[int]]
    skip_special_tokens: bool = True


async def tokenize(request: Request) -> Response:
    """Token ids, their number and the model's context length; of a list of prompts, lists."""
    context: ServeContext = request.app.state.context
    body = parse_body(TokenizeRequest, await request.body())
    context.model.check(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise ApiError("give either prompt or messages", param="prompt")
    if body.messages is not None:
        found = [await _conversation(context, body)]
    else:
        texts = body.prompt if isinstance(body.prompt, list) else [body.prompt or ""]
        adds = body.add_special_tokens is not False
        context.check_characters(texts, param="prompt")

        def encode() -> list[list[int]]:
            return [context.tokenizer.encode(text, add_special_tokens=adds) for text in texts]

        found = await context.tokenize(body.num_bytes, encode)
    told: dict[str, Any] = {"tokens": found, "count": [len(ids) for ids in found], "max_model_len": context.info.context_length}
    if body.return_token_strs:
        told["token_strs"] = await context.tokenize(
            body.num_bytes, lambda: [[context.tokenizer.token_text(token) for token in ids] for ids in found]
        )
    if not isinstance(body.prompt, list):
        told = {name: value[0] if isinstance(value, list) else value for name, value in told.items()}
    return json_response(told)


async def _conversation(context: ServeContext, body: TokenizeRequest) -> list[int]:
    messages = template_messages(body.messages or [], most=context.info.context_length)
    context.check_characters((message["content"] for message in messages), param="messages")
    if body.add_special_tokens:
        raise ApiError("add_special_tokens is not for messages, whose template writes them: leave it out", param="add_special_tokens")

    def encode() -> list[int]:
        return context.tokenizer.apply_chat_template(messages, add_generation_prompt=body.add_generation_prompt)

    return await context.tokenize(body.num_bytes, encode)


async def detokenize(request: Request) -> Response:
    """The text of token ids, as `text` (SGLang) and `prompt` (vLLM); of a list of lists, lists."""
    context: ServeContext = request.app.state.context
    body = parse_body(DetokenizeRequest, await request.body())
    context.model.check(body.model)
    is_batch = bool(body.tokens) and isinstance(body.tokens[0], list)
    batch = cast("list[list[int]]", body.tokens if is_batch else [body.tokens])
    for ids in batch:
        if ids:
            check_token_ids(ids, context.info, param="tokens")

    def decode() -> list[str]:
        return [context.tokenizer.decode(ids, skip_special_tokens=body.skip_special_tokens) for ids in batch]

    texts = await context.tokenize(4 * sum(map(len, batch)), decode)
    told = texts if is_batch else texts[0]
    return json_response({"text": told, "prompt": told})
