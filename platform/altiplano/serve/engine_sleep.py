"""The front end's side of an engine's sleep: what it is, who may begin meanwhile, and what becomes of those under way."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import AsleepError, RefusedError

TIMEOUT_S = 600.0  # to fall asleep, with the answers that are waited for, or to wake up

Call = Callable[[Callable[[int], m.Command], float], Awaitable[m.Done]]


class EngineSleep:
    """The sleep of one engine process and of those that follow it. All methods belong to the client's event loop.

    `call` asks the engine and waits for its answer, `withdraw` takes a sleep back that nobody waits for any more; `count_answers`:
    those under way.
    """

    def __init__(self, call: Call, withdraw: Callable[[], None], count_answers: Callable[[], int]) -> None:
        self._call, self._withdraw, self._count_answers = call, withdraw, count_answers
        self.level = 0  # 0: awake; what was asked for, from the moment on that it was
        self._confirmed = 0  # the same, but what the engine has said
        self._turns = set[asyncio.Task[None]]()  # falling asleep or waking up

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
        await self._turn(self._fall_asleep(level, mode == "abort"))

    async def end(self) -> None:
        """Wake up, or take the sleep back while it waits. Returns when requests are taken.

        Raises:
            RefusedError: there is too little memory now, or the checkpoint cannot be read; it sleeps on.
            EngineDiedError: the process ended. TimeoutError: it does not wake up.
        """
        if self.level:
            await self._turn(self._wake_up())

    async def _turn(self, change: Coroutine[Any, Any, None]) -> None:
        """Go on to the end though who asked may leave: what is known here stays what the engine is."""
        task = asyncio.create_task(self._settled(change))
        self._turns.add(task)
        task.add_done_callback(self._turned)
        await asyncio.shield(task)

    async def _settled(self, change: Coroutine[Any, Any, None]) -> None:
        try:
            await change
        finally:
            # Here and not in `_turned`: answers to several wishes may come at once, and the last of them has to see that it is the last.
            self._turns.discard(asyncio.current_task())
            if not self._turns:
                self.level = self._confirmed

    def _turned(self, task: "asyncio.Task[None]") -> None:
        self._turns.discard(task)
        if not task.cancelled():
            task.exception()  # known to who asked, unless nobody waits

    async def _fall_asleep(self, level: int, abort: bool) -> None:
        try:
            await self._call(lambda call: m.Sleep(call, level, abort), TIMEOUT_S)
            self._confirmed = level
        except TimeoutError:
            self._withdraw()
            raise

    async def _wake_up(self) -> None:
        await self._call(m.WakeUp, TIMEOUT_S)
        self._confirmed = 0
