"""A rollout on a real endpoint under load: no request fails, a good challenger arrives, a bad one is taken back by itself."""

import asyncio
import json
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.serve import messages as m
from altiplano.serve.adapters import name_of
from altiplano.serve.arms import Arms
from altiplano.serve.engine_errors import RefusedError
from altiplano.serve.evidence import AbClient, NoEvidenceError, Reading
from altiplano.serve.outcomes import Outcomes
from altiplano.serve.rollout import Phase, Plan, State
from altiplano.serve.rollout_config import ChampionMovedError, configured
from altiplano.serve.rollout_controller import Controller
from altiplano.serve.rollout_store import NoRolloutError, RolloutBusyError, Saved, Store

from .conftest import Server, make_adapter

CLIENTS = 6
BODY = {"model": "champion", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0, "ignore_eos": True}


class Here:
    """The endpoint of a test, as `ServeControl` shows one."""

    def __init__(self, server: Server, champion: Path) -> None:
        self._server, self.sets = server, 0
        self._config: dict[str, Any] = {
            "adapters": {"orders-1": str(champion)},
            "aliases": {"champion": "orders-1", "orders": "orders-1"},
        }
        server.run(server.generator.reconfigure(self._config))

    def get_user_config(self) -> dict[str, Any]:
        return json.loads(json.dumps(self._config))  # type: ignore[no-any-return]

    def set_user_config(self, user_config: dict[str, Any]) -> None:
        self._server.run(self._server.generator.reconfigure(user_config))
        self._config, self.sets = user_config, self.sets + 1


class Aliases:
    """The registry, as far as a rollout knows it."""

    def __init__(self) -> None:
        self.promoted: list[tuple[str, int]] = []
        self.away = 0

    def promote(self, name: str, version: int) -> None:
        if self.away:
            self.away -= 1
            raise RuntimeError("MLflow does not answer")
        self.promoted.append((name, version))


class Diary:
    """A journal in memory."""

    def __init__(self) -> None:
        self.moves: list[str] = []
        self.closed = 0

    def open(self, saved: Saved) -> str:
        return "run"

    def note(self, saved: Saved, outcomes: Outcomes, *, moved: bool) -> None:
        if moved:
            self.moves.append(saved.state.phase)

    def close(self, saved: Saved) -> None:
        self.closed += 1


class Looks:
    """The reader of a controller, which notes how many requests of the challenger each look has found."""

    def __init__(self, url: str) -> None:
        self._reader, self.found = AbClient(url), list[int]()

    def read(self) -> Reading:
        reading = self._reader.read()
        self.found.append(sum(arms["challenger"].requests for arms in reading.replicas.values() if "challenger" in arms))
        return reading


class Load:
    """Steady clients, each request with a session of its own. Counts statuses and arms, these with the time at which it was sent."""

    def __init__(self, url: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.failed: Counter[str | None] = Counter()
        self.arms: list[tuple[float, str | None]] = []
        self._url, self._stop = url, threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    async def _all(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            await asyncio.gather(*(self._one(http, client) for client in range(CLIENTS)))

    async def _one(self, http: httpx.AsyncClient, client: int) -> None:
        count = 0
        while not self._stop.is_set():
            headers, sent = {"x-session-id": f"{client}-{count}"}, time.monotonic()
            answer = await http.post("/v1/completions", json=BODY | {"stream": count % 2 == 0}, headers=headers)
            broken = answer.status_code == 200 and '"error"' in answer.text
            arm = answer.headers.get("x-altiplano-arm")
            self.statuses[599 if broken else answer.status_code] += 1
            self.failed[arm] += broken or answer.status_code != 200
            self.arms.append((sent, arm))
            count += 1

    def until(self, reached: Callable[["Load"], bool]) -> None:
        while not reached(self):
            assert self._thread.is_alive(), "no client asks any more"
            threading.Event().wait(0.05)


class Scene:
    """One endpoint with everything that a rollout needs."""

    def __init__(self, server: Server, adapter: Path, second: Path, directory: Path) -> None:
        self.server, self.here = server, Here(server, adapter)
        self.aliases, self.diary, self.store = Aliases(), Diary(), Store(directory)
        self.plan = Plan(
            "orders", 2, "orders-1", "orders-2", str(second), "a salt for tests", steps=(20.0, 50.0), bake_s=2.0, min_requests=30
        )

    def controller(self, **more: Any) -> Controller:
        self.looks = Looks(self.server.url)
        return Controller(self.here, self.looks, self.aliases, self.diary, self.store, **more)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("second"), seed=2)


@pytest.fixture
def scene(server: Server, adapter: Path, second: Path, tmp_path: Path) -> Iterator[Scene]:
    made = Scene(server, adapter, second, tmp_path / "rollout")
    yield made
    server.run(server.generator.reconfigure({"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}))


def test_a_good_challenger_is_promoted_under_load_and_no_request_fails(scene: Scene) -> None:
    # Latency budgets are wide: other tests share these two cores, and the arms share them alike.
    scene.plan = replace(scene.plan, budgets=replace(scene.plan.budgets, ttft_ratio=1.5, tokens_per_s_ratio=0.5))
    scene.store.begin(scene.plan, time.time())
    with Load(scene.server.url) as load:
        state = scene.controller().run(threading.Event())
        arrived = time.monotonic()
        load.until(lambda seen: seen.statuses.total() >= 2000)
    assert state.phase is Phase.promoted, state.reason
    assert set(load.statuses) == {200} and load.statuses.total() >= 2000
    assert scene.aliases.promoted == [("orders", 2)]
    config = scene.here.get_user_config()
    assert config["aliases"] == {"champion": "orders-2", "orders": "orders-2", "previous": "orders-1"}
    assert set(config["adapters"]) == {"orders-1", "orders-2"} and "arms" not in config
    assert [move["share"] for move in _saved(scene).history if move["phase"] == "running"] == [20, 50, 50]
    assert {arm for at, arm in load.arms if at < arrived} >= {"champion", "challenger"}
    assert scene.diary.moves[-1] == "promoted" and scene.diary.closed == 1


def spoil(monkeypatch: pytest.MonkeyPatch, server: Server, adapter: str, seconds: float | None) -> None:
    """From now on what an adapter is asked begins so many seconds later, or (None) is refused by the engine."""
    client = server.generator.client
    real = client.generate

    async def generate(request_id: str, prompt: list[int], sampling: m.Sampling, **more: Any) -> AsyncIterator[m.Token]:
        if name_of(more.get("adapter")) == adapter:
            if seconds is None:
                raise RefusedError("this adapter is broken")
            await asyncio.sleep(seconds)
        async for token in real(request_id, prompt, sampling, **more):
            yield token

    monkeypatch.setattr(client, "generate", generate)


@pytest.mark.parametrize(("seconds", "says"), [(None, "error rate"), (1.0, "TTFT")])
def test_a_bad_challenger_is_back_at_nothing_by_itself_before_many_have_met_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, seconds: float | None, says: str
) -> None:
    spoil(monkeypatch, scene.server, "orders-2", seconds)
    scene.store.begin(scene.plan, time.time())
    with Load(scene.server.url) as load:
        state = scene.controller().run(threading.Event())
        back = time.monotonic()
        many = load.statuses.total() + 200
        load.until(lambda seen: seen.statuses.total() >= many)
    assert state.phase is Phase.rolled_back and says in state.reason and state.step == 0
    # What 40 requests a second bring it in 30 seconds. The look before the last has not sufficed; the last may have come late.
    assert len(scene.looks.found) >= 2, "the first look finds nobody to judge by"
    assert scene.looks.found[-2] <= 0.2 * 40 * 30
    assert all(arm is None for at, arm in load.arms if at > back)
    assert set(load.failed) >= {"champion", "challenger", None} and load.failed["champion"] == load.failed[None] == 0
    assert scene.here.get_user_config()["aliases"] == {"champion": "orders-1", "orders": "orders-1"}
    assert scene.aliases.promoted == []


def test_weights_are_live_as_soon_as_they_are_set_and_wait_for_nobodys_answer(scene: Scene) -> None:
    arms = Arms.of({"salt": scene.plan.salt, "weights": {"champion": 80.0, "challenger": 20.0}})
    client = scene.server.generator.client
    with Load(scene.server.url) as load:
        load.until(lambda seen: seen.statuses.total() >= 50)
        scene.here.set_user_config(configured(scene.here.get_user_config(), scene.plan, State()))
        assert AbClient(scene.server.url).read().is_live(arms.test_id, {"champion": 0.8, "challenger": 0.2})
        load.until(lambda seen: any(arm == "challenger" for _, arm in seen.arms))
        with scene.server.stopped():  # everybody is under way now, and nobody's answer ends
            scene.server.until(lambda: len(client._streams) == CLIENTS)
            scene.here.set_user_config(configured(scene.here.get_user_config(), scene.plan, State(step=1)))
            assert AbClient(scene.server.url).read().is_live(arms.test_id, {"champion": 0.5, "challenger": 0.5})
    assert set(load.statuses) == {200}


def test_a_controller_that_dies_is_continued_by_the_next_one(scene: Scene) -> None:
    scene.store.begin(scene.plan, 0.0)
    first = scene.controller()
    first.tick()
    first.tick()
    assert first.saved.state.live_since is not None
    second = scene.controller()
    assert second.saved.state == first.saved.state and second.saved.run_id == "run"
    scene.store.ask("promote", "promoted by ada: the old one leaks names")
    scene.aliases.away = 1
    assert second.tick().phase is Phase.promoting and "MLflow does not answer" in second.saved.state.reason
    assert scene.here.get_user_config()["arms"]["weights"] == {"champion": 0, "challenger": 100}
    third = scene.controller()
    assert third.tick().phase is Phase.promoted
    assert "promoted by ada: the old one leaks names" in [move["reason"] for move in _saved(scene).history]
    assert scene.aliases.promoted == [("orders", 2)]
    assert scene.controller().tick().phase is Phase.promoted


def test_what_people_ask_for(scene: Scene) -> None:
    with pytest.raises(NoRolloutError, match="rollout start"):
        scene.store.ask("pause")
    with pytest.raises(NoRolloutError):
        scene.controller()
    scene.store.begin(scene.plan, 0.0)
    with pytest.raises(RolloutBusyError, match="orders-2 is running"):
        scene.store.begin(scene.plan, 1.0)
    controller = scene.controller()
    for verb, phase in (
        ("pause", Phase.paused),
        ("resume", Phase.running),
        ("resume", Phase.running),
        ("rollback", Phase.rolled_back),
    ):
        scene.store.ask(verb)
        assert controller.tick().phase is phase
    with pytest.raises(NoRolloutError):
        scene.store.ask("promote")
    assert scene.diary.moves == ["paused", "running", "rolled_back"]
    with scene.store.controlled() as mine, Store(scene.store.directory).controlled() as other:
        assert mine and not other


def test_without_evidence_the_weights_stay_and_evidence_of_a_dead_replica_is_kept(scene: Scene) -> None:
    clock = iter(range(0, 10_000, 60))
    scene.store.begin(scene.plan, 0.0)
    reader = AbClient(scene.server.url)
    controller = scene.controller(clock=lambda: float(next(clock)))
    controller.tick()
    controller.tick()
    monkey: list[Reading | None] = [None]

    class Deaf:
        def read(self) -> Reading:
            if monkey[0] is None:
                raise NoEvidenceError("nobody answers")
            return monkey[0]

    with httpx.Client(base_url=scene.server.url, timeout=60) as http:
        for session in range(20):
            http.post("/v1/completions", json=BODY, headers={"x-session-id": f"{session}"})
    seen = reader.read()
    controller._reader = Deaf()
    sets = scene.here.sets
    for _ in range(5):
        state = controller.tick()
        assert state.phase is Phase.running and state.step == 0 and "does not tell" in state.reason
    assert scene.here.sets == sets
    monkey[0] = seen
    controller.tick()
    # The replica has died, another one has begun from nothing.
    fresh = [told | {"replica": "another", "arms": {}} for told in seen.snapshots]
    monkey[0] = Reading(seen.test, {"another": {}}, fresh)
    controller.tick()
    assert sum(sums.requests for sums in controller.saved.notebook.outcomes().values()) == 20


def test_somebody_elses_deployment_is_set_right_or_ends_the_rollout(scene: Scene, adapter: Path, second: Path) -> None:
    now = [0.0]
    scene.store.begin(scene.plan, 0.0)
    controller = scene.controller(clock=lambda: now[0])
    controller.tick()
    plain = {"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}
    scene.here.set_user_config(plain)
    now[0] = 10.0
    controller.tick()
    assert scene.here.get_user_config()["arms"]["weights"] == {"champion": 80, "challenger": 20}
    scene.here.set_user_config({"adapters": {"orders-3": str(second)}, "aliases": {"champion": "orders-3"}})
    now[0] = 20.0
    assert controller.tick().phase is Phase.rolling_back
    assert (
        controller.tick().phase is Phase.rolled_back and "orders-3 has become the champion" in _saved(scene).history[-1]["reason"]
    )
    assert scene.here.get_user_config()["aliases"] == {"champion": "orders-3"}
    with pytest.raises(ChampionMovedError):
        configured(scene.here.get_user_config(), scene.plan, State())


def test_an_older_version_keeps_its_other_names_when_it_is_taken_back(scene: Scene) -> None:
    plan = scene.plan
    adapters = {plan.champion: "/a", plan.challenger: plan.path}
    config = {"adapters": adapters, "aliases": {"champion": plan.champion, "previous": plan.challenger}}
    back = configured(configured(config, plan, State()), plan, State(Phase.rolling_back))
    assert back == config


def _saved(scene: Scene) -> Saved:
    saved = scene.store.load()
    assert saved is not None
    return saved
