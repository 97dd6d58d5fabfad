"""Our settings and sampling parameters as vLLM's, under the names of its EngineArgs and SamplingParams (0.26)."""

from typing import Any

from altiplano.engine.config import EngineConfig
from altiplano.engine.errors import EngineError
from altiplano.engine.params import SamplingParams

CACHE_DTYPES = {"auto": "auto", "bf16": "auto", "fp8": "fp8"}  # auto is the model's own
BLOCK_SIZES = (16, 32, 64, 128)


def engine_args(config: EngineConfig) -> dict[str, Any]:
    """Arguments of vLLM's EngineArgs.

    Raises:
        EngineError: a setting that vLLM does not have; the message says what to change.
    """
    _refuse(config)
    return {
        "model": str(config.model),
        "load_format": config.load_format,
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "block_size": config.block_size,
        "num_gpu_blocks_override": config.num_blocks,
        "kv_cache_dtype": CACHE_DTYPES[config.kv_cache_dtype],
        "enable_prefix_caching": config.enable_prefix_caching,
        "enable_lora": True,
        "max_loras": config.max_loras,
        "max_lora_rank": config.max_lora_rank,
        "scheduling_policy": "priority",
        "seed": config.seed,
        # Code that comes with weights is never run.
        "trust_remote_code": False,
        # Our grammars are llguidance's.
        "structured_outputs_config": {"backend": "guidance"},
        "disable_log_stats": False,
    }


def sampling_params(params: SamplingParams, grammar: str | None) -> dict[str, Any]:
    """Arguments of vLLM's SamplingParams, all but `output_kind` and `structured_outputs`.

    Raises:
        EngineError: a structured request without its grammar.
    """
    if params.structured and grammar is None:
        raise EngineError("vLLM bounds structured output itself: give the request's grammar, not sets of tokens step by step")
    return {
        "max_tokens": max(1, params.max_tokens),  # scoring draws a token that nobody is told
        "min_tokens": params.min_tokens,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "seed": params.seed,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "repetition_penalty": params.repetition_penalty,
        "logit_bias": params.logit_bias,
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": params.ignore_eos,
        "logprobs": params.logprobs,
        "prompt_logprobs": (params.logprobs or 0) if params.prompt_logprobs else None,
        "detokenize": False,
    }


def _refuse(config: EngineConfig) -> None:
    wrong = []
    if not config.device.startswith("cuda"):
        wrong.append(f"device {config.device}: it runs on cuda here")
    if config.quantization != "none":
        wrong.append(
            f"quantization {config.quantization}: it does not make it while loading, serve a checkpoint that is quantized"
        )
    if config.kv_cache_dtype not in CACHE_DTYPES:
        wrong.append(f"kv_cache_dtype {config.kv_cache_dtype}: use one of {', '.join(CACHE_DTYPES)}")
    if config.block_size not in BLOCK_SIZES:
        wrong.append(f"block_size {config.block_size}: use one of {', '.join(map(str, BLOCK_SIZES))}")
    if config.num_speculative_tokens or config.speculative_model is not None:
        wrong.append("num_speculative_tokens: only our own engine's guesses are passed through, set it to 0")
    if config.itl_target_ms is not None:
        wrong.append("itl_target_ms: lower max_num_batched_tokens instead")
    if config.deterministic:
        wrong.append("deterministic: leave it out")
    if wrong:
        raise EngineError(f"vLLM cannot be started with {'; '.join(wrong)}. Or use engine altiplano")
