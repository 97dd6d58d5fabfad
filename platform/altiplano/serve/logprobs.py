"""OpenAI's two shapes of log-probabilities."""

import codecs
from collections.abc import Sequence
from typing import Any

from altiplano.serve import messages as m
from altiplano.serve.detokenize import Vocabulary

LOWEST = -9999.0  # what OpenAI writes for a token that cannot come: JSON has no infinity


def chat_logprobs(vocabulary: Vocabulary, tokens: Sequence[m.Token]) -> dict[str, Any]:
    """choices[].logprobs of a chat."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        said = list(vocabulary.bytes_of(token_id)) or list(vocabulary.name_of(token_id).encode())
        return {"token": vocabulary.name_of(token_id), "logprob": max(logprob, LOWEST), "bytes": said}

    content = [
        entry(token.token_id, token.logprob) | {"top_logprobs": [entry(i, p) for i, p in token.top]}
        for token in tokens
        if token.token_id is not None and token.logprob is not None
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """choices[].logprobs of a completion, piece by piece: offsets count the characters of the text so far."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def prompt(self, token_ids: Sequence[int], news: m.Token) -> dict[str, Any]:
        """Of an echoed prompt, from the first news of its answer. The first token follows nothing, so it has none."""
        top = news.prompt_top or ((),) * (len(token_ids) - 1)
        return self._body(token_ids, [None, *news.prompt_logprobs], [None, *map(dict, top)])

    def answer(self, tokens: Sequence[m.Token]) -> dict[str, Any]:
        """Of drawn tokens."""
        drawn = [token for token in tokens if token.token_id is not None and token.logprob is not None]
        return self._body([t.token_id or 0 for t in drawn], [t.logprob for t in drawn], [dict(t.top) for t in drawn])

    def _body(
        self, token_ids: Sequence[int], logprobs: Sequence[float | None], tops: Sequence[dict[int, float] | None]
    ) -> dict[str, Any]:
        name = self._vocabulary.name_of
        return {
            "tokens": [name(token_id) for token_id in token_ids],
            "token_logprobs": [None if p is None else max(p, LOWEST) for p in logprobs],
            "top_logprobs": [None if top is None else {name(i): max(p, LOWEST) for i, p in top.items()} for top in tops],
            "text_offset": [self._step(token_id) for token_id in token_ids],
        }

    def _step(self, token_id: int) -> int:
        before = self._offset
        self._offset += len(self._decoder.decode(self._vocabulary.bytes_of(token_id)))
        return before


def joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Pieces of one answer's log-probabilities as one."""
    return {name: [item for part in parts for item in part[name]] if parts[0][name] is not None else None for name in parts[0]}
