"""Shadow traffic on a real endpoint: the challenger answers again what the champion has answered, and nobody notices."""

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.serve.shadow import MAX_RUNNING, Shadow, ShadowSums

from .conftest import make_adapter
from .test_feedback import ARMS, Divided

ONLY_CHAMPION = ARMS | {"weights": {"champion": 100, "challenger": 0}}


@pytest.fixture(scope="module")
def divided(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    made = Divided(adapter, make_adapter(tmp_path_factory.mktemp("second"), seed=2))
    yield made
    made.close()


@pytest.fixture
def shadowed(divided: Divided) -> Callable[..., dict[str, Any]]:
    """Configure a fresh test, ask, and wait until so many answers were given again."""

    def ask(count: int, to: str = "orders-2", fraction: float = 1.0, **more: Any) -> dict[str, Any]:
        divided.configure(arms=None)
        aliases = {"champion": "orders-1", "challenger": to}
        divided.configure(arms=ONLY_CHAMPION, shadow={"arm": "challenger", "fraction": fraction}, aliases=aliases)
        for _ in range(count):
            before = _sums(divided)
            answer = divided.ask(**more)
            assert answer.status_code == 200 and answer.headers["x-altiplano-arm"] == "champion"
            while fraction == 1 and _done(_sums(divided)) == _done(before):
                continue
        return _sums(divided)

    return ask


def _sums(divided: Divided) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{divided.url}/v1/ab", timeout=60).json()["replicas"][0]["shadow"]
    return found


def _done(sums: dict[str, Any]) -> int:
    return int(sums["compared"] + sums["failed"])


@pytest.mark.parametrize("stream", [False, True])
def test_equal_weights_give_equal_answers_and_others_do_not(shadowed: Callable[..., dict[str, Any]], stream: bool) -> None:
    same = shadowed(3, to="orders-1", stream=stream)
    assert (same["compared"], same["greedy"], same["identical"], same["failed"]) == (3, 3, 3, 0)
    described = ShadowSums.merged([ShadowSums.from_json(same), ShadowSums.from_json(same)]).described()
    assert described["compared"] == 6 and described["exact_match"] == 1 and described["length_ratio"] == 1
    assert described["ttft_ratio"] is not None and described["ttft_ratio"] > 0
    other = shadowed(3, to="orders-2", stream=stream)
    assert (other["compared"], other["identical"]) == (3, 0)


def test_the_user_gets_the_champions_words_and_the_sums_of_the_test_know_nothing_of_copies(
    divided: Divided, shadowed: Callable[..., dict[str, Any]]
) -> None:
    shadowed(2)
    assert {arm: sums["requests"] for arm, sums in divided.sums().items()} == {"champion": 2}
    assert divided.ask().json()["choices"][0]["text"] == divided.ask(model="orders-1").json()["choices"][0]["text"]
    usage = httpx.get(f"{divided.url}/v1/usage", timeout=60).json()["data"]
    copies = [row for row in usage if row["model"] == "shadow"]
    assert copies and all(row["arm"] == "challenger" for row in copies)


def test_random_answers_are_not_compared_word_by_word(shadowed: Callable[..., dict[str, Any]]) -> None:
    sums = shadowed(2, temperature=1.0)
    assert (sums["compared"], sums["greedy"], sums["length_ratio"]["count"]) == (2, 0, 2)


def test_none_some_and_no_more_than_a_few_at_a_time(divided: Divided, shadowed: Callable[..., dict[str, Any]]) -> None:
    assert _done(shadowed(5, fraction=0.0)) == 0
    for wrong in ({"arm": "challenger"}, {"arm": "challenger", "fraction": 2}, {"arm": 1, "fraction": 1}):
        with pytest.raises(ValueError, match="shadow"):
            Shadow.of(wrong)
    with pytest.raises(ValueError, match="shadow needs arms"):
        divided.configure(arms=None, shadow={"arm": "challenger", "fraction": 1})


def test_copies_are_bounded(divided: Divided) -> None:
    divided.configure(arms=None)
    divided.configure(arms=ONLY_CHAMPION, shadow={"arm": "challenger", "fraction": 1.0})
    shadow = divided.generator.experiment.shadow
    assert shadow is not None
    running = []

    class Seen(set[Any]):
        """The set of running copies, which notes how many there were."""

        def add(self, task: Any) -> None:
            super().add(task)
            running.append(len(self))

    shadow._running = Seen()
    with ThreadPoolExecutor(8) as pool:
        with divided.stopped():  # all of them begin together, and end so
            answers = [pool.submit(divided.ask, max_tokens=100) for _ in range(8)]
            divided.until(lambda: len(divided.generator.client._streams) == 8)
        assert [answer.result().status_code for answer in answers] == [200] * 8
    while _done(_sums(divided)) + _sums(divided)["skipped"] < 8:
        continue
    assert _sums(divided)["skipped"] > 0
    assert max(running) == MAX_RUNNING


def test_a_copy_that_sleep_ends_is_nobodys_failure(divided: Divided) -> None:
    divided.configure(arms=None)
    divided.configure(arms=ONLY_CHAMPION, shadow={"arm": "challenger", "fraction": 1.0})
    shadow, sleep = divided.generator.experiment.shadow, divided.generator.client.sleep
    assert shadow is not None
    sleeping = list[asyncio.Task[None]]()

    class Tired(set[Any]):
        """The set of running copies: as soon as there is one, somebody puts the engine to sleep."""

        def add(self, task: Any) -> None:
            super().add(task)
            sleeping.append(asyncio.create_task(sleep.begin(1, "abort")))

    shadow._running = Tired()
    assert divided.ask(max_tokens=200).status_code == 200
    while not (_done(_sums(divided)) + _sums(divided)["skipped"]):
        continue
    assert (_sums(divided)["skipped"], _done(_sums(divided))) == (1, 0)
    divided.run(asyncio.wait_for(sleeping[0], 60))
    divided.run(sleep.end())
    assert divided.ask().status_code == 200
