"""Tokens to text as they come: whole characters only, and stop strings found across token borders."""

import codecs
import json

from tokenizers import Tokenizer


class Vocabulary:
    """The bytes of every token of a byte-level tokenizer, as all Llama 3 models have it. Special tokens say nothing.

    Raises:
        ValueError: a tokenizer of another kind.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if json.loads(tokenizer.to_str())["decoder"]["type"] != "ByteLevel":
            raise ValueError("the model's tokenizer is not a byte-level one: this endpoint serves Llama 3 models")
        byte_of = {character: byte for byte, character in _characters().items()}
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token_id: token.content for token_id, token in added.items() if token.special}
        self._bytes = [b""] * tokenizer.get_vocab_size(with_added_tokens=True)
        for word, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
            if token_id in added:
                self._bytes[token_id] = b"" if added[token_id].special else added[token_id].content.encode()
            else:
                self._bytes[token_id] = bytes(byte_of[character] for character in word)
        self.longest = max(map(len, [*self._bytes, *self._special.values()]))  # characters that one token can take

    def bytes_of(self, token_id: int) -> bytes:
        """What a token adds to a text. Ids beyond the vocabulary, which a padded model can draw, add nothing."""
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def name_of(self, token_id: int) -> str:
        """A token by itself as people read it; half characters are shown as such."""
        return self._special.get(token_id) or self.bytes_of(token_id).decode("utf-8", "replace")

    def text(self, token_ids: list[int]) -> str:
        """The text of a whole sequence."""
        return b"".join(map(self.bytes_of, token_ids)).decode("utf-8", "replace")


class TextStream:
    """The text of one answer. `push` returns what may be shown now; text that may become a stop string is held back."""

    def __init__(self, vocabulary: Vocabulary, stops: list[str]) -> None:
        self._vocabulary, self._stops = vocabulary, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token; returns the new text. After a stop string nothing more is shown, and `stopped` is true."""
        return self._show(self._decoder.decode(self._vocabulary.bytes_of(token_id)))

    def finish(self) -> str:
        """What was held back, at the end of the answer."""
        last = self._show(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""
        return last + held

    def _show(self, fresh: str) -> str:
        if self.stopped:
            return ""
        if not self._stops:
            return fresh
        pending = self._held + fresh
        found = [at for stop in self._stops if (at := pending.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            shown = pending[: min(found)]
        else:
            keep = max((_overlap(pending, stop) for stop in self._stops), default=0)
            shown, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _characters() -> dict[int, str]:
    """GPT-2's printable stand-in for every byte."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
