"""The bodies of /v1/chat/completions and /v1/completions, field by field. Knows what a field is called and typed, not what it does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .request_body import Body, List

_LATER = "leave it out, this server does not do that yet"
_STRUCTURED = "this server cannot constrain its output yet; ask for the format in the prompt and check the answer"

_TEXT_OR_TEXTS = "a string or a list of strings"

UNSUPPORTED: Mapping[str, str] = {
    "response_format": _STRUCTURED,
    "structured_outputs": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
    "grammar": _STRUCTURED,
    "json_schema": _STRUCTURED,
    "regex": _STRUCTURED,
    "ebnf": _STRUCTURED,
    "structural_tag": _STRUCTURED,
    "stop_regex": "use stop (strings) or stop_token_ids",
    "use_beam_search": "use n with a temperature",
    "lora_path": "this server has no LoRA adapters",
    "custom_logit_processor": _LATER,
    "custom_params": _LATER,
    "return_hidden_states": _LATER,
    "return_token_ids": "use /generate, which returns output_ids",
    "prompt_logprobs": "use echo with logprobs on /v1/completions, or logprob_start_len on /generate",
    "truncate_prompt_tokens": "shorten the prompt yourself; nothing is cut off here",
}
IGNORED = frozenset(
    {
        "user",
        "store",
        "metadata",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "parallel_tool_calls",
        "separate_reasoning",
        "stream_reasoning",
    }
)


class StreamOptions(Body):
    """What a stream carries beside the text."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False  # padding against eavesdroppers; optional for a server, and this one sends none


class SamplingFields(Body):
    """What both endpoints take. None means that the caller did not say."""

    unsupported: ClassVar[Mapping[str, str]] = UNSUPPORTED
    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {"response_format": ({"type": "text"},)}
    ignored: ClassVar[frozenset[str]] = IGNORED
    expected: ClassVar[Mapping[str, str]] = {
        "stop": _TEXT_OR_TEXTS,
        "logit_bias": "an object from token ids (as strings) to numbers",
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | List[str] | None = None
    stop_token_ids: List[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    no_stop_trim: bool | None = None
    include_stop_str_in_output: bool | None = None  # vLLM's name for no_stop_trim
    priority: int | None = None
    cache_salt: str | None = None
    rid: str | None = None  # SGLang: the id to abort this request by


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **UNSUPPORTED,
        "functions": "this server does not parse tool calls yet; use tools with tool_choice none to show them to the model only",
        "function_call": "this server does not parse tool calls yet",
        "audio": "this server answers in text",
        "modalities": 'this server answers in text: ["text"]',
        "prediction": _LATER,
        "web_search_options": _LATER,
        "reasoning_effort": "if the model's template reads it, give it in chat_template_kwargs",
        "verbosity": "if the model's template reads it, give it in chat_template_kwargs",
        "chat_template": "the server's operator chooses the template (--chat-template)",
        "documents": "if the model's template reads it, give it in chat_template_kwargs",
        "echo": "use continue_final_message, or echo on /v1/completions",
        "add_special_tokens": "the template writes them",
    }
    harmless: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **SamplingFields.harmless,
        "modalities": (["text"],),
        "function_call": ("none",),
    }
    expected: ClassVar[Mapping[str, str]] = {
        **SamplingFields.expected,
        "messages": "a list of messages, each with a role and content",
        "tools": "a list of tools",
        "tool_choice": '"none", "auto", "required" or an object that names a function',
    }

    messages: List[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: List[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    unsupported: ClassVar[Mapping[str, str]] = {
        **UNSUPPORTED,
        "suffix": "this server does not fill in the middle yet; write the model's own infill format into the prompt",
        "prompt_embeds": "give text or token ids in prompt",
    }
    expected: ClassVar[Mapping[str, str]] = {
        **SamplingFields.expected,
        "prompt": "a string, a list of strings, a list of token ids or a list of lists of token ids",
    }

    prompt: str | List[str] | List[int] | List[List[int]]
    echo: bool | None = None
    logprobs: int | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None
