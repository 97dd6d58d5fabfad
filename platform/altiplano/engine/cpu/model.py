"""A Llama's forward pass over the tokens of one step, as the paper has it, on paged keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from altiplano.engine.adapters import Adapter, Pair
from altiplano.engine.config import LlamaConfig
from altiplano.engine.weights import Layer, Weights
from altiplano_kernels.lora.reference import add_lora
from altiplano_kernels.paged_attention import reference as attention
from altiplano_kernels.rms_norm.reference import add_rms_norm, rms_norm
from altiplano_kernels.rope.reference import cos_sin, inverse_frequencies, rotate
from altiplano_kernels.swiglu.reference import swiglu

Pairs = Mapping[str, Pair]


@dataclass(frozen=True)
class Batch:
    """The tokens of a step, flat: decodes first (one row each), then the chunks of prompts one after another.

    ids, positions, slots: int64 [tokens]; `tables`, `lengths`: of the decodes; `chunks`: (first row, rows, page table, start).
    `groups`: (adapter, rows or None for all rows).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    num_decodes: int
    tables: torch.Tensor
    lengths: torch.Tensor
    chunks: tuple[tuple[int, int, torch.Tensor, int], ...]
    groups: tuple[tuple[Adapter, torch.Tensor | None], ...]


class Llama:
    """Weights and cache. cache: [layers, blocks, 2, kv_heads, block_size, head_dim]."""

    def __init__(self, config: LlamaConfig, weights: Weights, cache: torch.Tensor) -> None:
        self.config, self.weights, self.cache = config, weights, cache
        self._frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling).to(cache.device)

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states [tokens, hidden] after the last norm; keys and values of all tokens are in the cache afterwards."""
        config = self.config
        residual = self.weights.embedding[batch.ids]
        table = cos_sin(batch.positions, self._frequencies)
        x = rms_norm(residual, self.weights.layers[0].input_norm, config.rms_norm_eps)
        for index, layer in enumerate(self.weights.layers):
            updates = [(adapter.pairs[index], rows) for adapter, rows in batch.groups]
            x = self._attend(x, layer, self.cache[index], batch, table, updates)
            x, residual = add_rms_norm(x, residual, layer.post_norm, config.rms_norm_eps)
            x = self._feed(x, layer, updates)
            after = self.weights.layers[index + 1].input_norm if index + 1 < len(self.weights.layers) else self.weights.norm
            x, residual = add_rms_norm(x, residual, after, config.rms_norm_eps)
        return x

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab] for hidden: [rows, hidden]."""
        return (hidden @ self.weights.head.T).float()

    def _attend(
        self,
        x: torch.Tensor,
        layer: Layer,
        cache: torch.Tensor,
        batch: Batch,
        table: tuple[torch.Tensor, torch.Tensor],
        updates: Sequence[tuple[Pairs, torch.Tensor | None]],
    ) -> torch.Tensor:
        config = self.config
        heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        qkv = x @ layer.qkv.T
        q, k, v = qkv.split((heads * dim, kv * dim, kv * dim), dim=-1)
        _update(updates, x, {"q_proj": q, "k_proj": k, "v_proj": v})
        query = rotate(q.view(-1, heads, dim), *table)
        attention.write_kv(cache, batch.slots, rotate(k.view(-1, kv, dim), *table), v.view(-1, kv, dim))
        out = torch.empty_like(query)
        if batch.num_decodes:
            out[: batch.num_decodes] = attention.decode(query[: batch.num_decodes], cache, batch.tables, batch.lengths)
        for first, rows, pages, start in batch.chunks:
            out[first : first + rows] = attention.prefill(query[first : first + rows], cache, pages, start)
        flat = out.reshape(len(x), heads * dim)
        projected = flat @ layer.o.T
        _update(updates, flat, {"o_proj": projected})
        return projected

    def _feed(self, x: torch.Tensor, layer: Layer, updates: Sequence[tuple[Pairs, torch.Tensor | None]]) -> torch.Tensor:
        gate_up = x @ layer.gate_up.T
        gate, up = gate_up.chunk(2, dim=-1)
        _update(updates, x, {"gate_proj": gate, "up_proj": up})
        wide = swiglu(gate_up)
        out = wide @ layer.down.T
        _update(updates, wide, {"down_proj": out})
        return out


def _update(updates: Sequence[tuple[Pairs, torch.Tensor | None]], x: torch.Tensor, outs: Mapping[str, torch.Tensor]) -> None:
    """Add each adapter's share to the module outputs, in place."""
    for pairs, rows in updates:
        for module, out in outs.items():
            if module in pairs:
                add_lora(out, x, *pairs[module], rows)
