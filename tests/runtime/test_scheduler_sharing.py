"""Proves what the scheduler promises about shared prefixes: what is computed once, who waits for it, and what is never shared."""

from __future__ import annotations

import pytest

from octavo.runtime.outputs import FinishReason

from .scheduling import add, make, own, spans, step

ABORTED = FinishReason("abort", message="the caller went away", status_code=499)


def test_requests_in_flight_share_their_prefix() -> None:
    scheduler = make(chunk=64)
    prefix = own(1, 40)
    first = add(scheduler, "first", prefix + own(2, 3))
    second = add(scheduler, "second", prefix + own(3, 3))
    other = add(scheduler, "other", own(4, 5))
    assert step(scheduler) == {"first": (0, 43), "other": (0, 5)}  # the second waits for the pages that the first computes
    assert step(scheduler) == {"first": (43, 1), "other": (5, 1), "second": (40, 3)}
    assert second.pages[:10] == first.pages[:10]
    assert (first.cached_tokens, second.cached_tokens, other.cached_tokens) == (0, 40, 0)


def test_what_waits_for_a_prefix_goes_on_when_its_maker_leaves() -> None:
    scheduler = make(chunk=16)
    prefix = own(1, 40)
    add(scheduler, "first", prefix)
    second = add(scheduler, "second", prefix)
    assert step(scheduler) == {"first": (0, 16)}
    assert step(scheduler) == {"first": (16, 16)}
    scheduler.abort("first", ABORTED)
    assert step(scheduler) == {"second": (32, 8)}
    assert second.cached_tokens == 32


def test_what_waits_for_a_prefix_starts_where_the_two_part() -> None:
    scheduler = make(chunk=40)
    add(scheduler, "first", own(1, 200))
    add(scheduler, "second", own(1, 60) + own(2, 100))
    assert [step(scheduler) for _ in range(2)] == [{"first": (0, 40)}, {"first": (40, 40)}]
    assert step(scheduler) == {"second": (60, 10), "first": (80, 30)}


def test_what_waits_for_a_prefix_keeps_its_place() -> None:
    scheduler = make(20)
    add(scheduler, "first", own(1, 43))
    add(scheduler, "second", own(1, 43))
    add(scheduler, "large", own(3, 70))
    assert step(scheduler) == {"first": (0, 43)}
    assert step(scheduler) == {"first": (43, 1), "second": (40, 3)}


def test_nobody_waits_for_a_prefix_when_the_cache_is_off() -> None:
    scheduler = make(enabled=False)
    for name in ("first", "second"):
        add(scheduler, name, own(1, 20))
    assert step(scheduler) == {"first": (0, 20), "second": (0, 20)}


def test_n_identical_prompts_are_computed_once() -> None:
    scheduler = make()
    requests = [add(scheduler, str(number), own(1, 33)) for number in range(5)]
    assert step(scheduler) == {"0": (0, 33)}
    assert step(scheduler) == {"0": (33, 1), **{str(number): (32, 1) for number in range(1, 5)}}
    assert [request.cached_tokens for request in requests] == [0, 32, 32, 32, 32]
    assert scheduler.allocator.num_free == 100 - 8 - 5  # eight shared pages, and for each its own last one
    assert (scheduler.counters.prompt_tokens, scheduler.counters.cached_tokens) == (165, 128)


def test_an_answer_can_be_the_prefix_of_the_next_prompt() -> None:
    scheduler = make()
    first = add(scheduler, "first", own(1, 6), max_tokens=4)
    while scheduler.has_work:
        step(scheduler)
    second = add(scheduler, "second", [*first.tokens, 5, 6])
    step(scheduler)
    assert second.cached_tokens == 8  # the last answer token was never computed, and 9 tokens fill two pages


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make()
    add(scheduler, "first", own(1, 8), max_tokens=1)
    step(scheduler)
    add(scheduler, "second", own(1, 8))
    assert step(scheduler) == {"second": (4, 4)}


@pytest.mark.parametrize(("start", "cached"), [(0, 0), (1, 0), (4, 0), (5, 4), (12, 8), (13, 12), (40, 12)])
def test_prompt_logprobs_bound_what_comes_from_the_cache(start: int, cached: int) -> None:
    scheduler = make()
    add(scheduler, "first", own(1, 16), max_tokens=1)
    step(scheduler)
    request = add(scheduler, "second", own(1, 16), max_tokens=1, prompt_logprobs=0, prompt_logprobs_start=start)
    batch = scheduler.schedule()
    assert batch is not None
    assert spans(batch) == {"second": (cached, 16 - cached)}
    # Position p is predicted by the logits of p - 1, and nothing predicts the first.
    assert list(request.scored_positions(cached, 16 - cached)) == list(range(max(start - 1, 0), 15))


def test_a_cap_on_evictable_tokens_holds_after_every_step() -> None:
    scheduler = make(max_evictable_tokens=10)
    for number in range(4):
        add(scheduler, str(number), own(number, 20), max_tokens=number + 1)
    while scheduler.has_work:
        step(scheduler)
        assert scheduler.cache.num_evictable_pages <= 2
    assert scheduler.cache.num_evictable_pages == 2


def test_output_that_is_not_a_number_is_not_shared() -> None:
    scheduler = make()
    bad = add(scheduler, "bad", own(1, 20))
    step(scheduler, token=-1)
    assert bad.finish is not None
    assert (bad.finish.type, bad.finish.status_code, bad.num_generated) == ("abort", 500, 0)
    assert "not a number" in bad.finish.message
    assert scheduler.allocator.num_free == 100
    again = add(scheduler, "again", own(1, 20))
    step(scheduler)
    assert again.cached_tokens == 0
