"""Identical greedy requests are computed once, for one key, as long as the same weights answer."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano import spec
from altiplano.serve.governance import Governance
from altiplano.serve.response_cache import ResponseCache, Stored, digest_of

from .conftest import Server, settings

ASK = {"model": "champion", "prompt": "A note", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def caching(adapter: Path) -> Iterator[Server]:
    made = Server(settings(adapter), Governance.of(spec.Serve(response_cache_bytes=1 << 20)))
    yield made
    made.close()


def ask(server: Server, **more: object) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/completions", json=ASK | more, timeout=60)


def result(response: httpx.Response) -> object:
    return response.headers.get("x-altiplano-cache")


def test_the_same_bytes_come_back_without_the_engine(caching: Server) -> None:
    first = ask(caching)
    before = caching.run(caching.generator.client.stats())["generation_tokens"]
    second = ask(caching, user="somebody else behind the same key")
    assert (result(first), result(second)) == ("miss", "hit") and second.content == first.content
    assert second.headers["content-type"] == first.headers["content-type"]
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert caching.run(caching.generator.client.stats())["generation_tokens"] == before


def test_streams_are_kept_as_streams(caching: Server) -> None:
    first, second = ask(caching, stream=True), ask(caching, stream=True)
    assert result(second) == "hit" and second.text == first.text and second.text.endswith("data: [DONE]\n\n")
    assert second.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("change", [{"temperature": 0.5}, {"temperature": 1}])
def test_drawn_answers_are_not_kept(caching: Server, change: dict[str, object]) -> None:
    assert [result(ask(caching, **change)) for _ in range(2)] == [None, None]


def test_errors_are_not_kept(caching: Server) -> None:
    assert [(ask(caching, max_tokens=5000).status_code) for _ in range(2)] == [400, 400]
    assert result(ask(caching, max_tokens=5000)) == "miss"


def test_a_moved_alias_is_not_answered_with_old_words(caching: Server) -> None:
    tuned = ask(caching, max_tokens=9)
    caching.generator.aliases = {"champion": "cria"}
    base = ask(caching, max_tokens=9)
    caching.generator.aliases = {"champion": "orders-1"}
    assert result(base) == "miss" and base.json()["choices"][0]["text"] != tuned.json()["choices"][0]["text"]
    assert ask(caching, max_tokens=9).content == tuned.content


def test_what_makes_requests_identical() -> None:
    body = {"model": "m", "prompt": "p", "temperature": 0, "max_tokens": 4}
    one = digest_of("/v1/completions", body, "w", "k")
    assert one is not None
    assert one == digest_of("/v1/completions", dict(reversed(body.items())) | {"user": "x"}, "w", "k")
    others = [
        digest_of("/generate", body, "w", "k"),
        digest_of("/v1/completions", body, "w2", "k"),
        digest_of("/v1/completions", body, "w", "k2"),
        digest_of("/v1/completions", body | {"max_tokens": 5}, "w", "k"),
    ]
    assert len({one, *others}) == 5
    assert digest_of("/v1/completions", {"model": "m", "prompt": "p"}, "w", "k") is None
    assert digest_of("/v1/completions", [], "w", "k") is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 200)), max_size=60))
def test_memory_is_bounded_and_the_latest_are_kept(puts: list[tuple[int, int]]) -> None:
    cache = ResponseCache(800)
    for name, size in puts:
        cache.put(bytes([name]), Stored(((b"a", b"b"),), b"x" * size))
        kept = [cache.get(bytes([n])) for n in range(10)]
        assert cache.size == sum(stored.size for stored in kept if stored) <= 800
        assert size + 2 > 100 or cache.get(bytes([name])) is not None


def test_a_stream_that_failed_on_the_way_is_not_kept() -> None:
    cache = ResponseCache(8000)
    cache.put(b"1", Stored((), b'data: {"choices":[]}\n\ndata: {"error":{"message":"x"}}\n\ndata: [DONE]\n\n'))
    assert cache.get(b"1") is None
