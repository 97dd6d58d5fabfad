"""A test on a real endpoint: arms in headers, metrics and sums, feedback by the id of an answer."""

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.serve.adapters import name_of
from altiplano.serve.arms import Arms
from altiplano.serve.errors import ApiError
from altiplano.serve.experiment import Experiment
from altiplano.serve.feedback import FeedbackRequest, Scores, answer_id, arm_of, counts_at

from .conftest import Server, make_adapter, settings

ARMS = {"salt": "a salt for tests", "weights": {"champion": 50, "challenger": 50}}
ASK: dict[str, Any] = {"model": "champion", "prompt": "A note", "max_tokens": 6, "temperature": 0, "ignore_eos": True}


class Divided(Server):
    """An endpoint with two adapters, and a test that can be changed."""

    def __init__(self, champion: Path, challenger: Path) -> None:
        super().__init__(settings(champion))
        self.adapters = {"orders-1": str(champion), "orders-2": str(challenger)}
        self.configure()

    def configure(self, **more: Any) -> None:
        config = {"adapters": self.adapters, "aliases": {"champion": "orders-1", "challenger": "orders-2"}, "arms": ARMS}
        self.run(self.generator.reconfigure(config | more))

    def ask(self, path: str = "/v1/completions", session: str | None = None, **more: Any) -> httpx.Response:
        headers = {} if session is None else {"x-session-id": session}
        return httpx.post(f"{self.url}{path}", json=ASK | more, headers=headers, timeout=60)

    def sums(self) -> dict[str, Any]:
        body = httpx.get(f"{self.url}/v1/ab", timeout=60).json()
        assert body["object"] == "ab"
        found: dict[str, Any] = body["arms"]
        return found


@pytest.fixture(scope="module")
def tested(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    made = Divided(adapter, make_adapter(tmp_path_factory.mktemp("second"), seed=2))
    yield made
    made.close()


@pytest.fixture
def session_of(tested: Divided) -> Callable[[str], str]:
    """A session that belongs to an arm."""
    arms = Arms.of(ARMS)
    return lambda arm: next(f"{i}" for i in range(100) if arms.assign(f"session:{i}") == arm)


@pytest.fixture(autouse=True)
def fresh(tested: Divided) -> None:
    tested.configure(arms=None)
    tested.configure()


@pytest.mark.parametrize("stream", [False, True])
def test_each_arm_answers_with_its_own_adapter_and_says_so(
    tested: Divided, session_of: Callable[[str], str], stream: bool
) -> None:
    for arm, adapter in (("champion", "orders-1"), ("challenger", "orders-2")):
        answer = tested.ask(session=session_of(arm), stream=stream)
        assert answer.headers["x-altiplano-arm"] == arm
        first = answer.json() if not stream else json.loads(answer.text.split("\n\n")[0].removeprefix("data: "))
        assert first["model"] == "champion"
        text = (
            first["choices"][0]["text"]
            if not stream
            else "".join(
                c["text"] for event in answer.text.split("\n\n")[:-2] for c in json.loads(event.removeprefix("data: "))["choices"]
            )
        )
        assert text == tested.ask(model=adapter).json()["choices"][0]["text"]
        assert f"-{arm}-" in first["id"]
    assert {arm: sums["requests"] for arm, sums in tested.sums().items()} == {"champion": 1, "challenger": 1}


def test_a_user_stays_in_an_arm_and_other_models_are_not_tested(tested: Divided) -> None:
    arms = {tested.ask(user="ada").headers["x-altiplano-arm"] for _ in range(8)}
    assert len(arms) == 1
    assert {tested.ask(safety_identifier="ada").headers["x-altiplano-arm"] for _ in range(4)} == arms
    seen = {tested.ask().headers["x-altiplano-arm"] for _ in range(40)}
    assert seen == {"champion", "challenger"}
    for model in ("cria", "orders-1", "challenger"):
        assert "x-altiplano-arm" not in tested.ask(model=model).headers
    assert sum(sums["requests"] for sums in tested.sums().values()) == 52


def test_sums_hold_latencies_and_tokens_and_do_not_count_what_was_refused(
    tested: Divided, session_of: Callable[[str], str]
) -> None:
    session = session_of("challenger")
    for _ in range(3):
        tested.ask(session=session)
    assert tested.ask(session=session, max_tokens=10_000).status_code == 400
    bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    refused = tested.ask(session=session, response_format=bad, ignore_eos=False)
    assert (refused.status_code, refused.headers["x-altiplano-arm"]) == (400, "challenger")
    sums = tested.sums()["challenger"]
    assert (sums["requests"], sums["errors"], sums["tokens"]) == (3, 0, 18)
    assert sums["ttft"]["count"] == sums["e2e"]["count"] == sums["tokens_per_s"]["count"] == 3
    assert sums["ttft"]["total"] < sums["e2e"]["total"]


def test_an_answer_that_ends_at_a_stop_string_is_a_success(tested: Divided, session_of: Callable[[str], str]) -> None:
    session = session_of("champion")
    text = tested.ask(session=session).json()["choices"][0]["text"]
    assert tested.ask(session=session, stop=[text[1:3]]).json()["choices"][0]["finish_reason"] == "stop"
    sums = tested.sums()["champion"]
    assert (sums["requests"], sums["errors"]) == (2, 0)


def test_metrics_and_prometheus_have_the_arm(tested: Divided, session_of: Callable[[str], str]) -> None:
    tested.ask(session=session_of("challenger"))
    text = httpx.get(f"{tested.url}/metrics", timeout=60).text
    assert 'altiplano_request_success_total{arm="challenger",finished_reason="length"' in text


def test_feedback_finds_its_arm_and_replaces_itself(tested: Divided, session_of: Callable[[str], str]) -> None:
    first = tested.ask(session=session_of("challenger")).json()["id"]
    second = tested.ask(session=session_of("champion")).json()["id"]

    def rate(**body: Any) -> httpx.Response:
        return httpx.post(f"{tested.url}/v1/feedback", json=body, timeout=60)

    assert rate(id=first, score=-1, comment="wrong street").json() == {"object": "feedback", "id": first, "score": -1.0}
    assert rate(id=first, rating="up").json()["score"] == 1.0
    assert rate(id=second, rating=2).json()["score"] == -0.5
    sums = tested.sums()
    assert (sums["challenger"]["feedback"]["count"], sums["challenger"]["feedback"]["total"]) == (1, 1.0)
    assert (sums["champion"]["feedback"]["count"], sums["champion"]["feedback"]["total"]) == (1, -0.5)
    forged = first.replace("-challenger-", "-champion-")
    for body in ({"id": forged, "score": 1}, {"id": "chatcmpl-x", "score": 1}):
        assert rate(**body).status_code == 404
    for body in ({"id": first}, {"id": first, "score": 1, "rating": "up"}, {"id": first, "score": 2}, {"id": first, "rating": 6}):
        assert rate(**body).status_code == 400
    tested.configure(arms=ARMS | {"salt": "the salt of a new test"})
    assert rate(id=first, score=1).status_code == 404
    assert tested.sums() == {}


def test_weights_change_between_two_requests_and_sums_go_on(tested: Divided, session_of: Callable[[str], str]) -> None:
    session = session_of("challenger")
    tested.ask(session=session)
    tested.configure(arms=ARMS | {"weights": {"champion": 1, "challenger": 0}})
    assert tested.ask(session=session).headers["x-altiplano-arm"] == "champion"
    assert {arm: sums["requests"] for arm, sums in tested.sums().items()} == {"champion": 1, "challenger": 1}


def test_an_adapter_in_use_goes_when_its_last_request_has_ended(tested: Divided, session_of: Callable[[str], str]) -> None:
    body = ASK | {"stream": True, "max_tokens": 300, "temperature": 1}
    headers = {"x-session-id": session_of("challenger")}
    url, adapters = f"{tested.url}/v1/completions", {"orders-1": tested.adapters["orders-1"]}
    with ExitStack() as asked:
        with tested.unending():
            lines = asked.enter_context(httpx.stream("POST", url, json=body, headers=headers, timeout=60)).iter_lines()
            next(lines)
            tested.configure(adapters=adapters, aliases={"champion": "orders-1"}, arms=None)
            assert [name_of(loaded) for loaded in tested.generator.client.adapters] == ["orders-1", "orders-2"]
        assert "data: [DONE]" in list(lines)
    tested.ask()
    assert [name_of(loaded) for loaded in tested.generator.client.adapters] == ["orders-1"]


def test_a_user_config_with_an_arm_that_is_nowhere_changes_nothing(tested: Divided) -> None:
    with pytest.raises(ValueError, match="'third' is no adapter"):
        tested.configure(arms={"salt": "long enough", "weights": {"champion": 1, "third": 1}})
    with pytest.raises(ValueError, match="unknown keys"):
        tested.configure(weights={})
    assert tested.ask().headers["x-altiplano-arm"]


def test_ids_carry_any_arm_and_scores_are_bounded() -> None:
    arms = Arms.of(ARMS)
    assert arm_of(arms, answer_id("chatcmpl", arms, "a-b.c")) == "a-b.c"
    with pytest.raises(ApiError):
        arm_of(None, answer_id("cmpl", arms, "champion"))
    with pytest.raises(ApiError):
        arm_of(arms, answer_id("cmpl", None, None))
    with pytest.raises(ApiError):
        arm_of(arms, answer_id("cmpl", None, None, "0123456789ab"))
    scores = Scores(size=2)
    assert [scores.replace(name, value) for name, value in (("a", 1), ("a", 0), ("b", 1), ("c", 1), ("a", 1))] == [
        None,
        1,
        None,
        None,
        None,
    ]


def test_an_answer_is_rated_once_whichever_replicas_hear_of_it() -> None:
    replicas = {made.name: made for made in (Experiment() for _ in range(3))}
    for replica in replicas.values():
        replica.configure({"arms": ARMS})

        async def spread(answer: str, score: float) -> None:
            replicas[counts_at(answer, replicas)].count(answer, score)

        replica.spread = spread
    names = list(replicas)
    arms = Arms.of(ARMS)
    answer = answer_id("cmpl", arms, "champion", names[1])
    gone = answer_id("cmpl", arms, "champion", "0123456789ab")
    for score, name in zip((-1.0, 0.5, 1.0), names, strict=True):
        for rated in (answer, gone):
            asyncio.run(replicas[name].rate(FeedbackRequest(id=rated, score=score)))
    sums = [made.snapshot()["arms"].get("champion", {}).get("feedback", {}) for made in replicas.values()]
    assert sum(found.get("count", 0) for found in sums) == 2 and sum(found.get("total", 0) for found in sums) == 2.0
    assert sums[1]["count"] >= 1, "the replica that gave the answer counts its ratings"
    assert len({counts_at(answer_id("cmpl", arms, "champion", "0123456789ab"), names) for _ in range(64)}) == 3
