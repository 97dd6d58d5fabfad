"""The engine's side of the grammar process: ask it, outlive it, start it again.

Questions are answered in their order, so when the process ends on the way, the first question without an answer is under
suspicion: it is at fault if it ran out of time, or if the process ends on it once more (somebody else may have killed it). Then
its request is refused and its grammar remembered. Every other answer is taken up where it stood.
"""

import queue
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from altiplano.serve import grammar_worker as w

LIMIT_S = 3.0
LIMIT_BYTES = 4 << 30
REMEMBERED = 256


@dataclass(frozen=True)
class Gone:
    """The process has ended; all that it said came before."""

    exit_code: int


Report = w.Answer | Gone


@dataclass
class _Said:
    grammar: str
    tokens: list[int] = field(default_factory=list)
    deaths: int = 0


class Grammars:
    """Belongs to the engine's thread. `report` is called from another one: bring what it gets to `take_report` on this one."""

    def __init__(
        self,
        tokenizer: str,
        vocab_size: int,
        eos_token_ids: tuple[int, ...],
        report: Callable[[Report], None],
        limit_s: float = LIMIT_S,
    ) -> None:
        self._settings = w.Settings(tokenizer, vocab_size, eos_token_ids, limit_s, LIMIT_BYTES)
        self._report = report
        self._answers: dict[str, _Said] = {}
        self._pending: OrderedDict[str, str] = OrderedDict()  # request id to grammar, in the order of the questions
        self._fatal: OrderedDict[str, None] = OrderedDict()
        self._process: _Process | None = None
        self._ready = False

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._answers

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def begin(self, request_id: str, grammar: str) -> None:
        """Ask what the first token of an answer may be."""
        if grammar in self._fatal:
            self._report(self._too_hard(request_id))
            return
        self._answers[request_id] = _Said(grammar)
        self._ask(w.Begin(request_id, grammar), grammar)

    def take(self, request_id: str, token: int) -> None:
        """Say which token was drawn, and ask for the next set."""
        said = self._answers[request_id]
        said.tokens.append(token)
        self._ask(w.Take(request_id, token), said.grammar)

    def forget(self, request_id: str) -> None:
        """An answer is over. Unknown ids are ignored."""
        if self._answers.pop(request_id, None) is not None and self._process is not None:
            self._process.send(w.Forget(request_id))

    def take_report(self, report: Report) -> list[w.Allowed | w.Bad]:
        """What a report means for the requests that are still there."""
        if isinstance(report, Gone):
            return self._after_death(report)
        if isinstance(report, w.Ready):
            self._ready = True
            return []
        self._pending.pop(report.request_id, None)
        if isinstance(report, w.Bad):
            self.forget(report.request_id)
            return [report]
        said = self._answers.get(report.request_id)
        # After a death every answer begins again, also one whose next token had been drawn by then.
        return [report] if said is not None and report.position == len(said.tokens) else []

    def close(self) -> None:
        """End the process and forget everything."""
        self._answers.clear()
        self._pending.clear()
        if self._process is not None:
            self._process.kill()

    def _ask(self, question: w.Begin | w.Take, grammar: str) -> None:
        self._pending[question.request_id] = grammar
        if self._process is None:
            self._process, self._ready = _Process(self._settings, self._report), False
        self._process.send(question)

    def _after_death(self, gone: Gone) -> list[w.Allowed | w.Bad]:
        pending, self._pending, self._process = self._pending, OrderedDict(), None
        if not self._ready:
            why = f"structured output is out of order: its process ended with exit code {gone.exit_code} before it was ready"
            refused, self._answers = list(self._answers), {}
            return [w.Bad(request_id, why) for request_id in refused]
        news: list[w.Allowed | w.Bad] = []
        suspect = next(iter(pending), None)
        said = self._answers.get(suspect) if suspect is not None else None
        if said is not None:
            said.deaths += 1
        if suspect is not None and (gone.exit_code == -signal.SIGPROF or (said is not None and said.deaths > 1)):
            self._remember(pending[suspect])
            if self._answers.pop(suspect, None) is not None:
                news.append(self._too_hard(suspect))
        for request_id, said in self._answers.items():
            self._ask(w.Begin(request_id, said.grammar, tuple(said.tokens)), said.grammar)
        return news

    def _remember(self, grammar: str) -> None:
        self._fatal[grammar] = None
        if len(self._fatal) > REMEMBERED:
            self._fatal.popitem(last=False)

    def _too_hard(self, request_id: str) -> w.Bad:
        return w.Bad(
            request_id,
            f"the schema takes more than {self._settings.limit_s:g} s of a core or {self._settings.limit_bytes >> 30} GiB to work out: simplify it",
        )


class _Process:
    """One life of the process. Threads of its own write and read, so that a process that is busy never holds up a step."""

    def __init__(self, settings: w.Settings, report: Callable[[Report], None]) -> None:
        # By its path, without this package around it: a new life takes a tenth of a second instead of four.
        command = [sys.executable, "-P", w.__file__]
        self._popen = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._report = report
        self._questions: queue.SimpleQueue[w.Settings | w.Question | None] = queue.SimpleQueue()
        self._questions.put(settings)
        self.pid = self._popen.pid
        threading.Thread(target=self._write, daemon=True, name="grammar-questions").start()
        threading.Thread(target=self._read, daemon=True, name="grammar-answers").start()

    def send(self, question: w.Question) -> None:
        self._questions.put(question)

    def kill(self) -> None:
        self._popen.kill()

    def _write(self) -> None:
        assert self._popen.stdin is not None
        try:
            with self._popen.stdin as sink:
                while (question := self._questions.get()) is not None:
                    w.write_frame(sink, question)
        except (BrokenPipeError, ValueError):
            return

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as source:
            while (body := w.read_frame(source)) is not None:
                self._report(w.decode_answer(body))
        code = self._popen.wait()
        self._questions.put(None)
        self._report(Gone(code))
