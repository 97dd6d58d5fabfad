"""vLLM's synchronous engine as ours: the same calls, the same outputs.

Of vLLM 0.26: EngineArgs, LLMEngine (from_engine_args, add_request, step, abort_request, add_lora, remove_lora, sleep, wake_up,
get_metrics), SamplingParams, StructuredOutputsParams, tokens_input, LoRARequest; tests/engine/vllm_surface.py has their signatures.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from altiplano.engine.checks import (
    check_awake,
    check_idle,
    check_length,
    check_loaded,
    check_prompt,
    check_room,
    check_unused,
    check_vocabulary,
)
from altiplano.engine.config import EngineConfig, read_config
from altiplano.engine.errors import AdapterError, EngineError
from altiplano.engine.outputs import EngineStats, TokenOutput
from altiplano.engine.params import SamplingParams
from altiplano.engine.steps import StepLog
from altiplano.engine.vllm.adapters import check_fits
from altiplano.engine.vllm.answers import token_outputs
from altiplano.engine.vllm.mapping import engine_args, sampling_params

MISSING = (
    "engine vllm needs the package vllm, which is not installed here: install vllm>=0.26,<0.27 into the image (it brings its own "
    "torch), or use engine altiplano"
)


@dataclass(frozen=True)
class Model:
    """What callers ask of `Engine.runner`."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_position_embeddings: int


@dataclass
class _Request:
    prompt_len: int
    max_tokens: int
    top: int  # most likely tokens to report
    adapter: str | None
    told: bool = False


class VllmEngine:
    """`Engine` on vLLM. Grammars are given with their requests, so nobody is ever blocked.

    Raises:
        EngineError: vLLM is not installed, does not start, or lacks a setting.
        WeightsError: the model directory cannot be used.
    """

    def __init__(self, config: EngineConfig) -> None:
        engine_args(config)  # refuses what vLLM lacks before it is imported, which takes seconds
        self.config, self._model = config, read_config(config.model)
        model = self._model
        self.runner = Model(model.vocab_size, model.eos_token_ids, model.max_position_embeddings)
        try:
            self._vllm = import_module("vllm")
        except ImportError as error:
            raise EngineError(f"{MISSING} ({error})") from error
        self._inputs, self._sampling, self._lora = (
            import_module(f"vllm.{name}") for name in ("inputs", "sampling_params", "lora.request")
        )
        here = import_module("vllm.platforms").current_platform
        self._sleeps = here.is_sleep_mode_available() and here.is_cumem_allocator_available()
        try:
            arguments = self._vllm.EngineArgs(**engine_args(config, self._sleeps))
            self._engine: Any = self._vllm.LLMEngine.from_engine_args(arguments)
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM does not start: {error}") from error
        self._requests: dict[str, _Request] = {}
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self._news: list[TokenOutput] = []
        self._prompt_tokens = self._generated = self._cached = self._steps = 0
        self._seconds = 0.0
        self._asleep = False
        self.step_log = StepLog()  # without KV use and guesses, which vLLM does not tell by step

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        priority: int = 0,
        namespace: str = "",
        grammar: str | None = None,
    ) -> None:
        """As `Engine.add_request`; `grammar` (llguidance's Lark) bounds a structured request.

        Raises:
            ValueError: what our own engine refuses, or vLLM does.
        """
        self._check_awake()
        check_prompt(request_id, self._requests, prompt_token_ids)
        check_vocabulary(prompt_token_ids, (*(params.logit_bias or ()), *params.stop_token_ids), self.runner.vocab_size)
        check_length(len(prompt_token_ids), params.max_tokens, self.config.max_model_len, least=1)
        check_loaded(adapter, self._adapters)
        if not self._requests:
            self.step_log.idle()
        settings = sampling_params(params, self._model, grammar)
        if grammar is not None:
            settings["structured_outputs"] = self._sampling.StructuredOutputsParams(grammar=grammar)
        prompt = self._inputs.tokens_input(list(prompt_token_ids), cache_salt=namespace or None)
        drawing = self._sampling.SamplingParams(**settings, output_kind=self._sampling.RequestOutputKind.DELTA)
        lora = None if adapter is None else self._adapters[adapter]
        try:
            self._engine.add_request(request_id, prompt, drawing, lora_request=lora, priority=priority)
        except ValueError:
            raise
        except Exception as error:  # one request's trouble must not be everybody's
            raise EngineError(f"vLLM does not take the request: {type(error).__name__}: {error}") from error
        self._requests[request_id] = _Request(len(prompt_token_ids), params.max_tokens, params.logprobs or 0, adapter)
        self._prompt_tokens += len(prompt_token_ids)

    def abort(self, request_id: str) -> None:
        """End a request; its last output comes with the next step. Unknown ids are ignored."""
        if self._requests.pop(request_id, None) is not None:
            self._engine.abort_request([request_id])
            self._news.append(TokenOutput(request_id, None, finish_reason="abort"))

    def has_unfinished(self) -> bool:
        return bool(self._requests or self._news)

    def is_blocked(self) -> bool:
        return False

    def step(self) -> list[TokenOutput]:
        """One step of vLLM and its news."""
        news, self._news = self._news, []
        if not self._requests:
            return news
        started = time.perf_counter()
        outputs = self._engine.step()
        ended = time.perf_counter()
        self._seconds += ended - started
        self._steps += 1
        generated, cached, decodes, prompt_tokens = self._generated, self._cached, 0, 0
        for output in outputs:
            request = self._requests.get(output.request_id)
            if request is None:
                continue  # it was aborted a moment ago
            decodes += request.told
            prompt_tokens += 0 if request.told else request.prompt_len
            news += self._take(request, output)
        generated, cached = self._generated - generated, self._cached - cached
        self.step_log.add(started, ended, decodes, prompt_tokens - cached, generated, 0.0, cached)
        return news

    def prepare(self) -> bool:
        """Nothing is left to do: vLLM captures its graphs at its start."""
        return False

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load (or replace) a LoRA adapter from a directory in PEFT's format.

        Raises:
            AdapterError: it is in use, made for another base, of a kind that vLLM does not run, one too many, or vLLM refuses it.
            EngineAsleepError: there is no memory for it now.
        """
        self._check_awake()
        self._check_unused(name)
        check_room(name, self._adapters, self.config.max_loras)
        check_fits(name, directory, self.config, self._model)
        # Its name is new too: vLLM tells cached prefixes apart by the names of adapters, so those of a predecessor are not hit.
        number = next(self._numbers)
        adapter = self._lora.LoRARequest(lora_name=f"{name}#{number}", lora_int_id=number, lora_path=str(directory))
        try:
            self._engine.add_lora(adapter)
        except Exception as error:  # of any kind: vLLM reads the adapter before it changes anything, and goes on
            raise AdapterError(f"vLLM does not load adapter {name!r} from {directory}: {error}") from error
        before = self._adapters.get(name)
        self._adapters[name] = adapter
        if before is not None:
            self._engine.remove_lora(before.lora_int_id)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
            AdapterError: requests still use it.
        """
        check_loaded(name, self._adapters)
        self._check_unused(name)
        self._engine.remove_lora(self._adapters.pop(name).lora_int_id)

    @property
    def unfinished(self) -> list[str]:
        return list(self._requests)

    def check_sleep(self, level: int) -> None:
        """
        Raises:
            EngineError: it is not level 1 (vLLM's level 2 loses the adapters), or vLLM cannot do that here.
        """
        if not self._sleeps:
            raise EngineError("vLLM cannot sleep on this platform: take the endpoint down to free its memory")
        if level != 1:
            raise EngineError(
                f"engine vllm does not sleep at level {level}: use 1 (weights wait in host memory), or engine altiplano"
            )

    def sleep(self, level: int = 1) -> None:
        """As `Engine.sleep`, level 1 only.

        Raises:
            EngineError: another level, or requests are under way.
        """
        self.check_sleep(level)
        if self._asleep:
            return
        check_idle(self.has_unfinished(), len(self._requests))
        self._engine.step()  # vLLM runs a step ahead: the one after the last answer is still under way
        self._engine.sleep(level)
        self._asleep = True

    def wake_up(self) -> None:
        """End `sleep`. Does nothing when awake.

        Raises:
            EngineError: there is too little memory now; it sleeps on.
        """
        if not self._asleep:
            return
        try:
            self._engine.wake_up()
        except RuntimeError as error:
            raise EngineError(f"vLLM does not wake up: {error}") from error
        self._asleep = False

    def stats(self) -> EngineStats:
        """Our own counts, and vLLM's gauges where it has them; what it does not tell is 0."""
        gauges = {metric.name: getattr(metric, "value", 0) for metric in self._engine.get_metrics()}
        usage = float(gauges.get("vllm:kv_cache_usage_perc", 0.0))
        # Gauges are as of the last step that had news: after an abort they are late.
        waiting = min(int(gauges.get("vllm:num_requests_waiting", 0)), len(self._requests))
        usage = usage if self._requests else 0.0
        return EngineStats(
            num_running=len(self._requests) - waiting,
            num_waiting=waiting,
            kv_cache_usage=usage,
            num_cached_pages=0,
            kv_cache_held=usage,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
            cached_tokens=self._cached,
            preemptions=int(gauges.get("vllm:num_preemptions", 0)),
            guessed_tokens=0,
            accepted_tokens=0,
            guessed_steps=0,
            draft_seconds=0.0,
            steps=self._steps,
            step_seconds=self._seconds,
        )

    def _check_awake(self) -> None:
        check_awake(self._asleep)

    def _check_unused(self, adapter: str) -> None:
        check_unused(adapter, (request.adapter for request in self._requests.values()))

    def _take(self, request: _Request, output: Any) -> list[TokenOutput]:
        """Book what a request was told."""
        news = token_outputs(output, request.max_tokens, request.top, not request.told)
        if news:
            request.told = True
            self._generated += sum(one.token_id is not None for one in news)
            self._cached += news[0].num_cached_tokens
            if news[-1].finish_reason is not None:
                del self._requests[output.request_id]
        return news
