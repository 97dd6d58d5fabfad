"""What the feature matrices of both backends ask their engines, and the rules of sampling written out for one row of logits."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from altiplano.engine import Engine, SamplingParams

from .features import Feature

REQUESTS, NEW = 5, 10


@dataclass
class Answer:
    """What one request was told."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top: list[tuple[int, ...]] = field(default_factory=list)
    prompt_logprobs: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Text:
    """A model's vocabulary, the tokens that end its answers, and the prompts."""

    vocab: int
    ends: tuple[int, ...]
    prompts: tuple[list[int], ...]

    def allowed(self, request: int, step: int) -> list[int]:
        """What a structured request may say next; the end is among it from the fifth token on."""
        chosen = random.Random(100 * request + step).sample(range(3, self.vocab - len(self.ends)), 8)
        return [*chosen, self.ends[0]] if step >= 4 else chosen

    def bits(self, tokens: Iterable[int]) -> bytes:
        """The set of tokens as the engine takes it: a bit for each, lowest bit first."""
        mask = bytearray(-(-self.vocab // 8))
        for token in tokens:
            mask[token // 8] |= 1 << token % 8
        return bytes(mask)

    def ruled(self, row: torch.Tensor, prompt: list[int], said: list[int], request: int, params: SamplingParams) -> torch.Tensor:
        """The logits of the next token under everything but temperature and filters. row: float32 [vocab]."""
        row = row.clone()
        for token in {*prompt, *said} if params.penalized else ():
            row[token] = row[token] / params.repetition_penalty if row[token] > 0 else row[token] * params.repetition_penalty
            row[token] -= params.frequency_penalty * said.count(token) + params.presence_penalty * (token in said)
        for token, bias in (params.logit_bias or {}).items():
            row[token] += bias
        if len(said) < params.min_tokens:
            row[[*self.ends, *params.stop_token_ids]] = float("-inf")
        if params.structured:
            forbidden = torch.ones(self.vocab, dtype=torch.bool)
            forbidden[self.allowed(request, len(said))] = False
            row[forbidden.to(row.device)] = float("-inf")
        return row


def prompts(vocab: int) -> tuple[list[int], ...]:
    """Half of them with a common beginning."""
    rng = random.Random(3)
    shared = [rng.randrange(3, vocab) for _ in range(20)]
    own = [[rng.randrange(3, vocab) for _ in range(rng.randint(3, 25))] for _ in range(REQUESTS)]
    return tuple(shared + tokens if index % 2 else tokens for index, tokens in enumerate(own))


def settings_of(pair: tuple[Feature, Feature]) -> SamplingParams:
    merged = {"temperature": 0.0, "max_tokens": NEW} | dict(pair[0].params) | dict(pair[1].params)
    return SamplingParams(**merged)


def adapters_of(pair: tuple[Feature, Feature]) -> list[str | None]:
    """The adapter of each request."""
    choices = [None, *(feature.adapter for feature in pair if feature.adapter)]
    return [choices[index % len(choices)] for index in range(REQUESTS)]


def run(
    engine: Engine,
    text: Text,
    names: set[str],
    params: SamplingParams,
    adapters: Sequence[str | None],
    requests: Sequence[int] = range(REQUESTS),
    namespace: str = "",
) -> list[Answer]:
    """These requests through one engine, together; everybody's news in their answers."""
    told = [Answer() for _ in range(REQUESTS)]
    for index in requests:
        priority = -index if "priorities" in names else 0
        engine.add_request(
            f"{index}", text.prompts[index], params, adapter=adapters[index], priority=priority, namespace=namespace
        )
    if "abort" in names:
        engine.add_request("neighbour", [7, 8, 9], SamplingParams(max_tokens=20, temperature=0.0))
    steps = 0
    while engine.has_unfinished():
        if params.structured:
            for index in requests:
                engine.allow(f"{index}", text.bits(text.allowed(index, len(told[index].tokens))))
        for output in engine.step():
            if output.request_id == "neighbour":
                continue
            answer = told[int(output.request_id)]
            answer.prompt_logprobs += output.prompt_logprobs
            answer.reason = output.finish_reason
            assert output.token_id is not None
            answer.tokens.append(output.token_id)
            if output.logprob is not None:
                answer.logprobs.append(output.logprob)
                answer.top.append(tuple(token for token, _ in output.top_logprobs))
        steps += 1
        assert steps < 1000, "an answer of a few tokens never ends"
        if steps == 3:
            engine.abort("neighbour")
    return [told[index] for index in requests]
