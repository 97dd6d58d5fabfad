"""vLLM's synchronous engine as ours: the same calls, the same outputs.

Written against the documented interface of vLLM 0.26: EngineArgs, LLMEngine (from_engine_args, add_request, step, abort_request,
add_lora, remove_lora, get_metrics), SamplingParams, StructuredOutputsParams, LoRARequest.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from altiplano.engine.checks import check_length, check_loaded, check_prompt, check_unused
from altiplano.engine.config import EngineConfig, read_config
from altiplano.engine.errors import AdapterError, EngineError
from altiplano.engine.outputs import EngineStats, TokenOutput
from altiplano.engine.params import SamplingParams
from altiplano.engine.steps import StepLog
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
        arguments = engine_args(config)
        self.config, model = config, read_config(config.model)
        self.runner = Model(model.vocab_size, model.eos_token_ids, model.max_position_embeddings)
        try:
            self._vllm = import_module("vllm")
        except ImportError as error:
            raise EngineError(f"{MISSING} ({error})") from error
        self._sampling = import_module("vllm.sampling_params")
        self._lora = import_module("vllm.lora.request")
        self._engine: Any = self._vllm.LLMEngine.from_engine_args(self._vllm.EngineArgs(**arguments))
        self._requests: dict[str, _Request] = {}
        self._adapters: dict[str, Any] = {}
        self._numbers = itertools.count(1)
        self._news: list[TokenOutput] = []
        self._prompt_tokens = self._generated = self._cached = self._steps = 0
        self._seconds = 0.0
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
        check_prompt(request_id, self._requests, prompt_token_ids)
        check_length(len(prompt_token_ids), params.max_tokens, self.config.max_model_len, least=1)
        check_loaded(adapter, self._adapters)
        if not self._requests:
            self.step_log.idle()
        settings = sampling_params(params, grammar)
        if grammar is not None:
            settings["structured_outputs"] = self._sampling.StructuredOutputsParams(grammar=grammar)
        prompt: dict[str, Any] = {"prompt_token_ids": list(prompt_token_ids)}
        if namespace:
            prompt["cache_salt"] = namespace
        self._engine.add_request(
            request_id,
            prompt,
            self._sampling.SamplingParams(**settings, output_kind=self._sampling.RequestOutputKind.DELTA),
            lora_request=None if adapter is None else self._adapters[adapter],
            priority=priority,
        )
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

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load (or replace) a LoRA adapter from a directory in PEFT's format.

        Raises:
            AdapterError: it is in use, of a kind that vLLM does not run, or vLLM refuses it.
        """
        self._check_unused(name)
        _check_kind(directory)
        # Its id is new, so cached prefixes of a predecessor of the same name are not hit.
        adapter = self._lora.LoRARequest(lora_name=name, lora_int_id=next(self._numbers), lora_path=str(directory))
        try:
            loaded = self._engine.add_lora(adapter)
        except (ValueError, RuntimeError, OSError) as error:
            raise AdapterError(f"vLLM does not load adapter {name!r} from {directory}: {error}") from error
        if loaded is False:
            raise AdapterError(f"vLLM does not load adapter {name!r} from {directory}: unload another, or raise max_loras")
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
            EngineError: always.
        """
        raise EngineError("engine vllm does not sleep: take the endpoint down to free its GPU, or use engine altiplano")

    def sleep(self, level: int = 1) -> None:
        self.check_sleep(level)

    def wake_up(self) -> None:
        """It never sleeps."""

    def stats(self) -> EngineStats:
        """Our own counts, and vLLM's gauges where it has them; what it does not tell is 0."""
        gauges = {metric.name: getattr(metric, "value", 0) for metric in self._engine.get_metrics()}
        usage = float(gauges.get("vllm:kv_cache_usage_perc", 0.0))
        waiting = int(gauges.get("vllm:num_requests_waiting", 0))
        return EngineStats(
            num_running=len(self._requests) - min(waiting, len(self._requests)),
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

    def _check_unused(self, adapter: str) -> None:
        check_unused(adapter, (request.adapter for request in self._requests.values()))

    def _take(self, request: _Request, output: Any) -> list[TokenOutput]:
        """A RequestOutput of kind DELTA as our outputs, one for each token."""
        (completion,) = output.outputs
        reason, tokens = completion.finish_reason, list(completion.token_ids)
        logprobs = completion.logprobs or [None] * len(tokens)
        if reason is not None:
            del self._requests[output.request_id]
        if request.max_tokens == 0:
            tokens, logprobs, reason = [], [], reason and "length"
        news = [
            TokenOutput(output.request_id, token, *_chosen(token, found, request.top))
            for token, found in zip(tokens, logprobs, strict=True)
        ]
        self._generated += len(news)
        if not news and reason is not None:
            news = [TokenOutput(output.request_id, None)]
        if not news:
            return []
        if not request.told:
            request.told = True
            cached = output.num_cached_tokens or 0
            self._cached += cached
            first = _of_prompt(output, request.top)
            news[0] = replace(news[0], num_cached_tokens=cached, queue_seconds=_queued(output), **first)
        news[-1] = replace(news[-1], finish_reason=reason)
        return news


def _check_kind(directory: Path) -> None:
    path = directory / "adapter_config.json"
    try:
        settings = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read ({error}): the adapter must be a directory in PEFT's format") from error
    if settings.get("use_dora"):
        raise AdapterError(f"{path} is DoRA, which vLLM does not run: merge it into its base, or use engine altiplano")


def _chosen(token: int, found: Any, top: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """(log-probability of the token, the `top` most likely ones); vLLM lists the token beside them, wherever it ranks."""
    return (None, ()) if found is None else (found[token].logprob, _ranked(found, top))


def _ranked(found: Any, top: int) -> tuple[tuple[int, float], ...]:
    ordered = sorted(found.items(), key=lambda item: item[1].rank)
    return tuple((token, entry.logprob) for token, entry in ordered[:top])


def _of_prompt(output: Any, top: int) -> dict[str, Any]:
    """Of prompt tokens 1, 2, …; vLLM's list begins with None for token 0."""
    if not output.prompt_logprobs:
        return {}
    rows = list(zip(output.prompt_token_ids, output.prompt_logprobs, strict=True))[1:]
    found: dict[str, Any] = {"prompt_logprobs": tuple(row[token].logprob for token, row in rows)}
    return found | ({"prompt_top": tuple(_ranked(row, top) for _, row in rows)} if top else {})


def _queued(output: Any) -> float | None:
    """Seconds from arrival to the first step, where vLLM keeps count."""
    return None if output.metrics is None else output.metrics.scheduled_ts - output.metrics.queued_ts
