"""The cache and the batch: what is found again, given up, preempted, counted."""

import asyncio
from contextlib import aclosing

from altiplano.serve import messages as m

from .bench import Bench, check


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
