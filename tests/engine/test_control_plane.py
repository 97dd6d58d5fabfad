"""Pages, prefix cache and scheduler under random use: nothing leaks, nobody starves, no budget is broken."""

from collections.abc import Sequence
from random import Random

from hypothesis import given, settings
from hypothesis import strategies as st

from altiplano.engine.pages import PagePool
from altiplano.engine.params import SamplingParams
from altiplano.engine.radix import RadixIndex
from altiplano.engine.request import Request, State
from altiplano.engine.scheduler import Scheduler

BLOCK = 4


@given(st.lists(st.tuples(st.sampled_from(["take", "hold", "release"]), st.integers(0, 8)), max_size=60))
def test_pages_are_free_or_held_never_both(actions: list[tuple[str, int]]) -> None:
    pool, held = PagePool(12), list[int]()
    for action, n in actions:
        if action == "take":
            pages = pool.take(n)
            assert (pages is None) == (n > 12 - len(set(held)))
            held += pages or []
        elif held:
            page = held[n % len(held)]
            if action == "hold":
                pool.hold([page])
                held.append(page)
            else:
                pool.release([page])
                held.remove(page)
        pool.check()
        assert pool.num_free == 12 - len(set(held))


@given(st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=24), min_size=1, max_size=12), st.integers(0, 12))
def test_the_prefix_cache_finds_what_was_indexed_until_it_is_evicted(sequences: list[list[int]], evict: int) -> None:
    pool = PagePool(200)
    radix = RadixIndex(pool, BLOCK)
    for tokens in sequences:
        pages = pool.take(len(tokens) // BLOCK) or []
        radix.insert("", tokens, pages)
        pool.release(pages)
        assert len(radix.match("", tokens)) == len(tokens) // BLOCK
        assert radix.match("other", tokens) == []
    distinct = {tuple(t[: (i + 1) * BLOCK]) for t in sequences for i in range(len(t) // BLOCK)}
    assert len(radix) == len(distinct) == 200 - pool.num_free == pool.num_evictable
    assert radix.evict(evict) == min(evict, len(distinct))
    assert len(radix) == len(distinct) - min(evict, len(distinct)) == 200 - pool.num_free
    radix.drop("")
    pool.check()
    assert pool.num_free == 200


def test_a_page_in_use_is_not_evicted() -> None:
    pool = PagePool(4)
    radix = RadixIndex(pool, BLOCK)
    pages = pool.take(2) or []
    radix.insert("", list(range(8)), pages)
    assert radix.evict(4) == 0 == pool.num_evictable
    pool.release(pages)
    assert pool.num_evictable == 2
    pool.hold(pages)
    assert pool.num_evictable == 0
    pool.release(pages)
    assert radix.evict(4) == 2 and pool.num_evictable == 0


def test_a_page_in_use_outlives_what_the_cache_forgets() -> None:
    pool = PagePool(4)
    radix = RadixIndex(pool, BLOCK)
    pages = pool.take(2) or []
    radix.insert("", list(range(8)), pages)
    pool.release(pages[1:])
    radix.drop("")
    pool.check()
    assert (pool.num_free, pool.num_evictable) == (3, 0)
    pool.release(pages[:1])
    pool.check()
    assert pool.num_free == 4


requests = st.lists(
    st.tuples(
        st.integers(1, 30), st.integers(1, 12), st.integers(-1, 1), st.booleans()
    ),  # prompt, answer, priority, common beginning
    min_size=1,
    max_size=10,
)


def add_all(scheduler: Scheduler, wanted: list[tuple[int, int, int, bool]]) -> dict[str, Request]:
    """Requests by their ids, which wait in the scheduler."""
    live = {}
    for number, (length, answer, priority, common) in enumerate(wanted):
        prompt = [0 if common else number + 1] * length
        live[str(number)] = Request(str(number), length, prompt, SamplingParams(max_tokens=answer), 0, number, priority=priority)
        scheduler.add(live[str(number)])
    return live


@settings(deadline=None)
@given(requests, st.integers(1, 9), st.integers(11, 30), st.integers(1, 4), st.booleans())
def test_every_request_ends_within_budget_and_without_leaks(
    wanted: list[tuple[int, int, int, bool]], budget: int, num_pages: int, slots: int, caching: bool
) -> None:
    pool = PagePool(num_pages)
    scheduler = Scheduler(pool, RadixIndex(pool, BLOCK) if caching else None, BLOCK, slots, budget)
    live = add_all(scheduler, wanted)
    for _ in range(5000):
        if not live:
            break
        plan = scheduler.plan()
        assert plan.chunks, "there are requests, but nothing is planned"
        assert plan.num_tokens <= budget
        assert len({chunk.slot for chunk in plan.chunks}) == len(plan.chunks) <= slots
        for chunk in plan.chunks:
            request = live[chunk.request_id]
            assert chunk.tokens == tuple(request.tokens[chunk.start : chunk.start + len(chunk.tokens)])
            assert len(chunk.pages) * BLOCK >= chunk.start + len(chunk.tokens)
            scheduler.advance(request, chunk, 99 if chunk.sample else None)
            if request.num_generated >= request.params.max_tokens:
                scheduler.finish(request, "length")
                assert request.state is State.FINISHED
                del live[chunk.request_id]
        scheduler.check()
    assert not live
    assert pool.num_free == num_pages - (len(scheduler.radix) if scheduler.radix else 0)


@settings(deadline=None)
@given(requests, st.integers(2, 9), st.integers(11, 30), st.integers(1, 4), st.booleans(), st.integers(1, 5), st.randoms())
def test_guesses_and_a_limit_for_prompts_break_no_budget_and_starve_nobody(
    wanted: list[tuple[int, int, int, bool]], budget: int, num_pages: int, slots: int, caching: bool, limit: int, rng: Random
) -> None:
    """Guesses of random number, of which a random number is right; prompts get `limit` tokens beside decodes."""
    pool = PagePool(num_pages)

    def guess(wants: Sequence[tuple[Request, int]], catch_up: int) -> list[tuple[int, ...]]:
        assert all(len(request.pages) * BLOCK >= len(request.tokens) + places for request, places in wants)
        assert catch_up >= 0
        return [(99,) * rng.randrange(places + 1) for _, places in wants]

    scheduler = Scheduler(
        pool, RadixIndex(pool, BLOCK) if caching else None, BLOCK, slots, budget, guess=guess, prompt_limit=lambda decodes: limit
    )
    live = add_all(scheduler, wanted)
    for _ in range(5000):
        if not live:
            break
        decoding = sum(len(r.tokens) - r.num_computed == 1 for r in scheduler.running)
        plan = scheduler.plan()
        assert plan.chunks, "there are requests, but nothing is planned"
        assert plan.num_tokens <= budget
        prompts = [chunk for chunk in plan.chunks if len(chunk.tokens) - chunk.num_guesses > 1]
        if decoding and not plan.preempted:
            assert sum(len(chunk.tokens) for chunk in prompts) <= limit
        for chunk in plan.chunks:
            request = live[chunk.request_id]
            assert not (chunk.num_guesses and prompts), "no guesses beside prompts under a limit"
            assert len(chunk.pages) * BLOCK >= chunk.start + len(chunk.tokens)
            scheduler.advance(request, chunk, 99 if chunk.sample else None)
            for _ in range(rng.randrange(chunk.num_guesses + 1)):
                scheduler.accept(request, 99)
            assert request.num_generated <= request.params.max_tokens
            if request.num_generated == request.params.max_tokens:
                scheduler.finish(request, "length")
                del live[chunk.request_id]
        scheduler.check()
    assert not live
    assert pool.num_free == num_pages - (len(scheduler.radix) if scheduler.radix else 0)
