"""What the engine that runs ahead believes, on a GPU of Python: dozens of mixtures of requests, guesses, ends and too few pages.

Tokens depend on everything before them, and are read through the pages: an answer is right only if every token was computed where
the engine says, and nobody has written over it. A draft model's cache is held against the model's own.
"""

import os
import random
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano.engine import AdapterError, EngineConfig, EngineError, SamplingParams
from altiplano.engine.cuda.guesses import Guesses
from altiplano.engine.cuda.overlap import OverlappedEngine
from altiplano.engine.cuda.runner import Ticket
from altiplano.engine.plan import Chunk, StepPlan
from altiplano.engine.runner import Drawn
from altiplano_kernels.guessing import reference
from altiplano_kernels.sampling.kernel import RING

from .events import recorded

VOCAB, EOS = 64, 63
FREE = 254  # what free pages hold in debug mode; no token either


def follow(text: Sequence[int], seed: int) -> int:
    """What the model says after `text`: mostly predictable, always dependent on all of it."""
    noise = zlib.crc32(bytes(text))
    return (noise >> 8) % VOCAB if noise % 7 == 0 else (text[-1] * 5 + seed % 11 + 1) % VOCAB


class Slot:
    """What the GPU knows of a request."""

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.text: list[int] = []  # for guesses
        self.token = self.position = self.step = self.seed = self.made = 0


class PretendedRunner:
    """A `CudaRunner` whose work is done at once. `draft`: a model guesses, else prompt lookup."""

    vocab_size, eos_token_ids, max_position_embeddings = VOCAB, (EOS,), 512

    def __init__(self, config: EngineConfig, draft: bool) -> None:
        self.drafts, self._size, self._most = draft, config.block_size, config.num_speculative_tokens
        self._slots = [Slot() for _ in range(config.max_num_seqs)]
        self._ring = torch.zeros(config.max_num_seqs, RING, dtype=torch.int32)
        self._cache: dict[tuple[int, int], int] = {}
        self._draft_cache: dict[tuple[int, int], int] = {}
        self.guessed, self.pieces = (
            0,
            list[int](),
        )  # launches with guesses; known tokens that the draft computed between two of all
        self.slots = self  # where `set_pages` is looked for
        self.pieces.append(0)

    def set_pages(self, slot: int, pages: Sequence[int], fresh: bool) -> None:
        self._slots[slot].pages = list(pages)

    def warm_up(self) -> None:
        pass

    def stamp(self, pages: Sequence[int]) -> None:
        self._cache.update(((page, offset), FREE) for page in pages for offset in range(self._size))

    def written(self, pages: Sequence[int]) -> list[int]:
        return [page for page in pages if {self._cache[page, offset] for offset in range(self._size)} != {FREE}]

    def guesses_per_request(self, requests: int) -> int:
        places = (16 // Guesses.bucket_of(requests) - 1) if 0 < requests <= 8 else 0
        return min(self._most, places)

    def execute(self, plan: StepPlan) -> list[Drawn]:
        drawn = []
        for chunk in plan.chunks:
            self._compute(chunk)
            slot = self._slots[chunk.slot]
            token = self._next(slot, slot.position) if chunk.sample else None
            drawn.append(Drawn(token, -1.0 if chunk.params.logprobs is not None else None))
        return drawn

    def launch_prefill(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._compute(chunk)
            if chunk.sample:
                self._advance(chunk.slot, self._next(self._slots[chunk.slot], self._slots[chunk.slot].position))

    def launch_state(self, chunks: Sequence[Chunk]) -> None:
        for chunk in chunks:
            self._set(chunk)

    def launch_decode(self, slots: Sequence[int], times: int) -> None:
        for number in list(slots) * times:
            slot = self._slots[number]
            self._write(self._cache, slot, slot.position, slot.token)
            self._advance(number, self._next(slot, slot.position))

    def remember(self, slot: int, tokens: Sequence[int]) -> None:
        text = self._slots[slot].text
        text[: len(tokens)] = tokens

    def catch_up(self, slot: int, tokens: Sequence[int], first: int) -> None:
        self.pieces[-1] += len(tokens)
        for position, token in enumerate(tokens, first):
            self._write(self._draft_cache, self._slots[slot], position, token)

    def launch_guesses(self, slots: Sequence[int], times: int, guesses: int) -> None:
        self.guessed += 1
        for number in list(slots) * times:
            slot = self._slots[number]
            last, known = slot.position, slot.text[: slot.position + 1]
            assert known[-1] == slot.token and self._is_held(self._cache, slot, known[:-1]), "who guesses knows the text"
            guessed = self._draft(slot, known, guesses) if self.drafts else reference.look_up(known, guesses)
            slot.made += sum(guess >= 0 for guess in guessed)
            drawn = []
            for ahead, token in enumerate([slot.token, *guessed]):
                self._write(self._cache, slot, last + ahead, max(token, 0))
            for ahead in range(guesses + 1):
                drawn.append(self._next(slot, last + ahead))
            for token in drawn[: reference.count_right(guessed, drawn) + 1]:
                self._advance(number, token)

    def publish(self) -> Ticket:
        self.pieces.append(0)
        counts = [[slot.step, slot.made] for slot in self._slots]
        host = torch.cat((self._ring, torch.tensor(counts, dtype=torch.int32)), 1)
        return Ticket(host, recorded(), recorded())  # type: ignore[arg-type]

    def _draft(self, slot: Slot, known: list[int], guesses: int) -> list[int]:
        """A model that is right but for every fifth token; it computes the last two tokens and its guesses but the last."""
        last, text = slot.position, list(known)
        for position in range(max(last - 1, 0), last + 1):
            self._write(self._draft_cache, slot, position, known[position])
        assert self._is_held(self._draft_cache, slot, known), "the draft model has computed every token"
        for ahead in range(1, guesses + 1):
            text.append((follow(text, slot.seed) + (zlib.crc32(bytes(text)) % 5 == 0)) % VOCAB)
            if ahead < guesses:
                self._write(self._draft_cache, slot, last + ahead, text[-1])
        return text[last + 1 :]

    def _compute(self, chunk: Chunk) -> None:
        self.set_pages(chunk.slot, chunk.pages, fresh=True)
        for position, token in enumerate(chunk.tokens, chunk.start):
            self._write(self._cache, self._slots[chunk.slot], position, token)
        self._set(chunk)

    def _set(self, chunk: Chunk) -> None:
        self.set_pages(chunk.slot, chunk.pages, fresh=True)
        slot = self._slots[chunk.slot]
        slot.token, slot.position = chunk.tokens[-1], chunk.start + len(chunk.tokens) - 1
        slot.step, slot.seed = chunk.generated, chunk.seed

    def _advance(self, number: int, token: int) -> None:
        slot = self._slots[number]
        self._ring[number, slot.step % RING] = token
        slot.token, slot.position, slot.step = token, slot.position + 1, slot.step + 1
        slot.text += [0] * (slot.position + 1 - len(slot.text))
        slot.text[slot.position] = token

    def _next(self, slot: Slot, position: int) -> int:
        """Behind the pages that a request holds lies scratch: what is drawn there is drawn for nobody."""
        text = [self._read(self._cache, slot, at) for at in range(position + 1)]
        return follow([0 if token is None else token for token in text], slot.seed)

    def _is_held(self, cache: dict[tuple[int, int], int], slot: Slot, text: Sequence[int]) -> bool:
        return all(self._read(cache, slot, at) in (token, None) for at, token in enumerate(text))

    def _write(self, cache: dict[tuple[int, int], int], slot: Slot, position: int, token: int) -> None:
        page = position // self._size
        if page < len(slot.pages):
            cache[slot.pages[page], position % self._size] = token

    def _read(self, cache: dict[tuple[int, int], int], slot: Slot, position: int) -> int | None:
        """None in scratch; 255, which is no token, where nothing was ever written."""
        page = position // self._size
        return cache.get((slot.pages[page], position % self._size), 255) if page < len(slot.pages) else None


def make(drafts: bool, decide: Callable[[], bool], **settings: object) -> OverlappedEngine:
    class Payoff:
        def decide(self) -> bool:
            return decide()

        def observe(self, guessed: bool, tokens: float, seconds: float) -> None:
            pass

    config = EngineConfig(Path("x"), device="cuda", debug=True, **settings)  # type: ignore[arg-type]
    engine, payoff = OverlappedEngine(config, PretendedRunner(config, drafts)), Payoff()  # type: ignore[arg-type]
    engine._payoffs.of = lambda requests: payoff  # type: ignore[method-assign, assignment, return-value]
    return engine


def says(prompt: Sequence[int], params: SamplingParams) -> tuple[list[int], str]:
    text = list(prompt)
    while True:
        text.append(follow(text, params.seed or 0))
        said = text[len(prompt) :]
        if text[-1] in params.stop_token_ids or (text[-1] == EOS and not params.ignore_eos):
            return said, "stop"
        if len(said) >= params.max_tokens:
            return said, "length"


def nothing_is_kept(engine: OverlappedEngine) -> bool:
    return not any(vars(engine._ahead).values())


@pytest.mark.parametrize("seed", range(60))
def test_whatever_is_mixed_every_answer_is_what_the_request_says_alone(seed: int) -> None:
    dice = random.Random(seed)
    guesses, page, longest = dice.choice([0, 1, 3, 4, 7, 15]), dice.choice([8, 16]), dice.choice([64, 128])
    pages = longest // page
    chance = dice.choice([0.5, 0.8, 1.0])
    engine = make(
        dice.random() < 0.6, lambda: dice.random() < chance, max_model_len=longest, block_size=page, num_speculative_tokens=guesses,
        num_blocks=dice.choice([pages, pages + 3, 3 * pages, 8 * pages]), max_num_seqs=dice.choice([2, 4, 8, 12]),
        max_num_batched_tokens=dice.choice([16, 32, 256]), enable_prefix_caching=dice.random() < 0.7,
        itl_target_ms=dice.choice([None, None, 0.001]),
    )  # fmt: skip
    wanted: dict[str, tuple[list[int], str]] = {}
    said, ends, gone = defaultdict[str, list[int]](list), dict[str, str](), set[str]()
    common, count = [dice.randrange(60) for _ in range(30)], dice.randint(3, 12)
    while len(wanted) < count or engine.has_unfinished():
        if len(wanted) < count and (dice.random() < 0.35 or not engine.has_unfinished()):
            length = dice.randint(1, longest - 10)
            prompt = (common * 5)[:length] if dice.random() < 0.6 else [dice.randrange(60) for _ in range(length)]
            params = SamplingParams(
                max_tokens=dice.randint(1, longest - length), temperature=0.0, seed=dice.randrange(99),
                ignore_eos=dice.random() < 0.5, stop_token_ids=(dice.randrange(VOCAB),) if dice.random() < 0.4 else (),
                logprobs=1 if seed % 2 and dice.random() < 0.25 else None,
            )  # fmt: skip
            name = str(len(wanted))
            wanted[name] = says(prompt, params)
            engine.add_request(name, prompt, params, priority=dice.choice([0, 0, 0, 1, -1]))
        if dice.random() < 0.08 and engine.unfinished:
            name = dice.choice(engine.unfinished)
            gone.add(name)
            engine.abort(name)
        for output in engine.step():
            assert output.request_id not in ends, "no news after the end"
            said[output.request_id] += [] if output.token_id is None else [output.token_id]
            if output.finish_reason is not None:
                ends[output.request_id] = output.finish_reason
        if engine._flying is None:
            live = [request for request in engine._scheduler.running if request in engine._ahead.live]
            assert all(request.num_computed == len(request.tokens) - 1 for request in live), "what was supposed is corrected"
    for name, (tokens, reason) in wanted.items():
        if ends[name] == "abort":
            assert name in gone and said[name] == tokens[: len(said[name])]
        else:
            assert (said[name], ends[name]) == (tokens, reason)
    stats = engine.stats()
    assert (stats.num_running, stats.kv_cache_held) == (0, 0) and stats.accepted_tokens <= stats.guessed_tokens
    assert stats.steps == sum(record.steps for record in engine.step_log.last()) >= stats.guessed_steps
    assert nothing_is_kept(engine)


def test_a_write_into_a_free_page_is_named_once_nothing_is_in_flight() -> None:
    engine = make(False, lambda: True, max_model_len=64, num_blocks=8, block_size=16, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=20, temperature=0.0, seed=1, ignore_eos=True)
    engine.generate([[1, 2, 3]], params)
    engine.add_request("x", [1, 2, 3], params)
    engine.step()
    runner: PretendedRunner = engine.runner  # type: ignore[assignment]
    runner._cache[6, 9] = 1
    engine.step()
    assert engine._flying is not None
    with pytest.raises(AssertionError, match=r"free pages \[6\] have been written"):
        while engine.has_unfinished():
            engine.step()


def test_nothing_is_kept_of_a_request_that_ends_beside_one_with_log_probabilities() -> None:
    engine = make(False, lambda: True, max_model_len=64, num_blocks=8, block_size=16, num_speculative_tokens=3)
    engine.add_request("plain", [1, 2, 3], SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True))
    engine.step()
    engine.add_request("scored", [4, 5], SamplingParams(max_tokens=30, temperature=0.0, logprobs=1, ignore_eos=True))
    while engine.has_unfinished():
        engine.step()
    assert nothing_is_kept(engine)


@pytest.mark.parametrize("drafts", [False, True])
def test_right_guesses_save_steps(drafts: bool) -> None:
    engine = make(drafts, lambda: True, max_model_len=128, num_blocks=16, block_size=16, num_speculative_tokens=7)
    params = SamplingParams(max_tokens=60, temperature=0.0, seed=1, ignore_eos=True)
    prompt = list(range(9)) * 3
    assert engine.generate([prompt], params)[0].token_ids == says(prompt, params)[0]
    stats = engine.stats()
    # The first token is the prompt's, and the last steps may go past the end.
    assert 59 <= stats.guessed_steps + stats.accepted_tokens < 59 + 32 and 0 < stats.accepted_tokens <= stats.guessed_tokens


@pytest.mark.parametrize(("settings", "most"), [({"itl_target_ms": 0.001}, 16), ({"max_num_batched_tokens": 64}, 64)])
def test_a_draft_model_catches_up_in_pieces_beside_answers(settings: dict[str, float], most: int) -> None:
    """A long prompt is news to the draft: it computes no more of it beside a token than would be computed of a prompt."""
    engine = make(
        True, lambda: True, max_model_len=512, num_blocks=64, block_size=16, max_num_seqs=2, num_speculative_tokens=3, **settings
    )
    wanted = dict[str, list[int]]()
    for seed, length in enumerate([300, 150]):
        params = SamplingParams(max_tokens=100, temperature=0.0, seed=seed, ignore_eos=True)
        prompt = [i * i % 60 for i in range(length)]
        engine.add_request(str(seed), prompt, params)
        wanted[str(seed)] = says(prompt, params)[0]
    said = defaultdict[str, list[int]](list)
    while engine.has_unfinished():
        for output in engine.step():
            said[output.request_id] += [] if output.token_id is None else [output.token_id]
    runner: PretendedRunner = engine.runner  # type: ignore[assignment]
    assert said == wanted and runner.guessed > 0
    assert max(runner.pieces) <= most and sum(runner.pieces) > 400
    steps = [record.steps for record, piece in zip(engine.step_log.last(), runner.pieces, strict=False) if piece]
    assert set(steps[:-1]) == {1}, "while it catches up, nobody waits for a burst; with the last piece it guesses"


@pytest.mark.parametrize(("target", "beside"), [(None, [False, True] * 3), (1e9, [True] * 6)])
def test_who_decodes_waits_for_one_step_that_prompts_fill_but_never_under_a_latency_target(
    target: float | None, beside: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make(
        False, lambda: False, max_model_len=512, num_blocks=64, block_size=16, max_num_batched_tokens=32, itl_target_ms=target
    )
    short, long = (
        SamplingParams(max_tokens=40, temperature=0.0, seed=0, ignore_eos=True),
        SamplingParams(max_tokens=1, temperature=0.0),
    )
    engine.add_request("answer", [1, 2, 3], short)
    said = [output.token_id for output in engine.step()]
    runner: PretendedRunner = engine.runner  # type: ignore[assignment]
    decode, prefill, launches = runner.launch_decode, runner.launch_prefill, list[list[str]]()
    monkeypatch.setattr(runner, "launch_decode", lambda slots, times: (launches[-1].append("decode"), decode(slots, times)))
    monkeypatch.setattr(runner, "launch_prefill", lambda chunks: (launches[-1].append("prompts"), prefill(chunks)))
    engine.add_request("prompt", [i % 60 for i in range(6 * 32 + 5)], long)
    while engine.has_unfinished():
        launches.append([])
        said += [output.token_id for output in engine.step() if output.request_id == "answer"]
    assert ["decode" in launch for launch in launches[:6]] == beside and all("prompts" in launch for launch in launches[:6])
    assert "decode" in launches[6], "the prompt's last piece fills nothing"
    assert said == says([1, 2, 3], short)[0]


def test_an_adapter_for_which_there_is_no_memory_is_refused_and_everybody_else_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(False, lambda: False, max_model_len=64, num_blocks=8, block_size=16)

    def no_room(name: str, directory: Path) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(engine.runner, "load_adapter", no_room, raising=False)
    params = SamplingParams(max_tokens=12, temperature=0.0, seed=3, ignore_eos=True)
    engine.add_request("x", [1, 2, 3], params)
    said = [output.token_id for output in engine.step()]
    with pytest.raises(AdapterError, match=r"no memory for adapter 'big'.*num_blocks"):
        engine.load_adapter("big", Path("nowhere"))
    while engine.has_unfinished():
        said += [output.token_id for output in engine.step()]
    assert said == says([1, 2, 3], params)[0] and engine.adapters == []


def test_without_memory_for_graphs_an_adapter_is_refused_and_an_engine_sleeps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(False, lambda: False, max_model_len=64, num_blocks=8, block_size=16)
    level, adapters = 0, set[str]()

    def sleep(at: int) -> None:
        nonlocal level
        level = at

    calls = {"sleep": sleep, "wake_up": lambda: sleep(0), "unload_adapter": adapters.discard}
    for name, call in {**calls, "load_adapter": lambda name, directory: adapters.add(name)}.items():
        monkeypatch.setattr(engine.runner, name, call, raising=False)
    engine.sleep(1)

    def no_room() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "warm_up", no_room)
        with pytest.raises(EngineError, match="no memory for the graphs"):
            engine.wake_up()
        assert (engine.sleep_level, level) == (1, 1)
    engine.wake_up()
    assert (engine.sleep_level, level) == (0, 0)
    monkeypatch.setattr(engine.runner, "warm_up", no_room)
    with pytest.raises(AdapterError, match="no memory for adapter 'big'"):
        engine.load_adapter("big", Path("nowhere"))
    assert engine.adapters == [] and not adapters
    params = SamplingParams(max_tokens=5, temperature=0.0, seed=3, ignore_eos=True)
    assert engine.generate([[1, 2, 3]], [params])[0].token_ids == says([1, 2, 3], params)[0]


def test_a_decision_to_guess_is_not_spent_on_what_has_to_land_first() -> None:
    """A trial is a few decisions: each must show what guessing brings."""
    asked = 0

    def decide() -> bool:
        nonlocal asked
        asked += 1
        return asked % 6 >= 3

    engine = make(True, decide, max_model_len=512, num_blocks=64, block_size=16, num_speculative_tokens=3)
    engine.generate([[1, 2, 3]], SamplingParams(max_tokens=300, temperature=0.0, seed=1, ignore_eos=True))
    runner: PretendedRunner = engine.runner  # type: ignore[assignment]
    assert runner.guessed == sum(i % 6 >= 3 for i in range(1, asked + 1)) > 5


def test_pages_for_guesses_that_do_not_fit_are_given_back() -> None:
    """The first of the two would keep what the second needs to end."""
    engine = make(
        False, lambda: True, max_model_len=96, num_blocks=6, block_size=16, max_num_batched_tokens=64, enable_prefix_caching=False,
        num_speculative_tokens=7,
    )  # fmt: skip
    for seed, (length, most) in enumerate([(37, 36), (16, 11)]):
        engine.add_request(
            str(seed), list(range(length)), SamplingParams(max_tokens=most, temperature=0.0, seed=seed, ignore_eos=True)
        )
    while engine.has_unfinished():
        engine.step()
    assert engine.stats().preemptions == 0


def test_a_prompt_of_many_chunks_may_be_alone() -> None:
    """None of its first launches draws a token to wait for."""
    engine = make(False, lambda: True, max_model_len=512, num_blocks=32, block_size=16, max_num_batched_tokens=32)
    params = SamplingParams(max_tokens=3, temperature=0.0, seed=2, ignore_eos=True)
    prompt = list(range(60)) * 5
    assert engine.generate([prompt], params)[0].token_ids == says(prompt, params)[0]


def test_a_burst_is_short_beside_a_prompt_that_fits_once_the_prefix_cache_gives_way() -> None:
    engine = make(False, lambda: False, max_model_len=64, num_blocks=12, block_size=16, max_num_batched_tokens=64)
    one = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for first in (0, 20, 40):
        engine.generate([[first + i % 17 for i in range(50)]], one)
    assert engine._pool.num_free == 12 - 9 and engine._pool.num_evictable == 9
    engine.add_request("talker", [5, 6], SamplingParams(max_tokens=50, temperature=0.0, ignore_eos=True))
    for _ in range(3):
        engine.step()
    engine.add_request("late", [60] * 60, one)
    while engine.has_unfinished():
        engine.step()
    beside = [record for record in engine.step_log.last() if record.prompt_tokens and record.decodes]
    assert [(record.prompt_tokens, record.steps) for record in beside] == [(60, 1)]
