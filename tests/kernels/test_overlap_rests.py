"""An endpoint on a GPU rests, and sleeps, after an answer that ended while the next burst was under way already."""

import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")
pytest.importorskip("msgspec")  # the kernels' tests run without the endpoint's packages too

from altiplano.engine import EngineConfig, SamplingParams, TokenOutput
from altiplano.engine.cuda.overlap import OverlappedEngine
from altiplano.engine.cuda.runner import Ticket
from altiplano.engine.plan import Chunk
from altiplano.serve import messages as m
from altiplano.serve.engine_process import Loop
from altiplano_kernels.sampling.kernel import RING

from .events import recorded

END = 9
PROMPT, LENGTH = [1, 2, 3], 5  # tokens of the answer, the end among them


class Runner:
    """A `CudaRunner` of one slot whose model says END at last, and whatever it is asked for behind it."""

    vocab_size, eos_token_ids = 10, (END,)

    def __init__(self) -> None:
        self.slots = self  # where `set_pages` is looked for
        self._drawn, self.slept = 0, 0

    def set_pages(self, slot: int, pages: Sequence[int], fresh: bool) -> None:
        pass

    def warm_up(self) -> None:
        pass

    def guesses_per_request(self, requests: int) -> int:
        return 0

    def launch_prefill(self, chunks: Sequence[Chunk]) -> None:
        self._drawn = 1

    def launch_decode(self, slots: Sequence[int], times: int) -> None:
        self._drawn += times

    def publish(self) -> Ticket:
        host = torch.full((1, RING + 2), 4, dtype=torch.int32)
        host[0, LENGTH - 1] = END
        host[0, RING] = self._drawn
        return Ticket(host, recorded(), recorded())  # type: ignore[arg-type]

    def sleep(self, level: int) -> None:
        self.slept = level

    def wake_up(self) -> None:
        self.slept = 0


def make() -> OverlappedEngine:
    config = EngineConfig(Path("none"), device="cuda", max_model_len=64, num_blocks=8, block_size=16, max_num_seqs=1, debug=True)
    return OverlappedEngine(config, Runner())  # type: ignore[arg-type]


def test_what_flies_without_its_request_is_no_reason_to_wait() -> None:
    engine = make()
    engine.add_request("x", PROMPT, SamplingParams(max_tokens=50, temperature=0.0))
    said: list[TokenOutput] = []
    while not (said and said[-1].finish_reason):
        assert not engine.is_blocked()
        said += engine.step()
    assert [output.token_id for output in said] == [4] * (LENGTH - 1) + [END]
    assert engine.has_unfinished() and not engine.is_blocked()
    assert engine.step() == [] and not engine.has_unfinished()


def test_an_endpoint_sleeps_after_an_answer_that_ended_by_itself() -> None:
    ours, its = socket.socketpair()
    engine = make()
    loop = threading.Thread(target=Loop(its, engine).run)
    loop.start()
    ours.settimeout(240)  # a busy machine's patience: it answers, or never does

    def read() -> m.Report:
        (length,) = m.LENGTH.unpack(ours.recv(m.LENGTH.size, socket.MSG_WAITALL))
        report: m.Report = m.decode_report(ours.recv(length, socket.MSG_WAITALL))
        return report

    try:
        assert isinstance(read(), m.Ready)
        ours.sendall(m.frame(m.Add("x", PROMPT, m.Sampling(max_tokens=50, temperature=0.0))))
        ended = False
        while not ended:
            report = read()
            assert isinstance(report, m.Step)
            ended = report.tokens[-1].finish_reason == "stop"
        ours.sendall(m.frame(m.Sleep(7, 1)))
        assert read() == m.Done(7)
        assert engine.sleep_level == 1
    finally:
        ours.shutdown(socket.SHUT_RDWR)
        loop.join()
        ours.close()
        its.close()
