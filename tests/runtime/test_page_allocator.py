"""Proves that the page allocator hands out every page once, takes each back once, and refuses everything else."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.runtime.page_allocator import PageAllocator


class AllocatorMachine(RuleBasedStateMachine):
    """The allocator against a set of the pages that are out."""

    @initialize(num_pages=st.integers(1, 12))
    def start(self, num_pages: int) -> None:
        self.allocator = PageAllocator(num_pages)
        self.out: set[int] = set()

    @rule(count=st.integers(0, 12))
    def allocate(self, count: int) -> None:
        free = self.allocator.num_pages - len(self.out)
        if count > free:
            with pytest.raises(ValueError, match=f"{count} pages asked for, {free} free"):
                self.allocator.allocate(count)
            return
        pages = self.allocator.allocate(count)
        assert len(set(pages)) == len(pages) == count
        assert all(0 <= page < self.allocator.num_pages for page in pages)
        assert not self.out.intersection(pages)
        self.out.update(pages)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.out)), unique=True))
        self.allocator.free(pages)
        self.out.difference_update(pages)

    @rule(page=st.integers(-3, 15))
    def free_what_is_not_out(self, page: int) -> None:
        if page not in self.out:
            with pytest.raises(ValueError, match=f"page {page} is not allocated"):
                self.allocator.free([page])

    @invariant()
    def counts_fit(self) -> None:
        self.allocator.check_integrity()
        assert self.allocator.num_free == self.allocator.num_pages - len(self.out)


TestAllocatorMachine = AllocatorMachine.TestCase


@pytest.mark.parametrize("num_pages", [0, -1])
def test_a_pool_without_pages_is_refused(num_pages: int) -> None:
    with pytest.raises(ValueError, match=f"num_pages={num_pages}"):
        PageAllocator(num_pages)


def test_a_page_named_twice_in_one_free_is_refused() -> None:
    allocator = PageAllocator(3)
    page, _ = allocator.allocate(2)
    with pytest.raises(ValueError, match=f"page {page} is not allocated"):
        allocator.free([page, page])


def test_integrity_check_bites() -> None:
    allocator = PageAllocator(3)
    allocator.allocate(1)
    allocator._free.append(allocator._free[0])
    with pytest.raises(AssertionError, match="differ"):
        allocator.check_integrity()
