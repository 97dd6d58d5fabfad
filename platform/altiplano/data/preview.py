"""A row as its loss sees it: pieces of text, learned or not."""

from itertools import groupby
from typing import Any

from altiplano.data.templates import IGNORED, Example


def segments(tokenizer: Any, example: Example) -> list[tuple[str, bool]]:
    """(text, learned) pairs that together are the whole row."""
    pairs = zip(example.input_ids, example.labels, strict=True)
    return [
        (tokenizer.decode([token for token, _ in run], skip_special_tokens=False), learned)
        for learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    ]
