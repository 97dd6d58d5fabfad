"""The CPU runner: plan to flat batch, forward, draw."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from altiplano.engine import stamps
from altiplano.engine.adapters import Adapter, load_adapter
from altiplano.engine.checks import check_room
from altiplano.engine.config import EngineConfig, read_config
from altiplano.engine.cpu.model import Batch, Llama
from altiplano.engine.masks import forbid
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.prompt_scores import with_prompt
from altiplano.engine.runner import Drawn
from altiplano.engine.weights import Weights, load_weights, random_weights
from altiplano_kernels.sampling import reference as sampling

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CpuRunner:
    """Holds weights, cache and adapters; stateless between steps otherwise."""

    def __init__(self, config: EngineConfig) -> None:
        model = read_config(config.model)
        self._config, self._model_config, self._dtype = config, model, DTYPES[config.dtype]
        self._llama = Llama(model, self._load(), self._make_cache())
        self._asleep = False
        self._kept: Weights | None = None  # of a sleep that keeps them
        self._adapters: dict[str, Adapter] = {}
        self.vocab_size = model.vocab_size
        self.eos_token_ids = model.eos_token_ids
        self.max_position_embeddings = model.max_position_embeddings

    def load_adapter(self, name: str, directory: Path) -> None:
        check_room(name, self._adapters, self._config.max_loras)
        self._adapters[name] = load_adapter(
            name, directory, self._config.model, self._model_config, self._config.max_lora_rank, self._dtype, self._config.device
        )

    def unload_adapter(self, name: str) -> None:
        del self._adapters[name]

    def sleep(self, level: int) -> None:
        """Free the cache; weights stay, which are in host memory already (level 1), or go (2)."""
        self._asleep, self._kept = True, self._llama.weights if level == 1 else None
        del self._llama

    def wake_up(self) -> None:
        """
        Raises:
            WeightsError: the checkpoint cannot be read any more.
        """
        if not self._asleep:
            return
        weights = self._kept if self._kept is not None else self._load()
        self._llama = Llama(self._model_config, weights, self._make_cache())
        self._asleep, self._kept = False, None

    def stamp(self, pages: Sequence[int]) -> None:
        stamps.stamp([self._llama.cache], pages)

    def written(self, pages: Sequence[int]) -> list[int]:
        return stamps.written([self._llama.cache], pages)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> list[Drawn]:
        if self._config.deterministic:
            return [self._alone(chunk) for chunk in plan.chunks]
        return self._together(plan)

    def _load(self) -> Weights:
        config = self._config
        if config.load_format == "dummy":
            return random_weights(self._model_config, self._dtype, config.device, config.seed)
        return load_weights(config.model, self._model_config, self._dtype, config.device)

    def _make_cache(self) -> torch.Tensor:
        config, model = self._config, self._model_config
        shape = (model.num_hidden_layers, config.num_blocks, 2, model.num_key_value_heads, config.block_size, model.head_dim)
        return torch.zeros(shape, dtype=self._dtype, device=config.device)

    def _alone(self, chunk: Chunk) -> Drawn:
        """The chunk token by token, each in shapes that depend on its position only.

        Products, sums and vectorised functions round differently in different shapes and at different places of a batch; a
        single row is always computed alike. It costs what a batch saves: every token reads all weights.
        """
        results = [self._together(StepPlan((one,)))[0] for one in _singles(chunk, self._config.block_size)]
        drawn = _accepted(chunk, results[len(results) - 1 - chunk.num_guesses :]) if chunk.sample else Drawn()
        prompt = tuple(p for result in results for p in result.prompt_logprobs)
        return replace(drawn, prompt_logprobs=prompt, prompt_top=tuple(top for result in results for top in result.prompt_top))

    def _together(self, plan: StepPlan) -> list[Drawn]:
        # Decodes first: they share one attention call.
        order = sorted(range(len(plan.chunks)), key=lambda i: len(plan.chunks[i].tokens) > 1)
        chunks = [plan.chunks[i] for i in order]
        hidden = self._llama.forward(self._batch(chunks))
        ends = torch.tensor([len(chunk.tokens) for chunk in chunks]).cumsum(0)
        drawn: list[Drawn] = [Drawn()] * len(chunks)
        # One row for each token to draw: the last of a chunk, and those before its guesses.
        draws = [(i, guess) for i, chunk in enumerate(chunks) if chunk.sample for guess in range(chunk.num_guesses + 1)]
        if draws:
            at = torch.tensor([int(ends[i]) - 1 - chunks[i].num_guesses + guess for i, guess in draws])
            results = self._draw([_after(chunks[i], guess) for i, guess in draws], self._llama.logits(hidden[at]))
            for i, chunk in enumerate(chunks):
                if chunk.sample:
                    drawn[i] = _accepted(chunk, [r for (of, _), r in zip(draws, results, strict=True) if of == i])
        for i, chunk in enumerate(chunks):
            if chunk.params.prompt_logprobs and chunk.generated == 0:
                rows = hidden[int(ends[i]) - len(chunk.tokens) : int(ends[i])]
                drawn[i] = with_prompt(drawn[i], chunk, self._llama.logits(rows))
        return [drawn[order.index(i)] for i in range(len(chunks))]

    def _batch(self, chunks: list[Chunk]) -> Batch:
        size = self._config.block_size
        ids = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        positions = torch.tensor([chunk.start + i for chunk in chunks for i in range(len(chunk.tokens))])
        slots = torch.tensor(
            [
                chunk.pages[p // size] * size + p % size
                for chunk in chunks
                for p in range(chunk.start, chunk.start + len(chunk.tokens))
            ]
        )
        decodes = [chunk for chunk in chunks if len(chunk.tokens) == 1]
        width = max((len(chunk.pages) for chunk in decodes), default=0)
        tables = torch.tensor([chunk.pages + (0,) * (width - len(chunk.pages)) for chunk in decodes], dtype=torch.int64)
        prefills, row = [], len(decodes)
        for chunk in chunks[len(decodes) :]:
            prefills.append((row, len(chunk.tokens), torch.tensor(chunk.pages), chunk.start))
            row += len(chunk.tokens)
        return Batch(
            ids,
            positions,
            slots,
            len(decodes),
            tables,
            torch.tensor([chunk.start + 1 for chunk in decodes]),
            tuple(prefills),
            self._groups(chunks),
        )

    def _groups(self, chunks: list[Chunk]) -> tuple[tuple[Adapter, torch.Tensor | None], ...]:
        names = [chunk.adapter for chunk in chunks for _ in chunk.tokens]
        used = sorted({name for name in names if name is not None})
        if len(used) == 1 and None not in names:
            return ((self._adapters[used[0]], None),)
        return tuple((self._adapters[name], torch.tensor([i for i, n in enumerate(names) if n == name])) for name in used)

    def _draw(self, chunks: list[Chunk], logits: torch.Tensor) -> list[Drawn]:
        """One token per row of logits, float32 [rows, vocab]."""
        processed = self._process(chunks, logits)
        tokens = sampling.greedy(processed)
        random = [i for i, chunk in enumerate(chunks) if not chunk.params.greedy]
        if random:
            params = [chunks[i].params for i in random]
            tokens[random] = sampling.sample(
                processed[random],
                torch.tensor([p.temperature for p in params]),
                torch.tensor([p.top_k for p in params]),
                torch.tensor([p.top_p for p in params]),
                torch.tensor([p.min_p for p in params]),
                torch.tensor([chunks[i].seed for i in random]),
                torch.tensor([chunks[i].generated for i in random]),
            )
        chosen = tokens.tolist()
        if all(chunk.params.logprobs is None for chunk in chunks):
            return [Drawn(token) for token in chosen]
        logprobs = logits.log_softmax(-1)
        return [_report(chunk, token, logprobs[row]) for row, (chunk, token) in enumerate(zip(chunks, chosen, strict=True))]

    def _process(self, chunks: list[Chunk], logits: torch.Tensor) -> torch.Tensor:
        """Penalties, bias, the ban of end tokens before min_tokens, and of all tokens outside a set; the logits themselves when nobody asks."""
        if not any(c.params.penalized or c.params.logit_bias or c.allowed or c.generated < c.params.min_tokens for c in chunks):
            return logits
        logits = logits.clone()
        rows = [i for i, chunk in enumerate(chunks) if chunk.history is not None]
        if rows:
            params = [chunks[i].params for i in rows]
            counts = torch.stack([_counts(chunks[i].history[1], self.vocab_size) for i in rows])  # type: ignore[index]
            prompt = torch.stack([_counts(chunks[i].history[0], self.vocab_size) > 0 for i in rows])  # type: ignore[index]
            penalties = (
                torch.tensor([getattr(p, f"{kind}_penalty") for p in params]) for kind in ("presence", "frequency", "repetition")
            )
            logits[rows] = sampling.penalize(logits[rows], counts, prompt, *penalties)
        for row, chunk in enumerate(chunks):
            for token, bias in (chunk.params.logit_bias or {}).items():
                logits[row, token] += bias
            if chunk.generated < chunk.params.min_tokens:
                logits[row, [*self.eos_token_ids, *chunk.params.stop_token_ids]] = float("-inf")
        forbid(logits, [chunk.allowed for chunk in chunks])
        return logits


def _after(chunk: Chunk, guesses: int) -> Chunk:
    """The chunk as it would be if the first `guesses` guesses had been drawn."""
    first = len(chunk.tokens) - chunk.num_guesses
    return chunk.after(*chunk.tokens[first : first + guesses])


def _singles(chunk: Chunk, size: int) -> list[Chunk]:
    """Chunks of one token each, with no more pages than they see."""
    made = []
    for i, token in enumerate(chunk.tokens):
        guess = i - (len(chunk.tokens) - 1 - chunk.num_guesses)  # so many guesses are taken as drawn
        at = chunk.start + i
        made.append(
            replace(
                _after(chunk, max(0, guess)),
                start=at,
                tokens=(token,),
                pages=chunk.pages[: at // size + 1],
                sample=chunk.sample and guess >= 0,
                num_guesses=0,
                next_tokens=chunk.next_tokens[i : i + 1],
            )
        )
    return made


def _accepted(chunk: Chunk, draws: list[Drawn]) -> Drawn:
    """The first draw that no guess has foreseen, with those before it: a guess is right if it is what was drawn."""
    right = 0
    guesses = chunk.tokens[len(chunk.tokens) - chunk.num_guesses :]
    while right < len(guesses) and draws[right].token == guesses[right]:
        right += 1
    return replace(draws[right], accepted=tuple(draws[:right])) if right else draws[0]


def _counts(tokens: tuple[int, ...], vocab: int) -> torch.Tensor:
    return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=vocab).float()


def _report(chunk: Chunk, token: int, logprobs: torch.Tensor) -> Drawn:
    if chunk.params.logprobs is None:
        return Drawn(token)
    values, ids = logprobs.topk(chunk.params.logprobs)
    return Drawn(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
