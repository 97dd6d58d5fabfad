"""Data sets: what is asked. Lengths in tokens."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from altiplano.client.bench.ruler import Ruler

# Token ids that are ordinary tokens in every tokenizer of the Llama family, and that cria knows too.
ORDINARY_IDS = range(256, 1024)
# vLLM's limits for ShareGPT: shorter turns are greetings, longer ones do not fit everywhere.
SHAREGPT_MIN, SHAREGPT_MAX_PROMPT, SHAREGPT_MAX_TOTAL = 4, 1024, 2048


@dataclass(frozen=True)
class Sample:
    """One request: text or token ids, how many tokens it may generate, and its arrival in seconds where that is recorded."""

    prompt: str | list[int]
    output_len: int
    arrival: float | None = None


def random_samples(
    count: int,
    input_len: int,
    output_len: int,
    ruler: Ruler | None,
    rng: random.Random,
    *,
    range_ratio: float = 0.0,
    prefix_len: int = 0,
) -> list[Sample]:
    """Random prompts after one shared prefix; lengths uniform in len · (1 ± range_ratio). Token ids, or text with a ruler."""
    if not 0 <= range_ratio < 1:
        raise ValueError(f"--random-range-ratio must be at least 0 and below 1, not {range_ratio:g}")
    prefix = _fill(prefix_len, ruler, rng)
    return [
        Sample(_join(prefix, _fill(_around(input_len, range_ratio, rng), ruler, rng)), _around(output_len, range_ratio, rng))
        for _ in range(count)
    ]


def prefix_repetition_samples(
    count: int, prefix_len: int, suffix_len: int, num_prefixes: int, output_len: int, ruler: Ruler | None, rng: random.Random
) -> list[Sample]:
    """`num_prefixes` prefixes that are used again and again, each time with a new suffix, in random order."""
    if num_prefixes > count:
        raise ValueError(f"{num_prefixes} prefixes need at least as many prompts, not {count}: raise --num-prompts")
    prefixes = [_fill(prefix_len, ruler, rng) for _ in range(num_prefixes)]
    made = [Sample(_join(prefixes[i % num_prefixes], _fill(suffix_len, ruler, rng)), output_len) for i in range(count)]
    rng.shuffle(made)
    return made


def custom_samples(path: Path, count: int, output_len: int, rng: random.Random) -> list[Sample]:
    """JSONL with `prompt` and, optionally, `output_tokens`, which counts more than `output_len`."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found.append(Sample(str(row["prompt"]), int(row.get("output_tokens", output_len))))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: a row is an object with a `prompt` ({error!r})") from error
    return _draw(found, count, rng, path)


async def sharegpt_samples(path: Path, count: int, output_len: int | None, ruler: Ruler, rng: random.Random) -> list[Sample]:
    """First questions of conversations; the first answer's length, unless `output_len` is given, is what may be generated."""
    try:
        conversations = json.loads(path.read_text(encoding="utf-8"))
        pairs = [
            (str(turns[0]["value"]), str(turns[1]["value"]))
            for entry in conversations
            if len(turns := entry.get("conversations") or entry.get("conversation") or []) >= 2
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no ShareGPT file, a JSON list of objects with `conversations` ({error!r})") from error
    rng.shuffle(pairs)
    found: list[Sample] = []
    for question, answer in pairs:
        if len(found) == count:
            break
        prompt_len = await ruler.count(question)
        wanted = output_len if output_len is not None else await ruler.count(answer)
        if (
            min(prompt_len, wanted) >= SHAREGPT_MIN
            and prompt_len <= SHAREGPT_MAX_PROMPT
            and prompt_len + wanted <= SHAREGPT_MAX_TOTAL
        ):
            found.append(Sample(question, wanted))
    return _draw(found, count, rng, path)


def trace_samples(path: Path, count: int, block_size: int, seed: int) -> list[Sample]:
    """The first `count` requests of a Mooncake trace (JSONL: `timestamp` in ms, `input_length`, `output_length`, `hash_ids`).

    Equal hash ids are equal blocks of `block_size` tokens, so requests share the prefixes that the recorded ones shared. What
    the ids do not cover is filled with tokens of the request's own.
    """
    blocks: dict[int, list[int]] = {}
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()[:count], start=1):
        try:
            row = json.loads(line)
            length = int(row["input_length"])
            prompt: list[int] = []
            for block in row.get("hash_ids", [])[: -(-length // block_size)]:
                if block not in blocks:
                    blocks[block] = random.Random(f"{seed} block {block}").choices(ORDINARY_IDS, k=block_size)
                prompt += blocks[block]
            prompt += random.Random(f"{seed} row {number}").choices(ORDINARY_IDS, k=max(0, length - len(prompt)))
            found.append(Sample(prompt[:length], int(row["output_length"]), float(row["timestamp"]) / 1e3))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: a row has timestamp, input_length, output_length and hash_ids ({error!r})"
            ) from error
    if not found:
        raise ValueError(f"{path} has no requests")
    start = min(sample.arrival or 0.0 for sample in found)
    return sorted(
        (replace(sample, arrival=(sample.arrival or 0.0) - start) for sample in found), key=lambda one: one.arrival or 0.0
    )


def payload(sample: Sample, endpoint_path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The body of one streamed request."""
    asked: dict[str, Any] = {"prompt": sample.prompt}
    if endpoint_path.endswith("chat/completions"):
        asked = {"messages": [{"role": "user", "content": sample.prompt}]}
    return asked | {"max_tokens": sample.output_len, "stream": True, "stream_options": {"include_usage": True}} | fields


def _fill(length: int, ruler: Ruler | None, rng: random.Random) -> str | list[int]:
    return rng.choices(ORDINARY_IDS, k=length) if ruler is None else ruler.text(length, rng)


def _join(prefix: str | list[int], rest: str | list[int]) -> str | list[int]:
    if isinstance(prefix, list) and isinstance(rest, list):
        return prefix + rest
    assert isinstance(prefix, str) and isinstance(rest, str)
    return f"{prefix} {rest}" if prefix else rest


def _around(length: int, ratio: float, rng: random.Random) -> int:
    return max(1, rng.randint(round(length * (1 - ratio)), round(length * (1 + ratio))))


def _draw(found: Sequence[Sample], count: int, rng: random.Random, path: Path) -> list[Sample]:
    """`count` samples; a data set that is too small is repeated, as in vLLM."""
    if not found:
        raise ValueError(f"{path} has no usable prompts")
    return [*found[:count], *rng.choices(found, k=max(0, count - len(found)))]
