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


def prepare(engine: Engine) -> list[float]:
    """Do all that there is to do; returns seconds of each piece, during which a request would have waited."""
    seconds = list[float]()
    while True:
        started = time.perf_counter()
        if not engine.prepare():
            return seconds
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)


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
    pieces = prepare(engine)
    print(f"{kind}, {quantization}: {len(pieces)} pieces, {sum(pieces):.2f} s, the longest {max(pieces):.2f} s")
    before = graphs(engine)
    assert said(engine) == wanted and graphs(engine) == before
    engine.sleep()
    assert not engine.prepare() and not graphs(engine)
    engine.wake_up()
    prepare(engine)
    assert graphs(engine) == before and said(engine) == wanted


def test_steps_with_adapters(adapters: tuple[Path, dict[str, Path]]) -> None:  # noqa: F811
    plain, engine = (make_with_adapters(adapters) for _ in range(2))
    prepare(engine)
    before = graphs(engine)
    for name in (None, *adapters[1]):
        assert said(engine, name) == said(plain, name)
    assert graphs(engine) == before


def test_steps_with_guesses(checkpoint: Path) -> None:
    wanted = said(make_with_guesses(checkpoint, 3))
    engine = make_with_guesses(checkpoint, 3)
    prepare(engine)
    before = graphs(engine)
    assert said(engine) == wanted and graphs(engine) == before


def test_a_large_engine_keeps_memory_for_its_largest_step(checkpoint: Path) -> None:
    engine = make(checkpoint, "bf16", max_num_seqs=1024, num_blocks=2000)
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    pieces = prepare(engine)
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info()[0]
    print(
        f"{len(graphs(engine))} graphs take {taken / 2**20:.0f} MiB, {sum(pieces):.1f} s; the longest piece {max(pieces):.2f} s"
    )
    assert taken < 4 << 30
