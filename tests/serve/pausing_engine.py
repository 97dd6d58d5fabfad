"""The engine's process as always, but from SIGUSR1 on it computes a few steps only, until SIGUSR2; commands it hears all the time.

A test that needs answers which are under way has them so, however long it takes to do something with them.
"""

import signal
from typing import Any

from altiplano.engine import Engine
from altiplano.engine.cpu.runner import CpuRunner
from altiplano.serve.engine_process import main

STEPS = 32  # enough for first words, and far from the end of a long answer
execute, is_blocked = CpuRunner.execute, Engine.is_blocked
left: int | None = None


def pause_soon(*_: Any) -> None:
    global left
    left = STEPS


def go_on(*_: Any) -> None:
    global left
    left = None


def execute_and_count(self: CpuRunner, plan: Any) -> Any:
    global left
    if left is not None:
        left -= 1
    return execute(self, plan)


def is_blocked_or_pauses(self: Engine) -> bool:
    return left == 0 or is_blocked(self)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, pause_soon)
    signal.signal(signal.SIGUSR2, go_on)
    CpuRunner.execute = execute_and_count  # type: ignore[method-assign]
    Engine.is_blocked = is_blocked_or_pauses  # type: ignore[method-assign]
    main()
