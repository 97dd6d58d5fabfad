"""What is known of an engine's sleep when several ask at once, and nothing becomes of it."""

import asyncio
from collections.abc import Callable

import pytest

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import EngineDiedError, RefusedError
from altiplano.serve.engine_sleep import EngineSleep


class Engine:
    """The other end: it has been asked, and says nothing until `answer`."""

    def __init__(self) -> None:
        self.asked = list[asyncio.Future[m.Done]]()
        self.sleep = EngineSleep(self._call, lambda: 0)

    async def _call(self, make: Callable[[int], m.Command], timeout_s: float) -> m.Done:
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


@pytest.mark.parametrize(
    "error", [RefusedError("no memory for the weights"), EngineDiedError("the engine's process ended"), TimeoutError()]
)
def test_an_engine_that_cannot_sleep_after_a_restart_is_known_to_be_awake(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        engine = Engine()
        (asked,) = await engine.ask("sleep")
        engine.answer(None)
        await asked
        await restart(engine)
        assert engine.sleep.level == 1 and engine.sleep.turning, "nobody begins meanwhile"
        engine.answer(error)
        while engine.sleep.turning:
            if engine.asked:
                engine.answer(None)  # the sleep that took too long is taken back
            await asyncio.sleep(0)
        assert engine.sleep.level == 0
        engine.sleep.check_awake()

    asyncio.run(story())
    assert "does not sleep as the one before" in caplog.text


def test_a_restarted_engine_sleeps_until_it_is_woken_up() -> None:
    async def story() -> None:
        engine = Engine()
        (asked,) = await engine.ask("sleep")
        engine.answer(None)
        await asked
        await restart(engine)
        engine.answer(None)
        while engine.sleep.turning:
            await asyncio.sleep(0)
        assert engine.sleep.level == 1
        (asked,) = await engine.ask("wake up")
        engine.answer(None)
        await asked
        assert engine.sleep.level == 0
        engine.sleep.restarted()
        assert not engine.sleep.turning and not engine.asked

    asyncio.run(story())


def test_a_sleep_that_came_true_too_late_and_cannot_be_taken_back_is_known() -> None:
    """It fell asleep just after nobody waited any more, and there is no memory left to wake up."""

    async def story() -> None:
        engine = Engine()
        (asked,) = await engine.ask("sleep")
        engine.answer(TimeoutError())
        while not engine.asked:
            await asyncio.sleep(0)
        engine.answer(RefusedError("waking up needs 3.0 GiB and the GPU has 1.0 GiB free"))
        with pytest.raises(RefusedError, match="waking up needs"):
            await asked
        assert engine.sleep.level == 1

    asyncio.run(story())
