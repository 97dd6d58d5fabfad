"""The surface of vLLM 0.26 that we call, with its names and signatures (held to its source by vllm_signatures.json), and nothing of its inside.

vLLM pins a torch of its own, so it cannot run beside these tests; tests/gpu/vllm_engine.py asks the real one. An argument that
vLLM does not have is a TypeError here too. Its model says the next number after the last one, with made-up log-probabilities.
"""

from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any


@dataclass
class EngineArgs:
    """Of vllm.engine.arg_utils: those that we pass."""

    model: str
    load_format: str = "auto"
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int | None = None
    num_gpu_blocks_override: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    kv_cache_dtype: str = "auto"
    quantization: str | None = None
    enable_prefix_caching: bool | None = None
    enable_lora: bool = False
    max_loras: int = 1
    lora_target_modules: list[str] | None = None
    max_cpu_loras: int | None = None
    max_lora_rank: int = 16
    scheduling_policy: str = "fcfs"
    seed: int = 0
    trust_remote_code: bool = False
    structured_outputs_config: Any = None
    enable_sleep_mode: bool = False
    disable_log_stats: bool = False


class RequestOutputKind(Enum):
    """Of vllm.sampling_params."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass
class StructuredOutputsParams:
    """Of vllm.sampling_params."""

    json: str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None


@dataclass
class SamplingParams:
    """Of vllm.sampling_params: those that we pass."""

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    structured_outputs: StructuredOutputsParams | None = None
    logit_bias: dict[int, float] | None = None


@dataclass
class LoRARequest:
    """Of vllm.lora.request."""

    lora_name: str
    lora_int_id: int
    lora_path: str = ""


@dataclass
class Logprob:
    """Of vllm.logprobs."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """Of vllm.outputs."""

    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestStateStats:
    """Of vllm.v1.metrics.stats."""

    queued_ts: float = 0.0
    scheduled_ts: float = 0.0


@dataclass
class RequestOutput:
    """Of vllm.outputs."""

    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestStateStats | None = None
    num_cached_tokens: int | None = None


@dataclass
class Gauge:
    """Of vllm.v1.metrics.reader."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass
class _Asked:
    request_id: str
    prompt: dict[str, Any]
    params: SamplingParams
    lora_request: LoRARequest | None
    priority: int
    said: list[int] = field(default_factory=list)


def around(token: int, top: int) -> dict[int, Logprob]:
    """`top` likely tokens, and `token`, which ranks fourth."""
    found = {1000 + rank: Logprob(-0.1 * rank, rank) for rank in range(1, min(top, 3) + 1)}
    found[token] = Logprob(-2.5, 4)
    return found | {1000 + rank: Logprob(-0.9 * rank, rank) for rank in range(5, top + 1)}


class NotFoundError(Exception):
    """As vLLM's, no ValueError."""


def tokens_input(prompt_token_ids: list[int], *, prompt: str | None = None, cache_salt: str | None = None) -> dict[str, Any]:
    """Of vllm.inputs."""
    found: dict[str, Any] = {"type": "token", "prompt_token_ids": prompt_token_ids}
    return found | ({} if prompt is None else {"prompt": prompt}) | ({} if cache_salt is None else {"cache_salt": cache_salt})


class Platform:
    """Of vllm.platforms."""

    sleeps = True

    def is_sleep_mode_available(self) -> bool:
        return True

    def is_cumem_allocator_available(self) -> bool:
        return self.sleeps


class LLMEngine:
    """Of vllm.v1.engine.llm_engine."""

    def __init__(self, engine_args: EngineArgs) -> None:
        self.args, self.requests = engine_args, dict[str, _Asked]()
        self.loras: dict[int, LoRARequest] = {}
        self.asleep = 0
        self.seen: list[_Asked] = []

    @classmethod
    def from_engine_args(
        cls,
        engine_args: EngineArgs,
        usage_context: str = "ENGINE_CONTEXT",
        stat_loggers: list[Any] | None = None,
        enable_multiprocessing: bool = False,
    ) -> "LLMEngine":
        if engine_args.num_gpu_blocks_override and engine_args.num_gpu_blocks_override > 9000:
            raise RuntimeError("CUDA out of memory")
        return cls(engine_args)

    def add_request(
        self,
        request_id: str,
        prompt: dict[str, Any],
        params: SamplingParams,
        arrival_time: float | None = None,
        lora_request: LoRARequest | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
        trace_headers: dict[str, str] | None = None,
        priority: int = 0,
        prompt_text: str | None = None,
    ) -> str:
        if params.logprobs is not None and params.logprobs > 20:
            raise ValueError("more logprobs than max_logprobs")
        if params.structured_outputs is not None and "lmfe" in (params.structured_outputs.grammar or ""):
            raise ModuleNotFoundError("No module named 'lmformatenforcer'")
        self.requests[request_id] = _Asked(request_id, prompt, params, lora_request, priority)
        self.seen.append(self.requests[request_id])
        return f"{request_id}-1234abcd"

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        for request_id in request_ids:
            del self.requests[request_id]

    def add_lora(self, lora_request: LoRARequest) -> bool:
        if "forbidden" in lora_request.lora_path:
            raise NotFoundError("no such adapter")
        if len(self.loras) + 1 > (self.args.max_cpu_loras or self.args.max_loras):
            del self.loras[min(self.loras)]  # the least recently used, in silence
        self.loras[lora_request.lora_int_id] = lora_request
        return True

    def remove_lora(self, lora_id: int) -> bool:
        return self.loras.pop(lora_id, None) is not None

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert not self.requests and self.args.enable_sleep_mode
        self.asleep = level

    def wake_up(self, tags: list[str] | None = None) -> None:
        if self.args.seed == 666:
            raise RuntimeError("CUDA out of memory")
        self.asleep = 0

    def get_metrics(self) -> list[Gauge]:
        found = {"vllm:kv_cache_usage_perc": 0.25, "vllm:num_requests_waiting": 0, "vllm:num_preemptions": 3}
        return [Gauge(name, {}, value) for name, value in found.items()]

    def step(self) -> list[RequestOutput]:
        """Two tokens at a time for each request, as with speculation."""
        return [self._advance(asked) for asked in list(self.requests.values())]

    def _advance(self, asked: _Asked) -> RequestOutput:
        params, prompt, first = asked.params, asked.prompt["prompt_token_ids"], not asked.said
        news, reason = list[int](), None
        while len(news) < 2 and reason is None:
            news.append((asked.said or prompt)[-1] + 1)
            asked.said.append(news[-1])
            if news[-1] in (params.stop_token_ids or []):
                reason = "stop"
            elif len(asked.said) == params.max_tokens:
                reason = "length"
        if reason is not None:
            del self.requests[asked.request_id]
        if params.structured_outputs is not None and "error" in (params.structured_outputs.grammar or ""):
            news, reason = [], "error"
        told = asked.said[-len(news) :]  # of no news all that was told before, as in vLLM
        logprobs = None if params.logprobs is None else [around(token, params.logprobs) for token in told]
        top = params.prompt_logprobs
        of_prompt = None if top is None or not first else [None, *(around(token, top) for token in prompt[1:])]
        metrics = RequestStateStats(queued_ts=3.0, scheduled_ts=3.5)
        completion = CompletionOutput(0, news, logprobs, reason)
        return RequestOutput(
            asked.request_id, prompt, of_prompt, [completion], reason is not None, metrics, 16 if first else None
        )


def modules() -> dict[str, ModuleType]:
    """What `import vllm` and its modules give, by name."""
    found = {
        name: ModuleType(name) for name in ("vllm", *(f"vllm.{n}" for n in ("inputs", "platforms", "sampling_params", "lora")))
    }
    found["vllm.lora.request"] = ModuleType("vllm.lora.request")
    vars(found["vllm"]).update(LLMEngine=LLMEngine, EngineArgs=EngineArgs)
    vars(found["vllm.inputs"]).update(tokens_input=tokens_input)
    vars(found["vllm.platforms"]).update(current_platform=Platform())
    vars(found["vllm.sampling_params"]).update(
        SamplingParams=SamplingParams, StructuredOutputsParams=StructuredOutputsParams, RequestOutputKind=RequestOutputKind
    )
    vars(found["vllm.lora.request"]).update(LoRARequest=LoRARequest)
    return found
