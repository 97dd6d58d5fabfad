"""An engine's process that is quiet prepares for steps to come, a piece at a time, and whoever asks waits for one piece at most."""

import queue
import socket
import threading
from pathlib import Path

import pytest

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.serve import engine_process
from altiplano.serve import messages as m
from altiplano.serve.engine_process import Loop

from ..engine.virtual import Clock, VirtualRunner

PIECE_S, STEP_S = 0.25, 0.5  # sums of such numbers are exact
ADD = m.Add("x", [5, 6], m.Sampling(max_tokens=1, temperature=0.0))


class Runner(VirtualRunner):
    """It has `pieces` to prepare, and more again once it has slept."""

    def __init__(self, clock: Clock, pieces: int) -> None:
        super().__init__(clock, lambda prompts, decodes: STEP_S)
        self.pieces = self._all = pieces
        self.begun = list[float]()
        self.slept = False

    def prepare(self) -> bool:
        assert not self.slept
        if self.pieces == 0:
            return False
        self.pieces -= 1
        self.begun.append(self._clock.now)
        self._clock.now += PIECE_S
        return True

    def sleep(self, level: int) -> None:
        self.slept = True

    def wake_up(self) -> None:
        self.slept, self.pieces = False, self._all


class Inbox:
    """What comes at which second; to wait for it moves the clock."""

    def __init__(self, clock: Clock, comes: list[tuple[float, m.Command | None]]) -> None:
        self._clock, self._comes = clock, comes

    def get(self, timeout: float = float("inf")) -> m.Command | None:
        end = self._clock.now + timeout
        if self._comes[0][0] > end:
            self._clock.now = end
            raise queue.Empty
        at, command = self._comes.pop(0)
        self._clock.now = max(self._clock.now, at)
        return command

    def get_nowait(self) -> m.Command | None:
        return self.get(timeout=0.0)

    def put(self, message: object) -> None:
        pass


def make(runner: VirtualRunner, clock: Clock) -> Engine:
    return Engine(EngineConfig(Path("none"), max_model_len=64, num_blocks=8, block_size=16), runner, clock)


def told(runner: Runner, clock: Clock, *comes: tuple[float, m.Command | None]) -> list[tuple[float, str]]:
    """What an engine's process says, and when. It is ready at second 0, and hears what `comes`."""
    said = list[tuple[float, str]]()
    ours, its = socket.socketpair()
    with ours, its, pytest.MonkeyPatch.context() as patch:
        loop = Loop(its, make(runner, clock), clock=clock)
        patch.setattr(loop, "_inbox", Inbox(clock, [*comes, (1000.0, None)]))
        patch.setattr(loop, "_send", lambda report: said.append((clock.now, type(report).__name__)))
        patch.setattr(engine_process, "freeze", lambda: said.append((clock.now, "frozen")))
        loop.run()
    return said


def test_whoever_asks_waits_for_one_piece_and_work_goes_first() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=5)
    said = told(runner, clock, (2.3, m.AskStats(1)), (2.6, ADD), (2.65, m.Abort("nobody")))
    # It is ready before anything is prepared; statistics are told between two pieces, which go on; a request begins quiet anew.
    assert runner.begun == [2.0, 2.25, 2.5, 5.25, 5.5]
    assert said == [(0.0, "Ready"), (2.5, "Done"), (3.25, "Step"), (5.75, "frozen")]


def test_who_asks_at_once_after_the_start_waits_for_nothing() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=1)
    assert told(runner, clock, (1.0, ADD))[:2] == [(0.0, "Ready"), (1.5, "Step")]
    assert runner.begun == [3.5]


def test_preparing_is_in_no_statistics() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=3)
    engine = make(runner, clock)
    for _ in range(2):
        engine.generate([[5, 6]], SamplingParams(max_tokens=1))
        while engine.prepare():
            pass
    assert runner.pieces == 0
    assert (engine.stats().steps, engine.stats().step_seconds) == (2, 2 * STEP_S)
    assert [(record.seconds, record.gap_seconds) for record in engine.step_log.last()] == [(STEP_S, 0.0)] * 2


def test_asleep_nothing_is_prepared_and_awake_all_is_prepared_again() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=2)
    said = told(runner, clock, (2.1, m.Sleep(1, 1)), (50.0, m.WakeUp(2)))
    assert runner.begun == [2.0, 52.0, 52.25]
    assert said == [(0.0, "Ready"), (2.25, "Done"), (4.25, "frozen"), (50.0, "Done"), (52.5, "frozen")]


def test_nothing_is_prepared_while_somebody_waits_for_a_grammar() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=2)
    engine = make(runner, clock)
    engine.add_request("x", [5, 6], SamplingParams(structured=True))
    while not engine.is_blocked():
        engine.step()
    assert engine.has_unfinished() and not engine.prepare() and runner.pieces == 2
    engine.abort("x")
    engine.step()
    assert engine.prepare() and runner.pieces == 1


def test_who_runs_an_engine_himself_prepares_nothing() -> None:
    clock = Clock()
    runner = Runner(clock, pieces=2)
    make(runner, clock).generate([[5, 6]], SamplingParams(max_tokens=4))
    assert runner.pieces == 2
    assert not make(VirtualRunner(clock, lambda prompts, decodes: 1.0), clock).prepare(), "on a CPU there is nothing to do"


def test_a_process_that_always_has_something_to_prepare_answers_and_ends() -> None:
    ours, its = socket.socketpair()
    ours.settimeout(240)  # it answers at once, or never
    clock = Clock()
    thread = threading.Thread(target=Loop(its, make(Runner(clock, pieces=-1), clock), quiet_s=0.0).run, daemon=True)
    thread.start()

    def hear() -> m.Report:
        (length,) = m.LENGTH.unpack(ours.recv(m.LENGTH.size, socket.MSG_WAITALL))
        report: m.Report = m.decode_report(ours.recv(length, socket.MSG_WAITALL))
        return report

    try:
        assert isinstance(hear(), m.Ready)
        for call in range(3):
            ours.sendall(m.frame(m.AskStats(call)) + m.frame(ADD))
            statistics, step = hear(), hear()
            assert isinstance(statistics, m.Done) and isinstance(step, m.Step)
            assert statistics.stats is not None and statistics.stats["steps"] == call
            assert step.tokens[0].finish_reason == "length"
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(240)
        ours.close()
        its.close()
    assert not thread.is_alive()
