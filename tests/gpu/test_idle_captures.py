"""Graphs captured ahead on the GPU: the same tokens, no graph left for a step to stop for, and memory that is left for steps."""

import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import Engine, SamplingParams  # noqa: E402

from .test_adapters import adapters  # noqa: E402, F401 (a fixture)
from .test_adapters import make as make_with_adapters  # noqa: E402
from .test_guesses import make as make_with_guesses  # noqa: E402
from .test_runner import make, prompts, random_checkpoint  # noqa: E402

ASKED = prompts(12, 1, 300)
GREEDY = SamplingParams(max_tokens=37, temperature=0.0, ignore_eos=True)
SEEDED = SamplingParams(max_tokens=37, temperature=0.8, top_p=0.9, seed=11, ignore_eos=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("1b-like", 0.05, tmp_path_factory)


def prepare_all(engine: Engine) -> list[float]:
    """Seconds of each piece, during which a request would have waited."""
    seconds, tries = list[float](), 0
    while tries < 200:
        # While kernels are compiled, pieces may be moments of waiting for them.
        tries += not engine.runner.model.is_compiling(0.0)  # type: ignore[attr-defined]
        started = time.perf_counter()
        if not engine.prepare():
            return seconds
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    pytest.fail("there is always something to prepare")


def graphs(engine: Engine) -> set[object]:
    return set(engine.runner._graphs._graphs)  # type: ignore[attr-defined]


def said(engine: Engine, adapter: str | None = None) -> list[list[int]]:
    """Greedy and filtered answers, alone and together."""
    found = engine.generate(ASKED[:1], GREEDY, adapter) + engine.generate(ASKED, GREEDY, adapter)
    return [one.token_ids for one in found + engine.generate(ASKED, SEEDED, adapter)]


@pytest.mark.parametrize(
    ("kind", "quantization"), [("bf16", "none"), ("fp8", "int4"), ("int8", "int8"), ("bf16", "w8a8-fp8"), ("bf16", "w8a8-int8")]
)
def test_the_same_tokens_and_nothing_is_left_to_capture(checkpoint: Path, kind: str, quantization: str) -> None:
    wanted = said(make(checkpoint, kind, quantization=quantization))
    engine = make(checkpoint, kind, quantization=quantization)
    pieces = prepare_all(engine)
    print(f"{kind}, {quantization}: {len(pieces)} pieces, {sum(pieces):.2f} s, the longest {max(pieces):.2f} s")
    before = graphs(engine)
    assert said(engine) == wanted and graphs(engine) == before
    engine.sleep()
    assert not engine.prepare() and not graphs(engine)
    engine.wake_up()
    prepare_all(engine)
    assert graphs(engine) == before and said(engine) == wanted


def test_steps_with_adapters(adapters: tuple[Path, dict[str, Path]]) -> None:  # noqa: F811
    plain, engine = (make_with_adapters(adapters) for _ in range(2))
    prepare_all(engine)
    before = graphs(engine)
    for name in (None, *adapters[1]):
        assert said(engine, name) == said(plain, name)
    assert graphs(engine) == before


def test_steps_with_guesses(checkpoint: Path) -> None:
    wanted = said(make_with_guesses(checkpoint, 3))
    engine = make_with_guesses(checkpoint, 3)
    prepare_all(engine)
    before = graphs(engine)
    assert said(engine) == wanted and graphs(engine) == before


def test_a_large_engine_keeps_memory_for_its_largest_step(checkpoint: Path) -> None:
    from altiplano.engine.config import read_config
    from altiplano.engine.cuda.loading import step_bytes

    most = 1024
    engine = make(checkpoint, "bf16", max_num_seqs=most, max_num_batched_tokens=most, num_blocks=2 * most + 1)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    pieces = prepare_all(engine)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    taken = before - free
    print(
        f"{len(graphs(engine))} graphs take {taken / 2**20:.0f} MiB, {sum(pieces):.1f} s; the longest piece {max(pieces):.2f} s"
    )
    assert taken < 4 << 30
    assert free >= step_bytes(engine.config, read_config(checkpoint))
    # One token each, so that all begin in one step; then all decode in one.
    answers = engine.generate(prompts(most, 1, 1), SEEDED)
    assert [len(answer.token_ids) for answer in answers] == [SEEDED.max_tokens] * most
    assert max(record.decodes for record in engine.step_log.last()) == most
