"""Chat templates: against transformers' rendering, where they come from, what they may not do, and how they refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.chat_template import MAX_RENDERED_CHARS, ChatTemplate, TemplateError
from octavo.runtime.tokenizer import load_tokenizer

from .embedded_tokenizer import smollm2, write_config, write_folder

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


def test_embedded_template() -> None:
    tokenizer = smollm2()
    expected = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.render_chat(CHAT) == expected
    ids = tokenizer.apply_chat_template(CHAT)
    assert ids == tokenizer.encode(expected)
    assert ids.count(1) == 3
    assert tokenizer.render_chat(CHAT, add_generation_prompt=False) == expected.removesuffix("<|im_start|>assistant\n")


RICH = """{{ bos_token }}{%- if tools %}
  {%- for tool in tools %}
{{ tool | tojson(indent=2) }}{{ tool | tojson }}
  {% endfor %}
{% endif %}
{%- for message in messages -%}
  {%- if message.role == 'skip' %}{% continue %}{% endif %}
  {%- if loop.index > 3 %}{% break %}{% endif %}
[{{ message['role'] }}]{% generation %}{{ message.content | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{%- set ns = namespace(flag=enable_thinking is defined and enable_thinking) %}{{ ns.flag }} {{ pad_token }}{{ strftime_now('%Y') }}
{%- if add_generation_prompt %}<go>{% endif %}"""


@pytest.mark.parametrize("generate", [True, False])
@pytest.mark.parametrize("tools", [None, [{"type": "function", "function": {"name": "ü<&>", "parameters": {"b": 1, "a": [None, True]}}}]])
def test_rendering_agrees_with_transformers(tools: list[dict[str, Any]] | None, generate: bool) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": role, "content": f"  é {role} "} for role in ("system", "skip", "user", "assistant", "user")]
    ours = ChatTemplate({"default": RICH}, {"bos_token": "<s>", "eos_token": "</s>"}).render(
        messages, tools=tools, add_generation_prompt=generate, chat_template_kwargs={"enable_thinking": True}
    )
    theirs, _ = render_jinja_template(
        conversations=[messages],
        tools=tools,
        chat_template=RICH,
        add_generation_prompt=generate,
        bos_token="<s>",
        eos_token="</s>",
        enable_thinking=True,
    )
    assert ours == theirs[0]
    assert ("ü<&>" in ours) == (tools is not None)


def test_continue_final_message() -> None:
    conversation = [*CHAT, {"role": "assistant", "content": "The answer is "}]
    keeps = ChatTemplate(
        {"default": "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"}, {}
    )
    assert keeps.render(conversation, continue_final_message=True) == "[What is 2 + 2?][The answer is "
    trims = ChatTemplate({"default": "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"}, {})
    assert trims.render(conversation, continue_final_message=True) == "[What is 2 + 2?][The answer is"
    parts = ChatTemplate({"default": "{% for m in messages %}{{ m.content[0].text }}|{% endfor %}"}, {})
    spoken = [{"role": "assistant", "content": [{"type": "text", "text": "Yes,"}]}]
    assert parts.render(spoken, continue_final_message=True) == "Yes,"
    assert spoken[0]["content"][0]["text"] == "Yes,"  # type: ignore[index]
    with pytest.raises(TemplateError, match="does not show the last message"):
        ChatTemplate({"default": "{{ messages[0].content }}"}, {}).render(conversation, continue_final_message=True)
    with pytest.raises(TemplateError, match="text content"):
        keeps.render([{"role": "assistant", "content": None}], continue_final_message=True)


def test_refusals_carry_the_templates_words(folder: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('Roles must alternate, not ' + messages[0].role) }}{% endif %}x"
    template = ChatTemplate({"default": strict}, {})
    with pytest.raises(TemplateError, match=r"refused the conversation: Roles must alternate, not tool$"):
        template.render([{"role": "tool", "content": ""}])
    with pytest.raises(TemplateError, match="messages is empty"):
        template.render([])
    with pytest.raises(TemplateError, match="TypeError"):
        smollm2().apply_chat_template([{"role": "user", "content": None}])
    with pytest.raises(TemplateError, match=r"not valid Jinja.*line 2"):
        ChatTemplate({"default": "a\n{% if %}"}, {}).render(CHAT)
    plain = load_tokenizer(resolve_model(str(folder)))
    assert not plain.has_chat_template
    with pytest.raises(TemplateError, match=r"no chat template.*--chat-template"):
        plain.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "hostile",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% for i in range(99999) %}{{ m(n + 1) }}{% endfor %}{% endmacro %}{{ m(0) }}",
        "{% for i in 'x' * 10**9 %}{% endfor %}",
        "{{ (10**9 * ['x']) | length }}",
        "{{ 7 ** (10 ** 9) }}",
        "{% set _octavo_steps = cycler(1) %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{% set s = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set s.x = s.x + s.x %}{% endfor %}",
        "{% set s = namespace(x=10) %}{% for i in range(60) %}{% set s.x = s.x * s.x %}{% endfor %}",
        "{{ 'x'.center(10**9) }}",
        "{{ 'x' | center(10**9) }}",
        "{{ '%01000000000d' % 1 }}",
        "{{ '{:>1000000000}'.format(1) }}",
        "{{ '%01000000000d' | format(1) }}",
        "{% include 'secret' %}",
        "{{ lipsum(n=10**12) }}",
        "{{ [1] | slice(10**15) | list }}",
        "{{ [1] | batch(10**15, 0) | list }}",
        "{{ 'aaaa' | replace('a', 'b' * 9000000) }}",
        "{{ range(99999) | join('b' * 9000000) }}",
        "{{ 'a' | indent(10**12) }}",
        "{{ messages | tojson(indent=10**12) }}",
    ],
)
def test_templates_are_caged(hostile: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate({"default": hostile}, {}).render(CHAT)
    assert MAX_RENDERED_CHARS < 10**8


def test_loops_know_their_place() -> None:
    source = "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ ' last' if loop.last }}{% else %}none{% endfor %}"
    source += "{% for k, v in {'a': 1}.items() if v %}{{ k }}{% if true %}{% break %}{% endif %}{% endfor %}{{ 'ab' * 2 }}{{ 2 ** 3 }}"
    assert ChatTemplate({"default": source}, {}).render(CHAT * 2) == "1/22/2 lasta" + "abab8"


def test_where_templates_come_from(folder: Path) -> None:
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    files = write_config(folder, chat_template=named)
    assert load_tokenizer(files).render_chat(CHAT) == "D"
    assert load_tokenizer(files).render_chat(CHAT, tools=[{"type": "function"}]) == "T"
    (folder / "chat_template.jinja").write_text("from file")
    assert load_tokenizer(files).render_chat(CHAT) == "from file"
    assert load_tokenizer(files, chat_template="{{ 'given' }}").render_chat(CHAT) == "given"
    assert load_tokenizer(files, chat_template=str(folder / "chat_template.jinja")).render_chat(CHAT) == "from file"
    with pytest.raises(CheckpointError, match="neither a file nor"):
        load_tokenizer(files, chat_template="/no/such.jinja")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(TemplateError, match="named tool_use"):
        load_tokenizer(write_config(folder, chat_template=named[1:]))
