"""A model in GPU memory: weights (quantized where asked), cache, and the steps on them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from altiplano.engine.config import EngineConfig, LlamaConfig, read_config
from altiplano.engine.cuda.few_rows import FewRows
from altiplano.engine.cuda.model import CudaLlama
from altiplano.engine.cuda.quantized import BITS, CODES, CodedWeights, PackedWeights, code_weights, pack_weights
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.cuda.stepper import WIDE_ROWS, Stepper
from altiplano.engine.errors import EngineError
from altiplano.engine.weights import Weights, load_weights, random_weights
from altiplano_kernels.sampling.kernel import DrawWorkspace
from altiplano_kernels.steady_attention.kernel import places_of

CACHE_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}


@dataclass(frozen=True)
class Loaded:
    """Steps of a model, and how to make its weights again."""

    stepper: Stepper
    make_weights: Callable[[], Weights | PackedWeights | CodedWeights]

    @property
    def caches(self) -> list[torch.Tensor]:
        model = self.stepper.model
        return [model.cache] if model.scales is None else [model.cache, model.scales]


def load_model(
    config: EngineConfig,
    where: Path,
    model: LlamaConfig,
    slots: SlotTable,
    kv_cache_dtype: str,
    quantization: str,
    max_batch: int,
    *,
    drafts: bool = False,
) -> Loaded:
    """The model in the directory `where`, for steps over `slots` of up to `max_batch` rows, with a cache of `num_blocks` pages and scratch.

    `drafts`: it guesses for the model of `config`, which draws every token itself. So its own tokens may depend on who else is in
    the batch: that changes how many guesses are right, and no answer.

    Raises:
        EngineError: an unknown cache type or quantization, or too little memory (the message says how much is needed, and which
            settings need it).
    """
    if kv_cache_dtype not in CACHE_DTYPES:
        raise EngineError(f"kv_cache_dtype {kv_cache_dtype!r} is unknown: use one of {', '.join(CACHE_DTYPES)}")
    kind, device = CACHE_DTYPES[kv_cache_dtype], str(slots.tokens.device)
    bits = _bits(quantization, model, config.block_size)

    def make_weights() -> Weights | PackedWeights | CodedWeights:
        if config.load_format == "dummy":
            weights = random_weights(model, torch.bfloat16, device, config.seed)
        else:
            weights = load_weights(where, model, torch.bfloat16, device)
        if quantization in CODES:
            return code_weights(weights, CODES[quantization])
        return weights if bits == 16 else pack_weights(weights, bits, model.head_dim, fused_qkv=kind is torch.bfloat16)

    torch.cuda.empty_cache()  # else what an engine before this one left behind counts as taken
    free = torch.cuda.mem_get_info()[0]
    _check_weights(where, weight_bytes(model), free, drafts)
    try:
        weights = make_weights()
    except torch.OutOfMemoryError as error:
        # Parts are put together, and quantized, beside what was read.
        need = f"{_gib(weight_bytes(model))}, up to twice as much while they are loaded"
        raise _no_room_for_weights(where, need, free, drafts) from error
    torch.cuda.empty_cache()  # else what the weights were quantized from counts as taken
    # The steps of a model and its draft take turns in the same memory.
    step = max(step_bytes(config, each) for each in ([model, read_config(config.model)] if drafts else [model]))
    _check_memory(cache_bytes(config, model, kind), step, torch.cuda.mem_get_info()[0], config, where if drafts else None)
    shape = (model.num_hidden_layers, config.num_blocks + 1, 2, model.num_key_value_heads, config.block_size, model.head_dim)
    cache = torch.zeros(shape, dtype=kind, device=device)
    scales = torch.zeros(shape[:-1], dtype=torch.float16, device=device) if kind.itemsize == 1 else None
    llama = CudaLlama(model, weights, cache, scales, slots, max_batch, config.deterministic and not drafts)
    few = None
    if quantization not in CODES and not llama.deterministic and FewRows.supports(model, config.block_size, bits):
        few = FewRows(llama, steady=config.num_speculative_tokens > 0 and not drafts)
    return Loaded(Stepper(llama, few, DrawWorkspace(max_batch, model.vocab_size, device)), make_weights)


def _bits(quantization: str, model: LlamaConfig, page: int) -> int:
    """Bits of a weight that is quantized alone; 16 where none is."""
    if quantization == "none" or quantization in CODES:
        return 16
    if quantization not in BITS:
        raise EngineError(f"quantization {quantization!r} is unknown: use one of none, {', '.join((*BITS, *CODES))}")
    if not FewRows.supports(model, page, BITS[quantization]):
        raise EngineError(
            f"quantization {quantization} needs sizes that are multiples of 512 or 768 and a block_size that is one of 16; here hidden_size is "
            f"{model.hidden_size}, intermediate_size {model.intermediate_size} and block_size {page}: use none"
        )
    return BITS[quantization]


def weight_bytes(model: LlamaConfig) -> int:
    """In bf16, as a checkpoint is loaded whatever becomes of it."""
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    layer = model.hidden_size * (2 * queries + 2 * keys + 3 * model.intermediate_size + 2)
    embeddings = model.vocab_size * model.hidden_size * (1 if model.tie_word_embeddings else 2)
    return 2 * (embeddings + model.num_hidden_layers * layer + model.hidden_size)


def cache_bytes(config: EngineConfig, model: LlamaConfig, kind: torch.dtype) -> int:
    """What `num_blocks` pages and the scratch page take, with the scales of 8-bit ones: keys and values of every layer and head."""
    vectors = model.num_hidden_layers * (config.num_blocks + 1) * 2 * model.num_key_value_heads * config.block_size
    scale = torch.float16.itemsize if kind.itemsize == 1 else 0
    return vectors * (model.head_dim * kind.itemsize + scale)


def step_bytes(config: EngineConfig, model: LlamaConfig) -> int:
    """About what the largest step needs beside weights and cache: rows of a prompt between two products, and logits of all draws."""
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    row = 4 * model.hidden_size + 3 * model.intermediate_size + (heads + model.num_attention_heads) * model.head_dim
    logits = max(2 * config.max_num_seqs, 4 * min(config.max_num_seqs, WIDE_ROWS)) * model.vocab_size
    parts = 0
    if config.deterministic:
        row += 2 * model.intermediate_size if config.max_loras else 0  # adapters add to float32 sums of gate and up
        group = model.num_attention_heads // model.num_key_value_heads
        parts = 4 * places_of(group, config.max_model_len) * (model.head_dim + 2)
    return 2 * config.max_num_batched_tokens * row + logits + parts


def _check_weights(where: Path, need: int, free: int, drafts: bool) -> None:
    """In bytes."""
    if need > free:
        raise _no_room_for_weights(where, f"{_gib(need)}, {_gib(need - free)} more than there is", free, drafts)


def _no_room_for_weights(where: Path, need: str, free: int, drafts: bool) -> EngineError:
    return EngineError(
        f"the weights of {where} need {need}, and the GPU has {_gib(free)} free: free it (another engine or a notebook may hold it), "
        f"{'leave speculative_model out, ' if drafts else ''}or use a larger one"
    )


def _check_memory(cache: int, step: int, free: int, config: EngineConfig, draft: Path | None = None) -> None:
    """All in bytes. `draft`: the model whose cache it is, where that is not the engine's own."""
    if cache + step > free:
        whose = "" if draft is None else f" for the draft of speculative_model {draft}, which has as many pages as the model's,"
        raise EngineError(
            f"the KV cache of num_blocks {config.num_blocks}{whose} needs {_gib(cache)}, a step of max_num_batched_tokens "
            f"{config.max_num_batched_tokens} and max_num_seqs {config.max_num_seqs} about {_gib(step)}, and the GPU has {_gib(free)} "
            f"free{'' if draft is None else ' beside the model and its cache'}, {_gib(cache + step - free)} too little: lower one of "
            f"them, use kv_cache_dtype fp8 or int8, {'' if draft is None else 'leave speculative_model out, '}or free the GPU"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
