"""The embedded model's token ids against independent references, text back, and tokenizers in Hugging Face folders."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path

import pytest
import regex
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.quant.checkpoint.errors import CheckpointError
from octavo.quant.checkpoint.gguf_header import read_gguf_header
from octavo.quant.checkpoint.resolve import resolve_model
from octavo.runtime.tokenizer import load_tokenizer

from .embedded_tokenizer import smollm2, smollm2_backend, write_config, write_folder

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


# --- Hugging Face folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path)


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


@pytest.mark.needs_embedded_model
def test_a_long_text_does_not_keep_other_threads_waiting() -> None:
    """A server whose tokenizer held the interpreter would answer no probe meanwhile."""
    tokenizer, done, turns = smollm2(), threading.Event(), 0
    started = threading.Event()

    def encode() -> None:
        started.wait()
        tokenizer.encode("hello world " * 100_000)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    started.set()
    while not done.is_set():
        time.sleep(0.005)
        turns += 1
    thread.join()
    assert turns > 5
