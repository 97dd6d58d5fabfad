"""The CUDA runner: plans to launches. `execute` answers at once; `launch_*` and `publish` leave the host free to run ahead."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from altiplano.engine.adapters import load_adapter
from altiplano.engine.config import EngineConfig, LlamaConfig, read_config
from altiplano.engine.cuda import drawing
from altiplano.engine.cuda.adapter_pool import AdapterPool, Update
from altiplano.engine.cuda.few_rows import FewRows
from altiplano.engine.cuda.graphs import DecodeGraphs, Kind, bucket_of
from altiplano.engine.cuda.model import CudaLlama
from altiplano.engine.cuda.quantized import BITS, CODES, CodedWeights, PackedWeights, code_weights, pack_weights
from altiplano.engine.cuda.sleep import Asleep
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.errors import AdapterError, EngineError
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.prompt_scores import with_prompt
from altiplano.engine.runner import Drawn
from altiplano.engine.weights import Weights, load_weights, random_weights
from altiplano_kernels.few_rows.kernel import MOST_ROWS
from altiplano_kernels.filtered_sampling.kernel import draw_filtered
from altiplano_kernels.multi_lora.kernel import PREFILL
from altiplano_kernels.prefill_attention.kernel import list_tiles
from altiplano_kernels.sampling.kernel import RING, DrawWorkspace, advance, draw

CACHE_DTYPES = {"auto": torch.bfloat16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn, "int8": torch.int8}
SNAPSHOTS = 4  # copies of the token ring that may be on their way to the host


@dataclass(frozen=True)
class Ticket:
    """Tokens on their way to the host, in `host`: int32 [slots, RING]; a slot's step s is in column s % RING."""

    host: torch.Tensor
    done: torch.cuda.Event

    def tokens(self, slots: Sequence[int], first_steps: Sequence[int], count: int) -> list[list[int]]:
        """Wait, then give `count` tokens of each slot from its step in `first_steps` on."""
        self.done.synchronize()
        columns = (torch.tensor(first_steps)[:, None] + torch.arange(count)[None, :]) % RING
        found: list[list[int]] = self.host[torch.tensor(slots)[:, None], columns].tolist()
        return found


class CudaRunner:
    """Weights, paged cache, slots and graphs of one GPU.

    Raises:
        EngineError: no CUDA device or one too old, an unknown cache type or quantization, or too little memory (the message says how much is missing).
    """

    def __init__(
        self, config: EngineConfig, kv_cache_dtype: str = "auto", device: str = "cuda", quantization: str = "none"
    ) -> None:
        if not torch.cuda.is_available():
            raise EngineError("the CUDA backend needs an NVIDIA GPU, and torch sees none: use device 'cpu', or check the driver")
        if torch.cuda.get_device_capability(device) < (9, 0):
            raise EngineError(
                f"the CUDA backend needs compute capability 9.0 (Hopper) or newer, and {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, torch.cuda.get_device_capability(device)))}: use device 'cpu' or a newer GPU"
            )
        if kv_cache_dtype not in CACHE_DTYPES:
            raise EngineError(f"kv_cache_dtype {kv_cache_dtype!r} is unknown: use one of {', '.join(CACHE_DTYPES)}")
        model = read_config(config.model)
        self._config, self._model_config, self._device = config, model, device
        kind = CACHE_DTYPES[kv_cache_dtype]
        bits = _bits(quantization, model, config.block_size)
        self._make_weights = lambda: _make_weights(config, model, device, quantization, bits, fused_qkv=kind is torch.bfloat16)
        weights = self._make_weights()
        shape = (model.num_hidden_layers, config.num_blocks + 1, 2, model.num_key_value_heads, config.block_size, model.head_dim)
        _check_memory(shape, kind, config)
        cache = torch.zeros(shape, dtype=kind, device=device)
        scales = torch.zeros(shape[:-1], dtype=torch.float16, device=device) if kind.itemsize == 1 else None
        width = -(-(config.max_model_len + RING) // config.block_size)
        self.slots = SlotTable(config.max_num_seqs, width, config.num_blocks, device)
        largest = bucket_of(config.max_num_seqs)
        if largest > config.max_num_seqs:
            self.slots.rows = torch.full((largest,), self.slots.scratch, dtype=torch.int32, device=device)
        self.model = CudaLlama(model, weights, cache, scales, self.slots, largest)
        few = quantization not in CODES and FewRows.supports(model, config.block_size, bits)
        self._few = FewRows(self.model) if few else None
        self._draws = DrawWorkspace(largest, model.vocab_size, device)
        self._graphs = DecodeGraphs(self._decode_step, lambda bucket: self._set_rows((), bucket))
        self._adapters: set[str] = set()
        self._pool: AdapterPool | None = None  # made for the first adapter
        self._owners: dict[int, str | None] = {}  # the adapter of each slot
        self._copies = torch.cuda.Stream(device)
        ring = self.slots.ring
        self._snapshots = [
            (torch.empty_like(ring), torch.empty(ring.shape, dtype=ring.dtype).pin_memory()) for _ in range(SNAPSHOTS)
        ]
        self._published = 0
        self._asleep: Asleep | None = None
        self.vocab_size, self.eos_token_ids = model.vocab_size, model.eos_token_ids
        self.max_position_embeddings = model.max_position_embeddings

    def load_adapter(self, name: str, directory: Path) -> None:
        if name not in self._adapters and len(self._adapters) >= self._config.max_loras:
            raise AdapterError(
                f"{len(self._adapters)} adapters are loaded, and max_loras is {self._config.max_loras}: unload one or raise it"
            )
        adapter = load_adapter(
            name, directory, self._config.model, self._model_config, self._config.max_lora_rank, torch.bfloat16, self._device
        )
        if self._pool is None:
            config, largest = self._config, len(self.slots.rows)
            self._pool = AdapterPool(self._model_config, config.max_loras, config.max_lora_rank, largest, self._device)
        self._pool.load(adapter)
        self._adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        assert self._pool is not None, "an adapter has been loaded"
        self._pool.unload(name)
        self._adapters.remove(name)

    def sleep(self, level: int) -> None:
        """Free cache, weights and adapters (level 1: their bytes wait in host memory; level 2: the adapters' only). Slots stay."""
        torch.cuda.synchronize()
        self._graphs.forget()
        caches = [self.model.cache] if self.model.scales is None else [self.model.cache, self.model.scales]
        adapters = None if self._pool is None else self._pool.products
        self._asleep = Asleep(self.model.weights, adapters, caches, level)
        torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """
        Raises:
            EngineError: the GPU has too little memory now, or the checkpoint cannot be read any more. It sleeps on.
        """
        if self._asleep is None:
            return
        try:
            self._asleep.wake_up(self._make_weights, lambda: torch.cuda.mem_get_info()[0])
        finally:
            torch.cuda.empty_cache()
        self._asleep = None

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[Drawn]:
        """The plan's draws, in its order; waits for them."""
        drawn = [Drawn()] * len(plan.chunks)
        decodes = [i for i, chunk in enumerate(plan.chunks) if self._is_decode(chunk)]
        if decodes:
            self.launch_state([plan.chunks[i] for i in decodes])
            self.launch_decode([plan.chunks[i].slot for i in decodes], 1)
        rest = [i for i, chunk in enumerate(plan.chunks) if not self._is_decode(chunk)]
        if rest:
            for i, result in zip(rest, self.launch_prefill([plan.chunks[i] for i in rest]), strict=True):
                drawn[i] = result
        waiting = [i for i, chunk in enumerate(plan.chunks) if chunk.sample and drawn[i].token is None]
        if waiting:
            at = torch.tensor([plan.chunks[i].slot for i in waiting], device=self._device)
            for i, token in zip(waiting, self.slots.tokens[at].tolist(), strict=True):
                drawn[i] = Drawn(token, prompt_logprobs=drawn[i].prompt_logprobs)
        return drawn

    @torch.inference_mode()
    def launch_state(self, chunks: Sequence[Chunk]) -> None:
        """Set slots to chunks of one token each: what a decode step needs that does not follow one on the GPU."""
        for chunk in chunks:
            self.slots.set_pages(chunk.slot, chunk.pages, fresh=True)
        self.slots.upload_tables()
        self._write(chunks, [chunk.tokens[0] for chunk in chunks], [chunk.start for chunk in chunks])

    @torch.inference_mode()
    def launch_decode(self, slots: Sequence[int], times: int) -> None:
        """`times` tokens for each slot, from its state on the GPU; returns before they are drawn."""
        bucket = bucket_of(len(slots))
        adapted = any(self._owners.get(slot) is not None for slot in slots)
        kind = Kind(self.slots.any_filtered(slots), adapted)
        self._graphs.ensure(bucket, kind)
        self.slots.upload_tables()
        self._set_rows(slots, bucket)
        self._graphs.replay(bucket, times, kind)

    @torch.inference_mode()
    def launch_prefill(self, chunks: Sequence[Chunk]) -> list[Drawn]:
        """Chunks of any length in one forward pass. Plain draws stay on the GPU (their `Drawn` is empty); others come back."""
        for chunk in chunks:
            self.slots.set_pages(chunk.slot, chunk.pages, fresh=True)
        self.slots.upload_tables()
        last = [chunk.tokens[-1] for chunk in chunks]
        # The draw advances the position past the chunk's last token.
        self._write(chunks, last, [chunk.start + len(chunk.tokens) - 1 for chunk in chunks])
        ends = list(accumulate(len(chunk.tokens) for chunk in chunks))
        hidden = self._prefill(chunks, ends)
        plain = [i for i, c in enumerate(chunks) if c.sample and drawing.is_plain(c.params, c.generated)]
        if plain:
            self._draw([chunks[i].slot for i in plain], hidden[self._upload([ends[i] - 1 for i in plain])])
        drawn = [Drawn()] * len(chunks)
        special = [i for i, c in enumerate(chunks) if c.sample and not drawing.is_plain(c.params, c.generated)]
        if special:
            logits = self._logits(hidden[self._upload([ends[i] - 1 for i in special])])
            for i, result in zip(special, drawing.draw([chunks[i] for i in special], logits, self.eos_token_ids), strict=True):
                drawn[i] = result
        for i, chunk in enumerate(chunks):
            if chunk.params.prompt_logprobs and chunk.generated == 0:
                drawn[i] = with_prompt(drawn[i], chunk, self._logits(hidden[ends[i] - len(chunk.tokens) : ends[i]]))
        return drawn

    @torch.inference_mode()
    def publish(self) -> Ticket:
        """Start the copy of all slots' recent tokens to the host, behind everything launched so far."""
        snapshot, host = self._snapshots[self._published % SNAPSHOTS]
        self._published += 1
        # The next steps overwrite the ring while the copy is under way, but not this snapshot.
        snapshot.copy_(self.slots.ring)
        ready = torch.cuda.Event()
        ready.record()
        self._copies.wait_event(ready)
        with torch.cuda.stream(self._copies):
            host.copy_(snapshot, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Ticket(host, done)

    def warm_up(self, batches: Sequence[int]) -> None:
        """Capture the graphs of these batch sizes now instead of at first use."""
        with torch.inference_mode():
            for batch in sorted({bucket_of(batch) for batch in batches}, reverse=True):
                self._graphs.ensure(batch)

    def _is_decode(self, chunk: Chunk) -> bool:
        return len(chunk.tokens) == 1 and chunk.sample and drawing.is_plain(chunk.params, chunk.generated)

    def _set_rows(self, slots: Sequence[int], bucket: int) -> None:
        """Batch row i belongs to slots[i] and uses its adapter; rows up to `bucket` are scratch."""
        self.slots.upload_rows(slots, bucket)
        if self._pool is not None:
            self._pool.set_rows([self._owners.get(slot) for slot in slots], bucket)

    def _decode_step(self, bucket: int, kind: Kind) -> None:
        rows = self.slots.rows[:bucket]
        update = self._pool.decode_update(bucket) if kind.adapted and self._pool is not None else None
        if self._few is not None and bucket <= MOST_ROWS and update is None:
            if kind.filtered:
                self._draw_rows(rows, self._few.logits(rows), pdl=True, filtered=True)
            else:
                self._few.step(rows)
            return
        hidden = self.model.decode_hidden(rows, update)
        self._draw_rows(rows, hidden @ self.model.weights.head.T, pdl=True, filtered=kind.filtered)

    def _draw(self, slots: Sequence[int], hidden: torch.Tensor) -> None:
        rows = self._upload(slots).int()
        limit, filtered = self._draws.values.numel() // self._draws.parts, self.slots.any_filtered(slots)
        for first in range(0, len(slots), limit):
            logits = hidden[first : first + limit] @ self.model.weights.head.T
            self._draw_rows(rows[first : first + limit], logits, pdl=False, filtered=filtered)

    def _draw_rows(self, rows: torch.Tensor, logits: torch.Tensor, pdl: bool, filtered: bool) -> None:
        slots, draws = self.slots, self._draws
        draw(logits, rows, slots.temperatures, slots.seeds, slots.steps, draws, pdl)
        if filtered:
            filters = (slots.top_ks, slots.top_ps, slots.min_ps)
            draw_filtered(logits, rows, slots.temperatures, *filters, slots.seeds, slots.steps, draws, pdl)
        advance(draws.values, draws.ids, draws.parts, rows, slots.tokens, slots.positions, slots.steps, slots.ring, pdl)

    def _prefill(self, chunks: Sequence[Chunk], ends: Sequence[int]) -> torch.Tensor:
        starts = [end - len(chunk.tokens) for chunk, end in zip(chunks, ends, strict=True)]
        tiles = list_tiles([(first, len(c.tokens), c.start, c.slot) for first, c in zip(starts, chunks, strict=True)])
        ids = [token for chunk in chunks for token in chunk.tokens]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        slots_of = [chunk.slot for chunk in chunks for _ in chunk.tokens]
        owners = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        adapted = self._pool.tiles(owners, PREFILL) if self._pool is not None else []
        numbers = torch.tensor(ids + positions + slots_of + tiles + adapted, dtype=torch.int32)
        flat, n = numbers.pin_memory().to(self._device, non_blocking=True), len(ids)
        update: Update | None = None
        if self._pool is not None and adapted:
            update = self._pool.update(flat[3 * n + len(tiles) :], PREFILL)
        attention = flat[3 * n : 3 * n + len(tiles)]
        return self.model.prefill_hidden(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], attention, update)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab]: the products' sums are not rounded on the way."""
        return torch.mm(hidden, self.model.weights.head.T, out_dtype=torch.float32)

    def _write(self, chunks: Sequence[Chunk], tokens: Sequence[int], positions: Sequence[int]) -> None:
        self.slots.write(
            [chunk.slot for chunk in chunks],
            tokens,
            positions,
            [chunk.generated for chunk in chunks],
            [chunk.params.temperature for chunk in chunks],
            [chunk.seed for chunk in chunks],
            [(chunk.params.top_k, chunk.params.top_p, chunk.params.min_p) for chunk in chunks],
        )
        self._owners.update({chunk.slot: chunk.adapter for chunk in chunks})

    def _upload(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)


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


def _make_weights(
    config: EngineConfig, model: LlamaConfig, device: str, quantization: str, bits: int, fused_qkv: bool
) -> Weights | PackedWeights | CodedWeights:
    if config.load_format == "dummy":
        weights = random_weights(model, torch.bfloat16, device, config.seed)
    else:
        weights = load_weights(config.model, model, torch.bfloat16, device)
    if quantization in CODES:
        return code_weights(weights, CODES[quantization])
    return weights if bits == 16 else pack_weights(weights, bits, model.head_dim, fused_qkv)


def _check_memory(shape: tuple[int, ...], kind: torch.dtype, config: EngineConfig) -> None:
    need = torch.Size(shape).numel() * kind.itemsize
    free, _ = torch.cuda.mem_get_info()
    if need > free:
        raise EngineError(
            f"the KV cache of num_blocks {config.num_blocks} needs {need / 2**30:.1f} GiB and the GPU has {free / 2**30:.1f} GiB free: "
            "lower num_blocks, use kv_cache_dtype fp8 or int8, or free the GPU"
        )
