"""The engine's settings, and the model's as its config.json gives them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.engine.errors import WeightsError


@dataclass(frozen=True)
class EngineConfig:
    """Settings of one engine, under vLLM's names. Sizes are in tokens unless they say otherwise.

    Raises:
        ValueError: settings that cannot work together.
    """

    model: Path
    dtype: str = "float32"
    device: str = "cpu"
    max_model_len: int = 2048
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    block_size: int = 32
    num_blocks: int = 1024
    enable_prefix_caching: bool = True
    max_loras: int = 8
    max_lora_rank: int = 64
    load_format: str = "safetensors"  # or "dummy": random weights by config, for benchmarks
    kv_cache_dtype: str = "auto"  # or "bf16", "fp8", "int8": 8 bits have a scale per token and head; on a GPU only
    quantization: str = "none"  # or "int8", "int4" (weights in groups of 128), "w8a8-fp8", "w8a8-int8"; on a GPU only
    itl_target_ms: float | None = None  # a step that decodes takes no more prompt tokens than fit into it
    num_speculative_tokens: int = 0  # guessed per step when few requests run
    speculative_model: Path | None = None  # a smaller Llama that guesses; None: prompt lookup in the request's own text
    speculative_quantization: str = "none"  # of its weights, as `quantization`
    deterministic: bool = False  # a request's tokens and log-probabilities do not depend, to the bit, on who else runs
    seed: int = 0
    debug: bool = False  # check after steps who holds which page, and that nobody writes into free ones; slow

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.num_blocks * self.block_size < self.max_model_len:
            raise ValueError(
                f"the KV cache holds {self.num_blocks * self.block_size} tokens, less than max_model_len {self.max_model_len}: "
                "raise num_blocks or lower max_model_len"
            )
        reduced = (self.kv_cache_dtype, self.quantization, self.speculative_quantization)
        if self.device == "cpu" and reduced != ("auto", "none", "none"):
            raise ValueError(
                f"kv_cache_dtype {reduced[0]}, quantization {reduced[1]} and speculative_quantization {reduced[2]} need a GPU: "
                "leave them at auto, none and none on the CPU"
            )
        if self.speculative_quantization != "none" and self.speculative_model is None:
            raise ValueError(
                f"speculative_quantization {self.speculative_quantization} has no speculative_model: name one, or leave it out"
            )
        if not 0 <= self.num_speculative_tokens <= 32:
            raise ValueError(f"num_speculative_tokens must be between 0 and 32, not {self.num_speculative_tokens}")
        if self.device != "cpu" and self.num_speculative_tokens > 15:
            raise ValueError(
                f"num_speculative_tokens must be at most 15 on a GPU, not {self.num_speculative_tokens}: a step checks 16 tokens at once"
            )
        if self.speculative_model is not None and not self.num_speculative_tokens:
            raise ValueError("speculative_model guesses nothing with num_speculative_tokens 0: raise it, or leave the model out")
        if self.itl_target_ms is not None and not 0 < self.itl_target_ms < float("inf"):
            raise ValueError(f"itl_target_ms must be above 0 milliseconds, not {self.itl_target_ms}: leave it out for no target")
        if self.deterministic and self.quantization.startswith("w8a8"):
            raise ValueError(f"deterministic is not for quantization {self.quantization}: use none, int8 or int4")
        if self.load_format not in ("safetensors", "dummy"):
            raise ValueError(f"load_format must be safetensors or dummy, not {self.load_format!r}")


@dataclass(frozen=True)
class LlamaConfig:
    """What a forward pass needs to know of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]


def read_config(directory: Path) -> LlamaConfig:
    """The model's settings from config.json (transformers 5 and older key names) and generation_config.json.

    Raises:
        WeightsError: missing or unreadable, not a Llama, or quantized in a way that the engine does not know.
    """
    values = _json(directory / "config.json")
    if values.get("model_type") != "llama":
        raise WeightsError(
            f"{directory}/config.json says model_type {values.get('model_type')!r}: the engine runs models of type 'llama'"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method")
        raise WeightsError(f"{directory} is quantized with {method!r}, which the engine does not load: use the bf16 checkpoint")
    rope = values.get("rope_parameters") or {
        "rope_theta": values.get("rope_theta", 10000.0),
        **(values.get("rope_scaling") or {}),
    }
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise WeightsError(f"{directory}/config.json has rope type {kind!r}: the engine knows 'default' and 'llama3'")
    heads = values["num_attention_heads"]
    return LlamaConfig(
        hidden_size=values["hidden_size"],
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads", heads),
        head_dim=values.get("head_dim") or values["hidden_size"] // heads,
        vocab_size=values["vocab_size"],
        rms_norm_eps=values.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", 10000.0),
        rope_scaling=dict(rope) if kind == "llama3" else None,
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        max_position_embeddings=values.get("max_position_embeddings", 2048),
        eos_token_ids=_eos(directory, values),
    )


def _eos(directory: Path, values: Mapping[str, Any]) -> tuple[int, ...]:
    """generation_config.json lists all tokens that end an answer; config.json often only one."""
    generation = directory / "generation_config.json"
    found = _json(generation).get("eos_token_id") if generation.exists() else None
    found = values.get("eos_token_id") if found is None else found
    return tuple(found) if isinstance(found, list) else () if found is None else (found,)


def _json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror}): the model must be a directory in Hugging Face's format"
        ) from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON ({error}): copy the model again") from error
    return values
