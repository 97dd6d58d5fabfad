"""An engine that sleeps has really given its memory back, and says the same when it is woken up."""

import gc
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineAsleepError, EngineConfig, EngineError, SamplingParams, WeightsError
from altiplano.engine.cuda.sleep import Asleep, tensors_of

from .conftest import make_adapter, make_draft
from .virtual import Clock, VirtualRunner

Checkpoint = tuple[Path, LlamaForCausalLM]
PROMPTS = [[11, 12, 13, 14] * 6, [31, 7, 42], [11, 12, 13, 14] * 4 + [99]]
SEEDED = SamplingParams(max_tokens=12, temperature=0.9, seed=3, ignore_eos=True)


def make(model: Path, **more: Any) -> Engine:
    return Engine(EngineConfig(model, max_model_len=128, num_blocks=32, block_size=8, debug=True, **more))


def said(engine: Engine, adapter: str | None = None) -> list[list[int]]:
    return [completion.token_ids for completion in engine.generate(PROMPTS, SEEDED, adapter)]


def tensors(engine: Engine) -> Iterator[tuple[str, torch.Tensor]]:
    """The cache and the large weights of the engine's runner."""
    llama = engine.runner._llama  # type: ignore[attr-defined]
    yield "cache", llama.cache
    yield "weights", llama.weights.embedding
    for layer in llama.weights.layers:
        yield "weights", layer.gate_up


@pytest.mark.parametrize("level", [1, 2])
def test_the_memory_is_given_back_and_the_same_tokens_come_after(llama: Checkpoint, level: int) -> None:
    engine = make(llama[0])
    before = said(engine)
    watched = [(kind, weakref.ref(tensor)) for kind, tensor in tensors(engine)]
    engine.sleep(level)
    gc.collect()
    alive = {kind: {ref() is not None for of, ref in watched if of == kind} for kind in ("cache", "weights")}
    assert alive == {"cache": {False}, "weights": {level == 1}}
    assert engine.sleep_level == level and not engine.has_unfinished() and engine.step() == []
    assert engine.stats().kv_cache_usage == engine.stats().num_cached_pages == 0
    engine.wake_up()
    assert engine.sleep_level == 0 and said(engine) == before
    cached = engine.stats().cached_tokens
    assert said(engine) == before and engine.stats().cached_tokens > cached, "prefixes are cached again"


def test_a_large_cache_goes_back_to_the_system(llama: Checkpoint) -> None:
    engine = Engine(EngineConfig(llama[0], max_model_len=128, num_blocks=6000))
    cache = engine.runner._llama.cache  # type: ignore[attr-defined]
    size = cache.fill_(1.0).nbytes
    del cache
    process = psutil.Process()
    before = process.memory_info().rss
    engine.sleep()
    assert size > 64 << 20 and before - process.memory_info().rss > 0.9 * size


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_survive(llama: Checkpoint, tmp_path: Path, level: int) -> None:
    make_adapter(tmp_path, 5, "dora")
    engine = make(llama[0])
    engine.load_adapter("tuned", tmp_path)
    tuned, plain = said(engine, "tuned"), said(engine)
    engine.sleep(level)
    engine.wake_up()
    assert engine.adapters == ["tuned"] and (said(engine, "tuned"), said(engine)) == (tuned, plain) and tuned != plain


@pytest.mark.parametrize("level", [1, 2])
def test_a_draft_model_sleeps_too(llama: Checkpoint, tmp_path: Path, level: int) -> None:
    make_draft(llama[1], tmp_path)
    engine = make(llama[0], speculative_model=tmp_path, num_speculative_tokens=3)
    before, guessed = said(engine), engine.stats().guessed_tokens
    draft = weakref.ref(engine._proposer._runner._llama.cache)  # type: ignore[union-attr]
    engine.sleep(level)
    gc.collect()
    assert draft() is None
    engine.wake_up()
    assert said(engine) == before and engine.stats().guessed_tokens > guessed > 0


def test_who_is_being_answered_keeps_it_awake(llama: Checkpoint) -> None:
    engine = make(llama[0])
    engine.add_request("a", PROMPTS[0], SEEDED)
    engine.step()
    with pytest.raises(EngineError, match="1 requests are under way: wait for them, or abort them"):
        engine.sleep()
    for request_id in engine.unfinished:
        engine.abort(request_id)
    with pytest.raises(EngineError, match="under way"):
        engine.sleep()  # nobody has been told of the end yet
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    engine.sleep()
    engine.wake_up()
    assert said(engine) == said(make(llama[0]))


def test_nothing_is_taken_while_it_sleeps(llama: Checkpoint, tmp_path: Path) -> None:
    make_adapter(tmp_path, 5, "lora")
    engine = make(llama[0])
    engine.sleep()
    with pytest.raises(EngineAsleepError, match="wake it up first"):
        engine.add_request("a", PROMPTS[0], SEEDED)
    with pytest.raises(EngineAsleepError, match="wake it up first"):
        engine.load_adapter("tuned", tmp_path)
    assert not engine.has_unfinished() and engine.adapters == []


def test_levels(llama: Checkpoint) -> None:
    engine = make(llama[0])
    engine.wake_up()  # it is awake
    for level in (0, 3):
        with pytest.raises(EngineError, match=r"use 1 .* or 2"):
            engine.sleep(level)
    engine.sleep(1)
    engine.sleep(1)
    with pytest.raises(EngineError, match="sleeps at level 1: wake it up first"):
        engine.sleep(2)
    engine.wake_up()
    assert said(engine) == said(make(llama[0]))


def test_a_checkpoint_that_is_gone_leaves_it_asleep_until_it_is_back(llama: Checkpoint, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(llama[0], model)
    draft = tmp_path / "draft"
    make_draft(llama[1], draft)
    engine = make(model, speculative_model=draft, num_speculative_tokens=3)
    before = said(engine)
    engine.sleep(2)
    for path in (model, draft):
        weights = path / "model.safetensors"
        weights.rename(tmp_path / "aside")
        with pytest.raises(WeightsError, match=r"no \.safetensors file"):
            engine.wake_up()
        assert engine.sleep_level == 2
        (tmp_path / "aside").rename(weights)
    engine.wake_up()
    assert said(engine) == before


def test_a_backend_that_cannot_sleep_says_so() -> None:
    engine = Engine(EngineConfig(Path("virtual")), VirtualRunner(Clock(), lambda *_: 0.0))
    with pytest.raises(EngineError, match="cannot sleep"):
        engine.sleep()
    assert engine.sleep_level == 0


@dataclass(frozen=True)
class Part:
    """As weights are found in a model: in dataclasses, tuples, mappings; one of them twice."""

    embedding: torch.Tensor
    layers: tuple[torch.Tensor, ...]
    packed: dict[str, torch.Tensor]
    head: torch.Tensor
    bits: int = 4


def part(seed: int) -> Part:
    dice = torch.Generator().manual_seed(seed)
    embedding, *layers = (torch.randn(7, 5, generator=dice) for _ in range(4))
    return Part(embedding, tuple(layers), {"qkv": torch.randint(9, (30,), generator=dice).to(torch.uint8)}, embedding)


@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize("level", [1, 2])
def test_storages_go_and_come_back_under_everything_that_points_to_them(level: int, inferred: bool) -> None:
    """What the GPU does, on tensors of the host: see tests/gpu/test_sleep.py for the rest."""
    with torch.inference_mode(inferred):
        weights, adapters, cache = part(1), {"up": torch.arange(6.0)}, torch.ones(4, 3, dtype=torch.float8_e4m3fn)
    views = weights.layers[0][2:4], adapters["up"][1:], cache[1]
    held = [*tensors_of(weights), adapters["up"], cache]
    asleep = Asleep(weights, adapters, [cache], level)
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [0] * len(held)
    assert asleep.nbytes == 4 * 35 * 4 + 30 + 6 * 4 + 12, "the tied head is no second embedding"

    with pytest.raises(EngineError, match=r"waking up needs 0\.0 GiB"):
        asleep.wake_up(lambda: part(1), lambda: asleep.nbytes - 1)
    if level == 2:
        with pytest.raises(WeightsError):
            asleep.wake_up(gone, lambda: 1 << 30)
    assert [tensor.untyped_storage().nbytes() for tensor in held] == [0] * len(held)

    asleep.wake_up(lambda: part(1), lambda: asleep.nbytes)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(tensors_of(weights), tensors_of(part(1)), strict=True))
    assert weights.head.data_ptr() == weights.embedding.data_ptr()
    assert torch.equal(views[1], torch.arange(6.0)[1:]) and not cache.float().any() and not views[2].float().any()
    if level == 1:
        assert torch.equal(views[0], part(1).layers[0][2:4])


def gone() -> Part:
    raise WeightsError("the checkpoint is gone")
