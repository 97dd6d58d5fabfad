"""In debug mode, who writes into a page that nobody holds is noticed; whoever uses pages as agreed is left alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams, stamps
from altiplano.engine.canary import MOST_WATCHED, Canary
from altiplano.engine.outputs import TokenOutput
from altiplano.engine.pages import PagePool

Checkpoint = tuple[Path, LlamaForCausalLM]
GREEDY = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, logprobs=1)


class Paper:
    """A cache in which a page is stamped or not."""

    def __init__(self) -> None:
        self.stamped = set[int]()
        self.asked = list[int]()  # pages looked at, by check
        self.made = 0  # stamps

    def stamp(self, pages: Sequence[int]) -> None:
        self.made += len(pages)
        self.stamped.update(pages)

    def written(self, pages: Sequence[int]) -> list[int]:
        self.asked.append(len(pages))
        return sorted(set(pages) - self.stamped)


def make(model: Path, **more: Any) -> Engine:
    settings = {"max_model_len": 64, "block_size": 4, "num_blocks": 20, "max_num_seqs": 4, "debug": True, **more}
    return Engine(EngineConfig(model, **settings))


def cache_of(engine: Engine) -> torch.Tensor:
    cache: torch.Tensor = engine.runner._llama.cache  # type: ignore[attr-defined]
    return cache


@pytest.mark.parametrize("place", [(0, 0, 0, 0), (2, 1, 1, 3)])
def test_a_write_into_a_free_page_is_named(llama: Checkpoint, place: tuple[int, int, int, int]) -> None:
    engine = make(llama[0], enable_prefix_caching=False)
    engine.generate([[5, 6, 7]], GREEDY)
    layer, side, head, offset = place
    cache_of(engine)[layer, 13, side, head, offset, 5] = 0.5
    with pytest.raises(AssertionError, match=r"free pages \[13\] have been written, and nobody holds them"):
        engine.generate([[5, 6, 7]], GREEDY)


def test_a_page_that_was_taken_and_given_back_is_no_alarm() -> None:
    pool, paper = PagePool(4), Paper()
    canary = Canary(pool, paper)
    canary.check()
    taken = pool.take(2)
    assert taken is not None
    paper.stamped -= set(taken)  # their holder writes
    canary.check()
    pool.release(taken)
    canary.check()
    assert paper.stamped == {0, 1, 2, 3}, "what was given back is stamped again"
    for _ in range(2):  # taken and given back between two checks
        again = pool.take(1)
        assert again is not None
        paper.stamped -= set(again)
        pool.release(again)
    canary.check()
    paper.stamped -= set(taken)
    with pytest.raises(AssertionError, match=rf"free pages \[{min(taken)}, {max(taken)}\]"):
        canary.check()


def test_a_large_cache_is_watched_where_pages_were_given_back_last() -> None:
    pool, paper = PagePool(10 * MOST_WATCHED), Paper()
    canary = Canary(pool, paper)
    canary.check()
    canary.check()
    assert (paper.asked, paper.made) == ([0, MOST_WATCHED], MOST_WATCHED), "who is intact is not stamped again"
    taken = pool.take(4 * MOST_WATCHED)
    assert taken is not None
    pool.release(taken)
    canary.check()
    paper.stamped.discard(taken[-1])
    with pytest.raises(AssertionError, match=rf"\[{taken[-1]}\]"):
        canary.check()
    assert max(paper.asked) == MOST_WATCHED


def test_what_sleeps_is_forgotten() -> None:
    paper = Paper()
    canary = Canary(PagePool(3), paper)
    canary.check()
    paper.stamped.clear()  # as a new cache
    canary.forget()
    canary.check()
    assert paper.stamped == {0, 1, 2}


def run(engine: Engine) -> list[TokenOutput]:
    """More than its pages hold: prompts with a common start, one of them aborted; sleep at both levels in between."""
    common, news = [11, 12, 13, 14, 15, 16, 17, 18], list[TokenOutput]()
    for level in (1, 2):
        for i in range(5):
            engine.add_request(f"{level}-{i}", common + [20 + i] * (3 * i + 1), GREEDY)
        for step in range(200):
            if step == 7:
                engine.abort(f"{level}-1")
            news += engine.step()
            if not engine.has_unfinished():
                break
        engine.sleep(level)
        engine.wake_up()
    return news


@pytest.mark.parametrize("more", [{}, {"enable_prefix_caching": False}, {"deterministic": True}, {"num_speculative_tokens": 3}])
def test_who_uses_pages_as_agreed_is_left_alone_and_says_the_same(llama: Checkpoint, more: dict[str, Any]) -> None:
    """Tokens and log-probabilities: what a page holds behind what was written is not read, or does not count."""
    engine, plain = make(llama[0], **more), make(llama[0], debug=False, **more)
    news = run(engine)
    assert news and all(output.logprob == output.logprob for output in news if output.logprob is not None)
    shown = [(o.request_id, o.token_id, o.logprob, o.finish_reason) for o in news]
    assert shown == [(o.request_id, o.token_id, o.logprob, o.finish_reason) for o in run(plain)]
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.kv_cache_held == 0
    assert (stats.cached_tokens > 0) == more.get("enable_prefix_caching", True)
    engine.generate([[3, 4]], SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    free = engine._pool.free_pages(MOST_WATCHED)
    assert len(free) >= 19 and bool(cache_of(engine)[:, free].isnan().all()), "it did watch"


def test_without_debug_nothing_is_stamped(llama: Checkpoint) -> None:
    engine = make(llama[0], debug=False)
    engine.generate([[5, 6, 7]], GREEDY)
    assert not bool(cache_of(engine).isnan().any())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_the_pattern_is_nothing_that_a_step_writes(kind: torch.dtype) -> None:
    cache, scales = torch.zeros(2, 5, 2, 3, 4, 8).to(kind), torch.zeros(2, 5, 2, 3, 4, dtype=torch.float16)
    stamps.stamp([cache, scales], [3, 1])
    assert stamps.written([cache, scales], [1, 2, 3, 4]) == [2, 4]
    assert bool(scales[:, [1, 3]].isnan().all()) and not bool(scales[:, [0, 2, 4]].any())
    wide = cache.float()
    assert bool((wide[:, [1, 3]] == -128).all() if kind is torch.int8 else wide[:, [1, 3]].isnan().all())
    assert not bool(wide[:, [0, 2, 4]].any())
    scales[1, 3, 0, 2, 1] = 1.0
    assert stamps.written([cache, scales], [1, 3]) == [3]
    cache[0, 1, 1, 0, 3, 7] = 1
    assert stamps.written([cache, scales], [1, 3]) == [1, 3]
    assert stamps.written([cache, scales], []) == []
