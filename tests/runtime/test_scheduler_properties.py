"""Proves that no sequence of adds, aborts, steps and flushes loses, leaks or wrongly shares a page, stalls a request or loses a token.

Every step is "computed" into a shadow of the KV pool when it is launched: what a slot holds is named by all the tokens up to its position.
The scheduler hears of a step's tokens at once or, with `overlap`, when the next is launched; with several batches under way, when as many
have been launched.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random
from typing import Literal

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from octavo.runtime.admission import EngineLimits, admit
from octavo.runtime.batch import Batch, BatchRow
from octavo.runtime.errors import RequestRefused
from octavo.runtime.outputs import FinishReason
from octavo.runtime.page_allocator import PageAllocator
from octavo.runtime.radix_cache import RadixCache
from octavo.runtime.request import Request
from octavo.runtime.sampling_params import SamplingParams
from octavo.runtime.scheduler import QueueFull, Scheduler, SchedulerLimits

VOCABULARY = 8
NAN = -1
STOP = 7
ABORTED = FinishReason("abort", message="the caller went away", status_code=499)
CONTEXT_LENGTH = 300
STEMS = [[(position * position + stem) % 7 for position in range(CONTEXT_LENGTH)] for stem in (0, 0, 3)]
STEMS[1][40:] = [6] * (CONTEXT_LENGTH - 40)  # parts from the first stem inside a page, whatever the page size

TOKENS = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0, 1, 2, STOP]), min_size=1, max_size=6)
LENGTHS = st.one_of(st.integers(0, 40), st.integers(0, 250))


@dataclass
class Shadow:
    """What the test knows of a request without asking the scheduler: `tokens` as the device has them, those not told yet included."""

    request: Request
    tokens: list[int]
    is_over: bool = False  # a launched step has ended it, whether or not the scheduler knows
    scored: set[int] = field(default_factory=set)


@dataclass
class Flight:
    """A launched step that the scheduler has not heard of yet."""

    batch: Batch
    sampled: list[int]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        page_size=st.sampled_from([1, 4, 16]),
        num_pages=st.integers(2, 30),
        enabled=st.booleans(),
        cap=st.sampled_from([None, None, 0, 10, 64]),
        overlap=st.booleans(),
        limits=st.builds(
            SchedulerLimits,
            max_running_requests=st.sampled_from([1, 2, 4, 100]),
            max_queued_requests=st.sampled_from([None, None, 3]),
            chunk_tokens=st.sampled_from([1, 5, 32, 64, 1000]),
            mixed_chunk_tokens=st.sampled_from([1, 8, 64]),
            policy=st.sampled_from(["fcfs", "lpm"]),
            num_batches=st.sampled_from([1, 1, 2, 3]),
        ),
    )
    def start(self, page_size: int, num_pages: int, enabled: bool, cap: int | None, overlap: bool, limits: SchedulerLimits) -> None:
        self.page_size = page_size
        self.ahead = limits.num_batches - 1 or int(overlap)
        self.flights: deque[Flight] = deque()
        self.allocator = PageAllocator(num_pages)
        self.cache = RadixCache(page_size, self.allocator.free, max_evictable_tokens=cap, enabled=enabled)
        self.cap = cap
        self.scheduler = Scheduler(self.allocator, self.cache, limits)
        self.limits = EngineLimits(CONTEXT_LENGTH, num_pages * page_size, VOCABULARY)
        self.kv: dict[tuple[int, int], int] = {}  # (page, slot) -> name of the prefix that ends there
        self.live: dict[str, Shadow] = {}
        self.work = 0
        self.num_added = 0

    # -- rules -------------------------------------------------------------------------------------------------------

    @rule(
        stem=st.integers(0, 2),
        length=LENGTHS,
        tail=st.lists(st.integers(0, 6), max_size=3),
        max_tokens=st.sampled_from([0, 1, 2, 9, 60, 10_000]),
        min_tokens=st.sampled_from([0, 0, 3]),
        stops=st.sampled_from([frozenset(), frozenset({STOP})]),
        namespace=st.sampled_from(["", "", "", "tenant"]),
        priority=st.sampled_from([0, 0, 0, 1, -1]),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        logprobs_start=st.sampled_from([0, 1, 18, 60]),
        copies=st.sampled_from([1, 1, 1, 2, 3]),
    )
    def add(
        self,
        stem: int,
        length: int,
        tail: list[int],
        max_tokens: int,
        min_tokens: int,
        stops: frozenset[int],
        namespace: str,
        priority: int,
        prompt_logprobs: int | None,
        logprobs_start: int,
        copies: int,
    ) -> None:
        prompt = STEMS[stem][:length] + tail
        params = SamplingParams(
            max_tokens=max_tokens,
            min_tokens=min(min_tokens, max_tokens),
            prompt_logprobs=prompt_logprobs,
            prompt_logprobs_start=logprobs_start,
        )
        for _ in range(copies):
            try:
                allowed = admit(prompt, params, self.limits)
            except RequestRefused:
                assert len(prompt) == 0 or len(prompt) + min(1, max_tokens) > min(CONTEXT_LENGTH, self.limits.max_total_tokens)
                return
            name = f"r{self.num_added}"
            request = Request(name, len(prompt), list(prompt), params, allowed, stops, namespace=namespace, priority=priority)
            bound = self.scheduler.limits.max_queued_requests
            room = bound is None or len(self.scheduler.waiting) < bound
            try:
                self.scheduler.add(request)
            except QueueFull:
                assert not room
                return
            assert room
            self.live[name] = Shadow(request, list(prompt))
            self.num_added += 1
            self.work += len(prompt) + allowed

    @rule(number=st.integers(0, 50))
    def abort(self, number: int) -> None:
        name = f"r{number % (self.num_added + 1)}"
        request = self.scheduler.abort(name, ABORTED)
        assert (request is None) == (name not in self.live)
        if request is not None:
            assert request is self.live.pop(name).request
            assert request.finish is ABORTED
            self.check_let_go(request)

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert self.cache.num_evictable_pages == 0

    @rule(tokens=TOKENS, not_a_number=st.sampled_from([False, False, False, True]))
    def step(self, tokens: list[int], not_a_number: bool) -> None:
        """One step; the rows sample `tokens` in turn, or the last of them is not a number."""
        had_work = self.scheduler.has_work
        several = self.scheduler.limits.num_batches > 1
        decoding = [r for r in self.scheduler.running if (r.has_next or several) and not r.is_prefilling]
        retractions = self.scheduler.counters.retractions
        prompts = sum(request.is_prefilling for request in self.scheduler.running) + len(self.scheduler.waiting)
        batch = self.scheduler.schedule()
        if batch is None:
            assert self.flights or not had_work, "something waits, and nothing runs"
            self.land()
            return
        self.scheduler.check_integrity()
        retracted = self.scheduler.counters.retractions > retractions
        self.check_rows(batch, decoding, prompts, retracted=retracted)
        sampling = [row for row in batch.rows if row.samples]
        sampled = [tokens[at % len(tokens)] for at in range(len(sampling))]
        if not_a_number and sampled:
            sampled[-1] = NAN
        self.write(batch, {row.request.request_id: token for row, token in zip(sampling, sampled, strict=True)})
        self.scheduler.launch(batch)
        self.flights.append(Flight(batch, sampled))
        if len(self.flights) > self.ahead:
            self.land()

    def land(self) -> None:
        """Tell the scheduler what the first step in flight sampled."""
        if not self.flights:
            return
        flight = self.flights.popleft()
        finishes = {}
        tokens = iter(flight.sampled)
        for row in flight.batch.rows:
            token = next(tokens) if row.samples else None
            shadow = self.live.get(row.request.request_id)
            if shadow is not None and shadow.request is row.request:
                finishes[row.request.request_id] = self.finish_of(row.request, token)
        ended = self.scheduler.commit(flight.batch, flight.sampled)
        self.check_outcome(flight.batch, finishes, ended)

    @rule()
    def find_no_memory(self) -> None:
        """A step that could not be launched: what was launched before it lands, and it is cut. With stages that ends the engine."""
        if self.scheduler.limits.num_batches > 1:
            return
        batch = self.scheduler.schedule()
        self.land()
        if batch is not None and batch.num_tokens > 1:
            assert self.scheduler.relieve(batch) is None
        self.scheduler.check_integrity()

    @rule(count=st.integers(2, 12), tokens=TOKENS)
    def steps(self, count: int, tokens: list[int]) -> None:
        for at in range(count):
            self.step(tokens[at % len(tokens) :] + tokens, False)
            self.state_is_sound()

    # -- what must hold ------------------------------------------------------------------------------------------------

    def check_rows(self, batch: Batch, decoding: list[Request], prompts: int, *, retracted: bool) -> None:
        rows = {row.request.request_id: row for row in batch.rows}
        assert len(rows) == len(batch.rows), "two rows of one request"
        assert len(self.scheduler.running) <= self.scheduler.limits.max_running_requests
        limits = self.scheduler.limits
        in_step = sum(request.request_id in rows for request in decoding)
        if limits.num_batches == 1:
            for request in decoding:
                assert request.request_id in rows or request in self.scheduler.waiting, "a decoding request was left out of a step"
        else:
            assert all(row.request.num_awaited == 0 for row in batch.rows), "a batch has a request of another one under way"
            ready = sum(request.num_awaited == 0 and request.has_next for request in decoding)
            assert retracted or in_step == min(ready, -(-len(decoding) // limits.num_batches))
        prompt_tokens = batch.num_tokens - in_step
        assert prompt_tokens <= limits.chunk_tokens
        if not retracted:  # what was retracted counted when the budget was made
            decodes = in_step or int(limits.num_batches > 1 and len(decoding) > 0)
            assert prompt_tokens <= limits.prompt_tokens(decoding=decodes, prompts=prompts)
        holders: dict[int, int] = {}
        for request in self.scheduler.running:
            for page in request.pages:
                holders[page] = holders.get(page, 0) + 1
        in_tree = {page for node in self.cache.nodes() for page in node.pages}
        for row in batch.rows:
            self.check_row(row, holders, in_tree)

    def check_row(self, row: BatchRow, holders: dict[int, int], in_tree: set[int]) -> None:
        request, size = row.request, self.page_size
        shadow = self.live[request.request_id]
        assert request in self.scheduler.running
        assert request.tokens == shadow.tokens[: len(request.tokens)]
        assert len(request.tokens) + request.num_awaited == len(shadow.tokens)
        end = row.start + row.count
        assert row.start == request.num_launched
        if not self.ahead:
            assert (request.num_awaited, request.num_launched) == (0, request.num_computed)
        assert row.count >= 1
        assert end <= len(shadow.tokens) <= len(request.pages) * size + (0 if row.samples else len(shadow.tokens))
        assert end <= len(request.pages) * size, "a row has no page for its tokens"
        assert row.samples == (end == len(shadow.tokens))
        for page in request.pages[row.start // size : -(-end // size)]:
            assert page not in in_tree, "a row writes into a page of the tree"
            assert holders[page] == 1, "a row writes into a page of another request"
        names = self.names(shadow)
        for position in range(0 if shadow.is_over else row.start):
            held = self.kv.get((request.pages[position // size], position % size))
            assert held == names[position], f"{request.request_id} would read another prefix at position {position}"
        shadow.scored.update(request.scored_positions(row.start, row.count))

    def names(self, shadow: Shadow) -> list[int]:
        """For each position, a number that stands for the namespace and all tokens up to it."""
        names, name = [], hash(shadow.request.namespace)
        for token in shadow.tokens:
            name = hash((name, token))
            names.append(name)
        return names

    def write(self, batch: Batch, outcome: dict[str, int]) -> None:
        """Fill the shadow pool as the model would; a row whose output is not a number leaves what nobody may read.

        So does one that follows a token which ends its request.
        """
        for row in batch.rows:
            shadow = self.live[row.request.request_id]
            names = self.names(shadow)
            token = outcome.get(row.request.request_id)
            fit = token != NAN and not shadow.is_over
            if token is not None and row.request.max_tokens > 0:
                shadow.tokens.append(token)
            shadow.is_over |= token == NAN or self.ends(shadow)
            for position in range(row.start, row.start + row.count):
                self.kv[row.request.pages[position // self.page_size], position % self.page_size] = names[position] if fit else 0

    def check_outcome(self, batch: Batch, finishes: dict[str, str | None], ended: list[Request]) -> None:
        for row in batch.rows:
            request = row.request
            if request.request_id not in finishes:
                continue
            shadow = self.live[request.request_id]
            finish = finishes[request.request_id]
            assert request.tokens == shadow.tokens[: len(request.tokens)]
            assert (request.finish and request.finish.type) == finish
            assert (request in ended) == (finish is not None)
            if finish in ("stop", "length") and request.params.prompt_logprobs is not None:
                start = max(request.params.prompt_logprobs_start - 1, 0)
                assert shadow.scored >= set(range(start, request.prompt_length - 1)), "a prompt log-probability was never computed"
            if finish is None:
                if row.life == request.num_retractions:
                    assert request.num_computed == row.start + row.count
                assert len(request.tokens) + request.num_awaited == len(shadow.tokens)
            else:
                del self.live[request.request_id]
                self.check_let_go(request)

    def ends(self, shadow: Shadow) -> bool:
        """Whether the newest token ends the request."""
        request, generated = shadow.request, len(shadow.tokens) - shadow.request.prompt_length
        stops = generated > 0 and shadow.tokens[-1] in request.stop_token_ids and generated >= request.params.min_tokens
        return stops or generated == request.max_tokens > 0

    def finish_of(self, request: Request, token: int | None) -> str | None:
        """How the request must stand once the scheduler has taken in `token`, worked out anew."""
        if token is None:
            return None
        if token == NAN:
            return "abort"
        if request.max_tokens == 0:
            return "length"
        generated = len(request.tokens) + 1 - request.prompt_length
        if token in request.stop_token_ids and generated >= request.params.min_tokens:
            return "stop"
        return "length" if generated == request.max_tokens else None

    def check_let_go(self, request: Request) -> None:
        assert request.finish is not None
        assert request not in self.scheduler.running
        assert request not in self.scheduler.waiting
        assert len(request.pages) == 0
        assert request.node is None
        if request.cached_tokens is not None:
            assert request.cached_tokens <= request.num_cacheable or request.num_generated > 0
            assert request.cached_tokens % self.page_size == 0
            assert request.cached_tokens < request.prompt_length

    @invariant()
    def state_is_sound(self) -> None:
        self.scheduler.check_integrity()
        assert {request.request_id for request in self.scheduler.requests} == set(self.live)
        assert len(self.scheduler.running) + len(self.scheduler.waiting) == len(self.live)
        if self.cap is not None:
            assert self.cache.num_evictable_pages * self.page_size <= self.cap
        if not self.cache.enabled:
            assert list(self.cache.nodes()) == []

    def teardown(self) -> None:
        """Everything comes to an end, and every page comes back."""
        if not hasattr(self, "scheduler"):
            return
        bound = self.work * (1 + len(self.live)) + 1  # the first in rank moves on by a token a step, however often others are retracted
        while (self.scheduler.has_work or self.flights) and bound > 0:
            bound -= 1
            self.step([0, 1, 2, 3], False)
            self.scheduler.check_integrity()
        assert not self.live, "a request never ends"
        self.cache.flush()
        self.scheduler.check_integrity()
        assert self.allocator.num_free == self.allocator.num_pages


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(stateful_step_count=25)


@pytest.mark.parametrize(
    ("overlap", "batches"), [(False, 1), (True, 1), (False, 2), (False, 3)], ids=["in turn", "overlap", "two", "three"]
)
@pytest.mark.parametrize("policy", ["fcfs", "lpm"])
def test_a_crowd_on_a_small_pool(policy: Literal["fcfs", "lpm"], overlap: bool, batches: int) -> None:
    """Hypothesis seldom fills the pool for long: the same machine, driven by a plain generator that does."""
    retractions = cached = partial = 0
    for seed in range(20):
        random = Random(seed)
        machine = SchedulerMachine()
        size = random.choice([1, 4, 16])
        chunk, mixed = random.choice([5, 32, 64, 200]), random.choice([1, 8, 32])
        limits = SchedulerLimits(random.choice([3, 8, 100]), None, chunk, mixed, policy, batches)
        machine.start(
            size, random.randint(160 // size // 2, 320 // size), random.random() < 0.8, random.choice([None, None, 0, 40]), overlap, limits
        )
        for _ in range(70):
            if random.random() < 0.35:
                stops = random.choice([frozenset[int](), frozenset({STOP})])
                machine.add(
                    random.randint(0, 2),
                    random.choice([3, 17, 40, 64, 120]),
                    [random.randint(0, 6) for _ in range(random.randint(0, 2))],
                    random.choice([0, 1, 20, 60, 200]),
                    random.choice([0, 0, 3]),
                    stops,
                    random.choice(["", "", "tenant"]),
                    random.choice([0, 0, 0, 1, -1]),
                    random.choice([None, None, None, 0]),
                    random.choice([0, 1, 18, 60]),
                    random.choice([1, 1, 2, 3]),
                )
            elif random.random() < 0.06:
                machine.abort(random.randint(0, 50))
            elif seed % 4 == 0 and random.random() < 0.03:
                machine.find_no_memory()
            else:
                machine.step([random.choice([0, 1, 2, 3, STOP]) for _ in range(6)], random.random() < 0.04)
                prefilling = sum(request.is_prefilling for request in machine.scheduler.running)
                partial = max(partial, prefilling)
            machine.state_is_sound()
        machine.teardown()
        retractions += machine.scheduler.counters.retractions
        cached += machine.scheduler.counters.cached_tokens
    assert retractions > 50
    assert cached > 1000
    assert partial > 1, "never were two prompts in progress at once"
