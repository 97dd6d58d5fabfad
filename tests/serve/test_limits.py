"""Quotas and queues under a clock that the test moves: what is admitted, what has to wait, and for how long."""

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano import spec
from altiplano.serve.errors import ApiError
from altiplano.serve.keys import Key, Scope
from altiplano.serve.limits import Queue, Quota, Quotas, TokenBucket, check_schema, check_values

LIMITS = spec.ServeLimits()
KEY = Key("k1", "team", Scope.user, "", 0, requests_per_minute=3, tokens_per_minute=600, max_concurrency=2)


def refused(status: int, words: str) -> "pytest.RaisesExc[ApiError]":
    return pytest.RaisesExc(ApiError, check=lambda error: error.status == status and words in error.message)


@given(st.integers(1, 10_000), st.lists(st.tuples(st.floats(0, 100), st.integers(1, 500)), max_size=60))
def test_no_pattern_of_requests_gets_more_than_its_rate(per_minute: int, arrivals: list[tuple[float, int]]) -> None:
    bucket, now, admitted = TokenBucket(per_minute, 0.0), 0.0, 0
    for gap, amount in arrivals:
        now += gap
        if bucket.wait(amount, now) == 0 and amount <= per_minute:
            bucket.take(amount)
            admitted += amount
        assert admitted <= per_minute * (1 + now / 60) + 1e-6


@given(st.integers(1, 10_000), st.integers(0, 20_000), st.integers(1, 10_000))
def test_who_waits_as_long_as_told_is_admitted(per_minute: int, used: int, amount: int) -> None:
    bucket = TokenBucket(per_minute, 0.0)
    bucket.take(used)
    wait = bucket.wait(amount, 0.0)
    assert bucket.wait(amount, wait) == pytest.approx(0, abs=1e-6)
    if wait > 1e-3:
        assert TokenBucket.wait(bucket, amount, 0.0) == pytest.approx(0, abs=1e-6)  # time never runs backwards
        early = TokenBucket(per_minute, 0.0)
        early.take(used)
        assert early.wait(amount, wait * 0.99) > 0


def test_requests_per_minute_and_concurrency() -> None:
    quota = Quota.of(KEY, LIMITS, now=0.0)
    quota.enter(0.0)
    quota.enter(0.0)
    with refused(429, "2 requests running"):
        quota.enter(0.0)
    quota.leave()
    quota.enter(0.0)
    quota.leave()
    with refused(429, "3 requests a minute: try again in 20 s"):
        quota.enter(0.0)
    quota.enter(20.0)
    assert quota.running == 2


def test_tokens_are_charged_as_they_come_and_debts_are_paid_first() -> None:
    quota = Quota.of(KEY, LIMITS, now=0.0)
    assert quota.tokens is not None
    quota.enter(0.0)
    quota.charge_prompt(500, 0.0)
    quota.tokens.take(400)  # the answer turned out long: 300 in debt
    quota.leave()
    with refused(429, "600 tokens a minute"):
        quota.enter(29.0)
    quota.enter(31.0)
    with refused(429, "the prompt has 500"):
        quota.charge_prompt(500, 31.0)
    with refused(400, "601 tokens"):
        quota.charge_prompt(601, 31.0)


def test_headers_say_what_is_left() -> None:
    quota = Quota.of(KEY, LIMITS, now=0.0)
    quota.enter(0.0)
    headers = quota.headers(0.0)
    assert headers["x-ratelimit-limit-requests"] == "3" and headers["x-ratelimit-remaining-requests"] == "2"
    assert headers["x-ratelimit-reset-requests"] == "20.0s" and headers["x-ratelimit-remaining-tokens"] == "600"
    assert Quota.of(None, LIMITS, now=0.0).headers(0.0) == {}


def test_keys_do_not_share_quotas_and_new_limits_count_at_once() -> None:
    quotas = Quotas(spec.ServeLimits(requests_per_minute=1))
    other = Key("k2", "other", Scope.user, "", 0)
    quotas.of(other, 0.0).enter(0.0)
    with refused(429, "1 requests a minute"):
        quotas.of(other, 0.0).enter(0.0)
    quotas.of(KEY, 0.0).enter(0.0)
    raised = Key("k2", "other", Scope.user, "", 0, requests_per_minute=5)
    quotas.of(raised, 0.0).enter(0.0)


def test_the_queue_is_bounded_and_estimates_when_there_is_room() -> None:
    queue = Queue(running=8, waiting=2)
    queue.enter(8, 0.0)
    with refused(429, "try again in 1 s"):
        queue.enter(3, 0.0)
    with refused(400, "11 answers"):
        queue.enter(11, 0.0)
    for second in range(1, 5):
        queue.leave(1, 10.0 * second)
    queue.enter(4, 50.0)
    # Four answers ended in the last 40 seconds, and three places are missing.
    with refused(429, "try again in 30 s"):
        queue.enter(5, 50.0)
    assert queue.size == 8


def test_what_was_refused_does_not_make_the_endpoint_look_fast() -> None:
    queue = Queue(running=1, waiting=1)
    for second in (0.0, 30.0):
        queue.enter(1, second)
        queue.leave(1, second)
    for moment in range(100):  # asked for too much, and got 400 at once
        queue.enter(1, 60.0 + moment / 100)
        queue.leave(1, 60.0 + moment / 100, computed=False)
    queue.enter(2, 61.0)
    with refused(429, "try again in 31 s"):  # two answers in 61 seconds
        queue.enter(1, 61.0)


def test_a_busy_key_does_not_keep_others_out_and_alone_uses_everything() -> None:
    queue = Queue(running=4, waiting=6)
    queue.enter(10, 0.0, "hog")
    with refused(429, "10 answers run or wait"):
        queue.enter(1, 1.0, "guest")
    queue.leave(1, 2.0, "hog")
    with refused(429, "its share, 9"):
        queue.enter(1, 2.0, "hog")  # the place is the guest's, who asked a second ago
    queue.enter(1, 3.0, "guest")
    queue.leave(4, 4.0, "hog")
    for second in range(5, 9):
        queue.enter(1, float(second), "guest")
    queue.leave(1, 9.0, "guest")
    with refused(429, "its share, 5"):
        queue.enter(1, 9.0, "hog")
    queue.leave(4, 10.0, "guest")
    queue.enter(5, 70.0, "hog")  # nobody else has asked for a minute
    assert queue.size == 10


@pytest.mark.parametrize("clients", [60, 480, 2000])
def test_clients_who_come_back_when_told_to_do_not_come_all_at_once(clients: int) -> None:
    """Virtual time: 16 places compute, 32 wait, 50 answers a second end; each client asks again when it was answered, or may."""
    queue, coming, answered, refusals = Queue(running=16, waiting=32), [0.0] * clients, 0, 0
    heapq.heapify(coming)
    for tick in range(1, 3001):
        now = tick / 50
        if queue.size:
            queue.leave(1, now)
            heapq.heappush(coming, now)
            answered += tick > 1000
        while coming[0] <= now:
            heapq.heappop(coming)
            try:
                queue.enter(1, now)
            except ApiError as error:
                assert error.retry_after is not None
                heapq.heappush(coming, now + error.retry_after)
                refusals += tick > 1000
    assert answered >= 0.97 * 2000, "the engine is never without work"
    assert refusals <= 2 * answered


def test_a_flood_of_one_key_keeps_nobody_else_away_for_long() -> None:
    queue = Queue(running=4, waiting=4)
    for key in ("flood", "guest"):
        queue.enter(4, 0.0, key)
    for tick in range(1, 500):
        if tick % 50 == 0:
            for key in ("flood", "guest"):
                queue.leave(1, tick / 50, key)
                queue.enter(1, tick / 50, key)
        with refused(429, "8 answers run or wait"):
            queue.enter(1, tick / 50, "flood")
    assert queue.retry_after(1, 10.0, "flood") == 60
    assert queue.retry_after(1, 10.0, "guest") <= 3


def test_fairness_never_idles_the_engine() -> None:
    queue = Queue(running=8, waiting=0)
    for key in ("a", "b", "c"):
        queue.enter(1, 0.0, key)
        queue.leave(1, 1.0, key)
    queue.enter(8, 2.0, "hog")


@given(st.lists(st.integers(1, 4), max_size=80))
def test_the_queue_never_holds_more_than_its_limit(sizes: list[int]) -> None:
    queue, inside = Queue(running=4, waiting=3), []
    for at, size in enumerate(sizes):
        try:
            queue.enter(size, float(at))
            inside.append(size)
        except ApiError as error:
            assert error.status == 429 and error.retry_after is not None and 1 <= error.retry_after <= 60
            if inside:
                queue.leave(inside.pop(0), float(at))
        assert queue.size == sum(inside) <= 7


def test_deep_and_wide_bodies_are_refused_without_recursion() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with refused(400, "48 levels"):
        check_values(deep, LIMITS)
    check_values({"prompt": [list(range(1000))] * 100}, LIMITS)
    with refused(400, "262144 values"):
        check_values({"prompt": list(range(300_000))}, LIMITS)
    with refused(400, "a schema may be nested 24 levels deep"):
        check_schema(deep, LIMITS)
    check_schema({"type": "object", "properties": {"a": {"type": "string"}}}, LIMITS)


def test_a_public_address_needs_keys() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(ValueError, match="altiplano keys create"):
            spec.Serve(host=host)
        spec.Serve(host=host, api_keys_file="keys.json")
    for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost"):
        spec.Serve(host=host)
