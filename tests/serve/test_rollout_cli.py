"""`altiplano rollout` and `altiplano ab` as scripts use them: JSON, and exit codes that say what is wrong."""

import getpass
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.cli import app as command_line
from altiplano.cluster.processes import free_port
from altiplano.serve.evidence import Notebook
from altiplano.serve.outcomes import ArmOutcomes
from altiplano.serve.rollout import CHALLENGER, CHAMPION, Plan, State, promoted
from altiplano.serve.rollout_store import Store

from .conftest import make_adapter
from .test_feedback import Divided

PLAN = Plan("orders", 2, "orders-1", "orders-2", "/adapters/orders-2", "a salt for tests")


@pytest.fixture
def altiplano(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command as the console script does: (exit code, standard output, standard error)."""

    def run(*words: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["altiplano", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            command_line.main()
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


@pytest.fixture(scope="module")
def tested(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Divided]:
    made = Divided(adapter, make_adapter(tmp_path_factory.mktemp("second"), seed=2))
    yield made
    made.close()


def test_a_report_compares_both_arms_and_says_how_sure_it_is(tested: Divided, altiplano: Callable[..., Any]) -> None:
    for session in range(24):
        answer = tested.ask(session=f"{session}")
        rated = {"id": answer.json()["id"], "rating": "up" if answer.headers["x-altiplano-arm"] == CHAMPION else "down"}
        assert httpx.post(f"{tested.url}/v1/feedback", json=rated, timeout=60).status_code == 200
    code, out, _ = altiplano("ab", "report", "--url", tested.url, "-o", "json")
    told = json.loads(out)
    assert code == 0 and told["replicas"] == 1 and told["weights"] == {CHAMPION: 0.5, CHALLENGER: 0.5}
    assert sum(arm["requests"] for arm in told["arms"].values()) == 24
    assert told["confidence"] == pytest.approx(0.95)
    found = told["comparisons"][CHALLENGER]
    assert set(found) == {"error_rate", "ttft_s", "tokens_per_s", "e2e_s", "feedback"}
    assert found["error_rate"]["effect"] == 0 and found["error_rate"]["verdict"] == "undecided"
    assert found["feedback"]["effect"] == -2
    for metric in found.values():
        interval = metric["interval"]
        assert interval is None or interval["low"] <= metric["effect"] <= interval["high"]

    code, out, _ = altiplano("ab", "report", "--url", tested.url)
    assert code == 0 and "challenger against champion, 95% confidence at every look" in out
    assert all(name in out for name in ("error rate", "TTFT, s", "tokens/s", "response time, s", "feedback"))


def test_a_report_without_a_test_says_how_to_start_one(tested: Divided, altiplano: Callable[..., Any]) -> None:
    tested.configure(arms=None)
    try:
        assert altiplano("ab", "report", "--url", tested.url)[::2] == (
            0,
            "no test is running: start one with `altiplano rollout start`\n",
        )
        code, out, _ = altiplano("ab", "report", "--url", tested.url, "-o", "json")
        assert code == 0 and json.loads(out)["test"] is None
    finally:
        tested.configure()


def test_what_does_not_answer_has_code_4(tmp_path: Path, altiplano: Callable[..., Any]) -> None:
    code, _, err = altiplano("ab", "report", "--url", f"http://127.0.0.1:{free_port()}")
    assert code == 4 and "give its address with --url" in err
    code, _, err = altiplano("rollout", "start", "-w", tmp_path)
    assert code == 4 and "no Ray runs for" in err and "--dashboard-url" in err
    nowhere = f"http://127.0.0.1:{free_port()}"
    code, _, err = altiplano("rollout", "start", "-w", tmp_path, "--dashboard-url", nowhere, "--tracking-uri", nowhere)
    assert code == 4 and "is the cluster running?" in err


def test_wrong_arguments_have_code_2_and_say_what_to_write(tmp_path: Path, altiplano: Callable[..., Any]) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    site = ("-w", tmp_path, "--dashboard-url", nowhere, "--tracking-uri", nowhere)
    for option, value, says in (
        ("--steps", "5;25", "write percents with commas"),
        ("--max-ttft-ratio", "0.5", "use a ratio of at least 1"),
        ("--max-error-increase", "2", "use a share from 0 to 1"),
    ):
        code, _, err = altiplano("rollout", "start", *site, option, value)
        assert code == 2 and says in err, (option, err)
    for verb in ("status", "pause", "resume", "promote", "rollback"):
        code, _, err = altiplano("rollout", verb, "-w", tmp_path)
        assert code == 2 and "altiplano rollout start" in err, verb


def test_status_shows_the_rollout_and_commands_wait_for_its_controller(tmp_path: Path, altiplano: Callable[..., Any]) -> None:
    store = Store(tmp_path / "rollout")
    saved = store.begin(PLAN, time.time())
    code, out, _ = altiplano("rollout", "status", "-w", tmp_path, "-o", "json")
    told = json.loads(out)
    assert code == 0 and told["state"]["phase"] == "running" and told["share"] == 5
    assert "salt" not in told["plan"] and PLAN.salt not in out
    code, out, _ = altiplano("rollout", "status", "-w", tmp_path)
    assert code == 0 and "orders-2 against orders-1: running, 5 % of the traffic" in out and "error rate" in out

    code, out, err = altiplano("rollout", "pause", "-w", tmp_path)
    assert code == 0 and "asked for: pause" in out and "no controller is running" in err
    with store.controlled():
        code, _, err = altiplano("rollout", "promote", "-w", tmp_path)
        assert (
            code == 2 and "not all budgets look kept (error rate: 0 of the challenger's requests" in err and "--override" in err
        )
        assert altiplano("rollout", "promote", "-w", tmp_path, "--override", " ")[0] == 2
        code, _, err = altiplano("rollout", "promote", "-w", tmp_path, "--override", "the old one leaks names")
    assert code == 0 and err == ""
    verb, reason = store.taken() or ("", "")
    assert verb == "promote", "the last word counts"
    assert reason.startswith(f"promoted by {getpass.getuser()}: the old one leaks names (against: error rate")

    saved.state = promoted(State())
    store.save(saved)
    assert altiplano("rollout", "status", "-w", tmp_path)[1].startswith("orders-2 against orders-1: promoting, 100 %")


def test_a_promotion_that_nothing_speaks_against_needs_no_reason(tmp_path: Path, altiplano: Callable[..., Any]) -> None:
    store = Store(tmp_path / "rollout")
    saved = store.begin(PLAN, time.time())
    sums = ArmOutcomes(requests=400)
    for metric in (sums.ttft, sums.tokens_per_s):
        for value in range(400):
            metric.add_log(1 + value % 3)
    saved.notebook = Notebook(latest={"a replica": {CHAMPION: sums, CHALLENGER: sums}})
    store.save(saved)
    code, _, err = altiplano("rollout", "promote", "-w", tmp_path)
    assert code == 0 and "override" not in err
    assert store.taken() == ("promote", f"promoted by {getpass.getuser()}")
