"""An endpoint with API keys, over HTTP: who gets in, what they may use, and what everybody else is told."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai import OpenAI
from starlette.routing import Route

from altiplano import spec
from altiplano.serve import messages as m
from altiplano.serve.app import create_app
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile, Scope
from altiplano.serve.routes import TABLE, find, undeclared

from .conftest import Server, settings

# Random words, so that there is text to stream from the first tokens on.
LONG: dict[str, Any] = {"model": "cria", "prompt": "A note", "max_tokens": 400, "temperature": 2, "seed": 1, "ignore_eos": True}
SHORT: dict[str, Any] = {"model": "cria", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0, "ignore_eos": True}
LIMITS = spec.ServeLimits(max_queued_seqs=0, max_body_bytes=64 << 10, max_header_bytes=4 << 10)


class Clock:
    """Real time, but where a test holds it."""

    def __init__(self) -> None:
        self._held: float | None = None

    def __call__(self) -> float:
        return time.perf_counter() if self._held is None else self._held

    @contextmanager
    def held(self) -> Iterator[None]:
        """However long the machine takes, no time passes."""
        self._held = time.perf_counter()
        try:
            yield
        finally:
            self._held = None


class Guarded(Server):
    """An endpoint with a key file; `key` makes keys while it runs."""

    def __init__(self, adapter: Path, directory: Path) -> None:
        self.file = KeyFile(directory / "keys.json")
        self.user, self.admin = self.key("user"), self.key("admin", scope=Scope.admin)
        endpoint = spec.Serve(host="0.0.0.0", api_keys_file=str(self.file.path), limits=LIMITS, max_num_seqs=16, usd_per_hour=3.6)
        self.clock = Clock()
        self.governance = Governance.of(endpoint, self.clock)
        super().__init__(settings(adapter), self.governance)

    def key(self, name: str, **more: Any) -> str:
        return self.file.create(name, **more)[1]

    def http(self, key: str | None) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, headers={"authorization": f"Bearer {key}"} if key else {})

    @contextmanager
    def patience(self, **seconds: float) -> Iterator[None]:
        """Other timeouts for clients than the usual ones, which no client exceeds because the machine is busy."""
        usual = self.governance.limits
        self.governance.limits = usual.model_copy(update=seconds)
        try:
            yield
        finally:
            self.governance.limits = usual

    def idle(self) -> None:
        """Wait until no request is left in the front end."""
        self.until(lambda: not self.governance.queue.size)

    def busy(self) -> int:
        """Requests in the engine, after everything that was sent to it before."""
        stats = self.run(self.generator.client.stats())
        return int(stats["num_running"] + stats["num_waiting"])


@pytest.fixture(scope="module")
def guarded(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(adapter, tmp_path_factory.mktemp("keys"))
    yield made
    made.close()


def test_every_route_of_the_application_declares_its_scope(guarded: Guarded) -> None:
    app = create_app(lambda: guarded.generator)
    assert undeclared(app.routes) == []
    assert len(app.routes) >= 8
    app.get("/forgotten")(lambda: "x")
    app.mount("/files", FastAPI())
    assert undeclared(app.routes) == ["GET /forgotten", "Mount /files"]


def test_no_route_that_is_not_public_answers_without_a_key(guarded: Guarded) -> None:
    routes = [route for route in create_app(lambda: guarded.generator).routes if isinstance(route, Route)]
    with guarded.http(None) as http:
        for route in routes:
            for method in route.methods or ():
                path = route.path.split("{")[0]
                entry = find(method, path) or find(method, path + "x")
                assert entry is not None
                status = http.request(method, path if "{" not in route.path else path + "x").status_code
                assert (status != 401) == (entry.scope is Scope.public), (method, path, status)


def test_scopes_reach_as_far_as_the_table_says(guarded: Guarded) -> None:
    assert {entry.path: entry.scope for entry in TABLE}["/metrics"] is Scope.metrics
    watcher = guarded.key("prometheus", scope=Scope.metrics)
    for key, statuses in ((guarded.user, (200, 403)), (watcher, (403, 200)), (guarded.admin, (200, 200))):
        with guarded.http(key) as http:
            assert (http.get("/v1/models").status_code, http.get("/metrics").status_code) == statuses


def test_the_key_that_scrapes_can_do_nothing_else(guarded: Guarded) -> None:
    with guarded.http(guarded.key("prometheus", scope=Scope.metrics)) as http:
        for entry in TABLE:
            path = entry.path.replace("{path:path}", "index.js").replace("{model:path}", "cria").replace("{change}", "x")
            refused = http.request(entry.method, path).status_code == 403
            assert refused == (entry.scope not in (Scope.public, Scope.metrics)), entry
        assert http.get("/metrics").status_code == 200


@pytest.mark.parametrize("header", ["Basic eDp5", "Bearer", "Bearer alt-00000000-wrong", "Bearer \xff", "alt-x-y"])
def test_wrong_credentials_get_401_in_openais_shape(guarded: Guarded, header: str) -> None:
    headers = {b"authorization": header.encode("latin-1")}
    response = httpx.post(f"{guarded.url}/v1/completions", json=SHORT, headers=headers, timeout=60)
    assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"
    assert response.headers["x-request-id"]


def test_openais_client_works_with_a_key_until_it_is_revoked(guarded: Guarded) -> None:
    text = guarded.key("visitor")
    with OpenAI(base_url=f"{guarded.url}/v1", api_key=text, max_retries=0, timeout=60) as client:
        assert client.completions.create(model="cria", prompt=[5, 6, 7], max_tokens=1).choices[0].finish_reason == "length"
        guarded.file.revoke(text.split("-")[1])
        guarded.governance.keys._looked = 0.0  # type: ignore[union-attr]  # a second has passed
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            client.completions.create(model="cria", prompt=[5, 6, 7], max_tokens=1)


def test_unknown_paths_are_refused_before_the_application_sees_them(guarded: Guarded) -> None:
    with guarded.http(guarded.admin) as http:
        assert http.get("/nowhere").status_code == 404
        assert http.get("/v1/completions").status_code == 405
        assert http.get("/metrics/").status_code == 404
        assert http.get("/%6Detrics").status_code == 200
    with guarded.http(guarded.user) as http:
        assert http.get("/%6Detrics").status_code == 403
        assert http.delete("/metrics").status_code == 403


def test_requests_a_minute(guarded: Guarded) -> None:
    with guarded.clock.held(), guarded.http(guarded.key("slow", requests_per_minute=2)) as http:
        answers = [http.post("/v1/completions", json=SHORT) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[0].headers["x-ratelimit-remaining-requests"] == "1"
    assert answers[2].headers["retry-after"] == "30"
    assert answers[2].json()["error"]["type"] == "rate_limit_error"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"


def test_tokens_a_minute_count_prompts_and_answers(guarded: Guarded) -> None:
    with guarded.clock.held(), guarded.http(guarded.key("thrifty", tokens_per_minute=60)) as http:
        assert http.post("/v1/completions", json=SHORT | {"prompt": [5] * 61}).status_code == 400
        first = http.post("/v1/completions", json=SHORT | {"max_tokens": 80})
        assert first.status_code == 200 and first.headers["x-ratelimit-remaining-tokens"] == "0"
        second = http.post("/v1/completions", json=SHORT)
        # 3 + 80 tokens were used of 60, and one comes back each second.
        assert second.status_code == 429 and second.headers["retry-after"] == "24"


def test_limits_belong_to_a_key_and_not_to_the_endpoint(guarded: Guarded) -> None:
    with guarded.clock.held(), guarded.http(guarded.key("one", requests_per_minute=1)) as http:
        assert [http.post("/v1/completions", json=SHORT).status_code for _ in range(2)] == [200, 429]
    with guarded.http(guarded.user) as http:
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_key_has_so_many_requests_at_once_and_gets_its_place_back(guarded: Guarded) -> None:
    guarded.idle()
    with guarded.http(guarded.key("narrow", max_concurrency=1)) as http, ThreadPoolExecutor() as pool:
        with guarded.stopped():
            running = pool.submit(http.post, "/v1/completions", json=SHORT)
            guarded.until(lambda: guarded.governance.queue.size == 1)
            refused = http.post("/v1/completions", json=SHORT)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert "1 requests running" in refused.json()["error"]["message"]
        assert running.result().status_code == 200
        guarded.idle()
        assert http.post("/v1/completions", json=SHORT).status_code == 200


def test_a_full_endpoint_says_so_at_once_and_serves_what_it_took(guarded: Guarded) -> None:
    guarded.idle()
    body = SHORT | {"max_tokens": 100}
    with guarded.http(guarded.user) as http, ThreadPoolExecutor(16) as pool:
        with guarded.stopped():
            taken = [pool.submit(http.post, "/v1/completions", json=body) for _ in range(16)]
            guarded.until(lambda: guarded.governance.queue.size == 16)
            ends = len(guarded.governance.queue._ends)
            refused = [http.post("/v1/completions", json=body) for _ in range(3)]
        assert {answer.status_code for answer in refused} == {429}
        assert refused[0].json()["error"]["code"] == "overloaded" and int(refused[0].headers["retry-after"]) >= 1
        answers = [running.result() for running in taken]
    assert {answer.status_code for answer in answers} == {200}
    assert all(answer.json()["usage"]["completion_tokens"] == 100 for answer in answers)
    guarded.idle()
    assert len(guarded.governance.queue._ends) == min(64, ends + 16), "what was refused is no answer that ended"


def test_more_answers_than_the_endpoint_holds(guarded: Guarded) -> None:
    with guarded.http(guarded.user) as http:
        response = http.post("/v1/completions", json=SHORT | {"prompt": [[5, 6]] * 5, "n": 4})
        assert response.status_code == 400 and "20 answers" in response.json()["error"]["message"]
        assert http.post("/v1/completions", json=SHORT | {"prompt": [[5, 6]] * 2, "n": 4}).status_code == 200
    guarded.idle()


def test_headers_and_depth_have_limits(guarded: Guarded) -> None:
    with guarded.http(guarded.user) as http:
        response = http.post("/v1/completions", json=SHORT, headers={"x-long": "x" * 5000})
        assert response.status_code == 431 and response.json()["error"]["message"]
        for depth, status in ((40, 200), (60, 400), (20_000, 400)):
            body = f'{{"model": "cria", "prompt": [5], "max_tokens": 1, "x": {"[" * depth}{"]" * depth}}}'
            assert http.post("/v1/completions", content=body).status_code == status


def test_request_ids_are_echoed_when_they_can_be(guarded: Guarded) -> None:
    with guarded.http(None) as http:
        assert http.get("/health", headers={"x-request-id": "a1:b-2"}).headers["x-request-id"] == "a1:b-2"
        for bad in ("", "x" * 129, "a b"):
            assert len(http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]) == 32


def test_prefixes_are_cached_apart_for_each_key(guarded: Guarded) -> None:
    body = SHORT | {"prompt": [9, 8, 7] * 50}
    with guarded.http(guarded.key("a")) as one, guarded.http(guarded.key("b")) as two:
        cached = [
            http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
            for http in (one, one, two)
        ]
    assert cached[0] == cached[2] == 0 and cached[1] >= 96


def test_an_error_of_ours_is_a_500_in_openais_shape(guarded: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> list[str]:
        raise ZeroDivisionError

    monkeypatch.setattr(type(guarded.generator), "model_names", broken)
    with guarded.http(guarded.user) as http:
        response = http.get("/v1/models", headers={"x-request-id": "find-me"})
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    assert "find-me" in response.json()["error"]["message"] and "ZeroDivision" not in response.text


# Without keys (the endpoint of the other tests): this machine only.


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:8000"}, 200),
        ({"host": "rebound.example.org"}, 403),
        ({"host": "192.168.1.7:8000"}, 403),
        ({"origin": "http://localhost:3000"}, 200),
        ({"origin": "https://evil.example.org"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_keys_web_pages_and_other_hosts_are_refused(server: Server, headers: dict[str, str], status: int) -> None:
    response = httpx.get(f"{server.url}/v1/models", headers=headers, timeout=60)
    assert response.status_code == status
    if status == 403:
        assert response.json()["error"]["code"] == "loopback_only"


def test_without_keys_the_network_is_refused(server: Server) -> None:
    async def ask(client: str) -> int:
        transport = httpx.ASGITransport(create_app(lambda: server.generator), client=(client, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return (await http.get("/version")).status_code

    assert [asyncio.run(ask(client)) for client in ("127.0.0.1", "::1", "203.0.113.9")] == [200, 200, 403]


def test_the_engine_client_can_be_used_outside_of_a_call(server: Server) -> None:
    async def alone() -> int:
        return len([token async for token in server.generator.client.generate("alone", [5, 6], m.Sampling(max_tokens=3))])

    assert server.run(alone()) >= 1
