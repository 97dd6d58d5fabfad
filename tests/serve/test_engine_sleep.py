"""What is known of an engine's sleep when several ask at once, and nothing becomes of it."""

import asyncio
import random
from collections.abc import Callable

import pytest

from altiplano.serve import engine_sleep
from altiplano.serve import messages as m
from altiplano.serve.engine_errors import EngineDiedError, RefusedError
from altiplano.serve.engine_sleep import EngineSleep


class Engine:
    """The other end: it has been asked, and says nothing until `answer`."""

    def __init__(self) -> None:
        self.asked = list[asyncio.Future[m.Done]]()
        self.sleep = EngineSleep(self._call, lambda: 0)

    async def _call(self, make: Callable[[int], m.Command]) -> m.Done:
        self.asked.append(asyncio.get_running_loop().create_future())
        return await self.asked[-1]

    async def ask(self, *changes: str) -> list["asyncio.Task[None]"]:
        """Ask for "sleep" and "wake up", one after the other."""
        tasks = [asyncio.create_task(self.sleep.begin(1) if change == "sleep" else self.sleep.end()) for change in changes]
        while len(self.asked) < len(changes):
            await asyncio.sleep(0)
        return tasks

    def answer(self, *said: Exception | None) -> None:
        """All in one go, as they lie in one packet; None: done."""
        for future, error in zip(self.asked, said, strict=True):
            if error is None:
                future.set_result(m.Done(0))
            else:
                future.set_exception(error)
        self.asked.clear()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        (("sleep", "sleep"), RefusedError("engine vllm does not sleep")),
        (("sleep", "sleep"), EngineDiedError("the engine's process ended")),
        (("sleep", "wake up"), EngineDiedError("the engine's process ended")),
    ],
)
def test_when_nobody_gets_what_he_asked_for_it_is_awake(changes: tuple[str, ...], error: Exception) -> None:
    async def story() -> list[BaseException | None]:
        engine = Engine()
        asked = await engine.ask(*changes)
        assert engine.sleep.level == 1
        engine.answer(*(error for _ in changes))
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert engine.sleep.level == 0
        engine.sleep.check_awake()
        return told

    assert asyncio.run(story()) == [error] * 2


def test_who_asks_for_sleep_last_gets_it() -> None:
    async def story() -> None:
        engine = Engine()
        for change in ("sleep", "wake up", "sleep"):
            asked = await engine.ask(change)
            engine.answer(None)
            await asyncio.gather(*asked)
        assert engine.sleep.level == 1

        # It is woken up, and meanwhile somebody wants it to sleep: nobody begins in between.
        asked = await engine.ask("wake up", "sleep")
        engine.asked.pop(0).set_result(m.Done(0))
        await asked[0]
        assert engine.sleep.level == 1
        engine.answer(None)
        await asked[1]
        assert engine.sleep.level == 1 and not engine.sleep.turning

    asyncio.run(story())


async def restart(engine: Engine) -> None:
    """The process dies, another one takes its place and is asked something."""
    engine.sleep.restarted()
    while not engine.asked:
        await asyncio.sleep(0)


async def die_asleep(engine: Engine) -> None:
    """It falls asleep, and then its process is another one."""
    (asked,) = await engine.ask("sleep")
    engine.answer(None)
    await asked
    await restart(engine)


async def settle(engine: Engine) -> None:
    while engine.sleep.turning:
        await asyncio.sleep(0)


@pytest.mark.parametrize("error", [RefusedError("no memory for the weights"), EngineDiedError("the engine's process ended")])
def test_an_engine_that_cannot_sleep_after_a_restart_is_known_to_be_awake(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        engine = Engine()
        await die_asleep(engine)
        assert engine.sleep.level == 1 and engine.sleep.turning, "nobody begins meanwhile"
        engine.answer(error)
        await settle(engine)
        assert engine.sleep.level == 0
        engine.sleep.check_awake()

    asyncio.run(story())
    assert "does not sleep as the one before" in caplog.text


def test_a_restarted_engine_sleeps_until_it_is_woken_up() -> None:
    async def story() -> None:
        engine = Engine()
        await die_asleep(engine)
        engine.answer(None)
        await settle(engine)
        assert engine.sleep.level == 1
        (asked,) = await engine.ask("wake up")
        engine.answer(None)
        await asked
        assert engine.sleep.level == 0
        engine.sleep.restarted()
        assert not engine.sleep.turning and not engine.asked

    asyncio.run(story())


def test_a_sleep_that_came_true_too_late_and_cannot_be_taken_back_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """It fell asleep just after nobody waited any more, and there is no memory left to wake up."""

    async def story() -> None:
        engine = Engine()
        monkeypatch.setattr(engine_sleep, "TIMEOUT_S", 0)
        asked = asyncio.create_task(engine.sleep.begin(1))
        while len(engine.asked) < 1:
            await asyncio.sleep(0)
        monkeypatch.setattr(engine_sleep, "TIMEOUT_S", 600)
        while len(engine.asked) < 2:
            await asyncio.sleep(0)
        engine.answer(None, RefusedError("waking up needs 3.0 GiB and the GPU has 1.0 GiB free"))
        with pytest.raises(RefusedError, match="waking up needs"):
            await asked
        assert engine.sleep.level == 1

    asyncio.run(story())


def test_what_comes_true_when_nobody_waits_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        engine = Engine()
        (asked,) = await engine.ask("sleep")
        engine.answer(None)
        await asked
        monkeypatch.setattr(engine_sleep, "TIMEOUT_S", 0)
        (asked,) = await engine.ask("wake up")
        with pytest.raises(TimeoutError):
            await asked
        assert engine.sleep.level == 1 and not engine.sleep.turning, "an engine that hangs is started again"
        engine.answer(None)
        while engine.sleep._asked:
            await asyncio.sleep(0)
        assert engine.sleep.level == 0

    asyncio.run(story())


class Process:
    """An engine process that takes commands in order, may refuse, may be slower than anybody waits, and may die at any moment."""

    def __init__(self, dice: random.Random) -> None:
        self._dice, self._inbox = dice, list[tuple[m.Command, asyncio.Future[m.Done]]]()
        self._started = asyncio.Event()
        self._started.set()
        self.level = 0
        self.sleep = EngineSleep(self._call, lambda: 0)

    async def _call(self, make: Callable[[int], m.Command]) -> m.Done:
        await self._started.wait()
        future = asyncio.get_running_loop().create_future()
        self._inbox.append((make(0), future))
        return await future

    def work(self) -> None:
        """Take the next command, if there is one."""
        if not self._inbox:
            return
        command, future = self._inbox.pop(0)
        wanted = command.level if isinstance(command, m.Sleep) else 0
        refused = self._dice.random() < 0.2 or (wanted and self.level not in (0, wanted))
        self.level = self.level if refused else wanted
        if not future.done():
            future.set_exception(RefusedError("not now")) if refused else future.set_result(m.Done(0))

    def die(self) -> None:
        for _, future in self._inbox:
            if not future.done():
                future.set_exception(EngineDiedError("it ended"))
        self._inbox.clear()
        self._started.clear()

    def start_again(self) -> None:
        if not self._started.is_set():
            self.level = 0
            self.sleep.restarted()
            self._started.set()

    @property
    def rests(self) -> bool:
        return not self._inbox and not self.sleep.turning and not self.sleep._asked and self._started.is_set()


@pytest.mark.parametrize("seed", range(100))
def test_whatever_happens_what_is_known_is_what_the_engine_is(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dice = random.Random(seed)

    async def story() -> None:
        process, asked = Process(dice), list[asyncio.Task[None]]()
        deeds: list[Callable[[], object]] = [
            lambda: asked.append(asyncio.create_task(process.sleep.begin(dice.choice((1, 2))))),
            lambda: asked.append(asyncio.create_task(process.sleep.end())),
            process.work, process.work, process.work, process.die, process.start_again, process.start_again,
            # Some wait for nothing: what they have asked for comes true all the same.
            lambda: monkeypatch.setattr(engine_sleep, "TIMEOUT_S", dice.choice((0, 600))),
            lambda: dice.choice(asked).cancel() if asked else None,
        ]  # fmt: skip
        for _ in range(60):
            dice.choice(deeds)()
            for _ in range(dice.randrange(4)):
                await asyncio.sleep(0)
        process.start_again()
        while not process.rests or not all(task.done() for task in asked):
            process.work()
            await asyncio.sleep(0)
        await asyncio.gather(*asked, return_exceptions=True)
        assert process.sleep.level == process.level

    asyncio.run(story())
