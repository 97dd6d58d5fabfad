"""What is said: tokens, log-probabilities, ends, seeds, filters, penalties."""

import asyncio
import math
from typing import Any

import torch

from altiplano.engine import SamplingParams
from altiplano.serve import messages as m

from .bench import CONTEXT, Bench, check, refused


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
