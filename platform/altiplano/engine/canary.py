"""Free pages are watched: a step that writes into a page which nobody holds is noticed, for debugging.

Free pages get a pattern that no step writes, and must carry it until somebody takes them. What a page held before is lost with
it, so this also shows that nobody reads a page's rest before it is written: the pattern is no number wherever that can be said.
"""

from altiplano.engine.pages import PagePool
from altiplano.engine.runner import Stamper

# Pages watched at a time: those that were given back last, where a stray write of their last owner would go. All pages of a
# cache that fills a GPU would be read and written after each step.
MOST_WATCHED = 256


class Canary:
    """The books of which free pages `stamper` has stamped. To be asked only while no step is being computed."""

    def __init__(self, pool: PagePool, stamper: Stamper) -> None:
        self._pool, self._stamper = pool, stamper
        self._stamped: dict[int, int] = {}  # page: how often it had been taken

    def check(self) -> None:
        """Raise AssertionError when a watched page was written while it was free; then watch the pages that are free now."""
        intact = {page: taken for page, taken in self._stamped.items() if self._pool.times_taken(page) == taken}
        written = self._stamper.written(list(intact))
        assert not written, f"free pages {written} have been written, and nobody holds them"
        watched = self._pool.free_pages(MOST_WATCHED)
        self._stamper.stamp([page for page in watched if page not in intact])
        self._stamped = {page: self._pool.times_taken(page) for page in watched}

    def forget(self) -> None:
        """The cache is gone, and what was stamped with it."""
        self._stamped.clear()
