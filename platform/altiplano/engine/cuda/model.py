"""A Llama's forward pass over rows of a step on the GPU: prompts, and decode steps of more rows than `few_rows` takes.

Products are cuBLAS or, for a few dozen rows, ours; between them are Triton kernels and attention in clusters.
"""

from collections.abc import Callable, Sequence

import torch

from altiplano.engine.config import LlamaConfig
from altiplano.engine.cuda.adapter_pool import Update
from altiplano.engine.cuda.quantized import AnyLayer, CodedLayer, CodedWeights, PackedWeights
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.weights import Layer, Weights
from altiplano_kernels.cluster_attention.kernel import decode_clusters, fits
from altiplano_kernels.embed_norm.kernel import add_norm, add_norm_parts, embed_rows
from altiplano_kernels.kv_write.kernel import rope_and_write
from altiplano_kernels.linear import kernel as linear
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, choose_tiling, decode
from altiplano_kernels.prefill_attention.kernel import prefill
from altiplano_kernels.rope.reference import cos_sin, inverse_frequencies
from altiplano_kernels.steady_linear import kernel as steady
from altiplano_kernels.swiglu.kernel import swiglu
from altiplano_kernels.w8a8 import kernel as w8a8

# Below, the kernels of `few_rows` do the step; where they do not fit, the library's products are faster than ours that split sums.
LEAST_SPLIT_ROWS = 17
Attend = Callable[[int, torch.Tensor], torch.Tensor]


def _tilings(layer: AnyLayer | CodedLayer) -> dict[str, linear.Tiling]:
    """Of our own products for a few dozen rows, where all of them fit; that of QKV may be missing, for it can be the library's."""
    found: dict[str, linear.Tiling] = {}
    if not isinstance(layer, Layer):
        return found
    for name in ("o", "gate_up", "down"):
        n, k = getattr(layer, name).shape
        tiling = linear.choose_tiling(n, k, name == "gate_up")
        if not linear.fits(tiling, n // 2 if name == "gate_up" else n, k):
            return {}
        found[name] = tiling
    n, k = layer.qkv.shape
    return found | ({"qkv": linear.TUNED[n, k]} if (n, k) in linear.TUNED else {})


class CudaLlama:
    """Weights and paged cache. cache: [layers, blocks, 2, kv_heads, page, head_dim]; scales: [layers, blocks, 2, kv_heads, page] or None.

    `deterministic`: what a row becomes does not depend, to the bit, on the other rows: one path and one order of sums for all, which
    is that of prompts. A step takes two to four times as long (benchmarks/results/engine.json, variant deterministic).
    """

    def __init__(
        self,
        config: LlamaConfig,
        weights: Weights | PackedWeights | CodedWeights,
        cache: torch.Tensor,
        scales: torch.Tensor | None,
        slots: SlotTable,
        max_batch: int,
        deterministic: bool = False,
    ) -> None:
        self.config, self.weights, self.cache, self.scales, self.slots = config, weights, cache, scales, slots
        self.deterministic = deterministic
        device = str(cache.device)
        positions = torch.arange(slots.width * cache.shape[4])
        frequencies = inverse_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        self.cos_sin = torch.cat(cos_sin(positions, frequencies), -1).to(device).contiguous()
        kv_heads = config.num_key_value_heads
        # The batch whose splits need most room decides.
        need = max(batch * choose_splits(batch, kv_heads, config.head_dim) for batch in range(1, max_batch + 1))
        self.tilings = _tilings(weights.layers[0])
        self._clusters = fits(config.num_attention_heads, kv_heads, config.head_dim, cache.shape[4])
        self._workspace = DecodeWorkspace(max(need, max_batch), kv_heads, config.head_dim, device, 1)

    def decode_hidden(self, rows: torch.Tensor, update: Update | None = None, pdl: bool = True, fresh: int = 1) -> torch.Tensor:
        """Last hidden states [rows, hidden] of one token per row, whose slot is in `rows`: int32 [rows]. Capturable.

        `update`: what adapters add to each product, if a row has one. `fresh`: how many rows may belong to one request, at
        neighbouring positions.
        """
        batch, config = len(rows), self.config
        if self.deterministic:
            ids, positions = self.slots.tokens[rows], self.slots.positions[rows]
            numbers = torch.arange(batch, dtype=torch.int32, device=rows.device)
            tiles = torch.stack((numbers, torch.ones_like(rows), positions, rows), 1)
            return self.prefill_hidden(ids, positions, rows, tiles, update)
        positions = torch.empty_like(rows)
        residual, x = (torch.empty(batch, config.hidden_size, dtype=torch.bfloat16, device=rows.device) for _ in range(2))
        first, slots = self.weights.layers[0].input_norm, self.slots
        embed_rows(
            slots.tokens, slots.positions, rows, self.weights.embedding, first, residual, x, positions, config.rms_norm_eps, pdl
        )
        shape = (batch, config.num_key_value_heads, config.head_dim)
        splits, tiling = choose_splits(*shape), choose_tiling(*shape)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            out = torch.empty(batch, config.num_attention_heads * config.head_dim, dtype=torch.bfloat16, device=rows.device)
            scales = None if self.scales is None else self.scales[layer]
            if self._clusters:
                heads, cache = config.num_attention_heads, self.cache[layer]
                return decode_clusters(qkv, cache, scales, slots.tables, rows, positions, out, heads, pdl=pdl, fresh=fresh)
            return decode(
                qkv,
                self.cache[layer],
                scales,
                slots.tables,
                rows,
                positions,
                out,
                self._workspace,
                config.num_attention_heads,
                splits,
                *tiling,
                pdl=pdl,
            )

        return self._layers(x, residual, positions, rows, attend, update, pdl)

    def prefill_hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        slots_of: torch.Tensor,
        tiles: torch.Tensor,
        update: Update | None = None,
    ) -> torch.Tensor:
        """Last hidden states [tokens, hidden] of chunks, flat. ids, positions, slots_of: int32 [tokens]; tiles: of `list_tiles`."""
        config = self.config
        residual = self.weights.embedding[ids]
        x = torch.empty_like(residual)
        nothing = torch.zeros_like(residual)
        add_norm(nothing, residual, self.weights.layers[0].input_norm, x, config.rms_norm_eps)

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            out = torch.empty(len(ids), config.num_attention_heads * config.head_dim, dtype=torch.bfloat16, device=ids.device)
            scales = None if self.scales is None else self.scales[layer]
            heads = config.num_attention_heads
            return prefill(qkv, self.cache[layer], scales, self.slots.tables, tiles, out, heads, steady=self.deterministic)

        return self._layers(x, residual, positions, slots_of, attend, update, False)

    def head(self, hidden: torch.Tensor, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Logits [rows, vocab] of last hidden states [rows, hidden]; float32 ones are not rounded on the way."""
        head = self.weights.head
        if self.deterministic:
            return steady.linear(hidden, head, kind)
        return hidden @ head.T if kind is hidden.dtype else torch.mm(hidden, head.T, out_dtype=kind)

    def _layers(
        self,
        x: torch.Tensor | w8a8.Codes,
        residual: torch.Tensor,
        positions: torch.Tensor,
        slots_of: torch.Tensor,
        attend: Attend,
        update: Update | None,
        pdl: bool,
    ) -> torch.Tensor:
        config = self.config
        layers: Sequence[AnyLayer | CodedLayer] = self.weights.layers
        heads = config.num_attention_heads
        split = pdl and LEAST_SPLIT_ROWS <= len(residual) <= linear.MOST_ROWS and update is None and bool(self.tilings)
        for index, layer in enumerate(layers):
            qkv = self._split_qkv(x, layer, pdl) if split else self._product(x, layer, "qkv", pdl)
            if update is not None:
                assert isinstance(x, torch.Tensor), "adapters read rows that are not quantized"
                update("qkv", index, x, qkv)
            scales = None if self.scales is None else self.scales[index]
            rope_and_write(qkv, positions, slots_of, self.slots.tables, self.cos_sin, self.cache[index], scales, heads, pdl)
            mixed = attend(index, qkv)
            after = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.norm
            if split and not isinstance(layer, CodedLayer):
                x = self._finish_split(mixed, residual, layer, after, pdl)
            elif isinstance(layer, CodedLayer) and update is None:
                x = self._finish_coded(mixed, residual, layer, after, after is self.weights.norm, pdl)
            else:
                x = self._finish(mixed, residual, index, after, update, pdl)
        assert isinstance(x, torch.Tensor), "the last layer leaves bf16"
        return x

    def _finish(
        self,
        mixed: torch.Tensor,
        residual: torch.Tensor,
        index: int,
        after: torch.Tensor,
        update: Update | None,
        pdl: bool,
    ) -> torch.Tensor:
        """From attention to the next layer's input, in steps that adapters can add to."""
        layer, eps = self.weights.layers[index], self.config.rms_norm_eps
        x = self._product(mixed, layer, "o", pdl)
        if update is not None:
            update("o", index, mixed, x)
        add_norm(x, residual, layer.post_norm, x, eps, pdl)
        gate_up = self._product(x, layer, "gate_up", pdl)
        if update is not None:
            update("gate_up", index, x, gate_up)
        wide = swiglu(gate_up, torch.empty(len(x), gate_up.shape[1] // 2, dtype=x.dtype, device=x.device), pdl)
        x = self._product(wide, layer, "down", pdl)
        if update is not None:
            update("down", index, wide, x)
        add_norm(x, residual, after, x, eps, pdl)
        return x

    def _finish_split(
        self, mixed: torch.Tensor, residual: torch.Tensor, layer: AnyLayer, after: torch.Tensor, pdl: bool
    ) -> torch.Tensor:
        """The same for a few rows: every kernel starts while the one before it ends."""
        eps, tilings = self.config.rms_norm_eps, self.tilings
        x = torch.empty_like(residual)
        add_norm_parts(linear.linear_parts(mixed, layer.o, tilings["o"], pdl), residual, layer.post_norm, x, eps, pdl)
        wide = linear.swiglu_linear(x, layer.gate_up, tilings["gate_up"], pdl)
        add_norm_parts(linear.linear_parts(wide, layer.down, tilings["down"], pdl), residual, after, x, eps, pdl)
        return x

    def _split_qkv(self, x: torch.Tensor | w8a8.Codes, layer: AnyLayer | CodedLayer, pdl: bool) -> torch.Tensor:
        tiling = self.tilings.get("qkv")
        if tiling is None or not isinstance(layer, Layer) or not isinstance(x, torch.Tensor):
            return self._product(x, layer, "qkv")
        return linear.linear(x, layer.qkv, tiling, pdl)

    def _finish_coded(
        self, mixed: torch.Tensor, residual: torch.Tensor, layer: CodedLayer, after: torch.Tensor, last: bool, pdl: bool
    ) -> torch.Tensor | w8a8.Codes:
        """The same on 8 bits: norm and SwiGLU leave the codes that the next product reads; the `last` norm leaves bf16."""
        eps, kind = self.config.rms_norm_eps, layer.kind
        x = w8a8.linear_parts(w8a8.quantize_rows(mixed, kind, pdl), layer.o, pdl=pdl)
        gate_up = w8a8.linear(w8a8.add_norm(x, residual, layer.post_norm, eps, kind, pdl), layer.gate_up, pdl=pdl)
        x = w8a8.linear_parts(w8a8.swiglu(gate_up, kind, pdl), layer.down, pdl=pdl)
        if not last:
            return w8a8.add_norm(x, residual, after, eps, kind, pdl)
        out = torch.empty_like(residual)
        add_norm_parts(x, residual, after, out, eps, pdl)
        return out

    def _product(self, x: torch.Tensor | w8a8.Codes, layer: AnyLayer | CodedLayer, name: str, pdl: bool = False) -> torch.Tensor:
        """bf16 rows times a weight of a layer; the library's product where neither is quantized."""
        if isinstance(layer, CodedLayer):
            codes = x if isinstance(x, w8a8.Codes) else w8a8.quantize_rows(x, layer.kind, pdl)
            return w8a8.linear(codes, getattr(layer, name), pdl=pdl)
        assert isinstance(x, torch.Tensor), "rows are quantized for coded layers only"
        weight: torch.Tensor = getattr(layer, name)
        return steady.linear(x, weight) if self.deterministic else x @ weight.T
