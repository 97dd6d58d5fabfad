"""The prefix cache at sizes that real prompts reach: long chains, many leaves, pages in use."""

from altiplano.engine.pages import PagePool
from altiplano.engine.radix import RadixIndex

BLOCK = 4


class WatchedPool(PagePool):
    """Counts how often somebody looks at a page."""

    looks = 0

    def holders(self, page: int) -> int:
        self.looks += 1
        return super().holders(page)


def index(pool: PagePool, radix: RadixIndex, tokens: list[int]) -> list[int]:
    """Index `tokens`; returns their pages, which only the cache holds."""
    pages = pool.take(len(tokens) // BLOCK) or []
    radix.insert("", tokens, pages)
    pool.release(pages)
    return pages


def test_the_size_of_the_longest_prompts_is_known() -> None:
    pool = PagePool(40_000)
    radix = RadixIndex(pool, BLOCK)
    tokens = list(range(40_000 * BLOCK))
    pages = index(pool, radix, tokens)
    assert len(radix) == 40_000 and radix.match("", tokens) == pages
    assert radix.evict(39_000) == 39_000 and len(radix) == 1000
    assert radix.match("", tokens) == pages[:1000]
    radix.drop("")
    assert len(radix) == 0 and pool.num_free == 40_000


def test_eviction_looks_at_what_it_evicts_and_not_at_every_leaf() -> None:
    pool = WatchedPool(10_000)
    radix = RadixIndex(pool, BLOCK)
    for prompt in range(10_000):
        index(pool, radix, [prompt] * BLOCK)
    for _ in range(1000):
        assert radix.evict(1) == 1
    assert pool.looks <= 2 * 1000


def test_leaves_in_use_are_passed_over_once() -> None:
    pool = WatchedPool(1000)
    radix = RadixIndex(pool, BLOCK)
    for prompt in range(1000):
        pages = index(pool, radix, [prompt] * BLOCK)
        if prompt < 500:
            pool.hold(pages)
    for _ in range(400):
        assert radix.evict(1) == 1
    assert pool.looks <= 2 * 500 + 2 * 400
    assert radix.evict(1000) == 100, "what requests hold stays"
    assert len(radix) == 500


def test_the_least_recently_used_goes_first() -> None:
    pool = PagePool(8)
    radix = RadixIndex(pool, BLOCK)
    prompts = [[n] * BLOCK + [9] * BLOCK for n in range(3)]
    pages = [index(pool, radix, tokens) for tokens in prompts]
    radix.match("", prompts[0])

    def kept() -> list[int]:
        return [sum(map(pool.holders, chain)) for chain in pages]

    assert radix.evict(3) == 3 and kept() == [2, 0, 1]
    assert radix.evict(1) == 1 and kept() == [2, 0, 0], "a parent is as old as its last child"


def test_nothing_is_kept_of_a_namespace_without_pages() -> None:
    """A server sees many adapters and keys over the months; prompts shorter than a page leave nothing at all."""
    pool = PagePool(20)
    radix = RadixIndex(pool, BLOCK)
    for tenant in range(100):
        radix.insert(f"short {tenant}", [1], [])
        pages = pool.take(2)
        while pages is None:
            radix.evict(1)
            pages = pool.take(2)
        radix.insert(f"tenant {tenant}", list(range(2 * BLOCK)), pages)
        pool.release(pages)
    assert radix.namespaces() == [f"tenant {tenant}" for tenant in range(90, 100)]
    assert radix.match("tenant 99", list(range(2 * BLOCK))) == pages and radix.match("tenant 0", list(range(BLOCK))) == []
    assert radix.evict(19) == 19 and len(radix.namespaces()) == 1
    radix.insert("tenant 99", [1] * BLOCK, held := pool.take(1) or [])
    assert radix.match("tenant 99", [1] * BLOCK) == held, "a namespace that comes back is found again"
    pool.check()
