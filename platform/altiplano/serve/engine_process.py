"""The engine's process: `python -m altiplano.serve.engine_process SOCKET`, its settings as JSON on standard input.

One thread reads commands, the main thread steps, and when all has been quiet for a while lets the engine prepare for steps to come. It ends
when the front end is gone, so it never outlives it.
"""

import gc
import json
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import msgspec

from altiplano.engine import Engine, EngineConfig, SamplingParams, TokenOutput, VllmEngine, create_engine
from altiplano.serve import grammar_worker as w
from altiplano.serve import messages as m
from altiplano.serve.grammars import Gone, Grammars
from altiplano.serve.grammars import Report as GrammarReport

QUIET_S = 2.0  # without work, before the engine prepares for more: whoever starts an endpoint often asks it at once
GAVE_UP = "vLLM gave the request up: its grammar and its tokens did not go together; vLLM's log says more"


class _Where(TypedDict):
    """Where a request belongs."""

    adapter: str | None
    priority: int
    namespace: str


Message = m.Command | GrammarReport | None


class Loop:
    """Commands in, steps out. `quiet_s`: seconds without work before the engine prepares for more, by `clock`."""

    def __init__(
        self,
        connection: socket.socket,
        engine: Engine | VllmEngine,
        quiet_s: float = QUIET_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection, self._engine = connection, engine
        self._inbox: queue.Queue[Message] = queue.Queue()
        self._quiet_s, self._clock = quiet_s, clock
        self._prepared = False  # whether anything was, since the heap was frozen
        self._stir()
        self._bedtimes: list[m.Sleep] = []  # that wait for requests to end
        self._held: dict[str, m.Add] = {}  # requests to vLLM whose grammars are being tried
        runner, tokenizer = engine.runner, str(engine.config.model / "tokenizer.json")
        self._grammars = Grammars(tokenizer, runner.vocab_size, runner.eos_token_ids, self._inbox.put)

    def run(self) -> None:
        """Until the front end hangs up."""
        self._send(m.Ready(self._engine.runner.vocab_size, self._engine.runner.eos_token_ids))
        threading.Thread(target=self._read, daemon=True, name="commands").start()
        while self._take_commands():
            news = self._engine.step()
            self._stir()
            if isinstance(self._engine, VllmEngine):
                news = self._without_errors(news)
            if news:
                self._tell_grammars(news)
                waits = {output.request_id: output.queue_seconds for output in news if output.queue_seconds is not None}
                self._send(m.Step([_token(output) for output in news], waits))
        self._grammars.close()

    def _take_commands(self) -> bool:
        """Handle what has come; wait for something when there is nothing to compute. False when the front end is gone."""
        while True:
            if self._bedtimes and not self._held and not self._engine.has_unfinished():
                self._fall_asleep()
            try:
                message = self._next_message()
            except queue.Empty:
                return True
            if message is None:
                return False
            if not isinstance(message, m.AskStats):
                self._stir()
            if isinstance(message, w.Ready | w.Allowed | w.Bad | Gone):
                self._handle_grammars(message)
            else:
                self._handle(message)

    def _next_message(self) -> Message:
        """What has come; waits for it when there is nothing to compute, and prepares for steps to come meanwhile.

        Raises:
            queue.Empty: there is something to compute.
        """
        engine = self._engine
        if engine.has_unfinished() and not engine.is_blocked():
            return self._inbox.get_nowait()
        while self._preparing and not engine.has_unfinished() and not self._held:
            try:
                return self._inbox.get(timeout=max(0.0, self._quiet_from - self._clock()))
            except queue.Empty:
                self._prepare()
        return self._inbox.get()

    def _stir(self) -> None:
        """There is, or was, something to do: quiet begins anew, and there may be something to prepare for then."""
        self._quiet_from, self._preparing = self._clock() + self._quiet_s, True

    def _prepare(self) -> None:
        self._preparing = self._engine.prepare()
        if self._preparing:
            self._prepared = True
        elif self._prepared:
            freeze()
            self._prepared = False

    def _handle(self, command: m.Command) -> None:
        engine = self._engine
        if isinstance(command, m.Add):
            if command.grammar is not None and isinstance(engine, VllmEngine):
                # vLLM compiles it in this process and without limits: first our own process has to manage.
                self._held[command.request_id] = command
                self._grammars.begin(command.request_id, command.grammar)
            else:
                self._try_to_add(command)
        elif isinstance(command, m.Abort):
            engine.abort(command.request_id)
            self._held.pop(command.request_id, None)
            self._grammars.forget(command.request_id)
        elif isinstance(command, m.AskStats):
            stats, log = {name: float(value) for name, value in asdict(engine.stats()).items()}, engine.step_log
            self._send(m.Done(command.call, stats=stats, histograms=log.histograms(), steps=log.last(command.steps)))
        elif isinstance(command, m.Sleep):
            self._try(command.call, lambda: self._prepare_sleep(command))
        elif isinstance(command, m.WakeUp):
            for waiting in self._bedtimes:
                self._send(m.Done(waiting.call, error="the engine was woken up before it slept"))
            self._bedtimes.clear()
            self._do(command.call, engine.wake_up)
        elif isinstance(command, m.LoadAdapter):
            self._do(command.call, lambda: engine.load_adapter(command.name, Path(command.path)))
        else:
            self._do(command.call, lambda: engine.unload_adapter(command.name))

    def _do(self, call: int, action: Callable[[], None]) -> None:
        """Do what a call asks for, and answer it."""
        if self._try(call, action):
            self._send(m.Done(call))

    def _try(self, call: int, action: Callable[[], None]) -> bool:
        """Whether that went well; if not, the caller is told why."""
        try:
            action()
        except ValueError as error:
            self._send(m.Done(call, error=str(error)))
            return False
        return True

    def _prepare_sleep(self, command: m.Sleep) -> None:
        self._engine.check_sleep(command.level)
        self._bedtimes.append(command)
        if command.abort:
            for request_id in self._engine.unfinished:
                self._engine.abort(request_id)
                self._grammars.forget(request_id)
            for request_id in self._held:
                self._grammars.forget(request_id)
                self._send(m.Step([_token(TokenOutput(request_id, None, finish_reason="abort"))], {}))
            self._held.clear()

    def _fall_asleep(self) -> None:
        for command in self._bedtimes:
            self._do(command.call, partial(self._engine.sleep, command.level))
        self._bedtimes.clear()

    def _try_to_add(self, command: m.Add) -> None:
        try:
            self._add(command)
        except ValueError as error:
            self._send(m.Refused(command.request_id, str(error)))

    def _add(self, command: m.Add) -> None:
        engine, named = self._engine, (command.request_id, command.prompt)
        params = SamplingParams(**msgspec.structs.asdict(command.sampling), structured=command.grammar is not None)
        where: _Where = {"adapter": command.adapter, "priority": command.priority, "namespace": command.namespace}
        if isinstance(engine, VllmEngine):  # which compiles grammars itself
            engine.add_request(*named, params, **where, grammar=command.grammar)
            return
        engine.add_request(*named, params, **where)
        if command.grammar is not None:
            self._grammars.begin(command.request_id, command.grammar)

    def _handle_grammars(self, report: GrammarReport) -> None:
        for answer in self._grammars.take_report(report):
            held = self._held.pop(answer.request_id, None)
            if held is not None and isinstance(answer, w.Allowed):
                self._grammars.forget(held.request_id)
                self._try_to_add(held)
            elif isinstance(answer, w.Allowed):
                assert isinstance(self._engine, Engine)
                self._engine.allow(answer.request_id, answer.tokens)
            else:
                self._engine.abort(answer.request_id)
                self._send(m.Refused(answer.request_id, answer.error))

    def _without_errors(self, news: list[TokenOutput]) -> list[TokenOutput]:
        """The rest of the news, when those that ended in an error are told."""
        for output in news:
            if output.finish_reason == "error":
                self._send(m.Refused(output.request_id, GAVE_UP))
        return [output for output in news if output.finish_reason != "error"]

    def _tell_grammars(self, news: list[TokenOutput]) -> None:
        for output in news:
            if output.request_id not in self._grammars:
                continue
            if output.finish_reason is not None:
                self._grammars.forget(output.request_id)
            elif output.token_id is not None:
                self._grammars.take(output.request_id, output.token_id)

    def _read(self) -> None:
        try:
            while True:
                (length,) = m.LENGTH.unpack(_exactly(self._connection, m.LENGTH.size))
                self._inbox.put(m.decode_command(_exactly(self._connection, length)))
        except (OSError, EOFError):
            pass
        finally:
            self._inbox.put(None)  # whatever it was: a process that hears nothing must not live on

    def _send(self, message: m.Report) -> None:
        self._connection.sendall(m.frame(message))


def main() -> None:
    settings: dict[str, Any] = json.load(sys.stdin)
    threads, kind = settings.pop("threads"), settings.pop("engine")
    if threads:
        import torch

        torch.set_num_threads(threads)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(sys.argv[1])
        try:
            paths = {name: Path(settings[name]) for name in ("model", "speculative_model") if settings[name] is not None}
            config = EngineConfig(**(settings | paths))
            engine = _vllm(config) if kind == "vllm" else create_engine(config)
            freeze()
            Loop(connection, engine).run()
        except (BrokenPipeError, ConnectionResetError):
            os._exit(0)
        except Exception as error:
            connection.sendall(m.frame(m.Failed(f"{type(error).__name__}: {error}")))
            raise


def freeze() -> None:
    """What is there now stays: looking through it for garbage stops all answers for 70 ms."""
    gc.collect()
    gc.freeze()


def _vllm(config: EngineConfig) -> VllmEngine:
    # In this process: it is the engine's own already, and vLLM's would be asked by pickle. It meets itself here, not at the address of a
    # network that may not be there, and reports nothing to anybody.
    settings = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    os.environ.update(settings)
    return VllmEngine(config)


def _token(output: TokenOutput) -> m.Token:
    return m.Token(
        output.request_id,
        output.token_id,
        output.finish_reason,
        output.logprob,
        output.top_logprobs,
        output.num_cached_tokens,
        output.prompt_logprobs,
        output.prompt_top,
    )


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


if __name__ == "__main__":
    main()
