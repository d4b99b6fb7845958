"""Which replica gets what: beginnings of requests as bytes, who has seen them, and in which order replicas are tried."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from octavo.serve.prefix_index import BLOCK_BYTES, MOST_BLOCKS, PrefixIndex, beginning_of, blocks_of, order_of


def text(draw: random.Random, length: int) -> bytes:
    return bytes(draw.randrange(256) for _ in range(length))


def test_blocks_are_alike_exactly_as_far_as_texts_are() -> None:
    draw = random.Random(0)
    for _ in range(50):
        shared = text(draw, draw.randrange(0, 1000))
        one, other = (blocks_of(shared + text(draw, draw.randrange(0, 600))) for _ in range(2))
        alike = sum(a == b for a, b in zip(one, other, strict=False))
        assert one[:alike] == other[:alike]
        assert alike == min(len(shared) // BLOCK_BYTES, len(one), len(other))
    assert blocks_of(b"x" * (BLOCK_BYTES - 1)) == ()
    assert len(blocks_of(b"x" * BLOCK_BYTES * (MOST_BLOCKS + 5))) == MOST_BLOCKS


@pytest.mark.parametrize(
    ("body", "beginning"),
    [
        ({"prompt": "Once upon", "max_tokens": 3}, b"Once upon"),
        ({"prompt": ["Once", "Twice"]}, b"Once"),
        ({"prompt": [1, 70000]}, (1).to_bytes(4, "little") + (70000).to_bytes(4, "little")),
        ({"prompt": [[5], [6]]}, (5).to_bytes(4, "little")),
        ({"text": "SGLang's"}, b"SGLang's"),
        ({"input_ids": [7]}, (7).to_bytes(4, "little")),
        ({"prompt": [1, -1]}, b""),
        ({"prompt": [1, "a", None]}, b""),
        ({"prompt": None}, b""),
        ({"prompt": "\ud800"}, b"?"),
        ([], b""),
        (5, b""),
        ({"model": "m"}, b""),
    ],
)
def test_what_a_request_begins_with(body: Any, beginning: bytes) -> None:
    assert beginning_of(json.dumps(body).encode()) == beginning


def test_conversations_that_go_on_share_their_beginning() -> None:
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Ein Vögelchen."}]
    first = beginning_of(json.dumps({"messages": turns, "temperature": 1}).encode())
    longer = beginning_of(json.dumps({"messages": [*turns, {"role": "user", "content": "Why?"}]}).encode())
    with_tools = beginning_of(json.dumps({"messages": turns, "tools": [{"type": "function"}]}).encode())
    assert longer.startswith(first)
    assert not with_tools.startswith(first[:20])
    for body in (b"{broken", b"[" * 100_000, json.dumps({"prompt": "x" * (2 << 20)}).encode()):
        assert beginning_of(body) == b""
    assert len(beginning_of(json.dumps({"messages": [{"content": "x" * 100}] * 5000}).encode())) == BLOCK_BYTES * MOST_BLOCKS


def test_who_has_seen_the_most() -> None:
    draw = random.Random(1)
    shared, longer = text(draw, 5 * BLOCK_BYTES), text(draw, 5 * BLOCK_BYTES)
    index: PrefixIndex[str] = PrefixIndex()
    index.add(blocks_of(shared), "a")
    index.add(blocks_of(shared + longer), "b")
    asked = blocks_of(shared + longer[: 2 * BLOCK_BYTES] + text(draw, 400))
    assert index.matches(asked, ["a", "b", "c"]) == {"a": 5, "b": 7, "c": 0}
    index.forget("b")
    assert index.matches(asked, ["a", "b"]) == {"a": 5, "b": 0}
    assert index.matches(asked, ["b"]) == {"b": 0}


def test_what_was_used_long_ago_is_forgotten_from_its_end() -> None:
    draw = random.Random(2)
    old, new = blocks_of(text(draw, 6 * BLOCK_BYTES)), blocks_of(text(draw, 6 * BLOCK_BYTES))
    index: PrefixIndex[str] = PrefixIndex(max_blocks=8)
    index.add(old, "a")
    index.add(new, "a")
    assert index.matches(new, ["a"]) == {"a": 6}
    assert index.matches(old, ["a"]) == {"a": 2}
    index.add(old[:2], "a")
    assert index.matches(old, ["a"]) == {"a": 2}


def test_who_holds_it_comes_first_until_it_is_too_busy() -> None:
    matches, block = {"a": 3, "b": 0, "c": 1}, b"12345678"
    assert order_of(matches, {"a": 4, "b": 0, "c": 2}, most_ahead=4, first_block=block) == ["a", "c", "b"]
    assert order_of(matches, {"a": 5, "b": 0, "c": 2}, most_ahead=4, first_block=block) == ["c", "b", "a"]
    assert order_of(matches, {"a": 9, "b": 0, "c": 8}, most_ahead=4, first_block=block) == ["b", "c", "a"]


def test_routers_agree_on_what_nobody_has_seen_and_spread_it() -> None:
    draw = random.Random(3)
    firsts = [order_of(dict.fromkeys("abc", 0), dict.fromkeys("abc", 1), most_ahead=4, first_block=text(draw, 8))[0] for _ in range(300)]
    again = random.Random(3)
    assert firsts == [
        order_of(dict.fromkeys("cba", 0), dict.fromkeys("bca", 1), most_ahead=4, first_block=text(again, 8))[0] for _ in range(300)
    ]
    assert all(60 < firsts.count(name) < 140 for name in "abc")
