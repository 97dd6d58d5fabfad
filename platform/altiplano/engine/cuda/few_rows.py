"""A decode step of a few rows (`most_rows`, 16 at most) on kernels of our own: five a layer, each of which starts while the one before it ends.

    begin ─► [ norm+QKV+RoPE+KV ─► attention ─► O+residual ─► norm+gate/up+SwiGLU ─► down+residual ] × layers ─► norm+head+draw ─► advance

Weights are asked for before a kernel waits for its predecessor, so device memory is never idle between kernels; logits are written for
filters alone. With an 8-bit cache a separate kernel rotates and quantizes, because a scale needs a whole head.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from altiplano.engine.config import LlamaConfig
from altiplano.engine.cuda.quantized import AnyLayer, CodedWeights, PackedWeights, weight_of
from altiplano.engine.weights import Weights
from altiplano_kernels.cluster_attention.kernel import Shape, choose_shape, decode_clusters, fits
from altiplano_kernels.few_rows import kernel as few
from altiplano_kernels.few_rows.quantized import Packed
from altiplano_kernels.kv_write.kernel import rope_and_write
from altiplano_kernels.sampling.kernel import advance
from altiplano_kernels.tile_linear import kernel as tile

if TYPE_CHECKING:
    from altiplano.engine.cuda.model import CudaLlama

MOST_BLOCKS = 1056  # of the kernel that draws: eight per processor of the largest card


class FewRows:
    """The step of a `CudaLlama` for up to `most_rows` rows.

    `steady`: a row's result is the same, to the bit, in a step of one row and of `most_rows`, at the price of the fastest plans for one.
    """

    def __init__(self, model: "CudaLlama", steady: bool = False) -> None:
        config, device = model.config, str(model.cache.device)
        assert not isinstance(model.weights, CodedWeights), "these kernels read bf16 or packed weights"
        self._weights: Weights | PackedWeights = model.weights
        self._model, self._width = model, (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        query = config.num_attention_heads * config.head_dim
        self._scratch = few.Step(config.hidden_size, query, config.intermediate_size, config.head_dim, MOST_BLOCKS, device)
        self._qkv = torch.empty(few.MOST_ROWS, self._width, dtype=torch.bfloat16, device=device)
        self._logits: torch.Tensor | None = None  # made at the first step that needs it
        self.plans: dict[str, few.Plan] = {}  # overrides, for tuning
        self.shape: Shape | None = None  # of attention, likewise
        self._steady = steady
        # From nine rows on tiles are faster, but their sums are not those of one row, and packed weights have none.
        tiled = not steady and bool(model.tilings_of(few.MOST_ROWS))
        self.most_rows = min(few.most_rows(config.hidden_size), tile.LEAST_ROWS - 1 if tiled else few.MOST_ROWS)
        if steady:
            self.shape = choose_shape(8, config.num_key_value_heads, config.head_dim, model.cache.element_size())

    @staticmethod
    def supports(config: LlamaConfig, page: int, bits: int = 16) -> bool:
        """Whether all sizes divide into the kernels' tiles."""
        query = config.num_attention_heads * config.head_dim
        sums = (config.hidden_size, config.intermediate_size, query)
        return (
            all(few.divides(k, bits) for k in sums)
            and config.vocab_size % 16 == 0
            and few.most_rows(config.hidden_size) > 0
            and fits(config.num_attention_heads, config.num_key_value_heads, config.head_dim, page)
        )

    def step(self, rows: torch.Tensor, fresh: int = 1) -> None:
        """One token for each slot in `rows`: int32 [rows]; draws it and advances the slots. Capturable.

        `fresh`: how many rows may belong to one request, at neighbouring positions.
        """
        residual, weights, slots, scratch = self._residual(rows, fresh), self._weights, self._model.slots, self._scratch
        blocks = few.norm_draw(
            residual,
            _head(weights),
            weights.norm,
            self._model.config.rms_norm_eps,
            rows,
            slots.temperatures,
            slots.seeds,
            slots.steps,
            scratch,
            self._plans(len(rows)).get("head"),
        )
        advance(scratch.values, scratch.ids, blocks, rows, slots.tokens, slots.positions, slots.steps, slots.ring, pdl=True)

    def logits(self, rows: torch.Tensor, fresh: int = 1) -> torch.Tensor:
        """float32 [rows, vocab] of one token for each slot in `rows`, to the bit those that `step` draws from, for draws that need to see
        them. Capturable; valid until the next call."""
        residual, weights = self._residual(rows, fresh), self._weights
        if self._logits is None:
            self._logits = torch.empty(few.MOST_ROWS, self._model.config.vocab_size, dtype=torch.float32, device=rows.device)
        out = self._logits[: len(rows)]
        eps, plan = self._model.config.rms_norm_eps, self._plans(len(rows)).get("head")
        few.norm_logits(residual, _head(weights), weights.norm, eps, out, plan, self._scratch.turn)
        return out

    def _residual(self, rows: torch.Tensor, fresh: int) -> torch.Tensor:
        """The sums behind the last layer, bf16 [rows, hidden], before the last norm."""
        model, scratch, slots = self._model, self._scratch, self._model.slots
        config, weights, plan, count = model.config, self._weights, self._plans(len(rows)).get, len(rows)
        eps, heads = config.rms_norm_eps, config.num_attention_heads
        residual, mixed, wide = scratch.residual[:count], scratch.mixed[:count], scratch.wide[:count]
        few.begin(rows, slots.tokens, slots.positions, slots.tables, weights.embedding, model.cos_sin, model.cache[0], scratch)
        layers: Sequence[AnyLayer] = weights.layers
        for index, layer in enumerate(layers):
            cache, scales = model.cache[index], None if model.scales is None else model.scales[index]
            qkv, o, gate_up, down = (weight_of(layer, name) for name in ("qkv", "o", "gate_up", "down"))
            if scales is None:
                # Attention reads the positions before it waits: the first layer's must not start before `begin` has ended.
                first = index == 0
                few.norm_qkv(residual, qkv, layer.input_norm, eps, scratch, cache, heads, plan("qkv"), first)
                query = scratch.query[:count]
            else:
                query = self._qkv[:count]
                few.linear(residual, qkv, query, layer.input_norm, eps, plan("qkv"))
                positions = scratch.positions[:count]
                rope_and_write(query, positions, rows, slots.tables, model.cos_sin, cache, scales, heads, pdl=True)
            decode_clusters(query, cache, scales, slots.tables, rows, scratch.positions, mixed, heads, self.shape, fresh=fresh)
            few.add_linear(mixed, o, residual, plan("o"))
            few.norm_swiglu(residual, gate_up, layer.post_norm, eps, wide, plan("gate_up"), scratch.turn)
            few.add_linear(wide, down, residual, plan("down"))
        return residual

    def _plans(self, rows: int) -> dict[str, few.Plan]:
        """What is to be used instead of the kernels' own choice, by the names that `plans` has."""
        if not self._steady:
            return self.plans
        layer, head = self._weights.layers[0], _head(self._weights)
        qkv = few.QKV if self._model.scales is None else few.PLAIN
        modes = {"qkv": qkv, "o": few.RESIDUAL, "gate_up": few.SWIGLU, "down": few.RESIDUAL}
        weights = {name: (mode, weight_of(layer, name)) for name, mode in modes.items()}
        weights["head"] = few.DRAW, head
        return {
            name: few.steady_plan(mode, w.shape[0], w.shape[1], rows, w.bits if isinstance(w, Packed) else 16)
            for name, (mode, w) in weights.items()
        }


def _head(weights: Weights | PackedWeights) -> torch.Tensor | Packed:
    return weights.packed_head if isinstance(weights, PackedWeights) else weights.head
