"""Events are cut out of the wire's pieces wherever they were split, and carry the time of their last byte."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from octavo.benchmarks.sse import Event, Exchange


def exchange(pieces: list[bytes]) -> Exchange:
    return Exchange(0.0, 1.0, 200, tuple((float(number), piece) for number, piece in enumerate(pieces)))


@given(
    texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cc", "Zl", "Zp", "Cs", "Zs"]), min_size=1), max_size=8),
    newline=st.sampled_from([b"\n", b"\r\n"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_any_split_gives_the_same_events(texts: list[str], newline: bytes, cuts: list[int]) -> None:
    body = b"".join(b"data: " + text.encode() + newline * 2 for text in texts)
    edges = [0, *sorted(cut for cut in cuts if cut < len(body)), len(body)]
    pieces = [body[start:end] for start, end in pairwise(edges)]
    events = exchange(pieces).events()
    assert [event.data for event in events] == [text.encode() for text in texts]
    end = 0
    for text, event in zip(texts, events, strict=True):
        end += len(b"data: " + text.encode() + newline * 2)
        assert sum(map(len, pieces[: int(event.time_s) + 1])) >= end > sum(map(len, pieces[: int(event.time_s)]))


def test_comments_and_other_fields_are_left_out() -> None:
    assert exchange([b": ping\n\nevent: x\nid: 3\ndata: a\n\nretry: 9\n\n"]).events() == [Event(0.0, b"a")]


def test_lines_of_one_event_are_joined() -> None:
    assert exchange([b"data: a\ndata: b\n\n"]).events() == [Event(0.0, b"a\nb")]


def test_an_event_without_its_end_is_none() -> None:
    assert exchange([b"data: a\n\ndata: b\n"]).events() == [Event(0.0, b"a")]
