"""Graphs that an engine captures while nobody waits: which, in what order, and what becomes of those that cannot be captured.

A graph is only remembered, and steps compute nothing unless a test says so: on Triton's interpreter they take seconds.
"""

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu shows this on the GPU itself", allow_module_level=True)

from altiplano.engine import Engine
from altiplano.engine.cuda import graphs, idle
from altiplano.engine.cuda.graphs import PLAIN, DecodeGraphs, Kind, buckets_for
from altiplano_kernels.cuda_program import KernelBuildError

from .interpreted import cuda_interpreted
from .test_cuda_engine import FILTERED, GREEDY, answers, make, models  # noqa: F401 (a fixture)

SHORT, SHORT_FILTERED = replace(GREEDY, max_tokens=3), replace(FILTERED, max_tokens=3)
PROMPT = [1, 2, 3]
Wanted = tuple[int, Kind]
ENSURE = DecodeGraphs.ensure
FILTERS, ADAPTED, BOTH = Kind(filtered=True), Kind(adapted=True), Kind(filtered=True, adapted=True)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int, Kind]]]:
    """Bucket, steps and kind of every graph that is captured."""
    found = list[tuple[int, int, Kind]]()

    def capture(self: DecodeGraphs, bucket: int, steps: int, kind: Kind) -> str:
        found.append((bucket, steps, kind))
        return "a graph"

    with cuda_interpreted():
        monkeypatch.setattr(DecodeGraphs, "ensure", ENSURE)
        monkeypatch.setattr(DecodeGraphs, "_capture", capture)
        yield found


@pytest.fixture
def captured(remembered: list[tuple[int, int, Kind]], monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, Kind]]:
    """The same, where steps compute nothing."""
    from altiplano.engine.cuda.runner import CudaRunner

    monkeypatch.setattr(CudaRunner, "_decode_step", lambda self, bucket, kind: None)
    return remembered


def steps_of(captured: list[tuple[int, int, Kind]]) -> list[Wanted]:
    return [(bucket, kind) for bucket, steps, kind in captured if steps == 1]


def prepare_all(engine: Engine) -> None:
    for _ in range(200):
        if not engine.prepare():
            return
    pytest.fail("there is always something to prepare")


def test_buckets_hold_every_batch_and_none_that_cannot_come() -> None:
    assert buckets_for(1) == [1] and buckets_for(3) == [1, 2, 4] and buckets_for(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert buckets_for(1024) == list(graphs.BUCKETS) and buckets_for(1500) == [*graphs.BUCKETS, 1280, 1536]
    for most in (5, 100, 1030, 2000):
        assert buckets_for(most) == sorted({graphs.bucket_of(batch) for batch in range(1, most + 1)})


def test_an_idle_engine_captures_plain_steps_first_and_small_batches_first(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
) -> None:
    engine = make(models[0], max_num_seqs=3)
    for count in range(6):
        assert len(steps_of(captured)) == count
        assert engine.prepare()
    assert not engine.prepare()
    # Bursts of up to eight steps are a graph too, which is there before its bucket counts as captured.
    assert captured == [(bucket, steps, kind) for kind in (PLAIN, FILTERS) for bucket in (1, 2, 4) for steps in (8, 1)]
    for params in (SHORT, SHORT_FILTERED):
        answers(engine, [PROMPT] * 3, params)
    assert len(captured) == 12, "no step has had to stop for a graph"


def test_what_was_captured_ahead_changes_no_token(
    models: tuple[Path, Path],  # noqa: F811
    remembered: list[tuple[int, int, Kind]],
) -> None:
    """The step before a capture really runs, on rows that belong to nobody."""
    engine = make(models[0], max_num_seqs=2)
    before = answers(engine, [PROMPT] * 2, SHORT)
    assert steps_of(remembered) == [(2, PLAIN)]
    prepare_all(engine)
    assert len(steps_of(remembered)) == 4 and answers(engine, [PROMPT] * 2, SHORT) == before


def test_only_kinds_that_may_come_are_captured(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
) -> None:
    engine = make(models[0], 3, max_num_seqs=2)
    guessing = steps_of(captured)
    assert guessing and all(kind.guesses for _, kind in guessing), "as ever, these are there before the first request"
    prepare_all(engine)
    plain = [(bucket, kind) for kind in (PLAIN, FILTERS) for bucket in (1, 2)]
    assert steps_of(captured) == guessing + plain
    engine.runner._adapters.add("tuned")
    adapted = [(bucket, kind) for kind in (ADAPTED, BOTH) for bucket in (1, 2)]
    # An adapter that came while somebody was answered.
    adapted_guesses = [(bucket, kind._replace(adapted=True)) for bucket, kind in guessing]
    missing = engine.runner._graphs.missing(engine.runner._wanted())
    assert missing == adapted + adapted_guesses


def test_steps_that_have_captured_a_graph_leave_less_to_do_and_sleep_leaves_all(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
) -> None:
    engine = make(models[0], max_num_seqs=2)
    answers(engine, [PROMPT] * 2, SHORT_FILTERED)
    assert steps_of(captured) == [(2, FILTERS)]
    prepare_all(engine)
    assert sorted(steps_of(captured)) == sorted((bucket, kind) for kind in (PLAIN, FILTERS) for bucket in (1, 2))
    engine.sleep()
    captured.clear()
    assert not engine.prepare() and not captured
    engine.wake_up()
    assert engine.prepare() and steps_of(captured) == [(1, PLAIN)]


def test_nothing_is_captured_ahead_while_somebody_is_answered(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
) -> None:
    engine = make(models[0], max_num_seqs=1)
    engine.add_request("x", PROMPT, SHORT)
    before = len(captured)
    assert not engine.prepare() and len(captured) == before
    while engine.has_unfinished():
        engine.step()
    assert engine.prepare()


@pytest.mark.parametrize(
    ("error", "others"),
    [(KernelBuildError("nothing compiles here"), [2, 4]), (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), [])],
)
def test_what_cannot_be_captured_is_told_once_and_left_to_the_step_that_needs_it(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    others: list[int],
) -> None:
    engine = make(models[0], max_num_seqs=3)
    capture = DecodeGraphs._capture

    def fail(self: DecodeGraphs, bucket: int, steps: int, kind: Kind) -> object:
        # The burst's graph is there already, the step's fails.
        if (bucket, steps) == (1, 1):
            raise error
        return capture(self, bucket, steps, kind)

    monkeypatch.setattr(DecodeGraphs, "_capture", fail)
    with caplog.at_level(logging.WARNING, "altiplano.engine"):
        for _ in range(2):
            prepare_all(engine)
    plain = [record.getMessage() for record in caplog.records if "filtered=False" in record.getMessage()]
    assert len(plain) == 1 and str(error) in plain[0] and type(error).__name__ in plain[0]
    assert [bucket for bucket, kind in steps_of(captured) if kind == PLAIN] == others
    answers(engine, [PROMPT] * 3, SHORT)
    assert (4, PLAIN) in steps_of(captured), "the engine goes on"
    with pytest.raises(type(error)):
        answers(engine, [PROMPT], SHORT)


def test_graphs_take_no_memory_that_steps_may_need(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from altiplano.engine.config import read_config
    from altiplano.engine.cuda.loading import step_bytes

    engine = make(models[0], max_num_seqs=3)
    need = 2 * step_bytes(engine.config, read_config(models[0]))
    free = need
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    assert engine.prepare()
    free = need - 1
    with caplog.at_level(logging.WARNING, "altiplano.engine"):
        assert not engine.prepare() and not engine.prepare()
    assert len(caplog.records) == 1 and "GiB free" in caplog.text
    assert steps_of(captured) == [(1, PLAIN)]
    answers(engine, [PROMPT] * 3, SHORT)
    assert steps_of(captured)[-1] == (4, PLAIN), "a step that needs a graph captures it"


def test_kernels_that_are_being_compiled_are_waited_for_a_moment_at_a_time(
    models: tuple[Path, Path],  # noqa: F811
    captured: list[tuple[int, int, Kind]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(idle, "COMPILING_S", 0.0)
    engine, compiled = make(models[0], max_num_seqs=1), threading.Event()
    assert not engine.runner.model.is_compiling(30.0)
    engine.runner.model._compiler = compiler = threading.Thread(target=compiled.wait)
    compiler.start()
    try:
        assert engine.prepare() and not captured
    finally:
        compiled.set()
        compiler.join()
    assert engine.prepare() and steps_of(captured) == [(1, PLAIN)]
