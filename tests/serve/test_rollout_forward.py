"""A challenger with another base model: its requests are answered by another application, and whoever asks sees no difference."""

import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import OpenAI

from altiplano.serve.app import create_app
from altiplano.serve.arms import Arms
from altiplano.serve.deployment import make_generator
from altiplano.serve.errors import ApiError
from altiplano.serve.evidence import AbClient
from altiplano.serve.experiment import check_user_config
from altiplano.serve.forward import Forwarded, Frame, answered
from altiplano.serve.settings import ServeSettings

from .conftest import Server, make_adapter, make_base, settings

SALT, THERE = "a salt for tests", "altiplano-2"
HALF = {"champion": 50, "challenger": 50}
BODY: dict[str, Any] = {"model": "champion", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0, "ignore_eos": True}


class Two:
    """The endpoint as HTTP shows it, and the other application, which only the endpoint reaches."""

    def __init__(self, adapter: Path, base: Path, second: Path) -> None:
        here = settings(adapter)
        self.server = Server(here)
        there = ServeSettings(str(base), "second", max_model_len=512, kv_cache_tokens=8192, max_num_seqs=16)
        self.generator = self.server.run(make_generator(there))
        self.app = create_app(lambda: self.generator)
        self.asked: list[Forwarded] = []
        self.away: Exception | None = None
        self.breaks_after: int | None = None
        self.open = 0
        aliases = {"champion": "orders-2", "challenger": "orders-2"}
        arms = {"salt": SALT, "weights": HALF, "only": "challenger"}
        config = {"adapters": {"orders-2": str(second)}, "aliases": aliases, "arms": arms}
        self.server.run(self.generator.reconfigure(config))
        self.server.generator.experiment.forward = self.forward
        self.server.generator.experiment.gather = self.snapshots
        self.here = {"adapters": here.adapters, "aliases": here.aliases}
        self.divide(HALF)

    @property
    def url(self) -> str:
        return self.server.url

    def divide(self, weights: dict[str, int]) -> None:
        arms = {"salt": SALT, "weights": weights, "elsewhere": {"challenger": THERE}}
        self.server.run(self.server.generator.reconfigure(self.here | {"arms": arms}))

    async def forward(self, application: str, request: Forwarded) -> AsyncIterator[Frame]:
        assert application == THERE
        self.asked.append(request)
        if self.away is not None:
            raise self.away
        count = 0
        self.open += 1
        try:
            async with aclosing(answered(self.app, request)) as frames:  # type: ignore[type-var]
                async for frame in frames:
                    yield frame
                    count += 1
                    if count == self.breaks_after:
                        raise RuntimeError("the actor died")
        finally:
            self.open -= 1

    async def snapshots(self) -> list[dict[str, Any]]:
        return [self.server.generator.experiment.snapshot(), self.generator.experiment.snapshot()]

    def session(self, arm: str) -> dict[str, str]:
        """Headers of a session that has an arm."""
        arms = Arms.of({"salt": SALT, "weights": HALF})
        return {"x-session-id": next(f"{i}" for i in range(1000) if arms.assign(f"session:{i}") == arm)}

    def requests(self, arm: str) -> tuple[int, int]:
        """(requests, errors) of an arm, over both applications."""
        outcomes = AbClient(self.url).read().replicas.values()
        return sum(o[arm].requests for o in outcomes if arm in o), sum(o[arm].errors for o in outcomes if arm in o)

    def close(self) -> None:
        self.server.run(self.generator.client.stop())
        self.server.close()


@pytest.fixture(scope="module")
def two(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    base = make_base(tmp_path_factory.mktemp("base"), seed=7)
    made = Two(adapter, base, make_adapter(tmp_path_factory.mktemp("second"), 2, base))
    yield made
    made.close()


@pytest.fixture(autouse=True)
def whole(two: Two) -> None:
    two.away = two.breaks_after = None
    two.asked.clear()
    two.divide(HALF)


def test_each_arm_is_answered_by_its_own_base_and_says_so(two: Two) -> None:
    texts = {}
    for arm in HALF:
        before = two.requests(arm)
        answer = httpx.post(f"{two.url}/v1/completions", json=BODY, headers=two.session(arm), timeout=60)
        assert answer.status_code == 200 and answer.headers["x-altiplano-arm"] == arm
        assert answer.json()["usage"]["completion_tokens"] == 6 and f"-{arm}-" in answer.json()["id"]
        assert two.requests(arm) == (before[0] + 1, before[1])
        texts[arm] = answer.json()["choices"][0]["text"]
    assert len(two.asked) == 1, "the champion's request took one hop"
    assert texts["champion"] != texts["challenger"]


def test_a_stream_a_chat_and_a_rating_take_the_same_way(two: Two) -> None:
    with OpenAI(base_url=f"{two.url}/v1", api_key="none", default_headers=two.session("challenger"), timeout=60) as client:
        chunks = list(
            client.chat.completions.create(
                model="champion", messages=[{"role": "user", "content": "Hello"}], max_tokens=5, stream=True
            )
        )
    assert len(two.asked) == 1 and chunks[-1].choices[0].finish_reason in ("stop", "length")
    rated = httpx.post(f"{two.url}/v1/feedback", json={"id": chunks[0].id, "rating": "down"}, timeout=60)
    assert rated.status_code == 200


def test_both_ends_know_a_request_by_one_name(two: Two) -> None:
    headers = two.session("challenger") | {"x-request-id": "mine"}
    answer = httpx.post(f"{two.url}/v1/completions", json=BODY, headers=headers, timeout=60)
    assert answer.headers.get_list("x-request-id") == ["mine"]
    assert dict(two.asked[0].headers)[b"x-request-id"] == b"mine"


def test_what_is_wrong_with_a_request_is_said_over_there_and_counts_for_nobody(two: Two) -> None:
    before = two.requests("challenger")
    for wrong in ({"max_tokens": -1}, {"max_tokens": 4000}, {"prompt": ""}):
        answer = httpx.post(f"{two.url}/v1/completions", json=BODY | wrong, headers=two.session("challenger"), timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["message"]
    assert len(two.asked) == 3 and two.requests("challenger") == before
    assert httpx.post(f"{two.url}/v1/completions", content=b"{", timeout=60).status_code == 400
    assert httpx.post(f"{two.url}/v1/completions", json=BODY | {"model": 3}, timeout=60).status_code == 400


@pytest.mark.parametrize("stream", [True, False])
def test_an_application_that_is_gone_is_an_error_of_its_arm(two: Two, stream: bool) -> None:
    two.away = RuntimeError("no replica")
    before = two.requests("challenger"), two.requests("champion")
    headers = two.session("challenger")
    answer = httpx.post(f"{two.url}/v1/completions", json=BODY | {"stream": stream}, headers=headers, timeout=60)
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "arm_unavailable"
    assert answer.headers["x-altiplano-arm"] == "challenger" and "retry-after" in answer.headers
    assert two.requests("challenger") == (before[0][0] + 1, before[0][1] + 1) and two.requests("champion") == before[1]
    champion = httpx.post(f"{two.url}/v1/completions", json=BODY, headers=two.session("champion"), timeout=60)
    assert champion.status_code == 200


def test_an_application_without_room_is_nobodys_failure(two: Two) -> None:
    two.away = ApiError(429, "the endpoint is busy", code="overloaded", retry_after=1)
    before = two.requests("challenger")
    answer = httpx.post(f"{two.url}/v1/completions", json=BODY, headers=two.session("challenger"), timeout=60)
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.headers["x-altiplano-arm"] == "challenger" and two.requests("challenger") == before


def test_a_stream_that_breaks_off_ends_with_an_error(two: Two) -> None:
    two.breaks_after = 3
    headers = two.session("challenger")
    answer = httpx.post(f"{two.url}/v1/completions", json=BODY | {"stream": True}, headers=headers, timeout=60)
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]" and json.loads(events[-2])["error"]["code"] == "arm_unavailable"
    two.breaks_after = 1
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{two.url}/v1/completions", json=BODY, headers=headers, timeout=60)


def test_a_client_that_leaves_frees_the_engine_over_there(two: Two) -> None:
    pid = two.generator.client.pid
    assert pid is not None
    content = json.dumps(BODY | {"stream": True, "max_tokens": 480}).encode()
    session = two.session("challenger")["x-session-id"]
    head = (
        f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nx-session-id: {session}\r\ncontent-length: {len(content)}\r\n\r\n"
    )
    os.kill(pid, signal.SIGSTOP)  # no answer ends meanwhile
    try:
        with socket.create_connection(("127.0.0.1", int(two.url.rsplit(":", 1)[1]))) as client:
            client.sendall(head.encode() + content)
            two.server.until(lambda: two.open == 1)
        two.server.until(lambda: two.open == 0)
    finally:
        os.kill(pid, signal.SIGCONT)

    async def until_idle() -> None:
        stats = {"num_running": 1.0}
        while stats["num_running"]:
            stats = await two.generator.client.stats(60)

    two.server.run(until_idle())


def test_all_of_it_may_go_over_there_and_none(two: Two) -> None:
    for share, arms in ((100, {"challenger"}), (0, {"champion"})):
        two.divide({"champion": 100 - share, "challenger": share})
        found = set()
        for i in range(6):
            answer = httpx.post(f"{two.url}/v1/completions", json=BODY, headers={"x-session-id": f"{i}"}, timeout=60)
            assert answer.status_code == 200
            found.add(answer.headers["x-altiplano-arm"])
        assert found == arms
    base = httpx.post(f"{two.url}/v1/completions", json=BODY | {"model": "cria"}, timeout=60)
    assert base.status_code == 200 and "x-altiplano-arm" not in base.headers, "who names the base is in no test"


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ({"elsewhere": {"third": THERE}}, "arms.weights has no 'third'"),
        ({"only": "third"}, "arms.weights has no 'third'"),
        ({"elsewhere": {"challenger": THERE}, "only": "champion"}, "both elsewhere and only"),
        ({"elsewhere": {"challenger": ""}}, "names of Serve applications"),
        ({}, "the arm 'challenger' is no adapter"),
    ],
)
def test_wrong_arms_are_refused(arms: dict[str, Any], says: str) -> None:
    config = {"adapters": {"champion": "/a"}, "aliases": {}, "arms": {"salt": SALT, "weights": HALF} | arms}
    with pytest.raises(ValueError, match=says):
        check_user_config(config)


def test_an_arm_elsewhere_is_no_shadow() -> None:
    arms = {"salt": SALT, "weights": HALF, "elsewhere": {"challenger": THERE}}
    config = {"adapters": {"champion": "/a"}, "arms": arms, "shadow": {"arm": "challenger", "fraction": 0.1}}
    with pytest.raises(ValueError, match="another application"):
        check_user_config(config)
