"""The front end's side of the engine process: start it, talk to it, start it again when it dies."""

import asyncio
import contextlib
import itertools
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from altiplano.engine.vllm.adapters import room_for
from altiplano.serve import messages as m
from altiplano.serve.engine_errors import AsleepError, EngineDiedError, RefusedError
from altiplano.serve.engine_sleep import EngineSleep
from altiplano.serve.settings import ServeSettings

START_TIMEOUT_S = 600.0
CALL_TIMEOUT_S = 60.0
LAST_WORDS_S = 1.0
COMMAND = [sys.executable, "-m", "altiplano.serve.engine_process"]
LATE = f"it did not load its model within {START_TIMEOUT_S:g} s"

Make = Callable[[int], m.Command]  # a command of that number

log = logging.getLogger("altiplano.engine")


class Watch(Protocol):
    """Who counts what the engine says of one request, at the moment it arrives: whoever waits for it may be slow."""

    def waited(self, seconds: float) -> None:
        """How long the engine let it wait before its first step; comes before its first news."""

    def saw(self, token: m.Token) -> None:
        """News from the engine."""


class _Stream:
    """News of one request until somebody takes them."""

    def __init__(self, watch: Watch | None) -> None:
        self.news: asyncio.Queue[m.Token | Exception] = asyncio.Queue()
        self.watch = watch


class EngineClient:
    """One engine process. All methods belong to one event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._adapters: dict[str, str] = {}
        self._streams: dict[str, _Stream] = {}
        self._calls: dict[int, asyncio.Future[m.Done]] = {}
        self._numbers = itertools.count()
        self._ready = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._failure: str | None = None
        self.sleep = EngineSleep(self._call_started, lambda: len(self._streams))
        self.vocab_size = 0
        self.eos_token_ids: tuple[int, ...] = ()
        self.restarts = 0

    async def start(self) -> None:
        """Start the process and wait until its model is loaded.

        Raises:
            RuntimeError: it ended before it was ready; the message is its own.
        """
        self._keeper = asyncio.create_task(self._keep_running())
        waiting = asyncio.create_task(self._ready.wait())
        await asyncio.wait({waiting, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        if not self._ready.is_set():
            waiting.cancel()
            await self.stop()
            raise RuntimeError(f"the engine did not start: {self._failure or 'no answer'}")

    async def stop(self) -> None:
        """End the process and every request."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None

    def restart(self) -> None:
        """End the process, which may hang: its requests end with EngineDiedError and a new one starts."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def wait_until_ready(self) -> None:
        """Until the engine answers.

        Raises:
            EngineDiedError: it cannot start any more.
        """
        if self._keeper is None or self._keeper.done():
            raise EngineDiedError(f"the engine does not start again: {self.failure}")
        waiting = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait({waiting, self._keeper}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if not self._ready.is_set():
            raise EngineDiedError(f"the engine does not start again: {self.failure}")

    @property
    def failure(self) -> str | None:
        """Why there will be no engine any more; None while there is one or one starts."""
        if self._keeper is not None and self._keeper.done():
            return self._failure or "its process ended while it started"
        return None

    @property
    def ready(self) -> bool:
        return self._ready.is_set()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        sampling: m.Sampling,
        *,
        adapter: str | None = None,
        namespace: str = "",
        grammar: str | None = None,
        priority: int = 0,
        watch: Watch | None = None,
    ) -> AsyncGenerator[m.Token, None]:
        """Tokens of one request as they are drawn; `grammar` (llguidance's Lark) bounds what they say. Leaving the iterator early aborts the request.

        Raises:
            RefusedError: the engine does not take it.
            EngineDiedError: the process ended on the way.
            AsleepError: the engine sleeps, or was put to sleep on the way.
        """
        self.sleep.check_awake()
        if not self.ready:
            raise EngineDiedError("the engine is starting: try again in a moment")
        stream = self._streams[request_id] = _Stream(watch)
        self._send(m.Add(request_id, prompt, sampling, adapter, priority, namespace, grammar))
        finished = False
        try:
            while not finished:
                news = await stream.news.get()
                if isinstance(news, Exception):
                    finished = True
                    raise news
                finished = news.finish_reason is not None
                yield news
        finally:
            self._streams.pop(request_id, None)
            if not finished:
                self._send(m.Abort(request_id))

    async def load_adapter(self, name: str, path: str) -> None:
        """Load an adapter now and after every restart.

        Raises:
            RefusedError: it does not fit.
        """
        await self._call(lambda call: m.LoadAdapter(call, name, path))
        self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        await self._call(lambda call: m.UnloadAdapter(call, name))
        self._adapters.pop(name, None)

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    async def stats(self, timeout_s: float = CALL_TIMEOUT_S) -> dict[str, float]:
        """The engine's counters. Raises TimeoutError when it does not answer: it hangs, or a step takes that long."""
        return (await self.measure(0, timeout_s)).stats or {}

    async def measure(self, steps: int, timeout_s: float = CALL_TIMEOUT_S) -> m.Done:
        """Its counters, histograms over its steps, and the last `steps` of them. Raises as `stats`."""
        return await self._call(lambda call: m.AskStats(call, steps), timeout_s)

    async def _keep_running(self) -> None:
        """Start the process, serve it, and start it again when it ends; gives up when it cannot even load, or hangs while it does."""
        while True:
            folder = tempfile.mkdtemp(prefix="altiplano-engine-")  # mode 0700: nobody else can connect
            try:
                await self._serve_one_life(Path(folder) / "socket")
            finally:
                was_ready = self._ready.is_set()
                self._ready.clear()
                self._end_requests()
                await self._kill()
                shutil.rmtree(folder, ignore_errors=True)
            if not was_ready:
                return
            self.restarts += 1

    async def _serve_one_life(self, path: Path) -> None:
        connected: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        server = await asyncio.start_unix_server(lambda r, w: connected.put_nowait((r, w)), str(path))
        tasks = list[asyncio.Task[Any]]()
        try:
            self._process = await asyncio.create_subprocess_exec(*COMMAND, str(path), stdin=asyncio.subprocess.PIPE)
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(engine_settings(self._settings)).encode())
            self._process.stdin.close()
            deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
            tasks += [ended := asyncio.create_task(self._process.wait()), link := asyncio.create_task(connected.get())]
            await asyncio.wait({ended, link}, timeout=START_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED)
            if not link.done():
                self._failure = f"its process ended with exit code {ended.result()}" if ended.done() else LATE
                return
            reader, self._writer = link.result()
            tasks += [reading := asyncio.create_task(self._read(reader)), ready := asyncio.create_task(self._ready.wait())]
            left = deadline - asyncio.get_running_loop().time()
            await asyncio.wait({ended, reading, ready}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if ready.done():
                await asyncio.wait({ended, reading}, return_when=asyncio.FIRST_COMPLETED)
            elif not ended.done() and not reading.done():
                self._failure = LATE
            if ended.done():
                await asyncio.wait({reading}, timeout=LAST_WORDS_S)  # why it has ended may still be on its way
        finally:
            # Not `async with`: from Python 3.12 on that waits for the connection to close, which happens only after this.
            server.close()
            for task in tasks:
                task.cancel()

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while True:
                await self._take(m.decode_report(await m.read_frame(reader)))
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    async def _take(self, report: m.Report) -> None:
        if isinstance(report, m.Step):
            for name, seconds in report.waits.items():
                stream = self._streams.get(name)
                if stream is not None and stream.watch is not None:
                    stream.watch.waited(seconds)
            for token in report.tokens:
                stream = self._streams.get(token.request_id)
                if stream is None:
                    continue
                if self.sleep.level and token.finish_reason == "abort":
                    stream.news.put_nowait(AsleepError("the engine was put to sleep before the answer was complete"))
                    continue
                if stream.watch is not None:
                    stream.watch.saw(token)
                stream.news.put_nowait(token)
        elif isinstance(report, m.Refused):
            stream = self._streams.get(report.request_id)
            if stream is not None:
                stream.news.put_nowait(RefusedError(report.error))
        elif isinstance(report, m.Done):
            future = self._calls.pop(report.call, None)
            if future is not None and not future.done():
                future.set_result(report)
        elif isinstance(report, m.Ready):
            self.vocab_size, self.eos_token_ids, self._failure = report.vocab_size, report.eos_token_ids, None
            for name, path in self._adapters.items():
                loading = self._ask(next(self._numbers), partial(m.LoadAdapter, name=name, path=path))
                loading.add_done_callback(partial(_loaded_again, name))
            self.sleep.restarted()
            self._ready.set()
        else:
            self._failure = report.error
            log.error("the engine has failed: %s", report.error)

    async def _call_started(self, make: Make) -> m.Done:
        """`_call`, once the process has started, as long as it takes."""
        await self.wait_until_ready()
        return await self._call(make, None)

    async def _call(self, make: Make, timeout_s: float | None = CALL_TIMEOUT_S) -> m.Done:
        if not self.ready:
            raise EngineDiedError("the engine is starting: try again in a moment")
        number = next(self._numbers)
        try:
            done = await asyncio.wait_for(self._ask(number, make), timeout_s)
        finally:
            self._calls.pop(number, None)
        if done.error is not None:
            raise RefusedError(done.error)
        return done

    def _ask(self, number: int, make: Make) -> "asyncio.Future[m.Done]":
        """Send a call; its answer will come."""
        future: asyncio.Future[m.Done] = asyncio.get_running_loop().create_future()
        self._calls[number] = future
        self._send(make(number))
        return future

    def _send(self, message: m.Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(m.frame(message))

    def _end_requests(self) -> None:
        died = EngineDiedError("the engine's process ended; it is starting again, repeat the request")
        for stream in self._streams.values():
            stream.news.put_nowait(died)
        for future in self._calls.values():
            if not future.done():
                future.set_exception(died)
        self._streams.clear()
        self._calls.clear()

    async def _kill(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()


def _loaded_again(name: str, loading: "asyncio.Future[m.Done]") -> None:
    """Who asks for an adapter that did not survive the restart is told so; here is why."""
    if not loading.cancelled() and loading.exception() is None and loading.result().error is not None:
        log.error("adapter %s could not be loaded again after the engine was restarted: %s", name, loading.result().error)


def engine_settings(s: ServeSettings) -> dict[str, Any]:
    """What the engine's process reads on its standard input."""
    return {
        "engine": s.engine,
        "model": s.model_path,
        "dtype": s.dtype,
        "device": s.device,
        "max_model_len": s.max_model_len,
        "max_num_seqs": s.max_num_seqs,
        "max_num_batched_tokens": s.max_num_batched_tokens,
        "block_size": s.block_size,
        "num_blocks": max(1, s.kv_cache_tokens // s.block_size),
        "kv_cache_dtype": s.kv_cache_dtype,
        "quantization": s.quantization,
        "num_speculative_tokens": s.num_speculative_tokens,
        "speculative_model": s.speculative_model,
        "speculative_quantization": s.speculative_quantization,
        "itl_target_ms": s.itl_target_ms,
        "deterministic": s.deterministic,
        "enable_prefix_caching": s.enable_prefix_caching,
        "max_lora_rank": room_for(s.adapters.values()) if s.engine == "vllm" else 512,
        # A laptop's engine shares its cores with the front end and with training.
        "threads": 1 if s.device == "cpu" and (os.cpu_count() or 1) <= 4 else 0,
    }
