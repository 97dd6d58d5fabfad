"""Lengths in the endpoint's own tokens, without a tokenizer of ours."""

import random
from dataclasses import dataclass

import httpx

from altiplano.client.endpoint import Endpoint
from altiplano.client.errors import RefusedError, refused

# Common words, most of them one token each in Llama's vocabulary.
COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part place case
week company system program question work number night point home water room mother area money story fact month lot right study
book eye job word business issue side kind head house service friend father power hour game line end member law car city name
president team minute idea body information back parent face level office door health person art war history party result change
morning reason research girl moment air teacher force education foot boy age policy music market sense nation plan interest death
"""
WORDS = tuple(COMMON.split())


@dataclass(frozen=True)
class Ruler:
    """Counts text, and makes text of a wanted length."""

    endpoint: Endpoint
    client: httpx.AsyncClient
    model: str
    tokens_per_word: float = 1.0

    def text(self, length: int, rng: random.Random) -> str:
        """Random words of about `length` tokens. The exact count is in the answer's usage."""
        return " ".join(rng.choices(WORDS, k=max(1, round(length / self.tokens_per_word)))) if length else ""

    async def count(self, text: str) -> int:
        """Tokens of a text, counted by the endpoint's /tokenize.

        Raises:
            RefusedError: the endpoint has no such route.
        """
        response = await self.client.post(
            f"{self.endpoint.root}/tokenize", json={"model": self.model, "prompt": text, "add_special_tokens": False}
        )
        if response.is_error:
            raise RefusedError(f"{response.url} cannot count tokens ({refused(response)})", response.status_code)
        return int(response.json()["count"])


async def calibrate(endpoint: Endpoint, client: httpx.AsyncClient, model: str, chat_path: str) -> Ruler:
    """A ruler for chats: two requests tell what a word costs on average."""
    measured = []
    for text in (WORDS[0], " ".join([WORDS[0], *WORDS])):
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}
        response = await client.post(chat_path, json=body)
        if response.is_error:
            raise refused(response)
        measured.append(int(response.json()["usage"]["prompt_tokens"]))
    # The difference of two lengths, because the chat template adds the same to both.
    return Ruler(endpoint, client, model, (measured[1] - measured[0]) / len(WORDS))
