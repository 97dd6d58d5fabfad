"""The grammar process: what it allows, and what happens to others when a schema ends it."""

import json
import os
import queue
import signal
from collections.abc import Iterator

import pytest
from tokenizers import Tokenizer

from altiplano.models.cria import cria_path
from altiplano.serve import grammar_worker as w
from altiplano.serve.grammars import Gone, Grammars, Report

TOKENIZER = Tokenizer.from_file(str(cria_path() / "tokenizer.json"))
VOCAB, ENDS = TOKENIZER.get_vocab_size(), (5, 6)
PAIR = 'start: "1" ("2" | "3")'


class Bench:
    """Grammars with the queue that an engine would read."""

    def __init__(self, limit_s: float = 3.0) -> None:
        self.reports: queue.Queue[Report] = queue.Queue()
        self.grammars = Grammars(str(cria_path() / "tokenizer.json"), VOCAB, ENDS, self.reports.put, limit_s)

    def news(self) -> w.Allowed | w.Bad:
        while True:
            found = self.grammars.take_report(self.reports.get(timeout=60))
            if found:
                assert len(found) == 1
                return found[0]

    def texts(self) -> set[str]:
        """What may come next, as text."""
        news = self.news()
        assert isinstance(news, w.Allowed), news
        ids = [i for i in range(VOCAB) if news.tokens[i // 8] >> (i % 8) & 1]
        return {TOKENIZER.decode([i], skip_special_tokens=False) for i in ids}

    def die(self) -> None:
        """Kill the process; its death is the next report."""
        assert self.grammars.pid is not None
        os.kill(self.grammars.pid, signal.SIGKILL)


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.grammars.close()


def token(text: str) -> int:
    (found,) = TOKENIZER.encode(text, add_special_tokens=False).ids
    return int(found)


def test_each_answer_walks_through_its_own_grammar(bench: Bench) -> None:
    bench.grammars.begin("one", PAIR)
    assert bench.texts() == {"1"}
    bench.grammars.begin("two", 'start: "7"')
    assert bench.texts() == {"7"}
    bench.grammars.take("one", token("1"))
    assert bench.texts() == {"2", "3"}
    bench.grammars.take("one", token("3"))
    assert bench.texts() == {TOKENIZER.id_to_token(i) for i in ENDS}


def test_a_schema_that_is_none_is_bad_and_the_process_stays(bench: Bench) -> None:
    bench.grammars.begin("wrong", 'start: %json {"type": "strin"}')
    news = bench.news()
    assert isinstance(news, w.Bad) and news.error == "Invalid type: strin"
    pid = bench.grammars.pid
    bench.grammars.begin("right", PAIR)
    assert bench.texts() == {"1"} and bench.grammars.pid == pid


def test_a_schema_that_takes_too_long_is_refused_and_the_others_go_on() -> None:
    bench = Bench(limit_s=0.2)
    try:
        bench.grammars.begin("other", PAIR)
        assert bench.texts() == {"1"}
        bench.grammars.take("other", token("1"))
        assert bench.texts() == {"2", "3"}
        bomb = "start: %json " + json.dumps({"properties": {f"key{i}": {"type": "string"} for i in range(8000)}})
        bench.grammars.begin("bomb", bomb)
        bench.grammars.begin("waiting", PAIR)
        news = bench.news()
        assert isinstance(news, w.Bad) and news.request_id == "bomb" and "simplify" in news.error
        assert "bomb" not in bench.grammars
        # Both are begun again in the next life, each where it stood.
        assert bench.texts() == {"2", "3"}
        assert bench.texts() == {"1"}
        # The bomb is known now: it does not cost a second process.
        pid = bench.grammars.pid
        bench.grammars.begin("again", bomb)
        assert isinstance(bench.news(), w.Bad) and bench.grammars.pid == pid
    finally:
        bench.grammars.close()


def test_a_token_drawn_while_the_process_was_dead_is_not_forgotten(bench: Bench) -> None:
    bench.grammars.begin("one", 'start: "4" "5" "6"')
    assert bench.texts() == {"4"}
    bench.die()
    death = bench.reports.get(timeout=60)
    assert isinstance(death, Gone) and bench.grammars.take_report(death) == []
    bench.grammars.take("one", token("4"))
    # The new beginning's answer is about a token that is drawn already: only the one after it counts.
    assert bench.texts() == {"5"}


def test_who_asks_while_somebody_kills_the_process_is_not_blamed_at_once(bench: Bench) -> None:
    bench.grammars.begin("one", PAIR)
    assert bench.texts() == {"1"}
    bench.die()
    bench.grammars.take("one", token("1"))
    assert bench.texts() == {"2", "3"}
    # A grammar on which the process ends again and again is left alone.
    bench.die()
    bench.grammars.take("one", token("2"))
    news = bench.news()
    assert isinstance(news, w.Bad) and "simplify" in news.error


def test_answers_to_who_has_left_are_dropped(bench: Bench) -> None:
    bench.grammars.begin("gone", PAIR)
    bench.grammars.forget("gone")
    bench.grammars.begin("here", 'start: "7"')
    assert bench.texts() == {"7"}


def test_a_process_that_cannot_start_refuses_in_words() -> None:
    reports: queue.Queue[Report] = queue.Queue()
    grammars = Grammars("/nowhere/tokenizer.json", VOCAB, ENDS, reports.put)
    grammars.begin("one", PAIR)
    (news,) = grammars.take_report(reports.get(timeout=60))
    assert isinstance(news, w.Bad) and "exit code 1" in news.error
