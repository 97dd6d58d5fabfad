"""Our settings and sampling parameters as vLLM's, under the names of its EngineArgs and SamplingParams (0.26)."""

from typing import Any

from altiplano.engine.config import EngineConfig, LlamaConfig
from altiplano.engine.errors import EngineError
from altiplano.engine.params import SamplingParams
from altiplano.engine.vllm.adapters import LORA_RANKS

CACHE_DTYPES = {"auto": "auto", "bf16": "bfloat16", "fp8": "fp8", "int8": "int8_per_token_head"}  # auto is the model's own
QUANTIZATIONS = {"none": None, "w8a8-fp8": "fp8"}  # those that vLLM makes while it loads
BLOCK_SIZES = (16, 32, 64, 128)
# What our adapters change. Without the list vLLM puts room for LoRA around the LM head too, which every step pays for, and which
# reads past its rows where prompt log-probabilities are asked for.
LORA_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What its samplers have room for; a request with more would end the engine, not itself.
MAX_LOGIT_BIAS, MAX_BANNED_STOPS = 1024, 128
MAX_TEMPERATURE = 2.0


def engine_args(config: EngineConfig, sleeps: bool = True) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs. `sleeps`: whether its memory can be given back on this platform.

    Raises:
        EngineError: a setting that vLLM does not have; the message says what to change.
    """
    _refuse(config)
    return {
        "model": str(config.model),
        "load_format": config.load_format,
        "dtype": config.dtype,
        "quantization": QUANTIZATIONS[config.quantization],
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": max(config.max_num_batched_tokens, config.max_num_seqs),  # vLLM wants a token for each
        "block_size": config.block_size,
        "num_gpu_blocks_override": config.num_blocks + 1,  # one of them is nobody's
        # The override alone decides how much memory is taken. These two keep vLLM from measuring how much it could take, and from refusing
        # a card of which others hold a part.
        "kv_cache_memory_bytes": 1,
        "gpu_memory_utilization": 0.01,
        "kv_cache_dtype": CACHE_DTYPES[config.kv_cache_dtype],
        "enable_prefix_caching": config.enable_prefix_caching,
        **_adapter_args(config),
        "scheduling_policy": "priority",
        "seed": config.seed,
        # Code that comes with weights is never run.
        "trust_remote_code": False,
        # Our grammars are llguidance's.
        "structured_outputs_config": {"backend": "guidance"},
        "enable_sleep_mode": sleeps,
        "disable_log_stats": False,
    }


def sampling_params(params: SamplingParams, model: LlamaConfig, grammar: str | None) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams, all but `output_kind` and `structured_outputs`.

    Raises:
        EngineError: a value that vLLM does not take, or a structured request without its grammar.
    """
    if params.structured and grammar is None:
        raise EngineError("vLLM bounds structured output itself: give the request's grammar, not sets of tokens step by step")
    if params.temperature > MAX_TEMPERATURE:
        raise EngineError(f"temperature must be at most {MAX_TEMPERATURE:g} with engine vllm, not {params.temperature:g}")
    # Named one by one, because vLLM reads only the generation_config.json, and config.json may have them instead.
    ends = () if params.ignore_eos else model.eos_token_ids
    banned = {*model.eos_token_ids, *params.stop_token_ids} if params.min_tokens else ()
    for name, count, most in (
        ("logit_bias", len(params.logit_bias or ()), MAX_LOGIT_BIAS),
        ("stop_token_ids", len(banned), MAX_BANNED_STOPS),
    ):
        if count > most:
            raise EngineError(f"{name} must name at most {most} tokens with engine vllm, not {count}: leave some out")
    return {
        "max_tokens": max(1, params.max_tokens),  # scoring draws a token that nobody is told
        "min_tokens": params.min_tokens,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": 2**63 - 1 if params.seed == -1 else params.seed,  # -1 is no seed to vLLM
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": params.logit_bias or None,
        "stop_token_ids": sorted({*params.stop_token_ids, *ends}),
        "ignore_eos": params.ignore_eos,
        "logprobs": params.logprobs,
        "prompt_logprobs": (params.logprobs or 0) if params.prompt_logprobs else None,
        "detokenize": False,
    }


def _adapter_args(config: EngineConfig) -> dict[str, Any]:
    if not config.max_loras:
        return {"enable_lora": False}
    return {
        "enable_lora": True,
        "lora_target_modules": list(LORA_MODULES),
        "max_loras": config.max_loras,
        # Room for a successor beside its predecessor: vLLM throws out the adapter that was used least lately, in silence.
        "max_cpu_loras": config.max_loras + 1,
        "max_lora_rank": min(rank for rank in LORA_RANKS if rank >= config.max_lora_rank),
    }


def _refuse(config: EngineConfig) -> None:
    wrong = []
    if config.device not in ("cuda", "cuda:0"):
        wrong.append(f"device {config.device}: it runs on cuda here, on the first card of CUDA_VISIBLE_DEVICES")
    if config.quantization not in QUANTIZATIONS:
        wrong.append(f"quantization {config.quantization}: use one of {', '.join(QUANTIZATIONS)}")
    if config.kv_cache_dtype not in CACHE_DTYPES:
        wrong.append(f"kv_cache_dtype {config.kv_cache_dtype}: use one of {', '.join(CACHE_DTYPES)}")
    if config.block_size not in BLOCK_SIZES:
        wrong.append(f"block_size {config.block_size}: use one of {', '.join(map(str, BLOCK_SIZES))}")
    if config.max_lora_rank > LORA_RANKS[-1]:
        wrong.append(f"max_lora_rank {config.max_lora_rank}: it goes up to {LORA_RANKS[-1]}")
    if config.num_speculative_tokens or config.speculative_model is not None:
        wrong.append("num_speculative_tokens: only our own engine's guesses are passed through, set it to 0")
    if config.itl_target_ms is not None:
        wrong.append("itl_target_ms: lower max_num_batched_tokens instead")
    if config.deterministic:
        wrong.append("deterministic: leave it out")
    if wrong:
        raise EngineError(f"vLLM cannot be started with {'; '.join(wrong)}. Or use engine altiplano")
