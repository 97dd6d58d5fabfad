"""The engine: requests in, tokens out, one step at a time."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from altiplano.engine.canary import Canary
from altiplano.engine.checks import (
    check_awake,
    check_idle,
    check_length,
    check_loaded,
    check_prompt,
    check_unused,
    check_vocabulary,
)
from altiplano.engine.config import EngineConfig
from altiplano.engine.drafting import DraftProposer
from altiplano.engine.errors import AdapterError, EngineError
from altiplano.engine.guessing import LookupProposer, Payoff, Payoffs, Proposer, Wants
from altiplano.engine.outputs import Completion, EngineStats, TokenOutput
from altiplano.engine.pages import PagePool
from altiplano.engine.params import SamplingParams
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.radix import RadixIndex
from altiplano.engine.request import Request
from altiplano.engine.runner import Drawn, Preparer, Runner, Sleeper, Stamper
from altiplano.engine.scheduler import Scheduler
from altiplano.engine.step_time import Step, StepTimes
from altiplano.engine.steps import StepLog

Totals = tuple[int, int, int, int, float]


class Engine:
    """Synchronous and single-threaded: call `step` until `has_unfinished` is false. `clock`: seconds, from any zero.

    Raises:
        WeightsError: the model directory cannot be used.
    """

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner | None = None,
        clock: Callable[[], float] = time.perf_counter,
        proposer: Proposer | None = None,
    ) -> None:
        self.config = config
        self.runner = runner or _make_runner(config)
        self._clock = clock
        self._proposer = proposer or _make_proposer(config, self.runner.vocab_size)
        self._pool = PagePool(config.num_blocks)
        self._radix = RadixIndex(self._pool, config.block_size) if config.enable_prefix_caching else None
        self._scheduler = Scheduler(
            self._pool,
            self._radix,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            guess=self._guess if self._proposer else None,
            prompt_limit=self._prompt_limit if config.itl_target_ms is not None else None,
            clock=clock,
        )
        self._canary = Canary(self._pool, self.runner) if config.debug and isinstance(self.runner, Stamper) else None
        self._times, self._payoffs = StepTimes(), Payoffs()
        self._asked: tuple[Payoff, bool] | None = None  # who has decided on this step's guesses, and what
        self._requests: dict[str, Request] = {}
        self._adapters: dict[str, Path] = {}
        self._news: list[TokenOutput] = []
        self._arrivals = self._prompt_tokens = self._generated = self._cached = self._steps = 0
        self._guessed = self._accepted = self._guessed_steps = 0
        self._seconds = self._draft_seconds = 0.0
        self.step_log = StepLog()
        self.sleep_level = 0  # 0: awake

    @property
    def adapters(self) -> list[str]:
        return sorted(self._adapters)

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: str | None = None,
        priority: int = 0,
        namespace: str = "",
    ) -> None:
        """Queue a request. Requests with lower `priority` values go first; `namespace` keeps cached prefixes apart.

        Raises:
            ValueError: an empty prompt, a token outside the vocabulary, an id that is in use.
            PromptTooLongError, UnknownAdapterError, EngineAsleepError: see there.
        """
        self._check(request_id, prompt_token_ids, params, adapter)
        if not self._requests:
            self.step_log.idle()
        self._arrivals += 1
        seed = params.seed if params.seed is not None else _seed(self.config.seed, self._arrivals)
        request = Request(
            request_id,
            len(prompt_token_ids),
            list(prompt_token_ids),
            params,
            seed,
            self._arrivals,
            adapter,
            priority,
            namespace,
            arrived=self._clock(),
        )
        self._requests[request_id] = request
        self._scheduler.add(request)
        self._prompt_tokens += request.prompt_len

    def abort(self, request_id: str) -> None:
        """End a request; its pages are free at once, its last output comes with the next step. Unknown ids are ignored."""
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._scheduler.finish(request, "abort")
            self._news.append(TokenOutput(request_id, None, finish_reason="abort"))

    def has_unfinished(self) -> bool:
        return bool(self._requests or self._news)

    def allow(self, request_id: str, allowed: bytes) -> None:
        """Say which token a structured request may draw next: bit i % 8 of byte i // 8 for token i. Unknown ids are ignored."""
        request = self._requests.get(request_id)
        if request is not None:
            request.allowed = allowed

    def is_blocked(self) -> bool:
        """Whether a step would compute nothing before the next `allow`, `abort` or `add_request`."""
        return not self._news and all(request.blocked for request in self._requests.values())

    def step(self) -> list[TokenOutput]:
        """Compute one step and return its news."""
        news, self._news = self._news, []
        started, before, self._asked = self._clock(), self._totals(), None
        plan = self._scheduler.plan()
        if not plan.chunks:
            return news
        computing = self._clock()
        results = self.runner.execute(plan)
        computed = self._clock()
        self._seconds += computed - computing
        self._steps += 1
        for chunk, drawn in zip(plan.chunks, results, strict=True):
            request = self._requests[chunk.request_id]
            request.prompt_logprobs += drawn.prompt_logprobs
            request.prompt_top += drawn.prompt_top
            news += self._take(request, chunk, drawn)
        self._learn(plan, self._generated - before[0], self._clock() - started)
        decodes = sum(chunk.decodes for chunk in plan.chunks)
        guesses = self._guessed - before[2]
        self._record(computing, computed, decodes, plan.num_tokens - decodes - guesses, before)
        if self.config.debug:
            self._check_pages()
        return news

    def prepare(self) -> bool:
        """Do a piece of what steps to come would stop for (on a GPU: capture a graph), if nobody waits meanwhile and it is awake.

        Returns whether it did: False while there is nothing to do.
        """
        if self.sleep_level or self.has_unfinished() or not isinstance(self.runner, Preparer):
            return False
        return self.runner.prepare()

    def load_adapter(self, name: str, directory: Path) -> None:
        """Load (or replace) a LoRA adapter from a directory in PEFT's format.

        Raises:
            AdapterError: it does not fit this model or these settings.
            EngineAsleepError: there is no memory for it now.
        """
        self._check_awake()
        if any(request.adapter == name for request in self._requests.values()):
            raise AdapterError(f"adapter {name!r} is in use by running requests: load it under another name, or wait")
        self.runner.load_adapter(name, directory)
        self._adapters[name] = directory
        self._forget(name)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            UnknownAdapterError: there is none of that name.
            AdapterError: requests still use it.
        """
        check_loaded(name, self._adapters)
        check_unused(name, (request.adapter for request in self._requests.values()))
        self.runner.unload_adapter(name)
        del self._adapters[name]
        self._forget(name)

    @property
    def unfinished(self) -> list[str]:
        """Ids of the requests that have not ended."""
        return list(self._requests)

    def check_sleep(self, level: int) -> None:
        """
        Raises:
            EngineError: why it cannot sleep at this level, whoever is being answered.
        """
        if level not in (1, 2):
            raise EngineError(
                f"sleep level {level} is unknown: use 1 (weights wait in host memory) or 2 (weights are loaded again)"
            )
        if self.sleep_level not in (0, level):
            raise EngineError(f"the engine sleeps at level {self.sleep_level}: wake it up first")
        if not isinstance(self.runner, Sleeper):
            raise EngineError(f"the backend of device {self.config.device} cannot sleep")

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake_up`: the KV cache and the prefix cache with it, and the device's copies of weights and adapters.

        Level 1 keeps them in host memory; level 2 forgets the weights and reads the checkpoint again. Adapters survive both. Does
        nothing when it sleeps at this level already.

        Raises:
            EngineError: no such level, requests are under way, it sleeps at another level, or this backend cannot sleep.
        """
        self.check_sleep(level)
        if self.sleep_level == level:
            return
        check_idle(self.has_unfinished(), len(self._requests))
        if self._radix is not None:
            for namespace in self._radix.namespaces():
                self._radix.drop(namespace)
        if self._canary is not None:
            self._canary.forget()
        for sleeper in self._sleepers():
            sleeper.sleep(level)
        self.sleep_level = level

    def wake_up(self) -> None:
        """End `sleep`. Does nothing when awake.

        Raises:
            EngineError: there is too little memory now, or the checkpoint cannot be read any more; it sleeps on.
        """
        if not self.sleep_level:
            return
        for sleeper in self._sleepers():
            sleeper.wake_up()
        self.sleep_level = 0

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self._scheduler.running),
            num_waiting=len(self._scheduler.waiting),
            kv_cache_usage=1 - self._pool.num_free / self._pool.num_pages,
            num_cached_pages=len(self._radix) if self._radix else 0,
            kv_cache_held=len({page for request in self._scheduler.running for page in request.pages}) / self._pool.num_pages,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generated,
            cached_tokens=self._cached,
            preemptions=self._scheduler.num_preemptions,
            guessed_tokens=self._guessed,
            accepted_tokens=self._accepted,
            guessed_steps=self._guessed_steps,
            draft_seconds=self._draft_seconds,
            steps=self._steps,
            step_seconds=self._seconds,
        )

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams], adapter: str | None = None
    ) -> list[Completion]:
        """Run `prompts` to their ends, batched, and return the answers in order. The engine must be idle."""
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        names = [f"generate-{self._arrivals}-{i}" for i in range(len(prompts))]
        requests = []
        for name, prompt, one in zip(names, prompts, each, strict=True):
            self.add_request(name, prompt, one, adapter=adapter)
            requests.append(self._requests[name])
        logprobs: dict[str, list[float]] = {name: [] for name in names}
        while self.has_unfinished():
            for output in self.step():
                if output.logprob is not None:
                    logprobs[output.request_id].append(output.logprob)
        return [
            Completion(r.tokens[r.prompt_len :], r.finish_reason or "abort", logprobs[r.request_id], r.prompt_logprobs)
            for r in requests
        ]

    def score(self, sequences: Sequence[Sequence[int]], adapter: str | None = None) -> list[list[float]]:
        """Log-probabilities of every token after the first, for each of `sequences`."""
        params = SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=True)
        return [completion.prompt_logprobs for completion in self.generate(sequences, params, adapter)]

    def _sleepers(self) -> list[Sleeper]:
        parts: list[object] = [self.runner, self._proposer]
        return [part for part in parts if isinstance(part, Sleeper)]

    def _check_pages(self) -> None:
        """Raise AssertionError when the books of pages are wrong, or one was written that nobody holds. Nothing may be in flight."""
        self._scheduler.check()
        if self._canary is not None:
            self._canary.check()

    def _check_awake(self) -> None:
        check_awake(self.sleep_level > 0)

    def _check(self, request_id: str, prompt: Sequence[int], params: SamplingParams, adapter: str | None) -> None:
        self._check_awake()
        check_prompt(request_id, self._requests, prompt)
        check_vocabulary(prompt, (*(params.logit_bias or ()), *params.stop_token_ids), self.runner.vocab_size)
        check_length(len(prompt), params.max_tokens, self.config.max_model_len)
        check_loaded(adapter, self._adapters)

    def _prompt_limit(self, decodes: int) -> int:
        assert self.config.itl_target_ms is not None
        return self._times.prompt_limit(decodes, self.config.itl_target_ms / 1000)

    def _guess(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        """Guesses where they pay."""
        assert self._proposer is not None
        payoff = self._payoffs.of(len(wants))
        decision = payoff.decide()
        self._asked = payoff, decision
        if not decision:
            return [()] * len(wants)
        started = self._clock()
        found = self._proposer.propose(wants, budget)
        self._draft_seconds += self._clock() - started
        return found

    def _totals(self) -> Totals:
        """Tokens generated, found in the prefix cache, guessed and guessed right so far, and seconds of guessing; for `_record`."""
        return self._generated, self._cached, self._guessed, self._accepted, self._draft_seconds

    def _record(self, started: float, ended: float, decodes: int, prompt_tokens: int, before: Totals, steps: int = 1) -> None:
        """Book where a step's time went, once its tokens are booked. Costs about a microsecond.

        `started`, `ended`: seconds of the engine's clock at which the device was given the work and at which it was known to be
        done; work may be given before the last was done. `decodes`: requests that computed one token (each of `steps` times, in
        a burst); `prompt_tokens`: the other computed tokens, without guesses. `before`: `_totals()` of before its tokens were booked.
        """
        generated, cached, guessed, accepted, drafting = before
        pool = self._pool
        self.step_log.add(
            started,
            ended,
            decodes,
            prompt_tokens,
            self._generated - generated,
            1 - pool.num_free / pool.num_pages,
            self._cached - cached,
            self._guessed - guessed,
            self._accepted - accepted,
            self._draft_seconds - drafting,
            steps,
        )

    def _learn(self, plan: StepPlan, tokens: int, seconds: float) -> None:
        """Book what a step has taken, and what it has brought, where somebody wants to know."""
        if self._proposer is None and self.config.itl_target_ms is None:
            return
        decodes = [chunk for chunk in plan.chunks if chunk.decodes]
        guessed = any(chunk.num_guesses for chunk in decodes)
        self._guessed_steps += guessed
        if self._asked is not None and len(decodes) == len(plan.chunks):
            payoff, decision = self._asked
            payoff.observe(decision, tokens / len(decodes), seconds)
        if self.config.itl_target_ms is not None and (self._asked is None or not self._asked[1]):
            self._times.observe(Step(plan.num_tokens - len(decodes), len(decodes), seconds))

    def _take(self, request: Request, chunk: Chunk, drawn: Drawn) -> list[TokenOutput]:
        """Book what a chunk has brought."""
        draws = [*drawn.accepted, drawn]
        if chunk.num_guesses:
            assert self._proposer is not None
            self._proposer.observe(request, chunk.num_guesses, len(drawn.accepted))
            self._guessed += chunk.num_guesses
        self._scheduler.advance(request, chunk, draws[0].token)
        if draws[0].token is None:
            return []
        request.allowed = None
        news = [self._book(request, draws[0])]
        for draw in draws[1:]:
            if news[-1].finish_reason is not None:
                break
            assert draw.token is not None
            self._scheduler.accept(request, draw.token)
            self._accepted += 1
            news.append(self._book(request, draw))
        return news

    def _book(self, request: Request, drawn: Drawn) -> TokenOutput:
        """End the request if this token is its last."""
        params, token = request.params, drawn.token
        assert token is not None
        reason = None
        if params.max_tokens == 0:
            request.tokens.pop()  # scoring: the draw was not asked for
            reason, token = "length", None
        elif request.num_generated >= params.min_tokens and self._ends(params, token):
            reason = "stop"
        elif request.num_generated >= params.max_tokens:
            reason = "length"
        self._generated += token is not None
        if request.num_generated <= 1:
            self._cached += request.num_cached_tokens
        if reason is not None:
            self._scheduler.finish(request, reason)
            del self._requests[request.request_id]
        found, cached = (request.request_id, token, drawn.logprob, drawn.top, reason), request.num_cached_tokens
        if request.num_generated > 1 or request.admitted is None:
            return TokenOutput(*found, cached)
        return TokenOutput(
            *found, cached, tuple(request.prompt_logprobs), tuple(request.prompt_top), request.admitted - request.arrived
        )

    def _ends(self, params: SamplingParams, token: int) -> bool:
        return token in params.stop_token_ids or (not params.ignore_eos and token in self.runner.eos_token_ids)

    def _forget(self, adapter: str) -> None:
        """Pages computed with an adapter are wrong for its successor of the same name."""
        if self._radix is not None:
            for namespace in self._radix.namespaces():
                if namespace.split("\0")[0] == adapter:
                    self._radix.drop(namespace)


def _make_runner(config: EngineConfig) -> Runner:
    from altiplano.engine.cpu.runner import CpuRunner  # torch is needed from here on only

    return CpuRunner(config)


def _make_proposer(config: EngineConfig, vocab_size: int) -> Proposer | None:
    if not config.num_speculative_tokens or config.device != "cpu":
        return None  # on a GPU, guesses are made inside the steps
    if config.speculative_model is None:
        return LookupProposer(config.num_speculative_tokens)
    draft = replace(
        config,
        model=config.speculative_model,
        speculative_model=None,
        num_speculative_tokens=0,
        itl_target_ms=None,
        deterministic=False,
    )
    return DraftProposer(_make_runner(draft), vocab_size, config)


def _seed(base: int, arrival: int) -> int:
    """A seed for a request that brought none: differs by request, repeats with the engine's seed."""
    return int.from_bytes(hashlib.blake2b(f"{base}/{arrival}".encode(), digest_size=7).digest(), "big")
