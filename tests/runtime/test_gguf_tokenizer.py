"""Tokenizers from GGUF vocabularies: against sentencepiece, how text is cut, and which kinds are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.gguf_header import read_gguf_header
from octavo.quant.checkpoint.resolve import ModelFiles, resolve_model
from octavo.runtime.gguf_tokenizer import build_gguf_tokenizer
from octavo.runtime.tokenizer import load_tokenizer


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
