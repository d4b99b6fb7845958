"""PageAllocator: which page numbers are free. Knows neither what is in a page nor who holds one."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0 .. num_pages-1. Double frees and foreign numbers raise ValueError."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages}: the pool needs at least one page")
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` pages. Raises ValueError when fewer are free: callers ask `num_free` first."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} free")
        if count <= 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Iterable[int]) -> None:
        for page in pages:
            if not 0 <= page < self.num_pages or self._is_free[page]:
                raise ValueError(f"page {page} is not allocated")
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self) -> None:
        """Raises AssertionError when the free list and the flags differ."""
        assert len(set(self._free)) == len(self._free) == sum(self._is_free), "free list and flags differ"
        assert all(self._is_free[page] for page in self._free), "a page on the free list is flagged as taken"
