"""Scheduler: who runs next, and on which pages. Plain integers: knows no tensors, no text, no sockets.

One rule covers prefill and decode: a request has `num_pending` tokens that are known but not computed, and each step
computes some of them within a budget. Requests that decode have one and go first, so a long prompt never stalls them.

A step is scheduled, launched and, when its tokens are known, committed. The next may be scheduled and launched before that, on tokens that
are awaited: steps run in order, so pages may be freed and given away while a launched step still uses them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .batch import Batch, BatchRow
from .outputs import FinishReason
from .page_allocator import PageAllocator
from .radix_cache import Match, RadixCache, RadixNode
from .request import Request

SchedulePolicy = Literal["fcfs", "lpm"]
NextPage = tuple[str, int, tuple[int, ...]]  # namespace, node and the tokens of a page that is not in the tree yet
SMALLEST_SHARE = 8  # a step's prompt tokens are not split finer than this
LPM_LIMIT = 128  # longest-prefix matching asks the tree about every waiting request, so beyond this it gives way to fcfs


@dataclass(frozen=True)
class SchedulerLimits:
    """`chunk_tokens` is the most prompt tokens a step computes.

    `num_batches` that are under way together, where there are more, divide the requests that decode: a step then has no more than an equal
    share of them, and none whose last token is not known.

    While n requests decode it is at most `max(mixed_chunk_tokens, 2 * n)` for each prompt in line: one long prompt then stretches a step to
    about three times what it would take without it, where arithmetic bounds it, and many short ones still fill the batch soon.
    """

    max_running_requests: int
    max_queued_requests: int | None
    chunk_tokens: int
    mixed_chunk_tokens: int
    policy: SchedulePolicy = "fcfs"
    num_batches: int = 1

    def prompt_tokens(self, *, decoding: int, prompts: int, paced: int | None = None) -> int:
        """Prompt tokens for a step in which `decoding` requests decode while `prompts` are being computed or wait.

        `paced`: those of a single prompt, where they are measured out.
        """
        if decoding == 0:
            return self.chunk_tokens
        if paced is not None and prompts == 1:
            return min(self.chunk_tokens, paced)
        return min(self.chunk_tokens, max(self.mixed_chunk_tokens, 2 * decoding) * prompts)


@dataclass
class SchedulerCounters:
    """Totals since the start, in tokens or requests."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: int = 0
    aborted: int = 0
    retractions: int = 0


class QueueFull(RuntimeError):
    """The waiting queue is at its bound."""


class Scheduler:
    """Owns the waiting queue, the running list and, through allocator and tree, every page."""

    def __init__(self, allocator: PageAllocator, cache: RadixCache, limits: SchedulerLimits) -> None:
        self.allocator = allocator
        self.cache = cache
        self.limits = limits
        self.paced_tokens: int | None = None  # of a prompt that is alone beside decoding requests; None: by the limits
        self.counters = SchedulerCounters()
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._requests: dict[str, Request] = {}
        self._arrivals = 0
        self._lift_limits()

    # -- requests in and out ---------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request. Raises QueueFull, or ValueError for an id that is already here."""
        bound = self.limits.max_queued_requests
        if bound is not None and len(self.waiting) >= bound:
            raise QueueFull(
                f"the request queue is full ({len(self.waiting)} of {bound} waiting): try again later or raise --max-queued-requests"
            )
        if request.request_id in self._requests:
            raise ValueError(f"request id {request.request_id!r} is already in flight")
        if not self.has_work:
            self._lift_limits()
        self._arrivals += 1
        request.arrival = self._arrivals
        self._requests[request.request_id] = request
        self._enqueue(request)

    def abort(self, request_id: str, finish: FinishReason) -> Request | None:
        """End a request now, wherever it is. None when it is not here (already finished, or never came)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        self._end(request, finish)
        self.counters.aborted += finish.type == "abort"
        return request

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def requests(self) -> Sequence[Request]:
        return list(self._requests.values())

    # -- one step --------------------------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Choose the rows of the next step and give them pages. None when nothing can or need run."""
        rows: list[BatchRow] = []
        retractions = self.counters.retractions
        decoding: list[Request] = []
        prefilling: list[Request] = []
        for request in self.running:
            if request.has_next:
                (prefilling if request.is_prefilling else decoding).append(request)
        others_decode = False
        if self.limits.num_batches > 1:
            others_decode = any(not request.is_prefilling for request in self.running)
            decoding = self._share_of(decoding)
        page_size = self.cache.page_size
        for request in decoding:
            if request.num_launched < len(request.pages) * page_size:  # most of the time: nothing is to be found for it
                rows.append(BatchRow(request, request.num_launched, 1, True, request.num_retractions))
            else:
                self._grant(rows, request, 1)
        num_decoding = len(rows) or int(others_decode)
        budget = self.limits.prompt_tokens(decoding=num_decoding, prompts=len(prefilling) + len(self.waiting), paced=self.paced_tokens)
        self._compute_prompts(rows, prefilling, min(budget, self._most_prompt_tokens), retractions)
        rows = [row for row in rows if row.request.is_running]  # a later row may have taken an earlier one's pages
        return Batch(tuple(rows)) if rows else None

    def _share_of(self, decoding: list[Request]) -> list[Request]:
        """Those that this step decodes, so that as many are left for the other batches."""
        total = sum(not request.is_prefilling for request in self.running)
        ready = [request for request in decoding if request.num_awaited == 0]
        return ready[: -(-total // self.limits.num_batches)]

    def _lift_limits(self) -> None:
        self._most_running = self.limits.max_running_requests  # both smaller while the device is short of memory: see `relieve`
        self._most_prompt_tokens = self.limits.chunk_tokens

    def relieve(self, batch: Batch) -> Request | None:
        """Make steps half as large, because the device had no memory for this one, until all work is done. It was not launched.

        Requests that came last go back to the queue. Gives the request that finds no memory even alone and token by token.
        """
        if len(batch.rows) == batch.num_tokens == 1:
            self._lift_limits()
            return batch.rows[0].request if batch.rows[0].request.finish is None else None
        self._most_running = max(1, len(self.running) // 2)
        self._most_prompt_tokens = max(1, min(self._most_prompt_tokens, batch.num_tokens) // 2)
        while len(self.running) > self._most_running:
            self._retract(max(self.running, key=lambda r: (-r.priority, r.arrival)))
        return None

    def launch(self, batch: Batch) -> None:
        """Take note that a step is on its way. Every launched step is committed, in the order in which they were launched."""
        place = 0
        for row in batch.rows:
            request = row.request
            request.num_launched = row.start + row.count
            if row.samples:
                if request.max_tokens > 0:
                    request.num_awaited += 1
                    request.awaited_row = place
                place += 1

    def commit(self, batch: Batch, tokens: Sequence[int]) -> list[Request]:
        """Take in a computed step: `tokens` holds the sampled token of each row that samples, in order. Gives the requests that ended.

        A token of -1 means that the model's output for the row was not a number; the request is aborted. A request that was retracted
        after the launch takes its token and computes it anew.
        """
        sampled = iter(tokens)
        ended: list[Request] = []
        for row in batch.rows:
            request = row.request
            token = next(sampled) if row.samples else None
            if request.finish is not None:
                continue
            if token is not None and token < 0:  # what this step wrote is not fit to share, so it does not count as computed
                finish = FinishReason("abort", message="the model's output was not a number (NaN)", status_code=500)
                self._finish(request, finish, ended)
                continue
            if row.life == request.num_retractions:
                request.num_computed = row.start + row.count
                if request.num_computed <= request.prompt_length or row.count > 1:
                    self._share_pages(request)
            if token is None:
                continue
            if request.max_tokens == 0:
                self._finish(request, FinishReason("length"), ended)
                continue
            request.num_awaited -= 1
            request.tokens.append(token)
            self.counters.generated_tokens += 1
            if (reason := request.finish_after(token)) is not None:
                self._finish(request, reason, ended)
        self.cache.trim()
        return ended

    def check_integrity(self) -> None:
        """Raises AssertionError when a page is lost, doubly held, or a lock does not fit."""
        self.allocator.check_integrity()
        self.cache.check_integrity()
        in_tree = [page for node in self.cache.nodes() for page in node.pages]
        own = [page for request in self.running for page in request.pages[request.num_tree_pages :]]
        held = in_tree + own
        assert len(set(held)) == len(held), "a page has two owners"
        assert len(held) + self.allocator.num_free == self.allocator.num_pages, "a page is lost"
        assert all(not r.pages and r.node is None for r in self.waiting), "a waiting request holds pages"
        locks = sum(node.locks for node in self.cache.nodes())
        expected = 0
        for request in self.running:
            node = request.node
            while node is not None and node.parent is not None:
                expected += 1
                node = node.parent
        assert locks == expected, "locks do not fit the running requests"

    # -- prompts ---------------------------------------------------------------------------------------------------

    def _compute_prompts(self, rows: list[BatchRow], prefilling: Sequence[Request], budget: int, retractions: int) -> None:
        """Spend the step's prompt tokens, first on `prefilling`, then on those that wait.

        A prompt that cannot end in this step leaves a quarter of it to those behind, so that short prompts get past long ones.
        """
        long: list[tuple[Request, int]] = []
        for request in prefilling:
            if not request.is_running:
                continue
            if request.num_pending <= budget:
                budget -= self._grant(rows, request, request.num_pending)
            elif budget > 0:
                left = budget // 4 if budget >= 4 * SMALLEST_SHARE else 0
                long.append((request, budget - left))
                budget = left
        if self.counters.retractions == retractions:  # else the requests that just left would come back at once
            budget = self._admit(rows, budget)
        for request, share in long:
            budget += share
            budget -= self._grant(rows, request, min(budget, request.num_pending))

    def _grant(self, rows: list[BatchRow], request: Request, count: int) -> int:
        """Give `request` a row of `count` tokens if it still runs and finds pages for them. Gives the tokens granted."""
        if not request.is_running or not self._make_room(request, count):
            return 0
        rows.append(self._row(request, count))
        return count

    def _admit(self, rows: list[BatchRow], budget: int) -> int:
        """Start waiting requests while tokens, places and pages last. Gives the tokens left."""
        if not self.waiting or budget == 0 or len(self.running) >= self._most_running:
            return budget
        page_size = self.cache.page_size
        self._sort_waiting()
        in_progress = {self._page_after(r, r.node, r.num_tree_pages): r for r in self.running if r.will_share}
        committed = sum(self._pages_short(r, r.num_pending) for r in self.running)
        held_back: list[Request] = []
        while self.waiting and budget > 0 and len(self.running) < self._most_running:
            request = self.waiting[0]
            if request.num_awaited > 0 and self.limits.num_batches > 1:
                break  # it was retracted, and its token is still under way: the next step has it
            if self._follows(request):
                held_back.append(self.waiting.popleft())
                continue
            match = self._match(request)
            start = len(match.pages) * page_size
            upcoming = self._page_after(request, match.node, len(match.pages))
            if self.cache.enabled and upcoming in in_progress and start + page_size <= request.num_cacheable:
                # Another request is computing this very page: it will be in the tree after that step, so wait and share it.
                request.leader, request.num_followed = in_progress[upcoming], start + page_size
                held_back.append(self.waiting.popleft())
                continue
            self.cache.lock(match.node)
            need = -(-len(request.tokens) // page_size) - len(match.pages)
            spare = len(self.running) + 1  # a page each to go on decoding with
            if self.running and need + committed + spare > self.allocator.num_free + self.cache.num_evictable_pages:
                self.cache.unlock(match.node)
                break
            self.waiting.popleft()
            self._start(request, match)
            count = min(budget, request.num_pending)
            if not self._grant(rows, request, count):
                break
            budget -= count
            committed += self._pages_short(request, request.num_pending)
            if request.num_pending > count or count > 1:
                in_progress[upcoming] = request
        self.waiting.extendleft(reversed(held_back))
        return budget

    def _follows(self, request: Request) -> bool:
        """Whether the leader still computes pages that `request` will share. Compares what is new only: cheaper than a match."""
        leader, known = request.leader, request.num_followed
        if leader is None:
            return False
        upcoming = (leader.num_tree_pages + 1) * self.cache.page_size
        in_time = leader.is_running and leader.will_share and upcoming <= request.num_cacheable
        if not in_time or request.tokens[known:upcoming] != leader.tokens[known:upcoming]:
            request.leader = None
            return False
        request.num_followed = max(known, upcoming)
        return True

    def _match(self, request: Request) -> Match:
        """What the tree has of a request, but for what must be computed because its logits are needed."""
        return self.cache.match(request.namespace, request.tokens[: request.num_cacheable])

    def _start(self, request: Request, match: Match) -> None:
        """Move a request to the running list on top of a matched prefix whose node is locked already."""
        request.node = match.node
        request.pages.extend(match.pages)
        request.num_tree_pages = len(match.pages)
        request.num_computed = request.num_launched = len(match.pages) * self.cache.page_size
        if request.cached_tokens is None:
            request.cached_tokens = request.num_computed
            self.counters.cached_tokens += request.num_computed
            self.counters.prompt_tokens += request.prompt_length
        self.running.append(request)

    def _sort_waiting(self) -> None:
        if self.limits.policy != "lpm":
            return
        if len(self.waiting) > LPM_LIMIT:
            self.waiting = deque(sorted(self.waiting, key=lambda r: (-r.priority, r.arrival)))
        elif len(self.waiting) > 1:
            by_match = sorted(self.waiting, key=lambda r: (-r.priority, -r.num_retractions, -self._num_matched(r), r.arrival))
            self.waiting = deque(by_match)

    def _num_matched(self, request: Request) -> int:
        """Pages of `request` in the tree."""
        if request.leader is not None and self._follows(request):
            return request.leader.num_tree_pages
        return len(self._match(request).pages)

    def _enqueue(self, request: Request) -> None:
        """Keep the queue in order of priority, then arrival: a retracted request so comes back before those that came later."""
        rank = (-request.priority, request.arrival)
        at = len(self.waiting)
        while at > 0 and (-self.waiting[at - 1].priority, self.waiting[at - 1].arrival) > rank:
            at -= 1
        self.waiting.insert(at, request)

    def _page_after(self, request: Request, node: RadixNode | None, num_pages: int) -> NextPage:
        """Names the page that follows the first `num_pages` of a request, which end at `node`."""
        start = num_pages * self.cache.page_size
        return request.namespace, id(node), tuple(request.tokens[start : start + self.cache.page_size])

    # -- pages -------------------------------------------------------------------------------------------------------

    def _row(self, request: Request, count: int) -> BatchRow:
        return BatchRow(request, request.num_launched, count, samples=count == request.num_pending, life=request.num_retractions)

    def _pages_short(self, request: Request, count: int) -> int:
        return max(0, -(-(request.num_launched + count) // self.cache.page_size) - len(request.pages))

    def _make_room(self, request: Request, count: int) -> bool:
        """Give `request` the pages for its next `count` tokens: free ones, then evicted ones, then those of requests that came later.

        False when the request itself had to go back to the queue.
        """
        short = self._pages_short(request, count)
        while short > self.allocator.num_free:
            if self.cache.evict(short - self.allocator.num_free):
                continue
            victim = max(self.running, key=lambda r: (-r.priority, r.arrival))
            self._retract(victim)
            if victim is request:
                return False
        if short:
            request.pages.extend(self.allocator.allocate(short))
        return True

    def _share_pages(self, request: Request) -> None:
        """Put the full pages of what is computed into the tree, and take the tree's pages where it had them already."""
        full = request.num_computed // self.cache.page_size
        if not self.cache.enabled or full <= request.num_tree_pages:
            return
        shared = self.cache.insert(request.namespace, request.tokens[: full * self.cache.page_size], request.pages[:full])
        self.cache.lock(shared.node)
        if request.node is not None:
            self.cache.unlock(request.node)
        duplicates = [own for own, tree in zip(request.pages[:full], shared.pages, strict=True) if own != tree]
        request.pages[:full] = type(request.pages)("i", shared.pages)
        request.node, request.num_tree_pages = shared.node, full
        self.allocator.free(duplicates)

    def _release(self, request: Request) -> None:
        """Leave the running list: computed full pages stay in the tree, unlocked; the rest become free."""
        self.running.remove(request)
        self._share_pages(request)
        if request.node is not None:
            self.cache.unlock(request.node)
        self.allocator.free(request.pages[request.num_tree_pages :])
        request.node, request.num_tree_pages, request.num_computed, request.num_launched = None, 0, 0, 0
        del request.pages[:]
        self.cache.trim()

    def _retract(self, request: Request) -> None:
        self._release(request)
        request.num_retractions += 1
        self.counters.retractions += 1
        self._enqueue(request)

    def _finish(self, request: Request, finish: FinishReason, ended: list[Request]) -> None:
        self._end(request, finish)
        self.counters.finished += 1
        ended.append(request)

    def _end(self, request: Request, finish: FinishReason) -> None:
        if request.is_running:
            self._release(request)
        else:
            self.waiting.remove(request)
        self._forget(request, finish)

    def _forget(self, request: Request, finish: FinishReason) -> None:
        request.finish = finish
        del self._requests[request.request_id]
