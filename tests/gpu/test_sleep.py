"""A sleeping engine on the GPU: its memory is really free for others, and the same tokens come after."""

import gc
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, EngineError, SamplingParams  # noqa: E402

from .test_adapters import adapters  # noqa: E402, F401 (a fixture)
from .test_adapters import make as make_with_adapters  # noqa: E402
from .test_guesses import make as make_with_guesses  # noqa: E402
from .test_runner import make, prompts, random_checkpoint  # noqa: E402

ASKED = prompts(12, 1, 300)
GREEDY = SamplingParams(max_tokens=37, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=37, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)
# What else a sleeping engine may hold: slots, workspaces, compiled kernels, segments that the allocator keeps.
REST = 256 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("1b-like", 0.05, tmp_path_factory)


def said(engine: Engine, adapter: str | None = None) -> list[list[int]]:
    """Greedy and filtered answers, alone (captured steps of few rows) and together."""
    found = engine.generate(ASKED[:1], GREEDY, adapter) + engine.generate(ASKED, GREEDY, adapter)
    return [one.token_ids for one in found + engine.generate(ASKED, SEEDED, adapter)]


def free() -> int:
    gc.collect()  # engines of other tests
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("overlapped", [True, False])
@pytest.mark.parametrize(
    ("kind", "quantization"), [("bf16", "none"), ("fp8", "int4"), ("int8", "int8"), ("bf16", "w8a8-fp8"), ("bf16", "w8a8-int8")]
)
def test_the_same_tokens_come_after(checkpoint: Path, kind: str, quantization: str, overlapped: bool, level: int) -> None:
    engine = make(checkpoint, kind, overlapped, quantization)
    before = said(engine)
    for _ in range(2):
        engine.sleep(level)
        assert engine.runner.model.cache.untyped_storage().nbytes() == 0  # type: ignore[attr-defined]
        engine.wake_up()
        assert said(engine) == before


@pytest.mark.parametrize("level", [1, 2])
def test_the_memory_is_free_for_others(checkpoint: Path, level: int) -> None:
    empty = free()
    engine = make(checkpoint, "bf16", num_blocks=40_000)  # 2.4 GiB
    before, awake = said(engine), free()
    assert empty - awake > 2 << 30
    engine.sleep(level)
    assert free() > empty - REST
    with torch.inference_mode():
        other = torch.full((free() - REST,), 255, dtype=torch.uint8, device="cuda")
    with pytest.raises(EngineError, match=r"waking up needs .* GiB free"):
        engine.wake_up()
    assert engine.sleep_level == level
    del other
    torch.cuda.empty_cache()
    engine.wake_up()
    assert said(engine) == before and abs(free() - awake) < REST


@pytest.mark.parametrize("level", [1, 2])
def test_adapters_survive(adapters: tuple[Path, dict[str, Path]], level: int) -> None:  # noqa: F811
    engine = make_with_adapters(adapters)
    before = {name: said(engine, name) for name in (None, *adapters[1])}
    engine.sleep(level)
    assert all(tensor.untyped_storage().nbytes() == 0 for p in engine.runner._pool.products.values() for tensor in p[:3])  # type: ignore[attr-defined]
    engine.wake_up()
    assert {name: said(engine, name) for name in (None, *adapters[1])} == before
    name, path = next(iter(adapters[1].items()))
    engine.unload_adapter(name)
    engine.load_adapter(name, path)
    assert said(engine, name) == before[name]


@pytest.mark.parametrize("level", [1, 2])
def test_a_draft_model_sleeps_too(checkpoint: Path, level: int) -> None:
    engine = make_with_guesses(checkpoint, 4, draft=checkpoint)
    before, guessed = said(engine), engine.stats().guessed_tokens
    engine.sleep(level)
    caches = [cache for loaded in engine.runner._models for cache in loaded.caches]  # type: ignore[attr-defined]
    assert [cache.untyped_storage().nbytes() for cache in caches] == [0, 0]
    engine.wake_up()
    assert said(engine) == before and engine.stats().guessed_tokens > guessed > 0


def test_a_checkpoint_that_is_gone_leaves_it_asleep_until_it_is_back(tmp_path_factory: pytest.TempPathFactory) -> None:
    where = random_checkpoint("1b-like", 0.05, tmp_path_factory)
    engine = make(where, "bf16")
    before = said(engine)
    engine.sleep(2)
    weights, asleep = where / "model.safetensors", free()
    weights.rename(where / "aside")
    with pytest.raises(EngineError, match=r"no \.safetensors file"):
        engine.wake_up()
    assert engine.sleep_level == 2 and abs(free() - asleep) < REST
    (where / "aside").rename(weights)
    engine.wake_up()
    assert said(engine) == before
