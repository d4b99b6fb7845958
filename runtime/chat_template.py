"""ChatTemplate: a conversation as the text its model was trained on. Knows no tokens and no HTTP.

Templates are Jinja, rendered in a sandbox with what transformers offers them: `messages`, `tools`, `add_generation_prompt`, the
special tokens' texts, `raise_exception`, `strftime_now`, `tojson`, `break`/`continue` and the (here ignored) `generation` tag.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox

MAX_RENDERED_CHARS = 32_000_000
MAX_STEPS = 300_000  # of all loops and calls of a template together
_MAX_MADE = 10_000_000  # characters or items that one operation may make; bits of a number
_STEPS: ContextVar[Iterator[int]] = ContextVar("_STEPS")  # of the template that is rendered now
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map"})
_MAX_INDENT = 64
_MAX_PARTS = 10_000  # that a filter is asked to make
_WIDTH = re.compile(r"\d{6,}")
# Ends in a space, so that a template that trims its messages shows itself.
_CONTINUE_MARK = "<octavo-continues-here> "


class TemplateError(ValueError):
    """A conversation cannot be turned into a prompt. The text says why, in words for the caller."""


class ChatTemplate:
    """The templates of one model by name; "default" is the usual one, "tool_use" the one for requests with tools.

    `special_tokens` are texts that templates may name, such as bos_token. Raises TemplateError when there is no default.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        if "default" not in templates:
            raise TemplateError(f"the model's chat templates are named {', '.join(templates)}; name one file with --chat-template")
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `continue_final_message` leaves the last message open and opens no new one.

        Raises TemplateError when there is no message or the template refuses the conversation.
        """
        if not messages:
            raise TemplateError("messages is empty: a conversation needs at least one message")
        conversation: list[Any] = copy.deepcopy(list(messages))
        if continue_final_message:
            _mark_end(conversation[-1])
        variables = {
            **self._special_tokens,
            **(chat_template_kwargs or {}),
            "messages": conversation,
            "tools": list(tools) if tools else None,
            "documents": (chat_template_kwargs or {}).get("documents"),
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
        }
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        steps = _STEPS.set(itertools.count(1))
        try:
            text = _render(_compile(self._templates[name]), variables)
        finally:
            _STEPS.reset(steps)
        return _cut_at_mark(text) if continue_final_message else text


def _render(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    pieces: list[str] = []
    size = 0
    try:
        for piece in template.generate(variables):
            size += len(piece)
            if size > MAX_RENDERED_CHARS:
                raise TemplateError(f"the rendered conversation is longer than {MAX_RENDERED_CHARS} characters")
            pieces.append(piece)
    except TemplateError:
        raise
    # A template is a program: whatever goes wrong in it is about this conversation, and the caller is told.
    except Exception as error:
        told = str(error) if isinstance(error, _Raised) else f"{type(error).__name__}: {error}"
        raise TemplateError(f"the chat template refused the conversation: {told}") from error
    return "".join(pieces)


def _mark_end(message: dict[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_MARK
        return
    parts = content if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            part["text"] += _CONTINUE_MARK
            return
    raise TemplateError("continue_final_message needs a last message with text content to continue")


def _cut_at_mark(text: str) -> str:
    at = text.rfind(_CONTINUE_MARK.rstrip())
    if at < 0:
        raise TemplateError("the chat template does not show the last message as it is, so it cannot be continued")
    kept = text[:at]
    return kept if text.startswith(_CONTINUE_MARK, at) else kept.rstrip()


class _Raised(jinja2.TemplateRuntimeError):  # type: ignore[misc] # jinja2 is not followed
    """A template called raise_exception."""


def _raise_exception(message: str) -> None:
    raise _Raised(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML and sorts keys, which models were not trained on."""
    if isinstance(indent, int) and indent > _MAX_INDENT:
        raise _too_large()
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


class _GenerationTag(jinja2.ext.Extension):  # type: ignore[misc]
    """`{% generation %}...{% endgeneration %}` marks training targets: its body is rendered as if the tag were not there."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _step() -> None:
    if next(_STEPS.get()) > MAX_STEPS:
        raise _Raised(f"its loops and calls take more than {MAX_STEPS} steps")


class _Counted:
    """What a loop runs over, with its steps counted."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            _step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


def _size(value: Any) -> int:
    """Characters, items or bits."""
    if isinstance(value, str | bytes | list | tuple):
        return len(value)
    return value.bit_length() if isinstance(value, int) else 0


def _too_large() -> _Raised:
    return _Raised(f"it makes something of more than {_MAX_MADE} parts")


class _Cage(jinja2.sandbox.ImmutableSandboxedEnvironment):  # type: ignore[misc]
    """Jinja's sandbox, in which loops, calls and what operators make are bounded too. What filters make of long texts is not."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        sizes = _size(left), _size(right)
        is_whole = isinstance(left, int), isinstance(right, int)
        if operator == "%" and isinstance(left, str):
            too_large = bool(_WIDTH.search(left))
        elif operator == "**":
            too_large = all(is_whole) and right > 0 and sizes[0] * right > _MAX_MADE
        elif operator == "*" and is_whole[0] != is_whole[1]:  # a text or a list, so many times
            too_large = (sizes[1] * left if is_whole[0] else sizes[0] * right) > _MAX_MADE
        else:
            too_large = operator != "%" and sum(sizes) > _MAX_MADE
        if too_large:
            raise _too_large()
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  (jinja2's names)
        _step()
        if getattr(__obj, "__name__", "") in _PADDING:
            text = getattr(__obj, "__self__", "")
            wide = any(isinstance(one, int) and one > _MAX_MADE for one in (*args, *kwargs.values()))
            if wide or (isinstance(text, str) and bool(_WIDTH.search(text)) and "format" in __obj.__name__):
                raise _too_large()
        return super().call(__context, __obj, *args, **kwargs)


def _center(value: str, width: int = 80) -> str:
    if width > _MAX_MADE:
        raise _too_large()
    return str(value).center(width)


def _format(value: str, *args: Any, **kwargs: Any) -> str:
    if _WIDTH.search(str(value)):
        raise _too_large()
    return str(value) % (kwargs or args)


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = str(value)
    times = text.count(str(old)) if count is None else min(count, text.count(str(old)))
    if len(text) + times * len(str(new)) > _MAX_MADE:
        raise _too_large()
    return text.replace(str(old), str(new), -1 if count is None else count)


def _join(value: Any, d: str = "", attribute: str | int | None = None) -> str:
    items = list(value)
    if attribute is not None:
        items = [item.get(attribute, "") if isinstance(item, Mapping) else item[attribute] for item in items]
    texts = [str(item) for item in items]
    if sum(map(len, texts)) + len(str(d)) * len(texts) > _MAX_MADE:
        raise _too_large()
    return str(d).join(texts)


def _parted(made: Any) -> Any:
    """One of Jinja's filters that makes as many parts, or as much room, as a number says."""

    @functools.wraps(made)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(one, int) and one > _MAX_PARTS for one in (*args, *kwargs.values())):
            raise _too_large()
        return made(*args, **kwargs)

    return bounded


def _bounded(tree: jinja2.nodes.Template) -> jinja2.nodes.Template:
    """The same template, whose loops count their steps."""
    for loop in list(tree.find_all(jinja2.nodes.For)):
        loop.iter = jinja2.nodes.Filter(loop.iter, "_octavo_counted", [], [], None, None, lineno=loop.lineno)
    return tree


@functools.lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    environment = _Cage(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
    del environment.globals["lipsum"]  # makes text without end, and is no model's business
    environment.filters |= {"_octavo_counted": _Counted, "center": _center, "format": _format, "replace": _replace, "join": _join}
    environment.filters |= {name: _parted(environment.filters[name]) for name in ("slice", "batch", "indent", "wordwrap")}
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    try:
        return environment.from_string(_bounded(environment.parse(source)))
    except jinja2.TemplateSyntaxError as error:
        raise TemplateError(f"the chat template is not valid Jinja: {error.message} at line {error.lineno}") from error
