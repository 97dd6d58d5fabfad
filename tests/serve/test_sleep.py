"""An endpoint is put to sleep and woken up over HTTP, by whom, with whom under way, and what everybody else meets."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from altiplano.serve import deployment, engine_sleep
from altiplano.serve.engine_errors import RefusedError
from altiplano.serve.sleeping import Sleeping

from .conftest import Server, make_adapter, settings
from .test_gate import LONG, SHORT, Guarded

CHAMPION: dict[str, Any] = SHORT | {"model": "champion"}
REFUSAL = "an administrator has to wake it up (POST /wake_up)"


@pytest.fixture(scope="module")
def endpoint(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(adapter, tmp_path_factory.mktemp("keys"))
    yield made
    made.close()


@pytest.fixture
def guarded(endpoint: Guarded) -> Iterator[Guarded]:
    yield endpoint
    endpoint.idle()
    endpoint.run(endpoint.generator.client.sleep.end())


@pytest.fixture
def admin(guarded: Guarded) -> Iterator[httpx.Client]:
    with guarded.http(guarded.admin) as http:
        yield http


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as made:
        yield made


def answer(http: httpx.Client, body: dict[str, Any] = SHORT) -> Any:
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()["choices"]


def engine_stats(guarded: Guarded) -> dict[str, float]:
    found: dict[str, float] = guarded.run(guarded.generator.client.stats())
    return found


def state(http: httpx.Client) -> list[str]:
    lines = http.get("/metrics").text.splitlines()
    return [line for line in lines if line.startswith("altiplano_engine_sleep_state") and line.endswith(" 1.0")]


def counted(http: httpx.Client, metric: str) -> float:
    """The sum of a metric over its labels; 503s only where it is told apart by status."""
    lines = http.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(metric) and ("status" not in line or '"503"' in line))


@pytest.mark.parametrize(("level", "name"), [(1, "weights_offloaded"), (2, "discard_all")])
def test_asleep_it_lives_takes_nothing_and_says_the_same_afterwards(
    guarded: Guarded, admin: httpx.Client, level: int, name: str
) -> None:
    before = answer(admin), answer(admin, CHAMPION)
    assert admin.get("/is_sleeping").json()["is_sleeping"] is False
    slept = admin.post("/sleep", params={"level": level})
    assert slept.status_code == 200, slept.text
    (replica,) = slept.json()["replicas"]
    assert slept.json()["is_sleeping"] is replica["is_sleeping"] is True and replica["level"] == level
    assert admin.get("/is_sleeping").json() == slept.json()
    assert state(admin) == [f'altiplano_engine_sleep_state{{sleep_state="{name}"}} 1.0']
    refusals, excused = (counted(admin, f"altiplano_requests{kind}_total") for kind in ("", "_asleep"))

    for path, body in (
        ("/v1/completions", SHORT),
        ("/v1/completions", CHAMPION | {"stream": True}),
        ("/v1/chat/completions", {"model": "cria", "messages": [{"role": "user", "content": "hello"}]}),
        ("/generate", {"prompt": "hello"}),
    ):
        refused = admin.post(path, json=body)
        assert refused.status_code == 503 and "retry-after" not in refused.headers
        assert refused.json()["error"]["code"] == "engine_asleep" and REFUSAL in refused.json()["error"]["message"]
    assert (admin.get("/ready").status_code, admin.get("/health").status_code) == (503, 200)
    assert counted(admin, "altiplano_requests_total") == refusals + 5, "no alert counts what follows from sleep"
    assert counted(admin, "altiplano_requests_asleep_total") == excused + 5
    assert admin.post("/tokenize", json={"prompt": "hello"}).status_code == 200
    assert engine_stats(guarded)["num_cached_pages"] == guarded.governance.queue.size == 0

    woken = admin.post("/wake_up")
    assert woken.status_code == 200 and woken.json()["is_sleeping"] is False
    assert state(admin) == ['altiplano_engine_sleep_state{sleep_state="awake"} 1.0']
    assert admin.get("/ready").status_code == 200
    assert (answer(admin), answer(admin, CHAMPION)) == before


def under_way(guarded: Guarded, http: httpx.Client, pool: ThreadPoolExecutor, answers: int) -> Future[httpx.Response]:
    """Ask the engine, which is stopped, for something."""
    asked = pool.submit(http.post, "/v1/completions", json=LONG)
    guarded.until(lambda: len(guarded.generator.client._streams) == answers)
    return asked


def test_answers_under_way_keep_it_awake(guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor) -> None:
    with guarded.stopped():
        asked = under_way(guarded, admin, pool, 1)
        refused = admin.post("/sleep")
        assert refused.status_code == 409 and "1 answers are under way" in refused.json()["error"]["message"]
        assert refused.json()["error"]["code"] == "sleep_refused"
        assert admin.get("/ready").status_code == 200
    assert asked.result().json()["choices"][0]["finish_reason"] == "length" and answer(admin)


def test_wait_lets_them_end_and_nobody_begins(guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor) -> None:
    client = guarded.generator.client
    with guarded.stopped():
        asked = under_way(guarded, admin, pool, 1)
        sleeping = pool.submit(admin.post, "/sleep", params={"mode": "wait"})
        guarded.until(lambda: bool(client.sleep.level))
        assert admin.post("/v1/completions", json=SHORT).status_code == 503
        assert not sleeping.done() and not client.sleep.turning, "who hangs while it waits is started again"
    assert asked.result().json()["choices"][0]["finish_reason"] == "length"
    assert asked.result().json()["usage"]["completion_tokens"] == 400
    assert sleeping.result().json()["is_sleeping"] is True


def test_abort_ends_them_with_an_error(guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor) -> None:
    with ExitStack() as talk:
        with guarded.unending():
            stream = talk.enter_context(admin.stream("POST", "/v1/completions", json=LONG | {"stream": True, "n": 8}))
            lines = stream.iter_lines()
            next(lines)
            with guarded.stopped():
                asked = under_way(guarded, admin, pool, 9)
                sleeping = pool.submit(admin.post, "/sleep", params={"mode": "abort", "level": 2})
                guarded.until(lambda: bool(guarded.generator.client.sleep.level))
        refused, rest = asked.result(), list(filter(None, lines))
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "engine_asleep"
    assert rest[-1] == "data: [DONE]" and "was put to sleep before the answer was complete" in rest[-2]
    assert sleeping.result().json()["replicas"][0]["level"] == 2
    assert engine_stats(guarded)["num_running"] == 0


def test_an_engine_that_cannot_sleep_aborts_nobody(guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor) -> None:
    with guarded.stopped():
        asked = under_way(guarded, admin, pool, 1)
        # No such level: the route would have refused it.
        sleeping = asyncio.run_coroutine_threadsafe(guarded.generator.client.sleep.begin(3, "abort"), guarded.loop)
        guarded.until(lambda: bool(guarded.generator.client.sleep.level))
    with pytest.raises(RefusedError, match="sleep level 3 is unknown"):
        sleeping.result()
    assert asked.result().json()["choices"][0]["finish_reason"] == "length" and answer(admin)


def test_waking_up_takes_back_a_sleep_that_still_waits(guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor) -> None:
    client = guarded.generator.client
    with guarded.stopped():
        asked = under_way(guarded, admin, pool, 1)
        sleeping = [pool.submit(admin.post, "/sleep", params={"mode": "wait"}) for _ in range(2)]
        guarded.until(lambda: len(client.sleep._turns) == 2)
        waking = pool.submit(admin.post, "/wake_up")
        guarded.until(lambda: len(client.sleep._turns) == 3)
    assert [one.result().status_code for one in sleeping] == [409, 409]
    assert "woken up before it slept" in sleeping[0].result().json()["error"]["message"]
    assert waking.result().json()["is_sleeping"] is False
    assert asked.result().json()["choices"][0]["finish_reason"] == "length" and answer(admin)
    assert admin.get("/is_sleeping").json()["is_sleeping"] is False


def test_who_asks_may_leave_and_it_falls_asleep_all_the_same(guarded: Guarded, admin: httpx.Client) -> None:
    client = guarded.generator.client
    with guarded.stopped():
        guarded.leave("/sleep", lambda: client.sleep.level == 1, headers=admin.headers)
        assert client.sleep.level == 1 and len(client.sleep._turns) == 1
    guarded.until(lambda: not client.sleep._turns)
    assert admin.get("/is_sleeping").json()["is_sleeping"] is True
    assert admin.post("/v1/completions", json=SHORT).status_code == 503


def test_a_sleep_that_takes_too_long_leaves_it_awake(
    guarded: Guarded, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guarded.stopped():
        monkeypatch.setattr(engine_sleep, "TIMEOUT_S", 0.1)
        refused = admin.post("/sleep")
    assert refused.status_code == 409 and "in time" in refused.json()["error"]["message"]
    # The engine goes on: it falls asleep and wakes up, as it was asked to.
    guarded.until(lambda: not guarded.generator.client.sleep._asked)
    assert admin.get("/ready").status_code == 200 and answer(admin)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/sleep?level=0", "use one of 1, 2"),
        ("/sleep?level=3", "use one of 1, 2"),
        ("/sleep?level=many", "use one of 1, 2"),
        ("/sleep?mode=keep", "use one of wait, abort"),
        ("/wake_up?tags=weights", "everything wakes up together"),
    ],
)
def test_what_nobody_knows_is_refused_in_words(admin: httpx.Client, path: str, words: str) -> None:
    response = admin.post(path)
    assert response.status_code == 400 and words in response.json()["error"]["message"]
    assert admin.get("/is_sleeping").json()["is_sleeping"] is False


def test_levels_do_not_mix(admin: httpx.Client) -> None:
    assert [admin.post("/sleep", params={"level": level}).status_code for level in (2, 2, 1)] == [200, 200, 409]
    assert admin.get("/is_sleeping").json()["replicas"][0]["level"] == 2
    assert [admin.post("/wake_up").status_code for _ in range(2)] == [200, 200]


def test_only_an_administrator_may(guarded: Guarded, admin: httpx.Client) -> None:
    with guarded.http(guarded.user) as http:
        assert [http.post("/sleep").status_code, http.post("/wake_up").status_code, http.get("/is_sleeping").status_code] == [
            403
        ] * 3
    with guarded.http(None) as http:
        assert http.post("/sleep").status_code == 401
    assert admin.get("/ready").status_code == 200


def test_an_engine_that_dies_asleep_sleeps_again_with_its_adapters(guarded: Guarded, admin: httpx.Client) -> None:
    before, client = answer(admin, CHAMPION), guarded.generator.client
    admin.post("/sleep")
    restarts, pid = client.restarts, client.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    guarded.until(lambda: client.restarts > restarts)
    guarded.run(client.wait_until_ready())
    assert admin.post("/v1/completions", json=CHAMPION).status_code == 503
    assert admin.get("/is_sleeping").json()["is_sleeping"] is True
    with pytest.raises(RefusedError, match="wake it up first"):
        guarded.run(client.load_adapter("late", "nowhere"))
    admin.post("/wake_up")
    assert answer(admin, CHAMPION) == before


def test_waking_up_waits_for_a_process_that_is_started_again(guarded: Guarded, admin: httpx.Client) -> None:
    before, client = answer(admin), guarded.generator.client
    admin.post("/sleep")
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    guarded.until(lambda: not client.ready)
    woken = admin.post("/wake_up")
    assert woken.status_code == 200 and woken.json()["is_sleeping"] is False, woken.text
    assert answer(admin) == before


def test_an_adapter_that_does_not_survive_a_restart_is_named(
    guarded: Guarded, admin: httpx.Client, adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = guarded.generator.client
    directory = make_adapter(tmp_path / "short-lived", 2)
    guarded.run(client.load_adapter("short-lived", str(directory)))
    (directory / "adapter_model.safetensors").unlink()
    assert client.pid is not None
    os.kill(client.pid, signal.SIGKILL)
    guarded.until(lambda: not client.ready)
    guarded.run(client.wait_until_ready())
    with pytest.raises(RefusedError, match="short-lived"):
        guarded.run(client.unload_adapter("short-lived"))
    assert "adapter short-lived could not be loaded again" in caplog.text
    client._adapters.pop("short-lived")
    assert answer(admin, CHAMPION)


def test_new_adapters_wait_until_it_is_awake(guarded: Guarded, admin: httpx.Client, adapter: Path, tmp_path: Path) -> None:
    """What a rollout meets: the change is refused with the reason, and what was before is in force."""
    before = answer(admin, CHAMPION)
    wanted = {
        "adapters": {"orders-1": str(adapter), "orders-2": str(make_adapter(tmp_path, 2))},
        "aliases": {"champion": "orders-2"},
    }
    admin.post("/sleep")
    with pytest.raises(RefusedError, match="the engine sleeps: wake it up first"):
        guarded.run(guarded.generator.reconfigure(wanted))
    admin.post("/wake_up")
    assert answer(admin, CHAMPION) == before
    guarded.run(guarded.generator.reconfigure(wanted))
    assert answer(admin, CHAMPION) != before
    guarded.run(guarded.generator.reconfigure({"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}))


def test_a_test_of_models_takes_sleep_for_nobodys_failure(
    guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor, adapter: Path
) -> None:
    plain: dict[str, Any] = {"adapters": {"orders-1": str(adapter)}, "aliases": {"champion": "orders-1"}}
    guarded.run(guarded.generator.reconfigure(plain | {"arms": {"salt": "a salt for sleep", "weights": {"champion": 1}}}))
    tested = LONG | {"model": "champion"}
    with ExitStack() as talk:
        with guarded.unending():
            stream = talk.enter_context(admin.stream("POST", "/v1/completions", json=tested | {"stream": True, "n": 8}))
            lines = stream.iter_lines()
            next(lines)
            with guarded.stopped():
                asked = pool.submit(admin.post, "/v1/completions", json=tested)
                guarded.until(lambda: len(guarded.generator.client._streams) == 9)
                sleeping = pool.submit(admin.post, "/sleep", params={"mode": "abort"})
                guarded.until(lambda: bool(guarded.generator.client.sleep.level))
        assert asked.result().status_code == 503 and "engine_asleep" in "".join(lines)
    assert sleeping.result().status_code == 200
    assert admin.post("/v1/completions", json=CHAMPION).status_code == 503
    assert admin.get("/v1/ab").json()["arms"] == {}
    admin.post("/wake_up")
    answer(admin, CHAMPION)
    champion = admin.get("/v1/ab").json()["arms"]["champion"]
    assert (champion["requests"], champion["errors"]) == (1, 0)
    guarded.run(guarded.generator.reconfigure(plain))


def beside(own: Sleeping, other: Server) -> Callable[..., Awaitable[list[dict[str, Any]]]]:
    """Ask two front ends, as those of an endpoint's replicas hear of each other."""

    async def gather(method: str, *args: Any) -> list[dict[str, Any]]:
        second = asyncio.run_coroutine_threadsafe(other.generator.sleeping.turn(method, *args), other.loop)
        return [await own.turn(method, *args), await asyncio.wrap_future(second)]

    return gather


def test_replicas_sleep_together_or_not_at_all(
    guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor, adapter: Path
) -> None:
    """Two front ends that hear of each other as replicas do: one is busy, so the other is woken up again."""
    other = Server(settings(adapter))
    own = guarded.generator.sleeping
    try:
        own.gather = beside(own, other)
        with guarded.stopped():
            asked = under_way(guarded, admin, pool, 1)
            refused = admin.post("/sleep")
            assert refused.status_code == 409 and "of 2)" in refused.json()["error"]["message"]
            told = admin.get("/is_sleeping").json()
            assert [replica["level"] for replica in told["replicas"]] == [0, 0]
        assert asked.result().status_code == 200
        assert httpx.post(f"{other.url}/v1/completions", json=SHORT, timeout=60).status_code == 200

        other.run(other.generator.client.sleep.begin(1))
        told = admin.get("/is_sleeping").json()
        assert told["is_sleeping"] is False and [replica["level"] for replica in told["replicas"]] == [0, 1]
        assert admin.post("/sleep").json()["is_sleeping"] is True
        assert admin.post("/wake_up").json()["is_sleeping"] is False
    finally:
        own.gather = None
        other.close()


def test_who_leaves_does_not_leave_half_an_endpoint(
    guarded: Guarded, admin: httpx.Client, pool: ThreadPoolExecutor, adapter: Path
) -> None:
    """One replica refuses, the other one waits for an answer; the client goes, and the second is woken up all the same."""
    other = Server(settings(adapter))
    own = guarded.generator.sleeping
    try:
        other.run(other.generator.client.sleep.begin(2))
        own.gather = beside(own, other)
        with guarded.stopped():
            asked = under_way(guarded, admin, pool, 1)
            waiting = guarded.generator.client.sleep
            guarded.leave("/sleep", lambda: bool(waiting.level), params={"mode": "wait"}, headers=admin.headers)
        assert asked.result().status_code == 200
        guarded.until(lambda: not other.generator.client.sleep.level)
        guarded.until(lambda: not guarded.generator.client.sleep.level)
        assert answer(admin)
    finally:
        own.gather = None
        other.close()


def test_replicas_that_do_not_answer_are_not_said_to_sleep(guarded: Guarded, admin: httpx.Client) -> None:
    async def nobody(method: str, *args: Any) -> list[dict[str, Any]]:
        return []

    guarded.generator.sleeping.gather = nobody
    try:
        for ask in (lambda: admin.get("/is_sleeping"), lambda: admin.post("/sleep"), lambda: admin.post("/wake_up")):
            answered = ask()
            assert answered.status_code == 503 and answered.json()["error"]["code"] == "no_answer"
    finally:
        guarded.generator.sleeping.gather = None


def test_ray_serve_is_not_confused(guarded: Guarded, admin: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asleep a replica is healthy and reports no load, which holds the number of replicas; while it turns it is not started again."""
    client = guarded.generator.client
    monkeypatch.setattr(deployment._Process, "generator", guarded.generator)
    monkeypatch.setattr(deployment._Process, "governance", guarded.governance)
    found = SimpleNamespace(_patience_s=0.2, _first_token=SimpleNamespace(update=lambda *_: 0.0))
    endpoint: Any = deployment.Endpoint.func_or_class  # type: ignore[attr-defined]
    assert guarded.run(endpoint.record_autoscaling_stats(found))["num_seqs"] == 0
    restarts = client.restarts
    with guarded.stopped():
        guarded.leave("/sleep", lambda: client.sleep.turning, headers=admin.headers)
        assert client.sleep.turning
        monkeypatch.setattr("altiplano.serve.observability.STATS_TIMEOUT_S", 0.2)
        guarded.run(endpoint.check_health(found))
        assert admin.get("/health").status_code == 200
        assert counted(admin, "altiplano_engine_up") == 1, "and nobody is paged"
    guarded.until(lambda: not client.sleep.turning)
    guarded.run(endpoint.check_health(SimpleNamespace(_patience_s=60)))
    assert client.restarts == restarts and guarded.run(endpoint.record_autoscaling_stats(found)) == {}
    assert client.pid is not None and psutil.pid_exists(client.pid)
    admin.post("/wake_up")
    assert guarded.run(endpoint.record_autoscaling_stats(found))["num_seqs"] == 0
