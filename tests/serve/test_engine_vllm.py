"""The engine's process with vLLM in it, up to vLLM's surface: which grammars reach it, and what is told when it gives a request up."""

import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from altiplano.engine import EngineConfig, VllmEngine
from altiplano.models.cria import cria_path
from altiplano.serve import messages as m
from altiplano.serve.engine_client import engine_settings
from altiplano.serve.engine_process import GAVE_UP, Loop
from altiplano.serve.settings import ServeSettings

from ..engine.vllm_surface import LLMEngine, modules


class FrontEnd:
    """The other end of the process's socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._stream = connection.makefile("rwb")

    def say(self, *commands: m.Command) -> None:
        """All in one go."""
        self._stream.write(b"".join(map(m.frame, commands)))
        self._stream.flush()

    def hear(self) -> m.Report:
        (length,) = m.LENGTH.unpack(self._stream.read(m.LENGTH.size))
        report: m.Report = m.decode_report(self._stream.read(length))
        return report


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FrontEnd, LLMEngine]]:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    engine = VllmEngine(EngineConfig(cria_path(), device="cuda", dtype="bfloat16", max_model_len=512))
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    thread = threading.Thread(target=Loop(theirs, engine).run)
    thread.start()
    front = FrontEnd(ours)
    try:
        assert isinstance(front.hear(), m.Ready)
        yield front, engine._engine
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        thread.join(60)
        ours.close()
        theirs.close()


def add(name: str, grammar: str | None) -> m.Add:
    return m.Add(name, [5, 6], m.Sampling(max_tokens=1), grammar=grammar)


def test_a_grammar_that_cannot_be_never_reaches_vllm(process: tuple[FrontEnd, LLMEngine]) -> None:
    front, vllm = process
    front.say(add("bad", "start: nothing"))
    answer: Any = front.hear()
    assert isinstance(answer, m.Refused) and answer.request_id == "bad" and "nothing" in answer.error
    assert not vllm.seen


def test_a_grammar_that_can_be_goes_with_its_request(process: tuple[FrontEnd, LLMEngine]) -> None:
    front, vllm = process
    front.say(add("good", 'start: "yes"'))
    answer: Any = front.hear()
    assert isinstance(answer, m.Step) and [(token.token_id, token.finish_reason) for token in answer.tokens] == [(7, "length")]
    (asked,) = vllm.seen
    assert asked.params.structured_outputs is not None and asked.params.structured_outputs.grammar == 'start: "yes"'


def test_a_request_that_vllm_gives_up_is_refused(process: tuple[FrontEnd, LLMEngine]) -> None:
    front, _ = process
    front.say(add("odd", 'start: "error"'))
    assert front.hear() == m.Refused("odd", GAVE_UP)
    front.say(add("next", None))
    answer: Any = front.hear()
    assert isinstance(answer, m.Step) and [token.token_id for token in answer.tokens] == [7]


def test_vllm_makes_room_for_usual_ranks_and_our_engine_for_all() -> None:
    settings = [engine_settings(ServeSettings("x", "x", engine=engine)) for engine in ("vllm", "altiplano")]
    assert [one["max_lora_rank"] for one in settings] == [64, 512]


@pytest.mark.parametrize("abort", [False, True])
def test_a_request_whose_grammar_is_being_tried_is_not_forgotten_by_sleep(
    process: tuple[FrontEnd, LLMEngine], abort: bool
) -> None:
    """Its promise is kept with mode=wait, and with mode=abort it ends as the others do."""
    front, _ = process
    front.say(add("good", 'start: "yes"'), m.Sleep(7, 1, abort=abort))
    first, second = front.hear(), front.hear()
    assert isinstance(first, m.Step) and second == m.Done(7)
    assert [token.finish_reason for token in first.tokens] == ["abort" if abort else "length"]
