"""The front end's side of an engine's sleep: what it is, who may begin meanwhile, and what becomes of those under way."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import AsleepError, EngineDiedError, RefusedError

TIMEOUT_S = 600.0  # to fall asleep, with the answers that are waited for, or to wake up
WITHDRAW_S = 60.0  # to take back what took longer

Call = Callable[[Callable[[int], m.Command]], Awaitable[m.Done]]

Change = Coroutine[Any, Any, None]

log = logging.getLogger("altiplano.sleep")


class EngineSleep:
    """The sleep of one engine process and of those that follow it. All methods belong to the client's event loop.

    `call` asks the engine, once its process has started, and waits for its answer as long as it takes; `count_answers`: those under
    way. What was asked for may come true long after anybody waits: what is known follows what the engine says, whenever it says it.
    """

    def __init__(self, call: Call, count_answers: Callable[[], int]) -> None:
        self._call, self._count_answers = call, count_answers
        self.level = 0  # 0: awake; what was asked for, from the moment on that it was
        self._confirmed = 0  # the same, but what the engine has said
        self._waking = 0  # those who want it awake
        self._turns = set[asyncio.Task[None]]()  # falling asleep or waking up, within a time
        self._asked = set[asyncio.Task[None]]()  # what the engine has not answered yet

    @property
    def turning(self) -> bool:
        """Whether the engine is busy falling asleep or waking up, and may answer nobody meanwhile."""
        return bool(self._turns) and not self._count_answers()

    def check_awake(self) -> None:
        """
        Raises:
            AsleepError: it sleeps, or is about to.
        """
        if self.level:
            raise AsleepError

    async def begin(self, level: int, mode: str | None = None) -> None:
        """Give the engine's memory back, until `end` and over restarts of the process; nobody begins from now on. See Engine.sleep.

        `mode`: what becomes of answers under way: "wait" for their ends, "abort" them; None: they forbid it.

        Raises:
            RefusedError: answers are under way, or the engine cannot sleep. It is as it was.
            EngineDiedError: the process ended, and starts again awake. TimeoutError: answers did not end; it stays awake.
        """
        running = self._count_answers()
        if mode is None and running:
            raise RefusedError(f"{running} answers are under way: wait for them (mode=wait), or end them (mode=abort)")
        self.level = self.level or level
        await asyncio.shield(self._begin_turn(self._fall_asleep(level, mode == "abort"), self._wake_up))

    async def end(self) -> None:
        """Wake up, or take the sleep back while it waits. Returns when requests are taken.

        Raises:
            RefusedError: there is too little memory now, or the checkpoint cannot be read; it sleeps on.
            EngineDiedError: the process ended, and sleeps again once it has started. TimeoutError: it does not wake up.
        """
        if self.level:
            await asyncio.shield(self._begin_turn(self._wake_up()))

    def restarted(self) -> None:
        """The process is a new one, which is awake: it is put to sleep again if the one before was and nobody wants it awake.

        It stays awake if that fails.
        """
        self._confirmed = 0
        if self.level and not self._waking:
            self._begin_turn(self._fall_asleep_again(self.level))

    def _begin_turn(self, change: Change, take_back: Callable[[], Change] | None = None) -> "asyncio.Task[None]":
        """Go on to the end though who asked may leave; a change that takes too long is taken back."""
        task = asyncio.create_task(self._turn(change, take_back))
        self._turns.add(task)
        task.add_done_callback(self._turned)
        return task

    async def _turn(self, change: Change, take_back: Callable[[], Change] | None) -> None:
        try:
            try:
                await self._answered(change, TIMEOUT_S)
            except TimeoutError:
                if take_back is not None:
                    await self._answered(take_back(), min(TIMEOUT_S, WITHDRAW_S))
                raise
        finally:
            # Here and not in `_turned`: answers to several wishes may come at once, and the last of them has to see that it is the last.
            self._turns.discard(asyncio.current_task())
            self._settle()

    async def _answered(self, change: Change, timeout_s: float) -> None:
        """Wait for a change, which goes on when time is up."""
        task = asyncio.create_task(change)
        self._asked.add(task)
        task.add_done_callback(self._came_true)
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise TimeoutError
        task.result()

    def _turned(self, task: "asyncio.Task[None]") -> None:
        self._turns.discard(task)
        if not task.cancelled():
            task.exception()  # known to who asked, unless nobody waits

    def _came_true(self, task: "asyncio.Task[None]") -> None:
        self._asked.discard(task)
        if not task.cancelled():
            task.exception()
        self._settle()

    def _settle(self) -> None:
        if not self._turns:
            self.level = self._confirmed

    async def _fall_asleep(self, level: int, abort: bool) -> None:
        await self._call(lambda call: m.Sleep(call, level, abort))
        self._confirmed = level

    async def _fall_asleep_again(self, level: int) -> None:
        try:
            await self._fall_asleep(level, abort=False)
        except (RefusedError, EngineDiedError) as error:
            log.error("the engine, which was started again, does not sleep as the one before: %s", error)

    async def _wake_up(self) -> None:
        self._waking += 1
        try:
            await self._call(m.WakeUp)
        finally:
            self._waking -= 1
        self._confirmed = 0
