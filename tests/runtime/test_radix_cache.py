"""Proves that the radix cache holds, protects and evicts exactly what a plain table of every page-aligned prefix would."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.runtime.radix_cache import RadixCache, RadixNode

Prefix = tuple[str, tuple[int, ...]]  # namespace, and the tokens of one or more whole pages


@dataclass
class Entry:
    """The last page of a prefix in the model."""

    page: int
    used: int
    locks: int = 0


# A page is one of some runs of tokens, or differs from the first only in its last token: keys then nearly collide.
def page_tokens(kind: int, page_size: int) -> list[int]:
    return [0] * (page_size - 1) + [9] if kind == 3 else [kind] * page_size


PAGES = st.lists(st.sampled_from([0, 1, 3]), max_size=5)
NAMESPACES = st.sampled_from(["", "a"])


class RadixMachine(RuleBasedStateMachine):
    """The tree against a table that maps every page-aligned prefix to its page, time of last use and locks."""

    @initialize(page_size=st.sampled_from([1, 4, 16]), cap_pages=st.sampled_from([None, 0, 1, 4]))
    def start(self, page_size: int, cap_pages: int | None) -> None:
        self.page_size = page_size
        self.cap_pages = cap_pages
        self.released: list[int] = []
        # One token short of the next page: a cap counts whole pages.
        cap = None if cap_pages is None else (cap_pages + 1) * page_size - 1
        self.cache = RadixCache(page_size, self.released.extend, max_evictable_tokens=cap)
        self.table: dict[Prefix, Entry] = {}
        self.held: list[tuple[RadixNode, list[Prefix]]] = []
        self.clock = 0
        self.next_page = 0

    # -- the model ---------------------------------------------------------------------------------------------------

    def prefixes(self, namespace: str, tokens: list[int]) -> list[Prefix]:
        return [(namespace, tuple(tokens[:end])) for end in range(self.page_size, len(tokens) + 1, self.page_size)]

    def use(self, namespace: str, tokens: list[int]) -> list[Prefix]:
        """The held prefixes of `tokens`, marked as used now."""
        self.clock += 1
        found = [prefix for prefix in self.prefixes(namespace, tokens) if prefix in self.table]
        for prefix in found:
            self.table[prefix].used = self.clock
        return found

    def evictable(self) -> int:
        return sum(entry.locks == 0 for entry in self.table.values())

    def evict_from_model(self, count: int) -> list[int]:
        """Page by page: the least recently used one that no other prefix goes through and nobody locks."""
        gone: list[int] = []
        while len(gone) < count:
            inner = {(name, tokens[: -self.page_size]) for name, tokens in self.table}
            leaves = [(entry.used, prefix) for prefix, entry in self.table.items() if prefix not in inner and not entry.locks]
            if not leaves:
                break
            gone.append(self.table.pop(min(leaves)[1]).page)
        return gone

    def check_released(self, expected: list[int]) -> None:
        assert sorted(self.released) == sorted(expected)
        self.released.clear()

    def tokens_of(self, kinds: list[int], rest: int) -> list[int]:
        """Whole pages and an incomplete one."""
        return [token for kind in kinds for token in page_tokens(kind, self.page_size)] + [0] * min(rest, self.page_size - 1)

    # -- rules -------------------------------------------------------------------------------------------------------

    @rule(namespace=NAMESPACES, kinds=PAGES, rest=st.integers(0, 3))
    def match(self, namespace: str, kinds: list[int], rest: int) -> None:
        tokens = self.tokens_of(kinds, rest)
        found = self.use(namespace, tokens)
        assert self.cache.match(namespace, tokens).pages == [self.table[prefix].page for prefix in found]

    @rule(namespace=NAMESPACES, kinds=PAGES, rest=st.integers(0, 3), own_duplicates=st.booleans(), keep_lock=st.booleans())
    def insert(self, namespace: str, kinds: list[int], rest: int, own_duplicates: bool, keep_lock: bool) -> None:
        tokens = self.tokens_of(kinds, rest)
        held = [self.table[prefix].page for prefix in self.use(namespace, tokens)]
        fresh = list(range(self.next_page, self.next_page + len(kinds)))
        self.next_page += len(kinds)
        match = self.cache.insert(namespace, tokens, fresh if own_duplicates else held + fresh[len(held) :])
        assert match.pages == held + fresh[len(held) :]
        self.clock += 1
        for prefix, page in zip(self.prefixes(namespace, tokens), match.pages, strict=True):
            self.table.setdefault(prefix, Entry(page, self.clock))
        if keep_lock:
            self.hold(match.node, self.prefixes(namespace, tokens))

    @rule(namespace=NAMESPACES, kinds=PAGES)
    def lock(self, namespace: str, kinds: list[int]) -> None:
        tokens = self.tokens_of(kinds, 0)
        self.hold(self.cache.match(namespace, tokens).node, self.use(namespace, tokens))

    def hold(self, node: RadixNode, prefixes: list[Prefix]) -> None:
        self.cache.lock(node)
        for prefix in prefixes:
            self.table[prefix].locks += 1
        self.held.append((node, prefixes))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def unlock(self, data: st.DataObject) -> None:
        node, prefixes = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.cache.unlock(node)
        for prefix in prefixes:
            self.table[prefix].locks -= 1

    @rule(count=st.integers(0, 5))
    def evict(self, count: int) -> None:
        expected = self.evict_from_model(count)
        assert self.cache.evict(count) == len(expected)
        self.check_released(expected)

    @rule()
    def trim(self) -> None:
        over = 0 if self.cap_pages is None else max(0, self.evictable() - self.cap_pages)
        expected = self.evict_from_model(over)
        self.cache.trim()
        assert len(expected) == over
        self.check_released(expected)

    @rule()
    def flush(self) -> None:
        expected = self.evict_from_model(len(self.table))
        self.cache.flush()
        self.check_released(expected)
        assert all(entry.locks for entry in self.table.values())

    @invariant()
    def tree_equals_table(self) -> None:
        self.cache.check_integrity()
        assert not self.released
        assert self.cache.num_evictable_pages == self.evictable()
        assert self.cache.num_locked_pages == len(self.table) - self.evictable()
        pages = [page for node in self.cache.nodes() for page in node.pages]
        assert sorted(pages) == sorted(entry.page for entry in self.table.values())


TestRadixMachine = RadixMachine.TestCase


# Explicit cases, with pages of two tokens: token t fills a page as (t, t).


def twice(*tokens: int) -> list[int]:
    return [token for token in tokens for _ in range(2)]


def make_cache(**options: object) -> tuple[RadixCache, list[int]]:
    released: list[int] = []
    return RadixCache(2, released.extend, **options), released  # type: ignore[arg-type]


def test_match_inside_an_edge_splits_it() -> None:
    cache, _ = make_cache()
    cache.insert("", twice(1, 2, 3, 4), [10, 11, 12, 13])
    match = cache.match("", [*twice(1, 2), 3, 9])
    assert match.pages == [10, 11]
    assert match.node.pages == [10, 11]
    assert sorted(node.pages for node in cache.nodes()) == [[10, 11], [12, 13]]
    assert cache.match("", twice(1, 2, 3, 4)).pages == [10, 11, 12, 13]
    cache.check_integrity()


def test_first_pages_that_share_some_tokens_are_different_children() -> None:
    cache, _ = make_cache()
    cache.insert("", [1, 2], [0])
    assert cache.insert("", [1, 3], [1]).pages == [1]
    assert cache.match("", [1, 2]).pages == [0]
    assert cache.match("", [1]).pages == []


def test_insert_gives_the_trees_pages_where_it_held_them() -> None:
    cache, released = make_cache()
    cache.insert("", twice(1, 2), [10, 11])
    assert cache.insert("", twice(1, 2, 3), [20, 21, 22]).pages == [10, 11, 22]
    assert cache.insert("", twice(1), [30]).pages == [10]
    assert released == []  # duplicates stay the caller's
    assert cache.num_evictable_pages == 3


def test_locks_survive_a_split_above_them() -> None:
    cache, released = make_cache()
    locked = cache.insert("", twice(1, 2, 3), [10, 11, 12]).node
    cache.lock(locked)
    upper = cache.match("", twice(1)).node
    assert (upper.pages, upper.locks, locked.pages, locked.locks) == ([10], 1, [11, 12], 1)
    assert cache.evict(3) == 0
    cache.unlock(locked)
    cache.check_integrity()
    assert cache.evict(3) == 3
    assert sorted(released) == [10, 11, 12]


def test_a_lock_protects_the_path_and_nothing_below_or_beside_it() -> None:
    cache, released = make_cache()
    cache.insert("", twice(1, 2, 3), [10, 11, 12])
    cache.insert("", twice(1, 7), [10, 20])
    cache.lock(cache.match("", twice(1, 2)).node)
    assert cache.evict(99) == 2
    assert sorted(released) == [12, 20]
    assert cache.match("", twice(1, 2, 3)).pages == [10, 11]


def test_unlock_without_lock_is_refused() -> None:
    cache, _ = make_cache()
    node = cache.insert("", twice(1), [10]).node
    with pytest.raises(ValueError, match="unlock without lock"):
        cache.unlock(node)


def test_eviction_takes_the_end_of_a_leaf_and_leaves_the_rest_matchable() -> None:
    cache, released = make_cache()
    cache.insert("", twice(1, 2, 3, 4), [10, 11, 12, 13])
    assert cache.evict(1) == 1
    assert released == [13]
    assert cache.match("", twice(1, 2, 3, 4)).pages == [10, 11, 12]
    assert cache.evict(2) == 2
    assert cache.match("", twice(1, 2, 3, 4)).pages == [10]
    assert cache.num_evicted_pages == 3


def test_a_match_that_ends_inside_an_edge_leaves_the_rest_old() -> None:
    cache, released = make_cache()
    cache.insert("", twice(1, 2), [10, 11])
    cache.insert("", twice(5), [20])
    cache.match("", twice(1))  # page 10 is used again, page 11 is not
    assert cache.evict(1) == 1
    assert released == [11]


def test_a_match_makes_young_what_it_found() -> None:
    cache, released = make_cache()
    cache.insert("", twice(1), [10])
    cache.insert("", twice(2), [20])
    cache.match("", twice(1))
    cache.evict(1)
    assert released == [20]


def test_disabled_cache_stays_empty() -> None:
    cache, released = make_cache(enabled=False)
    match = cache.insert("", twice(1, 2), [10, 11])
    cache.lock(match.node)
    cache.unlock(match.node)
    assert match.pages == []
    assert cache.match("", twice(1, 2)).pages == []
    assert (cache.evict(5), list(cache.nodes()), released) == (0, [], [])


@pytest.mark.parametrize("cap", [0, 1])
def test_a_cap_below_one_page_keeps_nothing_unlocked(cap: int) -> None:
    cache, released = make_cache(max_evictable_tokens=cap)
    node = cache.insert("", twice(1, 2), [10, 11]).node
    cache.lock(node)
    cache.trim()
    assert released == []
    cache.unlock(node)
    cache.trim()
    assert sorted(released) == [10, 11]
    assert list(cache.nodes()) == []


def test_a_node_that_left_the_tree_changes_nothing_any_more() -> None:
    cache, released = make_cache()
    node = cache.insert("", twice(1), [10]).node
    for _ in range(3):  # the more often a leaf is unlocked, the more often it is offered for eviction
        cache.lock(node)
        cache.unlock(node)
    cache.flush()
    cache.lock(node)
    cache.unlock(node)
    cache.flush()
    cache.check_integrity()
    assert (released, cache.num_evictable_pages, cache.num_locked_pages) == ([10], 0, 0)


def test_namespaces_share_nothing() -> None:
    cache, _ = make_cache()
    cache.insert("a", twice(1), [10])
    assert cache.match("b", twice(1)).pages == []
    cache.insert("b", twice(1), [20])
    assert (cache.match("a", twice(1)).pages, cache.match("b", twice(1)).pages) == ([10], [20])


def test_what_is_used_again_and_again_takes_no_memory() -> None:
    cache, _ = make_cache()
    node = cache.insert("", twice(1), [10]).node
    for number in range(1000):
        cache.insert(f"namespace {number}", twice(1), [number + 20])
        cache.lock(node)
        cache.unlock(node)
        cache.match("", twice(1))
        assert cache.evict(1) == 1
    assert len(list(cache.nodes())) == len(cache._leaves) == len(cache._root.children) == 1


def test_integrity_check_bites() -> None:
    cache, _ = make_cache()
    node = cache.insert("", twice(1, 2), [10, 11]).node
    node.pages[1] = 10
    cache.insert("", twice(3), [10])
    with pytest.raises(AssertionError, match="twice"):
        cache.check_integrity()
    node.pages.append(11)
    with pytest.raises(AssertionError, match="differ in length"):
        cache.check_integrity()
