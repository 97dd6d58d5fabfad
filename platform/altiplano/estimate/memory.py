"""Bytes that one worker needs for a LoRA or QLoRA step."""

from dataclasses import dataclass

from altiplano import spec
from altiplano.estimate.shape import ModelShape

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Allocator slack, workspaces of the matrix library, and the runtime itself.
FIXED_BYTES = 1 << 30


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose."""

    weights: int
    adapter: int  # LoRA weights, gradients and both AdamW moments, in float32
    activations: int
    logits: int
    fixed: int = FIXED_BYTES

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.activations + self.logits + self.fixed


def memory(pipeline: spec.Pipeline, shape: ModelShape, micro_batch_tokens: int) -> Memory:
    """Peak of one worker with `micro_batch_tokens` tokens in a forward pass.

    Activations follow an unfused stack: per token and layer, six rows of the hidden size, query, key and value twice, the
    attention output and four rows of the feed-forward size; with checkpointing, one row per layer and one layer in full.
    """
    element = BYTES[pipeline.model.dtype]
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    per_layer = element * (6 * shape.hidden_size + 2 * (query + 2 * key) + query + 4 * shape.intermediate_size)
    if pipeline.training.gradient_checkpointing:
        activations = micro_batch_tokens * (shape.num_hidden_layers * shape.hidden_size * element + per_layer)
    else:
        activations = micro_batch_tokens * shape.num_hidden_layers * per_layer
    if pipeline.model.load_in_4bit:
        # 4 bits a weight, and an 8-bit scale for each 64 of them; embeddings stay as they are.
        weights = shape.body // 2 + shape.body // 64 + (shape.total - shape.body) * element
    else:
        weights = shape.total * element
    return Memory(
        weights=weights,
        adapter=16 * shape.adapter(pipeline.lora.r),
        activations=activations,
        # The head works on tiles of supervised rows (TRL's fused head): a tile of 1 024 rows, its gradient, in float32.
        logits=2 * 4 * shape.vocab_size * min(1024, micro_batch_tokens),
    )
