"""RadixCache: which pages hold which prefix. A tree over token ids in whole pages; knows nothing of what is in the pages.

RadixAttention (SGLang, arXiv:2312.07104) with pages: an edge carries tokens in multiples of the page size, and children
are told apart by the tokens of their first page. A locked node protects itself and all above it from eviction.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

PageKey = tuple[str | int, ...]  # the tokens of an edge's first page; below the root, the namespace before them


class RadixNode:
    """The end of one edge. `tokens` and `pages` are the edge's own; the prefix is those of the whole path from the root.

    `key` is its place among its parent's children.
    """

    __slots__ = ("children", "is_offered", "key", "last_access", "locks", "pages", "parent", "tokens")

    def __init__(self, parent: RadixNode | None, key: PageKey, tokens: list[int], pages: list[int]) -> None:
        self.parent = parent
        self.key = key
        self.tokens = tokens
        self.pages = pages
        self.children: dict[PageKey, RadixNode] = {}
        self.locks = 0
        self.last_access = 0
        self.is_offered = False  # stands in the cache's heap of leaves

    @property
    def is_evictable_leaf(self) -> bool:
        return self.parent is not None and not self.children and self.locks == 0


@dataclass(frozen=True)
class Match:
    """The longest cached prefix: its pages in order, and the node where it ends."""

    node: RadixNode
    pages: list[int]


class RadixCache:
    """Prefixes by (namespace, tokens). Pages in the tree belong to it; `release_pages` gets them back on eviction.

    `max_evictable_tokens` caps what may lie unlocked in the tree (None: no cap; 0: nothing stays). `enabled` False keeps the
    tree empty: nothing matches and nothing is inserted.
    """

    def __init__(
        self,
        page_size: int,
        release_pages: Callable[[list[int]], None],
        *,
        max_evictable_tokens: int | None = None,
        enabled: bool = True,
    ) -> None:
        self.page_size = page_size
        self.enabled = enabled
        self._release_pages = release_pages
        self._max_evictable_pages = None if max_evictable_tokens is None else max_evictable_tokens // page_size
        self._root = RadixNode(None, (), [], [])
        self._clock = itertools.count(1)
        self._order = itertools.count()
        self._leaves: list[tuple[int, int, RadixNode]] = []  # by age, each once; entries go stale and are checked when taken
        self.num_evictable_pages = 0
        self.num_locked_pages = 0
        self.num_evicted_pages = 0

    def match(self, namespace: str, tokens: Sequence[int]) -> Match:
        """The longest prefix of `tokens` in whole pages. Splits an edge where the match ends inside it; locks nothing."""
        node = self._root
        pages: list[int] = []
        now = next(self._clock)
        at = 0
        while (child := node.children.get(self._key(namespace, tokens, at))) is not None:
            shared = self._shared_length(child, tokens, at)
            if shared < len(child.tokens):
                child = self._split(child, shared)
            child.last_access = now
            pages += child.pages
            at += shared
            node = child
        return Match(node, pages)

    def insert(self, namespace: str, tokens: Sequence[int], pages: Sequence[int]) -> Match:
        """Make `tokens` (whole pages only; a rest is ignored) a prefix of the tree, with `pages` where it is new.

        Gives the prefix's pages as they stand in the tree afterwards. Where they differ from `pages`, the tree held that part
        before, and the caller still owns its duplicates.
        """
        found = self.match(namespace, tokens)
        count = len(tokens) // self.page_size
        held = len(found.pages)
        if not self.enabled or held >= count:
            return found
        new_tokens = list(tokens[held * self.page_size : count * self.page_size])
        new_pages = list(pages[held:count])
        leaf = RadixNode(found.node, self._key(namespace, tokens, held * self.page_size), new_tokens, new_pages)
        leaf.last_access = next(self._clock)
        found.node.children[leaf.key] = leaf
        self.num_evictable_pages += len(new_pages)
        self._offer(leaf)
        return Match(leaf, found.pages + new_pages)

    def lock(self, node: RadixNode) -> None:
        """Protect a node and its path from eviction, until as many `unlock`s."""
        for at in self._path(node):
            if at.locks == 0:
                self.num_evictable_pages -= len(at.pages)
                self.num_locked_pages += len(at.pages)
            at.locks += 1

    def unlock(self, node: RadixNode) -> None:
        for at in self._path(node):
            if at.locks <= 0:
                raise ValueError("unlock without lock")
            at.locks -= 1
            if at.locks == 0:
                self.num_evictable_pages += len(at.pages)
                self.num_locked_pages -= len(at.pages)
                self._offer(at)

    def evict(self, num_pages: int) -> int:
        """Drop least recently used leaves until `num_pages` pages are released or nothing is evictable. Gives how many were."""
        released = 0
        while released < num_pages and self._leaves:
            age, _, leaf = heapq.heappop(self._leaves)
            leaf.is_offered = False
            if not leaf.is_evictable_leaf:
                continue
            if leaf.last_access != age:
                self._offer(leaf)
                continue
            released += self._remove_leaf(leaf, num_pages - released)
        self.num_evicted_pages += released
        return released

    def trim(self) -> None:
        """Evict what lies above the cap on evictable tokens."""
        if self._max_evictable_pages is not None and self.num_evictable_pages > self._max_evictable_pages:
            self.evict(self.num_evictable_pages - self._max_evictable_pages)

    def flush(self) -> None:
        """Drop every prefix that is not locked."""
        self.evict(self.num_evictable_pages)

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the root."""
        stack = list(self._root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self) -> None:
        """Raises AssertionError when a count, a link or an invariant of the tree is broken."""
        evictable = locked = 0
        seen: set[int] = set()
        for node in self.nodes():
            assert node.parent is not None
            assert node.parent.children[node.key] is node, "a child stands under the wrong key"
            assert node.key[-self.page_size :] == tuple(node.tokens[: self.page_size]), "a key is not the edge's first page"
            assert len(node.tokens) == len(node.pages) * self.page_size > 0, "an edge's tokens and pages differ in length"
            assert node.locks >= sum(child.locks for child in node.children.values()), "a child is locked and its parent is not"
            assert not seen.intersection(node.pages), "a page stands in the tree twice"
            seen.update(node.pages)
            if node.locks:
                locked += len(node.pages)
            else:
                evictable += len(node.pages)
        assert (evictable, locked) == (self.num_evictable_pages, self.num_locked_pages), "page counts are off"

    def _key(self, namespace: str, tokens: Sequence[int], at: int) -> PageKey:
        page = tokens[at : at + self.page_size]
        return tuple(page) if at else (namespace, *page)

    def _shared_length(self, child: RadixNode, tokens: Sequence[int], at: int) -> int:
        edge, size = child.tokens, self.page_size
        limit = min(len(edge), (len(tokens) - at) // size * size)
        if list(tokens[at : at + limit]) == edge[:limit]:
            return limit
        shared = 1  # in pages: the first one is the key, and it matched. The first `shared` are equal, the first `differs` are not.
        differs = limit // size
        while differs - shared > 1:
            middle = (shared + differs) // 2
            if list(tokens[at + shared * size : at + middle * size]) == edge[shared * size : middle * size]:
                shared = middle
            else:
                differs = middle
        return shared * size

    def _split(self, node: RadixNode, length: int) -> RadixNode:
        """Cut an edge after `length` tokens; gives the new upper node. The lower node keeps its identity, so locks stay valid."""
        assert node.parent is not None
        cut = length // self.page_size
        upper = RadixNode(node.parent, node.key, node.tokens[:length], node.pages[:cut])
        upper.locks, upper.last_access = node.locks, node.last_access
        node.parent.children[node.key] = upper
        node.tokens, node.pages, node.parent = node.tokens[length:], node.pages[cut:], upper
        node.key = tuple(node.tokens[: self.page_size])
        upper.children[node.key] = node
        return upper

    def _remove_leaf(self, leaf: RadixNode, wanted_pages: int) -> int:
        """Take the end of a leaf, or all of it. Gives the pages released."""
        assert leaf.parent is not None
        keep = max(0, len(leaf.pages) - wanted_pages)
        dropped = leaf.pages[keep:]
        self.num_evictable_pages -= len(dropped)
        if keep:
            leaf.pages, leaf.tokens = leaf.pages[:keep], leaf.tokens[: keep * self.page_size]
            self._offer(leaf)
        else:
            del leaf.parent.children[leaf.key]
            self._offer(leaf.parent)
            leaf.parent = None  # who still holds it can neither lock nor evict what is gone
        self._release_pages(dropped)
        return len(dropped)

    def _offer(self, node: RadixNode) -> None:
        if node.is_evictable_leaf and not node.is_offered:
            node.is_offered = True
            heapq.heappush(self._leaves, (node.last_access, next(self._order), node))

    @staticmethod
    def _path(node: RadixNode) -> Iterator[RadixNode]:
        at: RadixNode | None = node
        while at is not None and at.parent is not None:
            yield at
            at = at.parent
