"""Which sizes steps are captured for, and which steps are taken; whole models are in test_gpu_runner.py."""

from __future__ import annotations

from array import array

import pytest

from octavo.runtime.batch import Batch, BatchRow
from octavo.runtime.decode_graphs import graph_sizes
from octavo.runtime.forward_batch import lay_out
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams


@pytest.mark.parametrize(
    ("most", "sizes"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (20, [1, 2, 4, 8, 16, 20]), (24, [1, 2, 4, 8, 16, 24])]
)
def test_sizes_end_with_the_largest_batch(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes


def row(start: int, count: int, tokens: int, *, awaited: int = 0, **params: int) -> BatchRow:
    request = Request("r", 5, list(range(tokens)), SamplingParams(**params), 9, frozenset(), pages=array("i", [3, 1, 2]))
    request.num_awaited, request.awaited_row = awaited, 7
    return BatchRow(request, start, count, samples=start + count == tokens + awaited)


def test_a_step_decodes_when_each_row_is_one_token_whose_logits_are_wanted() -> None:
    decoding, awaiting, prompt, chunk = row(5, 1, 6), row(6, 1, 6, awaited=1), row(0, 5, 5), row(0, 1, 5)
    scored = row(3, 1, 5, prompt_logprobs=0)
    assert lay_out(Batch((decoding, awaiting, scored)), 4).is_decoding
    for other in (prompt, chunk):
        assert not lay_out(Batch((decoding, other)), 4).is_decoding


def test_an_awaited_token_is_named_by_its_place() -> None:
    arrays = lay_out(Batch((row(5, 1, 6), row(6, 1, 6, awaited=1), row(4, 3, 6, awaited=1))), 4)
    assert arrays.ids.tolist() == [5, ~7, 4, 5, ~7]
    assert arrays.positions.tolist() == [5, 6, 4, 5, 6]
    assert arrays.slots.tolist() == [5, 6, 4, 5, 6]  # the second page of each is page 1
    assert arrays.wanted.tolist() == [0, 1, 4]
    assert arrays.contexts.tolist() == [6, 7, 7]
