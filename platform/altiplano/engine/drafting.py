"""Guesses from a smaller model of the same tokenizer: it runs ahead, the engine's model checks all its tokens in one pass.

The draft keeps keys and values of its own in a cache of the same shape, under the same page numbers, so its pages are
allocated, shared and given up with the engine's. It computes lazily: before it guesses, it catches up with what is known. What
its pages hold is remembered by content, so a request that starts from cached pages starts the draft from them too; a wrong
entry could only cost right guesses, never change an answer. It draws as the request would, with the same noise, which makes its
guess right as often as two distributions allow that do not talk to each other (Daliri, Musco and Suresh, arXiv 2408.07978).
It knows no adapters: those of the engine guess with the draft's plain weights.
"""

from dataclasses import replace

from altiplano.engine.config import EngineConfig
from altiplano.engine.errors import EngineError
from altiplano.engine.guessing import Wants
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.request import Request
from altiplano.engine.runner import Runner, Sleeper
from altiplano.engine.speculation import Caution


class DraftProposer:
    """Guesses of `runner`, a draft model whose cache has as many pages as the engine's, of the same size.

    Raises:
        EngineError: the draft has another vocabulary than the engine's model.
    """

    def __init__(self, runner: Runner, vocab_size: int, config: EngineConfig) -> None:
        check_vocabulary(config, runner.vocab_size, vocab_size)
        self._runner, self._most, self._size = runner, config.num_speculative_tokens, config.block_size
        self._content: dict[int, int] = {}  # of full pages: a hash of all tokens up to their ends

    def propose(self, wants: Wants, budget: int) -> list[tuple[int, ...]]:
        """Guesses, one more pass of the draft for each position; () for requests that still have to catch up, or are guessed badly."""
        found: dict[Request, tuple[int, ...]] = {request: () for request, _ in wants}
        chunks, limits = list[Chunk](), dict[Request, int]()
        requests = {request.request_id: request for request, _ in wants}
        for request, limit in wants:
            limit = min(limit, self._caution(request).allowance())
            if not limit or not budget:
                continue
            self._start(request)
            n = min(len(request.tokens) - request.num_drafted, budget)
            budget -= n
            chunks.append(self._chunk(request, n))
            limits[request] = limit
        while chunks:
            drawn = self._runner.execute(StepPlan(tuple(chunks)))
            ahead = list[Chunk]()
            for chunk, result in zip(chunks, drawn, strict=True):
                request = requests[chunk.request_id]
                self._note(request, chunk)
                if result.token is None:
                    continue
                found[request] += (result.token,)
                if len(found[request]) < limits[request]:
                    ahead.append(
                        replace(chunk.after(result.token), start=chunk.start + len(chunk.tokens), tokens=(result.token,))
                    )
            chunks = ahead
        return [found[request] for request, _ in wants]

    def observe(self, request: Request, proposed: int, accepted: int) -> None:
        self._caution(request).observe(proposed, accepted)
        # The last guess was not computed; those that were wrong are computed over.
        request.num_drafted = len(request.tokens) + min(accepted, proposed - 1)

    def sleep(self, level: int) -> None:
        assert isinstance(self._runner, Sleeper), "a draft runs on the backends that can sleep"
        self._runner.sleep(level)
        self._content.clear()

    def wake_up(self) -> None:
        assert isinstance(self._runner, Sleeper)
        self._runner.wake_up()

    def _caution(self, request: Request) -> Caution:
        if request.caution is None:
            request.caution = Caution(self._most)
        return request.caution

    def _start(self, request: Request) -> None:
        """Skip the pages that already hold what the request says."""
        last = (len(request.tokens) - 1) // self._size
        if request.num_drafted >= last * self._size:
            return
        known = 0
        for page in range(last):
            end = (page + 1) * self._size
            known = _hash(known, request.tokens[end - self._size : end])
            if end <= request.num_drafted:
                continue
            if self._content.get(request.pages[page]) != known:
                break
            request.num_drafted = end

    def _chunk(self, request: Request, n: int) -> Chunk:
        """`n` known tokens after those that the draft has computed."""
        start, params, slot = request.num_drafted, request.params, request.slot
        assert slot is not None
        return Chunk(
            request.request_id,
            slot,
            start,
            tuple(request.tokens[start : start + n]),
            tuple(request.pages),
            start + n == len(request.tokens),
            request.num_generated,
            request.seed,
            replace(params, logprobs=None, prompt_logprobs=False),
            None,
            request.history,
        )

    def _note(self, request: Request, chunk: Chunk) -> None:
        """Book what the draft has written; guesses are never booked as content, because they may be wrong."""
        end = chunk.start + len(chunk.tokens)
        for page in range(chunk.start // self._size, -(-end // self._size)):
            self._content.pop(request.pages[page], None)
        if end > len(request.tokens):
            return
        request.num_drafted = end
        if end // self._size == chunk.start // self._size:
            return
        known = 0
        for page in range(end // self._size):
            known = _hash(known, request.tokens[page * self._size : (page + 1) * self._size])
            if (page + 1) * self._size > chunk.start:
                self._content[request.pages[page]] = known


def check_vocabulary(config: EngineConfig, draft: int, target: int) -> None:
    """Raise EngineError unless the draft model has as many tokens as the engine's."""
    if draft != target:
        raise EngineError(
            f"speculative_model {config.speculative_model} has {draft} tokens and the model {target}: "
            "a draft must have the same tokenizer"
        )


def _hash(before: int, tokens: list[int]) -> int:
    return hash((before, tuple(tokens)))
