"""Calibration rows: from files of every kind, and from a model that writes its own."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from octavo.calibration.float_text import drawing
from octavo.calibration.samples import NotEnoughTextError, hub_texts, read_texts, rows_of
from octavo.calibration.self_text import ANSWER_TOKENS, OwnText, write_samples

from .conftest import BOS, MakeModel

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def plain(make_model: MakeModel) -> Any:
    return AutoTokenizer.from_pretrained(make_model()[0])


@pytest.fixture(scope="module")
def with_bos(make_model: MakeModel) -> Any:
    return AutoTokenizer.from_pretrained(make_model(adds_bos=True)[0])


def test_rows_are_the_text_without_a_gap(plain: Any) -> None:
    text = "".join(chr(97 + i % 26) for i in range(200))
    rows = rows_of([text[:90], text[90:]], plain, samples=3, seqlen=50, where="x")
    assert rows.shape == (3, 50)
    assert rows.flatten().tolist() == plain(text).input_ids[:150]


def test_every_row_begins_with_the_bos_token_that_a_text_gets(with_bos: Any) -> None:
    rows = rows_of(["a" * 200], with_bos, samples=3, seqlen=50, where="x")
    assert rows[:, 0].tolist() == [BOS] * 3
    assert int((rows[:, 1:] == BOS).sum()) == 0


def test_too_little_text_says_how_much_there_is(plain: Any) -> None:
    with pytest.raises(
        NotEnoughTextError, match=r"notes.txt has 130 tokens, which makes 2 samples of 50 where 8 are wanted: give --samples 2"
    ):
        rows_of(["a" * 130], plain, samples=8, seqlen=50, where="notes.txt")
    with pytest.raises(NotEnoughTextError, match="give more text"):
        rows_of(["a" * 20], plain, samples=8, seqlen=50, where="notes.txt")


def test_an_empty_file(tmp_path: Path, plain: Any) -> None:
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    with pytest.raises(NotEnoughTextError, match="is empty"):
        list(read_texts(file, plain))


@pytest.mark.parametrize("key", ["text", "content", "prompt"])
def test_json_lines(key: str, tmp_path: Path, plain: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(json.dumps({key: text, "id": 1}) for text in ("one", "two")) + "\n\n")
    assert list(read_texts(file, plain)) == ["one", "two"]


def test_conversations_go_through_the_template(tmp_path: Path, make_model: MakeModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model()[0])
    tokenizer.chat_template = TEMPLATE
    file = tmp_path / "chats.json"
    sharegpt = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]}
    file.write_text(json.dumps([{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}, sharegpt]))
    assert list(read_texts(file, tokenizer)) == ["[user] hi\n[assistant] hello\n"] * 2


def test_a_conversation_without_a_template_is_said(tmp_path: Path, plain: Any) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))
    with pytest.raises(ValueError, match=r"entry 1 is a conversation, and the model's tokenizer has no chat template"):
        list(read_texts(file, plain))


@pytest.mark.parametrize(("content", "told"), [('{"a": 1}', "entry 1 holds no text"), ("{", "is not sound JSON")])
def test_what_is_no_text(content: str, told: str, tmp_path: Path, plain: Any) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(content)
    with pytest.raises(ValueError, match=told):
        list(read_texts(file, plain))


def test_what_is_wrong_in_a_file_is_told_with_its_place(tmp_path: Path, plain: Any) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl is not sound JSON \(Expecting value at line 3, column 10\)"):
        list(read_texts(tmp_path / "a.jsonl", plain))
    for name in ("b.txt", "b.jsonl"):
        (tmp_path / name).write_bytes(b"\x80\x04\x95")
        with pytest.raises(ValueError, match=rf"{name} is no text in UTF-8 \(invalid start byte at byte 0\)"):
            list(read_texts(tmp_path / name, plain))


def test_rows_are_spread_over_the_text(plain: Any) -> None:
    rows = rows_of(["".join(chr(97 + i % 26) * 16 for i in range(40))], plain, samples=4, seqlen=16, where="text", of=12)
    first = plain("a").input_ids[0]
    assert [sorted({int(token) - first for token in row}) for row in rows] == [[0], [3], [6], [9]]
    short = rows_of(["a" * 16 + "b" * 16 + "c" * 16], plain, samples=2, seqlen=16, where="text", of=12)
    assert [int(row[0]) - first for row in short] == [0, 1]


def test_a_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch, plain: Any) -> None:
    asked: list[Any] = []

    def load_dataset(path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        asked.append((path, config, options))
        if path == "nowhere":
            raise FileNotFoundError("no such data set")
        return ({"text": f"text {i}"} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert next(hub_texts("wikitext:wikitext-2-raw-v1", plain)) == "text 0"
    assert rows_of(hub_texts("some/set", plain), plain, samples=2, seqlen=16, where="some/set").shape == (2, 16)
    assert [(path, config) for path, config, _ in asked] == [("wikitext", "wikitext-2-raw-v1"), ("some/set", None)]
    assert asked[0][2] == {"split": "train", "streaming": True}
    with pytest.raises(ValueError, match="'nowhere' is no file here, and the hub gave no such data set"):
        next(hub_texts("nowhere", plain))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="pip install datasets"):
        next(hub_texts("some/set", plain))


def test_a_model_writes_rows_of_its_own(with_bos: Any) -> None:
    asked: list[tuple[int, int]] = []

    def generate(prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
        asked.append((count, seed))
        assert all(prompt[0] == BOS for prompt in prompts)
        return [[7] * 13 for _ in prompts]

    done: list[int] = []
    rows = write_samples(generate, with_bos, samples=5, seqlen=40, seed=100, batch=4, on_tokens=done.append)
    assert rows.shape == (5, 40)
    assert rows[:, 0].tolist() == [BOS] * 5
    assert int((rows == 7).sum()) > 50
    assert asked[0] == (39, 100)
    assert len({seed for _, seed in asked}) == len(asked)
    assert sum(done) == 5 * 39
    assert torch.equal(rows, write_samples(generate, with_bos, samples=5, seqlen=40, seed=100, batch=4))
    text = OwnText()
    fewer = write_samples(generate, with_bos, samples=2, seqlen=40, seed=100, batch=4, text=text)
    assert torch.equal(fewer, rows[:2])
    asked.clear()
    assert torch.equal(rows, write_samples(generate, with_bos, samples=5, seqlen=40, seed=100, batch=4, text=text))
    assert min(seed for _, seed in asked) > 100, "what was written is not written again"
    asked.clear()
    write_samples(generate, with_bos, samples=1, seqlen=400, seed=0, batch=4)
    assert {count for count, _ in asked} == {ANSWER_TOKENS}, "texts are short, however long rows are"


LLAMAS_DATE = "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"


@pytest.mark.parametrize(
    ("template", "follows"),
    [
        (LLAMAS_DATE + "{{ messages[0].content }} {{ date_string }}", "child. 26 Jul 2024"),  # not the day of the run
        ("{{ raise_exception('no system turn') }}", None),
        ("{{ messages[7].content.x() }}", None),
        ("{% if %}", None),
    ],
)
def test_what_a_model_is_asked_through_its_template(template: str, follows: str | None, make_model: MakeModel) -> None:
    tokenizer = AutoTokenizer.from_pretrained(make_model(adds_bos=True)[0])
    tokenizer.chat_template = template
    asked: list[Sequence[int]] = []

    def generate(prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
        asked.extend(prompts)
        return [[7] * 13 for _ in prompts]

    write_samples(generate, tokenizer, samples=200, seqlen=40, seed=0, batch=4)
    texts = [tokenizer.decode(prompt) for prompt in asked]
    assert len(texts) >= 128  # with eight questions
    assert any(text.endswith(follows) for text in texts) if follows else all(text.startswith("<s>") for text in texts)


@pytest.mark.parametrize("served", [True, False])
def test_text_is_drawn_whatever_the_model_card_advises(served: bool, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.calibration.float_text.served", lambda model_path: served)
    folder, _ = make_model()
    prompts, seed = [[5, 6, 7], [8, 9]], 3

    def drawn() -> Sequence[Sequence[int]]:
        with drawing(str(folder), str(folder), 64, 2, torch.device("cpu")) as generate:
            return generate(prompts, 24, seed)

    plain = drawn()
    advice = {"repetition_penalty": 8.0, "min_p": 0.5, "top_p": 0.1, "top_k": 1, "temperature": 0.1, "do_sample": True}
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | advice))
    assert drawn() == plain
    assert len({token for text in plain for token in text}) > 20


def test_a_model_that_writes_nothing(with_bos: Any) -> None:
    class Silent:
        chat_template = None
        bos_token_id = BOS

        def __call__(self, text: str) -> Any:
            return type("Encoding", (), {"input_ids": []})()

    def silent(prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
        return [[] for _ in prompts]

    with pytest.raises(ValueError, match="ends its texts at once"):
        write_samples(silent, Silent(), samples=2, seqlen=16, seed=0, batch=4)
    with pytest.raises(ValueError, match="ends its texts at once"):  # though what it is asked would fill the rows
        write_samples(silent, with_bos, samples=200, seqlen=64, seed=0, batch=4)


def test_passages_leave_room_for_what_the_model_writes(with_bos: Any) -> None:
    asked: list[Sequence[int]] = []

    def generate(prompts: Sequence[Sequence[int]], count: int, seed: int) -> list[list[int]]:
        asked.extend(prompts)
        return [[7] * count for _ in prompts]

    for seqlen in (24, 512):
        asked.clear()
        write_samples(generate, with_bos, samples=40, seqlen=seqlen, seed=0, batch=8)
        long = [prompt for prompt in asked if len(prompt) > 80]
        assert (2 * len(long) > len(asked) // 3) == (seqlen == 512)
        assert max(map(len, asked)) <= max(80, seqlen // 2)
