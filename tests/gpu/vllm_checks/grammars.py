"""Structured output: JSON schemas and grammars of our own."""

import asyncio
import contextlib
import json

from altiplano.serve import messages as m
from altiplano.serve.engine_errors import RefusedError
from altiplano.serve.structured import FREE_TEXT, grammar, json_rule

from .bench import Bench, check, refused

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "minimum": 1, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


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
