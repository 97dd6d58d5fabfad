"""LoRA adapters: loaded, replaced, refused."""

import asyncio
import json

from altiplano.serve import messages as m

from .bench import Bench, check, refused


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
