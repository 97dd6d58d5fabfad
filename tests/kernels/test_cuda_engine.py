"""What the CUDA engine's host decides, on Triton's interpreter: with guesses, under page pressure, while requests come, go and end.

In deterministic mode all paths add in one order, so every answer must be, token by token, what the request says alone.
"""

import functools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu shows this on the GPU itself", allow_module_level=True)

from altiplano.engine import EngineConfig, SamplingParams

from .interpreted import cuda_interpreted

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=10, temperature=0.9, seed=4, ignore_eos=True)
FILTERED = SamplingParams(max_tokens=10, temperature=0.9, seed=4, top_k=20, top_p=0.9, ignore_eos=True)
Decide = Callable[[int], bool]


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with cuda_interpreted():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model, and another of the same vocabulary."""
    found = []
    for hidden in (64, 128):
        where = tmp_path_factory.mktemp(f"llama-{hidden}")
        shape = {
            "hidden_size": hidden,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
        }
        rest = {"intermediate_size": 64, "vocab_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": True}
        (where / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 95, **shape, **rest}))
        found.append(where)
    return found[0], found[1]


def make(model: Path, guesses: int = 0, draft: Path | None = None, decide: Decide = lambda _: True, **settings: object):  # type: ignore[no-untyped-def]
    from altiplano.engine.cuda.overlap import OverlappedEngine
    from altiplano.engine.cuda.runner import CudaRunner

    class Payoff:
        asked = 0

        def decide(self) -> bool:
            self.asked += 1
            return decide(self.asked)

        def observe(self, guessed: bool, tokens: float, seconds: float) -> None:
            pass

    sizes = {"max_model_len": 96, "max_num_seqs": 8, "num_blocks": 48, "block_size": 16, "max_num_batched_tokens": 64, **settings}
    config = EngineConfig(
        model, device="cuda", dtype="bfloat16", load_format="dummy", debug=True, deterministic=True, num_speculative_tokens=guesses,
        speculative_model=draft, **sizes,  # type: ignore[arg-type]
    )  # fmt: skip
    engine, payoff = OverlappedEngine(config, CudaRunner(config, device="cpu")), Payoff()
    engine._payoffs.of = lambda requests: payoff  # type: ignore[method-assign, assignment, return-value]
    return engine


def texts(count: int) -> list[list[int]]:
    """Prompts that repeat themselves, so that there is something to look up."""
    dice = random.Random(1)
    return [[dice.randrange(90) for _ in range(dice.randint(1, 6))] * dice.randint(1, 6) for _ in range(count)]


def answers(engine, asked: list[list[int]], params: SamplingParams) -> list[list[int]]:  # type: ignore[no-untyped-def]
    found = [answer.token_ids for answer in engine.generate(asked, params)]
    stats = engine.stats()
    assert (stats.num_running, stats.kv_cache_held) == (0, 0)
    return found


@pytest.fixture(scope="module")
def alone(models: tuple[Path, Path]) -> Callable[[SamplingParams], list[list[int]]]:
    """What two texts are answered without guesses; computed once for each kind of draw, because that takes a while."""
    return functools.cache(lambda params: answers(make(models[0]), texts(2), params))


@pytest.mark.parametrize("drafted", [None, 0, 1], ids=["looked-up", "by-the-model-itself", "by-another-model"])
@pytest.mark.parametrize("params", [GREEDY, SEEDED, FILTERED], ids=["greedy", "seeded", "filtered"])
def test_guesses_change_no_token(
    models: tuple[Path, Path],
    alone: Callable[[SamplingParams], list[list[int]]],
    params: SamplingParams,
    drafted: int | None,
) -> None:
    wanted = alone(params)
    assert len({token for tokens in wanted for token in tokens}) > 1, "an answer that never changes shows nothing"
    engine = make(models[0], 3, None if drafted is None else models[drafted])
    assert answers(engine, texts(2), params) == wanted
    stats = engine.stats()
    assert 0 <= stats.accepted_tokens <= stats.guessed_tokens and stats.guessed_steps > 0
    if drafted == 0:
        assert stats.accepted_tokens > 0.9 * stats.guessed_tokens > 0, "it draws what it will draw"
    elif params is GREEDY:
        assert stats.guessed_tokens > 0


@pytest.mark.parametrize("drafts", [False, True])
def test_pages_run_out_while_guesses_fly(models: tuple[Path, Path], drafts: bool) -> None:
    asked, params = [text * 3 for text in texts(4)], SamplingParams(max_tokens=20, temperature=0.9, seed=4, ignore_eos=True)
    asked = [text[:30] for text in asked]
    wanted = answers(make(models[0]), asked, params)
    engine = make(models[0], 2, models[0] if drafts else None, num_blocks=7)
    assert answers(engine, asked, params) == wanted
    assert engine.stats().preemptions > 0


def test_the_last_page_is_enough_for_the_last_token(models: tuple[Path, Path]) -> None:
    """What guesses could draw beyond the end is not reserved: nobody preempts itself for it."""
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)
    prompt = [7, 8, 9] * 4
    engine = make(models[0], 7, max_model_len=32, num_blocks=2)
    assert answers(engine, [prompt], params) == answers(make(models[0]), [prompt], params)
    assert engine.stats().preemptions == 0


@pytest.mark.parametrize("drafts", [False, True])
def test_requests_come_go_and_end_while_guessing_stops_and_starts(models: tuple[Path, Path], drafts: bool) -> None:
    asked, plain = texts(6), make(models[0])
    stop = answers(plain, [asked[3]], SEEDED)[0][5]
    kinds = [
        GREEDY,
        SEEDED,
        FILTERED,
        SamplingParams(max_tokens=10, temperature=0.9, seed=4, stop_token_ids=(stop,), ignore_eos=True),
    ]
    kinds += [SamplingParams(max_tokens=5, temperature=0.0, logprobs=2, ignore_eos=True), GREEDY]
    alone = [answers(plain, [text], params)[0] for text, params in zip(asked, kinds, strict=True)]
    engine = make(models[0], 3, models[0] if drafts else None, decide=lambda asked: asked % 5 < 3)
    said: dict[str, list[int]] = {str(i): [] for i in range(6)}
    said["gone"] = []
    ends: dict[str, str] = {}

    def step() -> None:
        for output in engine.step():
            if output.token_id is not None:
                said[output.request_id].append(output.token_id)
            if output.finish_reason is not None:
                assert output.request_id not in ends
                ends[output.request_id] = output.finish_reason

    for i, (text, params) in enumerate(zip(asked, kinds, strict=True)):
        engine.add_request(str(i), text, params)
        if i == 1:
            engine.add_request("gone", [3, 4] * 6, SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True))
        if i == 3:
            engine.abort("gone")  # with a burst in flight
        step()
        step()
    while engine.has_unfinished():
        step()
    assert [said[str(i)] for i in range(6)] == alone
    assert ends == {**{str(i): "length" for i in range(6)}, "3": "stop", "gone": "abort"}
    stats = engine.stats()
    assert (stats.num_running, stats.kv_cache_held) == (0, 0) and stats.guessed_tokens > 0
    assert not any(vars(engine._ahead).values()), "nothing is kept of requests that have ended"


def test_no_graph_with_guesses_is_captured_while_somebody_waits(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from altiplano.engine.cuda.graphs import PLAIN, DecodeGraphs

    captured = list[tuple[int, object]]()

    def ensure(self: DecodeGraphs, bucket: int, kind: object = PLAIN) -> None:
        if (bucket, kind) not in captured:
            captured.append((bucket, kind))

    monkeypatch.setattr(DecodeGraphs, "ensure", ensure)
    engine = make(models[0], 3, models[1], max_num_seqs=3)
    start = list(captured)
    # One, two and up to four requests, each with and without filters.
    assert sorted(bucket for bucket, _ in start) == [1, 1, 2, 2, 4, 4]
    for requests, params in ((1, GREEDY), (2, GREEDY), (3, GREEDY), (2, FILTERED)):
        answers(engine, texts(requests), replace(params, max_tokens=3))
    assert engine.stats().guessed_steps > 0
    assert all(not kind.guesses for _, kind in captured[len(start) :])  # type: ignore[attr-defined]
    captured.clear()
    engine.sleep()
    engine.wake_up()
    assert captured == start, "what was captured points to memory that has moved"


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_caches_take_what_was_measured_for_them(models: tuple[Path, Path], kind: str) -> None:
    from altiplano.engine.config import read_config
    from altiplano.engine.cuda.loading import CACHE_DTYPES, cache_bytes, weight_bytes
    from altiplano.engine.cuda.runner import CudaRunner
    from altiplano.engine.cuda.sleep import tensors_of

    config = EngineConfig(
        models[0], device="cuda", dtype="bfloat16", load_format="dummy", max_model_len=96, num_blocks=6, block_size=16,
        num_speculative_tokens=3, speculative_model=models[1],
    )  # fmt: skip
    for loaded, model in zip(CudaRunner(config, kind, device="cpu")._models, models, strict=True):
        taken = sum(cache.nbytes for cache in loaded.caches)
        assert taken == cache_bytes(config, read_config(model), CACHE_DTYPES[kind])
        weights = {tensor.data_ptr(): tensor for tensor in tensors_of(loaded.stepper.model.weights)}
        assert sum(tensor.nbytes for tensor in weights.values()) == weight_bytes(read_config(model))


@pytest.mark.parametrize("kind", ["auto", "fp8", "int8"])
def test_a_write_into_a_free_page_of_any_cache_is_named(models: tuple[Path, Path], kind: str) -> None:
    from altiplano.engine.canary import Canary
    from altiplano.engine.cuda.runner import CudaRunner
    from altiplano.engine.pages import PagePool

    config = EngineConfig(
        models[0], device="cuda", dtype="bfloat16", load_format="dummy", max_model_len=96, num_blocks=6, block_size=16,
        num_speculative_tokens=3, speculative_model=models[1],
    )  # fmt: skip
    runner = CudaRunner(config, kind, device="cpu")
    canary = Canary(PagePool(6), runner)
    canary.check()
    canary.check()
    target, draft = (loaded.caches for loaded in runner._models)
    assert not any(cache[:, 6].float().any() for cache in target), "scratch is written by everybody"
    assert not any(cache.float().any() for cache in draft)
    for cache in target:
        cache[0, 4, 1, 0, 15] = 0
        with pytest.raises(AssertionError, match=r"free pages \[4\] have been written"):
            canary.check()
        runner.stamp([4])
    canary.check()


def test_free_pages_are_watched_before_and_after_sleep(models: tuple[Path, Path]) -> None:
    engine, short = make(models[0], enable_prefix_caching=False), replace(SEEDED, max_tokens=3)
    said = answers(engine, texts(1), short)
    engine.sleep()
    engine.wake_up()
    assert not bool(engine.runner.model.cache.any())
    assert answers(engine, texts(1), short) == said
    assert bool(engine.runner.model.cache[:, :48].isnan().all())
    engine.runner.model.cache[0, 40, 0, 0, 3] = 0.5
    with pytest.raises(AssertionError, match=r"free pages \[40\] have been written"):
        answers(engine, texts(1), short)


def test_a_latency_target_cuts_prompts_beside_answers(models: tuple[Path, Path]) -> None:
    pieces = {}
    for target in (None, 0.001):
        engine = make(models[0], itl_target_ms=target)
        engine.add_request("talker", [1, 2, 3], SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True))
        engine.step()
        engine.add_request("late", list(range(60)), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        while engine.has_unfinished():
            engine.step()
        pieces[target] = [record.prompt_tokens for record in engine.step_log.last() if record.prompt_tokens and record.decodes]
    assert sum(pieces[None]) == sum(pieces[0.001]) == 60
    assert pieces[None] == [60] and max(pieces[0.001]) == 16
