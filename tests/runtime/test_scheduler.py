"""Proves the scheduler's promises one by one: who runs in a step, what is shared, who gives way, and how a request ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from octavo.runtime.batch import Batch
from octavo.runtime.outputs import FinishReason
from octavo.runtime.page_allocator import PageAllocator
from octavo.runtime.radix_cache import RadixCache
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.scheduler import LPM_LIMIT, QueueFull, SchedulePolicy, Scheduler, SchedulerLimits

ABORTED = FinishReason("abort", message="the caller went away", status_code=499)
STOP = 99


def make(
    num_pages: int = 100,
    *,
    page_size: int = 4,
    chunk: int = 64,
    mixed: int = 8,
    running: int = 100,
    queued: int | None = None,
    policy: SchedulePolicy = "fcfs",
    **cache: Any,
) -> Scheduler:
    allocator = PageAllocator(num_pages)
    limits = SchedulerLimits(running, queued, chunk, mixed, policy)
    return Scheduler(allocator, RadixCache(page_size, allocator.free, **cache), limits)


def add(scheduler: Scheduler, name: str, prompt: Sequence[int], max_tokens: int = 50, *, priority: int = 0, **params: Any) -> Request:
    wishes = SamplingParams(max_tokens=max_tokens, **params)
    request = Request(name, len(prompt), list(prompt), wishes, max_tokens, frozenset({STOP}), priority=priority)
    scheduler.add(request)
    return request


def step(scheduler: Scheduler, token: int = 7) -> dict[str, tuple[int, int]]:
    """Run one step in which every row samples `token`; gives (start, count) by request id."""
    batch = scheduler.schedule()
    if batch is None:
        return {}
    scheduler.check_integrity()
    scheduler.commit(batch, [token] * sum(row.samples for row in batch.rows))
    scheduler.check_integrity()
    return spans(batch)


def spans(batch: Batch) -> dict[str, tuple[int, int]]:
    return {row.request.request_id: (row.start, row.count) for row in batch.rows}


def own(number: int, length: int) -> list[int]:
    """A prompt that shares nothing with those of other numbers."""
    return [1000 * number + at for at in range(length)]


# -- who runs --------------------------------------------------------------------------------------------------------


def test_a_long_prompt_never_stalls_running_decodes() -> None:
    scheduler = make(300, chunk=64, mixed=8)
    for number in range(3):
        add(scheduler, f"stream {number}", own(number, 5))
    step(scheduler)
    long = add(scheduler, "long", own(9, 200))
    steps = 0
    while long.is_prefilling:
        ran = step(scheduler)
        steps += 1
        assert all(ran[f"stream {number}"] == (4 + steps, 1) for number in range(3))
        assert 1 <= ran["long"][1] <= 8
    assert steps == 200 // 8


def test_decoding_rows_come_first_in_a_batch() -> None:
    scheduler = make()
    add(scheduler, "stream", own(1, 5))
    step(scheduler)
    add(scheduler, "prompt", own(2, 5))
    batch = scheduler.schedule()
    assert batch is not None
    assert [(row.request.request_id, row.count, row.samples) for row in batch.rows] == [("stream", 1, True), ("prompt", 5, True)]
    assert batch.num_tokens == 6


def test_a_short_prompt_gets_past_two_long_ones() -> None:
    scheduler = make(1000, chunk=256)
    for number in (1, 2):
        add(scheduler, f"long {number}", own(number, 1000))
    short = add(scheduler, "short", own(3, 10))
    assert step(scheduler) == {"long 1": (0, 256)}
    ran = step(scheduler)
    assert ran == {"long 1": (256, 192), "long 2": (0, 64)}
    assert step(scheduler) == {"long 1": (448, 198), "long 2": (64, 48), "short": (0, 10)}
    assert short.num_generated == 1


def test_a_prompt_gets_the_whole_step_when_nobody_is_behind_it() -> None:
    scheduler = make(1000, chunk=256)
    add(scheduler, "long", own(1, 700))
    assert [step(scheduler)["long"] for _ in range(3)] == [(0, 256), (256, 256), (512, 188)]


def test_running_requests_are_bounded() -> None:
    scheduler = make(running=2)
    for number in range(3):
        add(scheduler, str(number), own(number, 3), max_tokens=2)
    assert set(step(scheduler)) == {"0", "1"}
    assert set(step(scheduler)) == {"0", "1"}
    assert set(step(scheduler)) == {"2"}


def test_the_queue_is_bounded() -> None:
    scheduler = make(queued=1)
    add(scheduler, "a", own(1, 3))
    with pytest.raises(QueueFull, match=r"1 of 1 waiting.*--max-queued-requests"):
        add(scheduler, "b", own(2, 3))
    step(scheduler)
    add(scheduler, "b", own(2, 3))


def test_an_id_in_flight_is_refused_and_free_again_afterwards() -> None:
    scheduler = make()
    add(scheduler, "a", own(1, 3), max_tokens=1)
    with pytest.raises(ValueError, match="'a' is already in flight"):
        add(scheduler, "a", own(1, 3))
    step(scheduler)
    add(scheduler, "a", own(1, 3))


def test_higher_priority_starts_first_then_earlier_arrival() -> None:
    scheduler = make(running=1)
    for name, priority in (("low", -1), ("first", 0), ("second", 0), ("high", 5)):
        add(scheduler, name, own(len(name), 3), max_tokens=1, priority=priority)
    assert [*(name for _ in range(4) for name in step(scheduler))] == ["high", "first", "second", "low"]


def test_lpm_starts_the_longest_cached_prefix_first() -> None:
    scheduler = make(policy="lpm", running=1)
    add(scheduler, "seed", own(1, 13), max_tokens=1)
    step(scheduler)
    add(scheduler, "none", own(2, 13), max_tokens=1)
    add(scheduler, "one page", own(1, 5) + own(3, 8), max_tokens=1)
    add(scheduler, "three pages", own(1, 13), max_tokens=1)
    add(scheduler, "none, but urgent", own(4, 13), max_tokens=1, priority=1)
    ran = [step(scheduler) for _ in range(4)]
    assert ran == [{"none, but urgent": (0, 13)}, {"three pages": (12, 1)}, {"one page": (4, 9)}, {"none": (0, 13)}]


def test_lpm_gives_way_to_arrival_when_too_many_wait() -> None:
    scheduler = make(policy="lpm", running=1)
    add(scheduler, "seed", own(1, 13), max_tokens=1)
    step(scheduler)
    add(scheduler, "first", own(2, 13), max_tokens=1)
    for number in range(LPM_LIMIT):
        add(scheduler, f"matches {number}", own(1, 13), max_tokens=1)
    assert list(step(scheduler)) == ["first"]


# -- what is shared ---------------------------------------------------------------------------------------------------


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


# -- who gives way ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("enabled", [True, False])
def test_a_full_pool_sends_back_the_latest_which_keeps_its_tokens(enabled: bool) -> None:
    scheduler = make(8, enabled=enabled)
    early = add(scheduler, "early", own(1, 8), max_tokens=20)
    late = add(scheduler, "late", own(2, 4), max_tokens=20)
    tokens: list[int] = []
    for number in range(60):
        before = late.num_retractions
        kept = list(late.tokens)
        step(scheduler, token=number)
        if late.num_retractions > before:
            tokens = kept
            assert late.tokens == kept
            assert (len(late.pages), late.num_computed, late in scheduler.waiting) == (0, 0, True)
        assert early.num_retractions == 0
    assert late.num_retractions >= 1
    assert late.tokens[: len(tokens)] == tokens
    assert len(tokens) > 5
    assert [request.finish and request.finish.type for request in (early, late)] == ["length", "length"]
    assert [request.num_generated for request in (early, late)] == [20, 20]
    assert late.cached_tokens == 0  # as first admitted: what it finds of its own afterwards is not the caller's gain
    scheduler.cache.flush()
    assert scheduler.allocator.num_free == 8


def test_a_full_pool_sends_back_the_lowest_priority() -> None:
    scheduler = make(8, enabled=False)
    low = add(scheduler, "low", own(1, 8), max_tokens=20, priority=-1)
    high = add(scheduler, "high", own(2, 8), max_tokens=20)
    while scheduler.has_work:
        step(scheduler)
    assert (low.num_retractions > 0, high.num_retractions) == (True, 0)


def test_a_step_that_takes_pages_back_starts_nobody() -> None:
    scheduler = make(12, page_size=1, enabled=False)
    for number in (1, 2):
        add(scheduler, str(number), own(number, 3))
    step(scheduler)
    add(scheduler, "waiting", own(3, 2), priority=1)
    ran = [step(scheduler) for _ in range(5)]
    assert [set(rows) for rows in ran] == [{"1", "2"}, {"1", "2"}, {"1", "2"}, {"1"}, {"1", "waiting"}]


def test_cached_prefixes_go_before_any_request_has_to() -> None:
    scheduler = make(8)
    add(scheduler, "old", own(1, 16), max_tokens=1)
    step(scheduler)
    assert scheduler.cache.num_evictable_pages == 4
    new = add(scheduler, "new", own(2, 20), max_tokens=12)
    while scheduler.has_work:
        step(scheduler)
    assert (new.num_generated, new.num_retractions) == (12, 0)


def test_a_prompt_that_does_not_fit_now_waits_and_keeps_its_place() -> None:
    scheduler = make(10, enabled=False)
    add(scheduler, "running", own(1, 20), max_tokens=5)
    step(scheduler)
    add(scheduler, "large", own(2, 26), max_tokens=2)
    add(scheduler, "small", own(3, 2), max_tokens=2)
    ran = [step(scheduler) for _ in range(5)]
    assert [set(rows) for rows in ran[:4]] == [{"running"}] * 4
    assert set(ran[4]) == {"large", "small"}


# -- how a request ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_abort_ends_a_request_wherever_it_is(steps: int) -> None:
    scheduler = make(chunk=16, enabled=False)
    add(scheduler, "a", own(1, 40))
    for _ in range(steps):
        step(scheduler)
    aborted = scheduler.abort("a", ABORTED)
    assert aborted is not None
    assert aborted.finish is ABORTED
    assert scheduler.abort("a", ABORTED) is None
    assert (scheduler.has_work, scheduler.allocator.num_free, scheduler.counters.aborted) == (False, 100, 1)
    scheduler.check_integrity()


def test_what_is_aborted_during_a_step_takes_no_token_of_it() -> None:
    scheduler = make()
    gone, stays = add(scheduler, "gone", own(1, 5)), add(scheduler, "stays", own(2, 5))
    batch = scheduler.schedule()
    assert batch is not None
    scheduler.abort("gone", ABORTED)
    assert scheduler.commit(batch, [3, 4]) == []
    assert (gone.num_generated, stays.tokens[-1]) == (0, 4)
    scheduler.check_integrity()


def test_no_tokens_wanted_computes_the_prompt_and_ends() -> None:
    scheduler = make(chunk=16)
    request = add(scheduler, "a", own(1, 20), max_tokens=0, prompt_logprobs=0)
    assert [step(scheduler), step(scheduler)] == [{"a": (0, 16)}, {"a": (16, 4)}]
    assert request.finish == FinishReason("length")
    assert (request.num_generated, scheduler.has_work) == (0, False)


def test_a_stop_token_counts_only_after_min_tokens() -> None:
    scheduler = make()
    patient = add(scheduler, "patient", own(1, 5), min_tokens=3)
    plain = add(scheduler, "plain", own(2, 5))
    while scheduler.has_work:
        step(scheduler, token=STOP)
    assert patient.finish == plain.finish == FinishReason("stop", matched=STOP)
    assert (patient.num_generated, plain.num_generated) == (3, 1)


def test_a_stop_token_wins_over_the_length() -> None:
    scheduler = make()
    request = add(scheduler, "a", own(1, 5), max_tokens=1)
    step(scheduler, token=STOP)
    assert request.finish == FinishReason("stop", matched=STOP)


def test_nothing_to_do_gives_no_batch() -> None:
    assert make().schedule() is None


def test_the_scheduler_needs_no_torch() -> None:
    code = "import sys, octavo.runtime.scheduler, octavo.runtime.admission; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
