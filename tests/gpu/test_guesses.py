"""Speculation inside the graphs: the same tokens as without, whoever guesses; and what it costs nobody."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402
from altiplano.engine.errors import EngineError  # noqa: E402
from altiplano.models.cria import cria_path  # noqa: E402

from .test_runner import prompts, random_checkpoint  # noqa: E402

GREEDY = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights narrow enough that answers repeat themselves."""
    return random_checkpoint("1b-like", 0.04, tmp_path_factory)


def make(
    where: Path, guesses: int, draft: Path | None = None, kind: str = "bf16", always: bool = True, **settings: int
) -> OverlappedEngine:
    values = {"max_model_len": 1024, "max_num_seqs": 16, "num_blocks": 400, "max_num_batched_tokens": 512, **settings}
    config = EngineConfig(
        where, device="cuda", dtype="bfloat16", debug=True, num_speculative_tokens=guesses, speculative_model=draft, **values
    )
    engine = OverlappedEngine(config, CudaRunner(config, kind))
    if always:
        engine._payoffs.of = lambda requests: Always()  # type: ignore[method-assign, assignment]
    return engine


class Always:
    """Who decides guesses in every step, whatever it costs."""

    guessing = True

    def decide(self) -> bool:
        return self.guessing

    def observe(self, guessed: bool, tokens: float, seconds: float) -> None:
        pass


class Never(Always):
    """Nobody guesses: the same kernels without guesses."""

    guessing = False


def without(engine: OverlappedEngine) -> None:
    engine._payoffs.of = lambda requests: Never()  # type: ignore[method-assign, assignment]


def texts(count: int) -> list[list[int]]:
    """Prompts that repeat themselves, so that there is something to guess."""
    dice = random.Random(5)
    return [[dice.randrange(4000) for _ in range(dice.randint(3, 9))] * dice.randint(3, 30) for _ in range(count)]


@pytest.mark.parametrize("kind", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize(("requests", "guesses"), [(1, 15), (1, 4), (2, 7), (3, 3), (7, 1)])
def test_tokens_are_those_of_no_guesses(checkpoint: Path, requests: int, guesses: int, kind: str) -> None:
    for params in (GREEDY, SamplingParams(max_tokens=60, temperature=0.1, seed=3, ignore_eos=True)):
        engine = make(checkpoint, guesses, kind=kind)
        guessed = engine.generate(texts(requests), params)
        assert 0 < engine.stats().accepted_tokens <= engine.stats().guessed_tokens
        plain = make(checkpoint, guesses, kind=kind)
        without(plain)
        alone = plain.generate(texts(requests), params)
        assert plain.stats().guessed_tokens == 0
        assert [a.token_ids for a in guessed] == [a.token_ids for a in alone]
        assert engine.stats().num_running == 0


def test_a_model_that_drafts_for_itself_is_nearly_always_right(checkpoint: Path) -> None:
    engine = make(checkpoint, 4, checkpoint)
    plain = make(checkpoint, 4)
    without(plain)
    for asked in (prompts(1, 50, 90), prompts(3, 5, 300)):
        for params in (GREEDY, SamplingParams(max_tokens=60, temperature=0.8, seed=9, ignore_eos=True)):
            before = engine.stats()
            found = engine.generate(asked, params)
            assert [a.token_ids for a in found] == [a.token_ids for a in plain.generate(asked, params)]
            after = engine.stats()
            right = (after.accepted_tokens - before.accepted_tokens) / (after.guessed_tokens - before.guessed_tokens)
            assert right > 0.8, right


def test_a_worse_draft_changes_no_token(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = random_checkpoint("3b-like", 0.05, tmp_path_factory)
    engine, plain = make(checkpoint, 3, other), make(checkpoint, 3)
    without(plain)
    asked = prompts(4, 5, 200)
    assert [a.token_ids for a in engine.generate(asked, GREEDY)] == [a.token_ids for a in plain.generate(asked, GREEDY)]
    assert engine.stats().accepted_tokens < 0.3 * engine.stats().guessed_tokens


def test_guesses_and_bursts_without_may_take_turns(checkpoint: Path) -> None:
    """Requests come and go, one wants log-probabilities for a while, and guessing stops and starts: nothing is lost or said twice."""

    class Fickle(Always):
        asked = 0

        def decide(self) -> bool:
            self.asked += 1
            return self.asked % 5 < 3

    for draft in (None, checkpoint):
        plain = make(checkpoint, 4, draft)
        without(plain)
        alone = [plain.generate([text], GREEDY)[0].token_ids for text in texts(9)]
        engine, fickle = make(checkpoint, 4, draft), Fickle()
        engine._payoffs.of = lambda requests, fickle=fickle: fickle  # type: ignore[method-assign, assignment, misc]
        said: dict[str, list[int]] = {str(i): [] for i in range(9)}
        for i, text in enumerate(texts(9)):
            engine.add_request(str(i), text, GREEDY)
            if i == 4:
                engine.add_request("scored", text[:5], SamplingParams(max_tokens=3, temperature=0.0, logprobs=1, ignore_eos=True))
            for _ in range(3):
                for output in engine.step():
                    said.setdefault(output.request_id, []).append(output.token_id or 0)
        while engine.has_unfinished():
            for output in engine.step():
                said.setdefault(output.request_id, []).append(output.token_id or 0)
        assert engine.stats().guessed_tokens > 0
        # Up to 16 rows share their kernels, and every row's sums are the same in all of them.
        assert [said[str(i)] for i in range(9)] == alone


def test_preemption_under_page_pressure_ends_every_request(checkpoint: Path) -> None:
    asked = texts(7)
    engine, plain = make(checkpoint, 2, num_blocks=34, max_model_len=512), make(checkpoint, 2, num_blocks=400)
    without(plain)
    long = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
    found = engine.generate(asked, long)
    assert engine.stats().preemptions > 0
    assert [len(a.token_ids) for a in found] == [200] * 7
    # Computed again after a preemption, a token's keys come from the kernels of prompts: near-equal logits may swap then.
    same = sum(a.token_ids[:20] == b.token_ids[:20] for a, b in zip(found, plain.generate(asked, long), strict=True))
    assert same >= 5
    assert engine.stats().num_running == 0 and engine.stats().kv_cache_held == 0


def test_a_stop_token_among_right_guesses_ends_the_answer(checkpoint: Path) -> None:
    plain = make(checkpoint, 7)
    without(plain)
    free = plain.generate(texts(1), GREEDY)[0].token_ids
    stop = free[20]
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    engine = make(checkpoint, 7)
    for _ in range(2):  # the second time from cached pages
        answer = engine.generate(texts(1), params)[0]
        assert answer.token_ids == free[: free.index(stop) + 1] and answer.finish_reason == "stop"
    assert engine.stats().cached_tokens > 0


def test_text_that_repeats_is_guessed_and_filters_are_kept() -> None:
    """On a trained model: repeated orders are guessed right, greedy and under filters."""
    plain, engine = make(Path(cria_path()), 6, max_model_len=512), make(Path(cria_path()), 6, max_model_len=512)
    without(plain)
    prompt = [0, *([60, 70, 80, 90, 100, 110] * 12)]
    for params in (GREEDY, SamplingParams(max_tokens=60, temperature=0.8, top_p=0.9, top_k=20, seed=4, ignore_eos=True)):
        found = engine.generate([prompt], params)[0].token_ids
        # Its products are the library's, which adds in another order for other numbers of rows.
        assert found[:8] == plain.generate([prompt], params)[0].token_ids[:8]
    assert engine.stats().accepted_tokens > 0


def test_guessing_stops_where_it_does_not_pay(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = random_checkpoint("3b-like", 0.05, tmp_path_factory)
    engine = make(checkpoint, 3, other, always=False)
    params = SamplingParams(max_tokens=900, temperature=0.0, ignore_eos=True)
    engine.generate([[5, 6, 7]], params)
    guessed = engine.stats().guessed_steps
    engine.generate([[7, 8, 9]], params)
    assert engine.stats().guessed_steps - guessed < 0.3 * 900 / 4


def test_a_draft_of_another_vocabulary_is_refused(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="must have the same tokenizer"):
        make(checkpoint, 3, Path(cria_path()))
