"""A Llama's forward pass over rows of a step on the GPU: prompts, and decode steps of more rows than `few_rows` takes.

Products are cuBLAS or, up to a few hundred rows, ours; between them are Triton kernels, and attention in CUDA C++ where it is faster.
"""

import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch

from altiplano.engine.config import LlamaConfig
from altiplano.engine.cuda.adapter_pool import Update
from altiplano.engine.cuda.quantized import AnyLayer, CodedLayer, CodedWeights, PackedWeights
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.weights import Layer, Weights
from altiplano_kernels.cluster_attention.kernel import decode_clusters, fits, is_fastest
from altiplano_kernels.embed_norm.kernel import add_norm, add_norm_parts, embed_rows
from altiplano_kernels.hopper import processors_of, runs_on
from altiplano_kernels.kv_write.kernel import rope_and_write
from altiplano_kernels.paged_attention.kernel import DecodeWorkspace, choose_splits, choose_tiling, decode
from altiplano_kernels.prefill_attention import groups
from altiplano_kernels.prefill_attention.kernel import prefill
from altiplano_kernels.rope.reference import cos_sin, inverse_frequencies
from altiplano_kernels.steady_attention import kernel as steady_attention
from altiplano_kernels.steady_linear import kernel as steady
from altiplano_kernels.swiglu.kernel import swiglu
from altiplano_kernels.tile_linear import kernel as tile
from altiplano_kernels.w8a8 import kernel as w8a8

Attend = Callable[[int, torch.Tensor], torch.Tensor]
Tilings = dict[str, tile.Tiling]
KINDS = {"qkv": tile.WHOLE, "o": tile.PARTS, "gate_up": tile.GATED, "down": tile.PARTS}


class CudaLlama:
    """Weights and paged cache. cache: [layers, blocks, 2, kv_heads, page, head_dim]; scales: [layers, blocks, 2, kv_heads, page] or None.

    `deterministic`: what a row becomes does not depend, to the bit, on the other rows, nor on the chunk or step in which it is computed:
    one order of sums for all (`steady_linear`, `steady_attention`), at 1.1 to 1.6 times the step.
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
        self._tiles = runs_on(cache.device) and not deterministic
        self.tilings: dict[int, Tilings] = {}  # of our products, by the rows of a step
        self._clusters = fits(config.num_attention_heads, kv_heads, config.head_dim, cache.shape[4])
        self._compiler: threading.Thread | None = None
        self._parts: steady_attention.Workspace | None = None
        self._workspace: DecodeWorkspace | None = None
        if deterministic:
            group, longest = config.num_attention_heads // kv_heads, len(positions)
            self._parts = steady_attention.Workspace(group, config.head_dim, longest, device)
        else:
            # The batch whose splits need most room decides.
            need = max(batch * choose_splits(batch, kv_heads, config.head_dim) for batch in range(1, max_batch + 1))
            self._workspace = DecodeWorkspace(max(need, max_batch), kv_heads, config.head_dim, device, 1)

    def decode_hidden(self, rows: torch.Tensor, update: Update | None = None, pdl: bool = True, fresh: int = 1) -> torch.Tensor:
        """Last hidden states [rows, hidden] of one token per row, whose slot is in `rows`: int32 [rows]. Capturable.

        `update`: what adapters add to each product, if a row has one. `fresh`: how many rows may belong to one request, at
        neighbouring positions.
        """
        batch, config = len(rows), self.config
        positions = torch.empty_like(rows)
        residual, x = (torch.empty(batch, config.hidden_size, dtype=torch.bfloat16, device=rows.device) for _ in range(2))
        first, slots = self.weights.layers[0].input_norm, self.slots
        embed_rows(
            slots.tokens, slots.positions, rows, self.weights.embedding, first, residual, x, positions, config.rms_norm_eps, pdl
        )
        shape = (batch, config.num_key_value_heads, config.head_dim)
        splits, tiling = choose_splits(*shape), choose_tiling(*shape)
        clusters = self._clusters and is_fastest(*shape, self.cache.element_size())

        def attend(layer: int, qkv: torch.Tensor) -> torch.Tensor:
            out = torch.empty(batch, config.num_attention_heads * config.head_dim, dtype=torch.bfloat16, device=rows.device)
            scales = None if self.scales is None else self.scales[layer]
            if self._parts is not None:
                where = self.cache[layer], scales, slots.tables, rows, positions, out
                return steady_attention.decode(qkv, *where, self._parts, config.num_attention_heads, pdl)
            if clusters:
                heads, cache = config.num_attention_heads, self.cache[layer]
                return decode_clusters(qkv, cache, scales, slots.tables, rows, positions, out, heads, pdl=pdl, fresh=fresh)
            assert self._workspace is not None, "deterministic steps have parts"
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
            attention = steady_attention.chunks if self.deterministic else prefill
            return attention(qkv, self.cache[layer], scales, self.slots.tables, tiles, out, config.num_attention_heads)

        return self._layers(x, residual, positions, slots_of, attend, update, False)

    def tilings_of(self, rows: int) -> Tilings:
        """Of those products of a step that are ours; the others are the library's."""
        if rows not in self.tilings:
            found = {name: tile.choose(rows, *weight) for name, weight in self._tiled_weights().items()}
            self.tilings[rows] = {name: tiling for name, tiling in found.items() if tiling is not None}
        return self.tilings[rows]

    def compile_ahead(self, most_rows: int) -> None:
        """Compile the kernels of steps of up to `most_rows` rows beside whatever goes on, so that no step has to wait for them."""
        go_on, layer, jobs = threading.main_thread().is_alive, self.weights.layers[0], list[Callable[[], None]]()
        if self._tiles:
            sizes = (self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim, self.cache.shape[4])
            if groups.fits(*sizes):
                processors = processors_of(self.cache.device)
                jobs.append(partial(groups.compile_shapes, sizes, self.cache.dtype, processors, go_on))
            weights = [(self.weights.head, tile.DRAW), *self._tiled_weights().values()]
            jobs.append(partial(tile.compile_chosen, weights, most_rows, go_on))
        elif self.deterministic and isinstance(layer, Layer):
            whole, parted = [layer.qkv, self.weights.head], [layer.o, layer.down]
            jobs.append(partial(steady.compile_tilings, whole, parted, [layer.gate_up], go_on))

        def compile_all() -> None:
            for job in jobs:
                job()

        if jobs:
            # No daemon, which would compile on while the libraries that it uses are taken down.
            self._compiler = threading.Thread(target=compile_all, name="compile")
            self._compiler.start()

    def is_compiling(self, seconds: float) -> bool:
        """Whether `compile_ahead` is still at work, after waiting for its end for up to so many seconds."""
        if self._compiler is not None:
            self._compiler.join(seconds)
        return self._compiler is not None and self._compiler.is_alive()

    def _tiled_weights(self) -> dict[str, tuple[torch.Tensor, int]]:
        """Weights of a layer that our products can take, by name, each with what becomes of its sums."""
        layer = self.weights.layers[0]
        # Weights that are unpacked in the step cannot be asked for before the kernel that unpacks them has ended.
        if not (self._tiles and isinstance(layer, Layer)):
            return {}
        return {name: (getattr(layer, name), kind) for name, kind in KINDS.items()}

    def draw(self, rows: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Candidates of the plain draw, float32 and int32 [rows, candidates], without logits; None: the head is for the library.

        rows: as for `decode_hidden`, whose result `hidden` is. Capturable.
        """
        head, slots = self.weights.head, self.slots
        tiling = tile.choose(len(rows), head, tile.DRAW) if self._tiles else None
        if tiling is None:
            return None
        return tile.linear_draw(hidden, head, tiling, rows, slots.temperatures, slots.seeds, slots.steps)

    def head(self, hidden: torch.Tensor, kind: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """Logits [rows, vocab] of last hidden states [rows, hidden]; float32 ones are not rounded on the way."""
        head = self.weights.head
        if self.deterministic:
            return steady.linear(hidden, head, kind, pdl=True)
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
        tilings = self.tilings_of(len(residual)) if pdl and update is None else {}
        for index, layer in enumerate(layers):
            if "qkv" in tilings:
                assert isinstance(x, torch.Tensor) and isinstance(layer, Layer), "tiles are of bf16"
                qkv = tile.linear(x, layer.qkv, tilings["qkv"], pdl)
            else:
                qkv = self._product(x, layer, "qkv", pdl)
            if update is not None:
                assert isinstance(x, torch.Tensor), "adapters read rows that are not quantized"
                update("qkv", index, x, qkv)
            scales = None if self.scales is None else self.scales[index]
            rope_and_write(qkv, positions, slots_of, self.slots.tables, self.cos_sin, self.cache[index], scales, heads, pdl)
            mixed = attend(index, qkv)
            after = layers[index + 1].input_norm if index + 1 < len(layers) else self.weights.norm
            if isinstance(layer, CodedLayer) and update is None:
                x = self._finish_coded(mixed, residual, layer, after, after is self.weights.norm, pdl)
            else:
                x = self._finish(mixed, residual, index, after, tilings, update, pdl)
        assert isinstance(x, torch.Tensor), "the last layer leaves bf16"
        return x

    def _finish(
        self,
        mixed: torch.Tensor,
        residual: torch.Tensor,
        index: int,
        after: torch.Tensor,
        tilings: Tilings,
        update: Update | None,
        pdl: bool,
    ) -> torch.Tensor:
        """From attention to the next layer's input, in steps that adapters can add to where no tilings are given."""
        layer = self.weights.layers[index]
        x = self._add_product(mixed, residual, index, "o", layer.post_norm, tilings, update, pdl)
        if "gate_up" in tilings:
            assert isinstance(layer, Layer), "tiles are of bf16"
            wide = tile.swiglu_linear(x, layer.gate_up, tilings["gate_up"], pdl)
        elif self.deterministic:
            wide = self._steady_swiglu(x, index, update, pdl and isinstance(layer, Layer))
        else:
            gate_up = self._product(x, layer, "gate_up", pdl)
            if update is not None:
                update("gate_up", index, x, gate_up)
            wide = swiglu(gate_up, torch.empty(len(x), gate_up.shape[1] // 2, dtype=x.dtype, device=x.device), pdl)
        return self._add_product(wide, residual, index, "down", after, tilings, update, pdl)

    def _steady_swiglu(self, x: torch.Tensor, index: int, update: Update | None, pdl: bool) -> torch.Tensor:
        gate_up = self.weights.layers[index].gate_up
        assert isinstance(gate_up, torch.Tensor), "codes are not for deterministic mode"
        if update is None:
            return steady.swiglu_linear(x, gate_up, pdl)
        sums = steady.swiglu_sums(x, gate_up, pdl)
        update("gate_up", index, x, sums)
        return steady.activate(sums)

    def _add_product(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        index: int,
        name: str,
        norm: torch.Tensor,
        tilings: Tilings,
        update: Update | None,
        pdl: bool,
    ) -> torch.Tensor:
        """residual += x times a weight of a layer, in place; returns its norm."""
        layer, eps = self.weights.layers[index], self.config.rms_norm_eps
        if name in tilings:
            out = torch.empty_like(residual)
            add_norm_parts(tile.linear_parts(x, getattr(layer, name), tilings[name], pdl), residual, norm, out, eps, pdl)
            return out
        if self.deterministic:
            assert isinstance(x, torch.Tensor), "codes are not for deterministic mode"
            weight, early = getattr(layer, name), pdl and isinstance(layer, Layer)
            if update is None:
                out = torch.empty_like(residual)
                steady.add_norm_linear(x, weight, residual, norm, out, eps, early)
                return out
            out = steady.add(steady.linear_parts(x, weight, early))
        else:
            out = self._product(x, layer, name, pdl)
        if update is not None:
            update(name, index, x, out)
        add_norm(out, residual, norm, out, eps, pdl)
        return out

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
        if self.deterministic:
            return steady.linear(x, weight, pdl=pdl and isinstance(layer, Layer))
        return x @ weight.T
