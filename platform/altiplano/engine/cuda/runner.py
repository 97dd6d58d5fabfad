"""The CUDA runner: plans to launches. `execute` answers at once; `launch_*` and `publish` leave the host free to run ahead."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from altiplano.engine import stamps
from altiplano.engine.adapters import load_adapter
from altiplano.engine.checks import check_room
from altiplano.engine.config import EngineConfig, read_config
from altiplano.engine.cuda import drawing
from altiplano.engine.cuda.adapter_pool import AdapterPool, Update
from altiplano.engine.cuda.graphs import DecodeGraphs, Kind, bucket_of, buckets_for
from altiplano.engine.cuda.guesses import GUESTS, MOST_REQUESTS, Guesses
from altiplano.engine.cuda.idle import IdleCaptures
from altiplano.engine.cuda.loading import load_model, step_bytes
from altiplano.engine.cuda.sleep import Asleep
from altiplano.engine.cuda.slots import SlotTable
from altiplano.engine.drafting import check_vocabulary
from altiplano.engine.errors import EngineError
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.prompt_scores import with_prompt
from altiplano.engine.runner import Drawn
from altiplano_kernels.few_rows.kernel import MOST_ROWS
from altiplano_kernels.multi_lora.kernel import DECODE, PREFILL
from altiplano_kernels.prefill_attention.kernel import list_tiles
from altiplano_kernels.sampling.kernel import RING

SNAPSHOTS = 4  # copies of the token ring that may be on their way to the host


@dataclass(frozen=True)
class Ticket:
    """What the GPU knows of all slots, on its way to the host; `ready` and `done`: events before and after the copy.

    host: int32 [slots, RING + 2]. A slot's token number s is in column s % RING; then come the tokens drawn and the guesses made.
    """

    host: torch.Tensor
    ready: torch.cuda.Event
    done: torch.cuda.Event

    def tokens(self, slots: Sequence[int], first: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
        """Wait, then give as many tokens of each slot as `counts` says, from its token number in `first` on."""
        self.done.synchronize()
        if not slots:
            return []
        most = max(counts)
        columns = (torch.tensor(first)[:, None] + torch.arange(most)[None, :]) % RING
        found: list[list[int]] = self.host[torch.tensor(slots)[:, None], columns].tolist()
        return [tokens[:count] for tokens, count in zip(found, counts, strict=True)]

    def drawn(self, slot: int) -> tuple[int, int]:
        """Wait, then give the tokens that the slot's request has drawn since it began, and the guesses made in this slot."""
        self.done.synchronize()
        return int(self.host[slot, RING]), int(self.host[slot, RING + 1])


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
        if torch.device(device).index is not None:
            torch.cuda.set_device(device)  # free memory is that of the current device
        model = read_config(config.model)
        self._config, self._model_config, self._device = config, model, device
        width = -(-(config.max_model_len + RING) // config.block_size)
        guests = GUESTS if config.num_speculative_tokens else 0
        self.slots = SlotTable(config.max_num_seqs, width, config.num_blocks, device, guests)
        largest = bucket_of(max(config.max_num_seqs, guests and MOST_ROWS))
        if largest > len(self.slots.rows):
            self.slots.rows = torch.full((largest,), self.slots.scratch, dtype=torch.int32, device=device)
        self._models = [load_model(config, config.model, model, self.slots, kv_cache_dtype, quantization, largest)]
        if config.speculative_model is not None:
            draft = read_config(config.speculative_model)
            check_vocabulary(config, draft.vocab_size, model.vocab_size)
            quantization, rows = config.speculative_quantization, 2 * MOST_REQUESTS
            self._models.append(
                load_model(config, config.speculative_model, draft, self.slots, kv_cache_dtype, quantization, rows, drafts=True)
            )
        self.stepper, *drafts = (loaded.stepper for loaded in self._models)
        self.model = self.stepper.model
        self._guesses: Guesses | None = None
        if guests:
            most, longest = config.num_speculative_tokens, config.max_model_len + RING
            self._guesses = Guesses(self.slots, most, longest, drafts[0] if drafts else None)
        self.model.compile_ahead(config.max_num_seqs)
        self._graphs = DecodeGraphs(self._decode_step, self._point_at_scratch)
        largest_step = max(step_bytes(config, loaded.stepper.model.config) for loaded in self._models)
        self._idle = IdleCaptures(self._graphs, self.stepper, largest_step)
        self._adapters: set[str] = set()
        self._pool: AdapterPool | None = None  # made for the first adapter
        self._owners: dict[int, str | None] = {}  # the adapter of each slot
        self._copies = torch.cuda.Stream(device)
        board = (len(self.slots.tokens), RING + 2)
        self._snapshots = [
            (torch.zeros(board, dtype=torch.int32, device=device), torch.empty(board, dtype=torch.int32).pin_memory())
            for _ in range(SNAPSHOTS)
        ]
        self._published = 0
        self._asleep: Asleep | None = None
        self.vocab_size, self.eos_token_ids = model.vocab_size, model.eos_token_ids
        self.max_position_embeddings = model.max_position_embeddings

    def load_adapter(self, name: str, directory: Path) -> None:
        check_room(name, self._adapters, self._config.max_loras)
        adapter = load_adapter(
            name, directory, self._config.model, self._model_config, self._config.max_lora_rank, torch.bfloat16, self._device
        )
        if self._pool is None:
            config, largest = self._config, len(self.slots.rows)
            shape = PREFILL if config.deterministic else DECODE
            self._pool = AdapterPool(self._model_config, config.max_loras, config.max_lora_rank, largest, self._device, shape)
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
        caches = [cache for loaded in self._models for cache in loaded.caches]
        adapters = None if self._pool is None else self._pool.products
        self._asleep = Asleep([loaded.stepper.model.weights for loaded in self._models], adapters, caches, level)
        torch.cuda.empty_cache()

    def wake_up(self) -> None:
        """
        Raises:
            EngineError: the GPU has too little memory now, or the checkpoint cannot be read any more. It sleeps on.
        """
        if self._asleep is None:
            return
        try:
            self._asleep.wake_up(lambda: [loaded.make_weights() for loaded in self._models], lambda: torch.cuda.mem_get_info()[0])
        finally:
            torch.cuda.empty_cache()
        self._asleep = None

    def stamp(self, pages: Sequence[int]) -> None:
        """A draft model's pages are left alone: what it has computed may be taken up again."""
        stamps.stamp(self._models[0].caches, pages)

    def written(self, pages: Sequence[int]) -> list[int]:
        return stamps.written(self._models[0].caches, pages)

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
        bucket, kind = bucket_of(len(slots)), self._kind(slots)
        self._graphs.ensure(bucket, kind)
        self.slots.upload_tables()
        self._set_rows(self.slots.longest_first(slots), bucket)
        self._graphs.replay(bucket, times, kind)

    def guesses_per_request(self, requests: int) -> int:
        """Guesses that each of so many requests may have in a step; 0: none."""
        return 0 if self._guesses is None else self._guesses.per_request(requests)

    @property
    def drafts(self) -> bool:
        """Whether a draft model guesses, which must `catch_up` with what it has not computed."""
        return self._guesses is not None and self._guesses.drafts

    @torch.inference_mode()
    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        """Tell those who guess what a request has said; once, because the GPU remembers what it draws."""
        assert self._guesses is not None
        self._guesses.remember(slot, tokens)

    @torch.inference_mode()
    def catch_up(self, slot: int, tokens: Sequence[int], first: int) -> None:
        """Let the draft model compute known `tokens` of a request, from position `first` on. Its pages must hold them."""
        assert self._guesses is not None
        self.slots.upload_tables()
        for start in range(0, len(tokens), self._config.max_num_batched_tokens):
            self._guesses.catch_up(slot, tokens[start : start + self._config.max_num_batched_tokens], first + start)

    @torch.inference_mode()
    def launch_guesses(self, slots: Sequence[int], times: int, guesses: int) -> None:
        """`times` steps with `guesses` for each slot, no more than `guesses_per_request`; each step draws a token, and one for every right
        guess. Returns before they are drawn."""
        assert self._guesses is not None
        bucket, kind = self._guesses.bucket_of(len(slots)), self._kind(slots)._replace(guesses=guesses)
        self._graphs.ensure(bucket, kind)
        self.slots.upload_tables()
        self._guesses.set_parents(slots, bucket)
        if self._pool is not None:
            owners = [self._owners.get(slot) for slot in slots for _ in range(guesses + 1)]
            self._pool.set_rows(owners, bucket * (guesses + 1))
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
            self._draw([chunks[i].slot for i in plain], hidden[self.slots.send([ends[i] - 1 for i in plain], torch.int64)])
        drawn = [Drawn()] * len(chunks)
        special = [i for i, c in enumerate(chunks) if c.sample and not drawing.is_plain(c.params, c.generated)]
        if special:
            logits = self._logits(hidden[self.slots.send([ends[i] - 1 for i in special], torch.int64)])
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
        snapshot[:, :RING].copy_(self.slots.ring)
        if self._guesses is not None:
            snapshot[:, RING].copy_(self.slots.steps)
            snapshot[:, RING + 1].copy_(self._guesses.guessed)
        ready = torch.cuda.Event(enable_timing=True)
        ready.record()
        self._copies.wait_event(ready)
        with torch.cuda.stream(self._copies):
            host.copy_(snapshot, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        return Ticket(host, ready, done)

    def warm_up(self, batches: Sequence[int] = ()) -> None:
        """Capture the graphs of these batch sizes, and of all steps with guesses that may come, now instead of at first use."""
        with torch.inference_mode():
            for batch in sorted({bucket_of(batch) for batch in batches}, reverse=True):
                self._graphs.ensure(batch)
            if self._guesses is not None:
                adapted = (False,) if self._pool is None else (False, True)
                for bucket, kind in self._guesses.kinds(self._config.max_num_seqs, adapted):
                    self._graphs.ensure(bucket, kind)

    def prepare(self) -> bool:
        """Capture a graph of those that steps may come to need: small batches come first, and plain steps before others."""
        return self._idle.capture_next(self._wanted())

    def _wanted(self) -> list[tuple[int, Kind]]:
        """Buckets and kinds of all steps that may come."""
        most, adapted = self._config.max_num_seqs, (False, True) if self._adapters else (False,)
        kinds = [Kind(filtered, one) for one in adapted for filtered in (False, True)]
        guesses = [] if self._guesses is None else self._guesses.kinds(most, adapted)
        return [*((bucket, kind) for kind in kinds for bucket in buckets_for(most)), *guesses]

    def _is_decode(self, chunk: Chunk) -> bool:
        return len(chunk.tokens) == 1 and chunk.sample and drawing.is_plain(chunk.params, chunk.generated)

    def _kind(self, slots: Sequence[int]) -> Kind:
        return Kind(self.slots.any_filtered(slots), any(self._owners.get(slot) is not None for slot in slots))

    def _set_rows(self, slots: Sequence[int], bucket: int) -> None:
        """Batch row i belongs to slots[i] and uses its adapter; rows up to `bucket` are scratch."""
        self.slots.upload_rows(slots, bucket)
        if self._pool is not None:
            self._pool.set_rows([self._owners.get(slot) for slot in slots], bucket)

    def _point_at_scratch(self, bucket: int, kind: Kind) -> None:
        if kind.guesses:
            assert self._guesses is not None
            self._guesses.set_parents((), bucket)
            if self._pool is not None:
                self._pool.set_rows((), bucket * (kind.guesses + 1))
        else:
            self._set_rows((), bucket)

    def _decode_step(self, bucket: int, kind: Kind) -> None:
        def step(rows: torch.Tensor) -> None:
            update = self._pool.decode_update(len(rows)) if kind.adapted and self._pool is not None else None
            self.stepper.step(rows, kind.filtered, update, kind.guesses + 1)

        if kind.guesses:
            assert self._guesses is not None
            self._guesses.step(bucket, kind.guesses, step, kind.filtered)
            return
        rows = self.slots.rows[:bucket]
        step(rows)
        if self._guesses is not None:
            self._guesses.note(rows, pdl=True)

    def _draw(self, slots: Sequence[int], hidden: torch.Tensor) -> None:
        rows = self.slots.send(slots, torch.int32)
        limit, filtered = self.stepper.most_rows, self.slots.any_filtered(slots)
        for first in range(0, len(slots), limit):
            some = rows[first : first + limit]
            self.stepper.draw_rows(some, self.stepper.logits(hidden[first : first + limit]), pdl=False, filtered=filtered)
            if self._guesses is not None:
                self._guesses.note(some, pdl=False)

    def _prefill(self, chunks: Sequence[Chunk], ends: Sequence[int]) -> torch.Tensor:
        starts = [end - len(chunk.tokens) for chunk, end in zip(chunks, ends, strict=True)]
        tiles = list_tiles([(first, len(c.tokens), c.start, c.slot) for first, c in zip(starts, chunks, strict=True)])
        ids = [token for chunk in chunks for token in chunk.tokens]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))]
        slots_of = [chunk.slot for chunk in chunks for _ in chunk.tokens]
        owners = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        adapted = self._pool.tiles(owners, PREFILL) if self._pool is not None else []
        flat, n = self.slots.send(ids + positions + slots_of + tiles + adapted, torch.int32), len(ids)
        update: Update | None = None
        if self._pool is not None and adapted:
            update = self._pool.update(flat[3 * n + len(tiles) :], PREFILL)
        attention = flat[3 * n : 3 * n + len(tiles)]
        return self.model.prefill_hidden(flat[:n], flat[n : 2 * n], flat[2 * n : 3 * n], attention, update)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab]: the products' sums are not rounded on the way."""
        return self.model.head(hidden, torch.float32)

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
