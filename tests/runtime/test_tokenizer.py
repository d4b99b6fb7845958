"""Tokenizers: ids against independent references, text back, chat templates against transformers' rendering."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.gguf_header import read_gguf_header
from octavo.quant.checkpoint.resolve import ModelFiles, resolve_model
from octavo.runtime.chat_template import MAX_RENDERED_CHARS, ChatTemplate, TemplateError
from octavo.runtime.gguf_tokenizer import build_gguf_tokenizer
from octavo.runtime.tokenizer import Tokenizer, load_tokenizer

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@cache
def smollm2() -> Tokenizer:
    return load_tokenizer(resolve_model(None))


@cache
def smollm2_backend() -> tokenizers.Tokenizer:
    files = resolve_model(None)
    assert files.gguf_file is not None
    return build_gguf_tokenizer(read_gguf_header(files.gguf_file))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with the embedded model's tokenizer."""
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    save_file({"t": torch.zeros(1)}, tmp_path / "model.safetensors")
    smollm2_backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write_config(folder: Path, **config: Any) -> ModelFiles:
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return resolve_model(str(folder))


# --- token ids -------------------------------------------------------------------------------------------------------


@cache
def smollm2_tables() -> tuple[dict[str, int], dict[tuple[str, str], int], dict[int, str]]:
    files = resolve_model(None)
    assert files.gguf_file is not None
    metadata = read_gguf_header(files.gguf_file).metadata
    vocab = {token: index for index, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return vocab, ranks, {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def reference_ids(text: str) -> list[int]:
    """llama.cpp's "smollm": digits one by one, GPT-2's pattern between them, then merges by rank. Slow and plain."""
    vocab, ranks, spelling = smollm2_tables()
    ids = []
    for stretch in regex.split(r"(\p{N})", text):
        words = regex.findall(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", stretch)
        for word in words:
            parts = [spelling[byte] for byte in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda at: ranks.get((parts[at], parts[at + 1]), 1 << 30))
                if (parts[best], parts[best + 1]) not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            ids += [vocab[part] for part in parts if part in vocab]
    return ids


TEXTS = [
    "Hello world",
    "In 2024,  12345 apples\n\n\n   cost 3.14 each (½ off)!",
    "def f(x):\n\treturn x**2  # ²³\n",
    "don't I'LL we've  it's",
    "Größe naïve Übung — 数字 1２3 привет 😀👩‍👩‍👧",
    "   leading and trailing   ",
    "a  1  b 2\t3\r\n4",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_ids_and_round_trip(text: str) -> None:
    ids = smollm2().encode(text)
    assert ids == reference_ids(text)
    assert smollm2().decode(ids) == text


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(min_codepoint=32, max_codepoint=0x2FFF, exclude_categories=("Cs", "Cn", "Cc", "No", "Nl")), max_size=40))
def test_smollm2_ids_on_any_text(text: str) -> None:
    assert smollm2().encode(text) == reference_ids(text)


def test_smollm2_digits_are_single_and_spaces_stay_together() -> None:
    """transformers 5.24 reads this GGUF with GPT-2's cut alone, which takes the last space before a digit away from its run."""
    texts = [smollm2().token_text(token) for token in smollm2().encode("x  2024")]
    assert texts == ["x", "  ", "2", "0", "2", "4"]


def test_smollm2_special_tokens_are_one_id_and_nothing_is_added() -> None:
    tokenizer = smollm2()
    assert tokenizer.encode("<|im_start|>user\nHi<|im_end|>") == [1, 4093, 198, 26843, 2]
    assert (tokenizer.vocab_size, tokenizer.eos_token_ids, tokenizer.bos_token_id) == (49152, (2,), 1)
    assert {0, 1, 2} <= tokenizer.special_token_ids
    assert tokenizer.decode([1, 26843, 2]) == "Hi"
    assert tokenizer.decode([1, 26843, 2], skip_special_tokens=False) == "<|im_start|>Hi<|im_end|>"


def test_start_is_light() -> None:
    """Neither torch nor transformers is imported to load the embedded model's tokenizer."""
    code = (
        "import sys; from octavo.quant.checkpoint.resolve import resolve_model; from octavo.runtime.tokenizer import load_tokenizer; "
        "load_tokenizer(resolve_model(None)); print({'torch', 'transformers'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "set()"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=12), st.booleans())
def test_decode_agrees_with_the_tokenizers_library(ids: list[int], skip: bool) -> None:
    assert smollm2().decode(ids, skip_special_tokens=skip) == smollm2_backend().decode(ids, skip_special_tokens=skip)


def test_token_bytes_and_text() -> None:
    tokenizer = smollm2()
    ids = tokenizer.encode("né 😀")
    assert b"".join(tokenizer.token_bytes(token) for token in ids) == "né 😀".encode()
    assert "\N{REPLACEMENT CHARACTER}" in [tokenizer.token_text(token) for token in ids][-1]
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert (tokenizer.token_bytes(10**6), tokenizer.token_bytes(-1), tokenizer.decode([10**6])) == (b"", b"", "")


# --- GGUF vocabularies ------------------------------------------------------------------------------------------------


def vocabulary_file(path: Path, fill: Callable[[Any], None]) -> ModelFiles:
    writer = gguf.GGUFWriter(str(path), "llama")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return resolve_model(str(path))


LINES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "a  b   c", "hello hello world"]


@pytest.fixture(scope="module")
def sentencepiece_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[sentencepiece.SentencePieceProcessor, ModelFiles]:
    folder = tmp_path_factory.mktemp("spm")
    (folder / "corpus.txt").write_text("\n".join(LINES * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "m"),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "m.model"))
    size = processor.get_piece_size()

    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list([processor.id_to_piece(index) for index in range(size)])
        writer.add_token_scores([processor.get_score(index) for index in range(size)])
        writer.add_token_types(
            [3 if index in (1, 2) else 2 if index == 0 else 6 if processor.is_byte(index) else 1 for index in range(size)]
        )
        writer.add_unk_token_id(0)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)

    return processor, vocabulary_file(folder / "m.gguf", fill)


@pytest.mark.parametrize("text", ["hello world", "the dog", "  two  spaces ", "ünïcode 😀 日本", "quick-fox jugs,box", "a\nb", "", " "])
def test_sentencepiece_vocabulary(sentencepiece_files: tuple[sentencepiece.SentencePieceProcessor, ModelFiles], text: str) -> None:
    processor, files = sentencepiece_files
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode(text, add_special_tokens=False) == processor.encode(text)
    assert tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert b"".join(map(tokenizer.token_bytes, processor.encode(text))) == (b" " + text.encode() if text else b"")


def test_sentencepiece_special_tokens_in_text(sentencepiece_files: tuple[sentencepiece.SentencePieceProcessor, ModelFiles]) -> None:
    tokenizer = load_tokenizer(sentencepiece_files[1])
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False)[0] == 1
    assert tokenizer.encode("<s>hello</s>", add_special_tokens=False)[-1] == 2


def test_unknown_pre_tokenizers_and_kinds_are_refused(tmp_path: Path) -> None:
    def bpe(pre: str | None) -> Callable[[Any], None]:
        def fill(writer: Any) -> None:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b"])
            writer.add_token_merges([])
            if pre is not None:
                writer.add_tokenizer_pre(pre)

        return fill

    for index, pre in enumerate(("never-heard-of", None)):
        with pytest.raises(CheckpointError, match=r"not known.*llama-bpe.*--tokenizer-path"):
            load_tokenizer(vocabulary_file(tmp_path / f"{index}.gguf", bpe(pre)))
    with pytest.raises(CheckpointError, match=r"kind 'bert'.*--tokenizer-path"):
        load_tokenizer(vocabulary_file(tmp_path / "bert.gguf", lambda writer: writer.add_tokenizer_model("bert")))
    with pytest.raises(CheckpointError, match="kind None"):
        load_tokenizer(vocabulary_file(tmp_path / "none.gguf", lambda writer: None))


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("llama-bpe", "It's 12345  x\n\n y", ["It", "'s", " ", "123", "45", " ", " x", "\n\n", " y"]),
        ("qwen2", "It'S 123  x\n", ["It", "'S", " ", "1", "2", "3", " ", " x", "\n"]),
        ("gpt-2", "It's 123  x", ["It", "'s", " 123", " ", " x"]),
        ("smollm", "It's 123  x", ["It", "'s", " ", "1", "2", "3", " ", " x"]),
        ("tekken", "fooBar 12/\n", ["foo", "Bar", " ", "1", "2", "/\n"]),
    ],
)
def test_how_text_is_cut(tmp_path: Path, pre: str, text: str, words: list[str]) -> None:
    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a"])
        writer.add_token_merges([])

    files = vocabulary_file(tmp_path / "m.gguf", fill)
    assert files.gguf_file is not None
    backend = build_gguf_tokenizer(read_gguf_header(files.gguf_file))
    pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
    assert [piece.replace("Ġ", " ").replace("Ċ", "\n") for piece in pieces] == words


def test_user_defined_tokens_are_whole_and_shown(tmp_path: Path) -> None:
    def fill(writer: Any) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(["a", "b", "<think>", "<|begin|>", "<|end|>"])
        writer.add_token_types([1, 1, 4, 3, 3])
        writer.add_token_merges([])
        writer.add_bos_token_id(3)
        writer.add_eos_token_id(4)

    tokenizer = load_tokenizer(vocabulary_file(tmp_path / "m.gguf", fill))
    assert tokenizer.encode("a<think>b<|end|>") == [3, 0, 2, 1, 4]
    assert tokenizer.encode("ab", add_special_tokens=False) == [0, 1]
    assert tokenizer.decode([3, 0, 2, 1, 4]) == "a<think>b"


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


def test_folder_gives_the_same_ids(folder: Path) -> None:
    files = write_config(folder, eos_token={"content": "<|im_end|>"}, bos_token="<|im_start|>", chat_template="{{ messages }}")
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode(TEXTS[1]) == smollm2().encode(TEXTS[1])
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id, tokenizer.has_chat_template) == ((2, 0), 1, True)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    assert load_tokenizer(files).eos_token_ids == (2, 7)


def test_truncation_and_padding_in_the_file_are_off(folder: Path) -> None:
    backend = smollm2_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(str(folder / "tokenizer.json"))
    backend.no_truncation()
    backend.no_padding()
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    assert len(tokenizer.encode("one two three four five six seven")) > 4
    assert len(tokenizer.encode("one")) == 1


def test_begin_flag_and_listed_tokens(folder: Path) -> None:
    tokenizer = load_tokenizer(
        write_config(
            folder,
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            add_bos_token=True,
            added_tokens_decoder={"49152": {"content": "<extra : 1>", "special": True, "normalized": False}},
        )
    )
    assert tokenizer.encode("Hi<extra : 1>") == [1, 26843, 49152]
    assert tokenizer.encode("Hi", add_special_tokens=False) == [26843]
    assert tokenizer.vocab_size == 49153
    assert tokenizer.decode([49152]) == ""


def test_folder_without_tokenizer_json_goes_through_transformers(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    vocab = content["model"]["vocab"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    files = write_config(folder, tokenizer_class="GPT2Tokenizer", eos_token="<|im_end|>", bos_token=None, unk_token="<|endoftext|>")
    tokenizer = load_tokenizer(files)
    assert tokenizer.encode("Hello world") == smollm2().encode("Hello world")
    assert 2 in tokenizer.eos_token_ids


def test_missing_and_broken_tokenizers(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no sound tokenizer.*again"):
        load_tokenizer(resolve_model(str(folder)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"looked for tokenizer\.json, tokenizer\.model.*--tokenizer-path"):
        load_tokenizer(resolve_model(str(folder)))
    embedded = resolve_model(None)
    tokenizer = load_tokenizer(resolve_model(str(folder)), tokenizer_path=str(embedded.gguf_file))
    assert tokenizer.encode("Hello world") == [19556, 905]
    with pytest.raises(CheckpointError, match="no such file or folder"):
        load_tokenizer(embedded, tokenizer_path="./nowhere")


def test_unsupported_decoders_are_named(folder: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(folder / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"WordPiece.*Supported: ByteLevel"):
        load_tokenizer(resolve_model(str(folder)))


def test_metaspace_decoder_drops_one_leading_space(folder: Path) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({"▁a": 0, "▁": 1, "b": 2}, []))
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    for ids in ([0, 0, 2], [1, 0], [2, 0], [0]):
        assert tokenizer.decode(ids) == backend.decode(ids)


# --- chat templates ---------------------------------------------------------------------------------------------------


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
        "{% include 'secret' %}",
    ],
)
def test_templates_are_caged(hostile: str) -> None:
    with pytest.raises(TemplateError):
        ChatTemplate({"default": hostile}, {}).render(CHAT)
    assert MAX_RENDERED_CHARS < 10**8


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
