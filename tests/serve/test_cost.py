"""The replica's price is divided without a rest, whatever runs when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from altiplano.serve.cost import IDLE, Account, Ledger, report
from altiplano.serve.metrics import Labels

ANNA, BERT = Labels("cria", "base", "anna"), Labels("cria", "base", "bert")
EVENTS = st.lists(
    st.tuples(st.floats(0, 1000), st.sampled_from(["begin", "end", "token", "prompt", "settle"]), st.sampled_from([ANNA, BERT])),
    max_size=60,
)


@given(EVENTS)
def test_shares_and_idle_time_add_up_to_the_bill(events: list[tuple[float, str, Labels]]) -> None:
    ledger, now = Ledger(3.6, 0.0), 0.0
    running: list[Account] = []
    for gap, what, labels in events:
        now += gap
        if what == "begin":
            running.append(ledger.begin(labels, now))
        elif what == "end" and running:
            ledger.end(running.pop(), now)
        elif what == "token" and running:
            running[0].token()
        elif what == "prompt" and running:
            running[0].prompt(100, 50)
        elif what == "settle":
            ledger.settle(now)
    now += 1.0
    if running:
        running[0].token()  # so that the last stretch belongs to somebody
    assert sum(account.usd for _, account in ledger.settle(now)) == pytest.approx(3.6 * now / 3600)


def test_who_generates_more_pays_more_and_nobody_pays_for_the_night() -> None:
    ledger = Ledger(36.0, 0.0)  # a cent a second
    anna, bert = ledger.begin(ANNA, 100.0), ledger.begin(BERT, 100.0)
    for _ in range(30):
        anna.token()
    bert.prompt(tokens=100, cached=50)  # as much work as ten generated tokens
    ledger.end(anna, 104.0)
    ledger.end(bert, 104.0)
    accounts = dict(ledger.settle(104.0))
    assert accounts[IDLE].usd == pytest.approx(1.0)
    assert accounts[ANNA].usd == pytest.approx(0.03)
    assert accounts[BERT].usd == pytest.approx(0.01)
    assert accounts[BERT].usd_per_million_tokens == pytest.approx(100.0)


def test_a_report_shows_a_key_its_own_rows_only() -> None:
    ledger = Ledger(None, 0.0)
    ledger.begin(ANNA, 0.0).token()
    ledger.begin(BERT, 0.0)
    assert [row["key"] for row in report(ledger, 1.0, "bert")["data"]] == ["bert"]
    rows = report(ledger, 1.0, None)["data"]
    assert [(row["key"], row["completion_tokens"], row["cost_usd"]) for row in rows] == [("anna", 1, None), ("bert", 0, None)]
