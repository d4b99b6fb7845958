"""Proves the scheduler's promises one by one: who runs in a step, who gives way, and how a request ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

from octavo.runtime.outputs import FinishReason
from octavo.runtime.scheduler import LPM_LIMIT, QueueFull

from .scheduling import STOP, add, make, own, step

ABORTED = FinishReason("abort", message="the caller went away", status_code=499)


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
    scheduler.launch(batch)
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
