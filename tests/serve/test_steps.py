"""Where the engine's time goes, as an operator sees it: histograms for Prometheus, and the last steps one by one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from .test_gate import SHORT, Guarded


@pytest.fixture(scope="module")
def guarded(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    made = Guarded(adapter, tmp_path_factory.mktemp("keys"))
    yield made
    made.close()


@pytest.fixture
def http(guarded: Guarded) -> Iterator[httpx.Client]:
    with guarded.http(guarded.admin) as made:
        yield made


def steps(http: httpx.Client, last: int = 64) -> list[dict[str, Any]]:
    response = http.get("/v1/engine/steps", params={"last": last})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["data"]
    return found


def histogram(http: httpx.Client, name: str) -> dict[str, float]:
    """Samples of a histogram: `count`, `sum`, and the cumulative counts by their bounds."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    samples = [sample for family in families if family.name == f"altiplano_{name}" for sample in family.samples]
    assert samples, f"{name} is not shown"
    return {sample.labels.get("le", sample.name.rpartition("_")[2]): sample.value for sample in samples}


def test_the_steps_of_an_answer_one_by_one(http: httpx.Client) -> None:
    prompt = list(range(3, 73))
    usage = [http.post("/v1/completions", json=SHORT | {"prompt": prompt}).json()["usage"] for _ in range(2)]
    cached = usage[1]["prompt_tokens_details"]["cached_tokens"]
    first, again = steps(http, 8)[:4], steps(http, 8)[4:]
    assert [step["prompt_tokens"] for step in first] == [len(prompt), 0, 0, 0]
    assert [step["prompt_tokens"] for step in again] == [len(prompt) - cached, 0, 0, 0]
    assert [step["cached_tokens"] for step in again] == [cached, 0, 0, 0] and cached > 0
    assert [step["decodes"] for step in first] == [0, 1, 1, 1]
    assert all(step["generated_tokens"] == step["steps"] == 1 and step["seconds"] > 0 for step in first + again)
    assert first[0]["gap_seconds"] == again[0]["gap_seconds"] == 0 < first[1]["gap_seconds"]
    numbers = [step["number"] for step in first + again]
    assert numbers == list(range(numbers[0], numbers[0] + 8))
    assert steps(http, 2) == again[2:]


def test_histograms_of_steps_are_prometheus_histograms(http: httpx.Client) -> None:
    before = histogram(http, "iteration_tokens_total")
    http.post("/v1/completions", json=SHORT | {"max_tokens": 9, "prompt": [9, 8, 7]})
    after = histogram(http, "iteration_tokens_total")
    new = {name: value - before[name] for name, value in after.items()}
    assert (new["count"], new["sum"]) == (9, 3 + 9)
    assert (new["1.0"], new["8.0"], new["+Inf"]) == (8, 9, 9)
    last = steps(http, 1024)
    assert histogram(http, "iteration_seconds")["sum"] == pytest.approx(sum(step["seconds"] for step in last))
    assert histogram(http, "iteration_gap_seconds")["sum"] == pytest.approx(sum(step["gap_seconds"] for step in last))
    assert histogram(http, "iteration_decode_seqs")["sum"] == sum(step["decodes"] for step in last)


@pytest.mark.parametrize("last", ["0", "-1", "1025", "many", "9" * 5000, "٣"])
def test_a_number_of_steps_that_makes_no_sense_is_refused(http: httpx.Client, last: str) -> None:
    response = http.get("/v1/engine/steps", params={"last": last})
    assert response.status_code == 400 and "1 to 1024" in response.json()["error"]["message"]


def test_an_engine_that_hangs_has_no_steps_to_show_and_the_histograms_stay(
    guarded: Guarded, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    http.post("/v1/completions", json=SHORT)
    count = histogram(http, "iteration_tokens_total")["count"]
    with guarded.stopped():
        monkeypatch.setattr("altiplano.serve.observability.STATS_TIMEOUT_S", 0.3)
        response = http.get("/v1/engine/steps")
        assert response.status_code == 503 and "does not answer" in response.json()["error"]["message"]
        assert histogram(http, "iteration_tokens_total")["count"] == count


def test_only_an_administrator_sees_steps(guarded: Guarded) -> None:
    with guarded.http(guarded.user) as http:
        assert http.get("/v1/engine/steps").status_code == 403
    with guarded.http(None) as http:
        assert http.get("/v1/engine/steps").status_code == 401
