"""Ownership of KV-cache pages: who holds a page, and which are free."""

from collections.abc import Iterable


class PagePool:
    """Pages 0 … num_pages - 1 with reference counts.

    A page is free (count 0, in the free list) or held (count > 0). Requests and the prefix cache hold pages side by side; a
    page is free again when the last holder lets go. What the cache alone holds can be had for the asking (`num_evictable`).
    """

    def __init__(self, num_pages: int) -> None:
        self._free = list(range(num_pages - 1, -1, -1))
        self._count = [0] * num_pages
        self._taken = [0] * num_pages
        self._indexed = bytearray(num_pages)
        self._num_evictable = 0

    @property
    def num_pages(self) -> int:
        return len(self._count)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_evictable(self) -> int:
        """Pages that nobody but the prefix cache holds."""
        return self._num_evictable

    def take(self, n: int) -> list[int] | None:
        """`n` pages held once each, or None (and nothing changed) when there are not as many."""
        if n > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(n)]
        for page in pages:
            self._count[page] = 1
            self._taken[page] += 1
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """Hold pages that somebody holds already."""
        for page in pages:
            assert self._count[page] > 0, f"page {page} is free and cannot be shared"
            self._num_evictable -= self._indexed[page] and self._count[page] == 1
            self._count[page] += 1

    def release(self, pages: Iterable[int]) -> list[int]:
        """Let go once of each page; returns those that became free."""
        freed = []
        for page in pages:
            assert self._count[page] > 0, f"page {page} is released more often than held"
            self._count[page] -= 1
            self._num_evictable += self._indexed[page] and self._count[page] == 1
            if self._count[page] == 0:
                self._free.append(page)
                freed.append(page)
        return freed

    def index(self, page: int) -> None:
        """Hold a page, which a request holds, for the prefix cache."""
        self.hold([page])
        self._indexed[page] = True

    def unindex(self, page: int) -> None:
        """Let the prefix cache's hold of a page go."""
        self._num_evictable -= self._count[page] == 1
        self._indexed[page] = False
        self.release([page])

    def holders(self, page: int) -> int:
        return self._count[page]

    def free_pages(self, most: int) -> list[int]:
        """Free pages, up to `most`: those that would be taken next."""
        return self._free[: -most - 1 : -1]

    def times_taken(self, page: int) -> int:
        """How often a page has been taken since the start: unchanged as long as a free page is free."""
        return self._taken[page]

    def check(self) -> None:
        """Raise AssertionError unless every page is either free once or held."""
        free = set(self._free)
        assert len(free) == len(self._free), "a page is in the free list twice"
        alone = sum(indexed and count == 1 for indexed, count in zip(self._indexed, self._count, strict=True))
        assert alone == self._num_evictable, f"{alone} pages are the prefix cache's alone, and {self._num_evictable} were counted"
        for page, count in enumerate(self._count):
            assert (count == 0) == (page in free), (
                f"page {page} has {count} holders and is {'in' if page in free else 'not in'} the free list"
            )
