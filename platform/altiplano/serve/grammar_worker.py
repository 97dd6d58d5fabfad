"""The process that knows grammars: this file as a program, Settings as the first frame on its standard input.

A grammar is text of a client, and compiling it or finding its next tokens can take any time and any memory. So it happens
here: the kernel ends this process when one answer computes longer than `limit_s` or needs more than `limit_bytes`, and whoever
started it begins again without the grammar at fault.
"""

import resource
import signal
import struct
import sys
from collections import OrderedDict
from typing import IO

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_LENGTH = struct.Struct("<I")
CACHED_GRAMMARS = 64
STALLED = 40  # times its limit on a clock: what waits so long without computing will not come, and others wait behind it


class Settings(msgspec.Struct, frozen=True):
    """`tokenizer` is the path of a tokenizer.json; `limit_s` is time of a core, not of a clock: a machine without a free one blames no grammar."""

    tokenizer: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    limit_s: float
    limit_bytes: int


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    """Start an answer under a grammar in llguidance's dialect of Lark, of which `tokens` are said already."""

    request_id: str
    grammar: str
    tokens: tuple[int, ...] = ()


class Take(msgspec.Struct, frozen=True, tag="take"):
    """A token was said."""

    request_id: str
    token: int


class Forget(msgspec.Struct, frozen=True, tag="forget"):
    """An answer is over. The only question without an answer."""

    request_id: str


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The process understands questions."""


class Allowed(msgspec.Struct, frozen=True, tag="allowed"):
    """What may come after `position` tokens: bit i % 8 of byte i // 8 for token i."""

    request_id: str
    position: int
    tokens: bytes


class Bad(msgspec.Struct, frozen=True, tag="bad"):
    """The grammar cannot be used, or not any further, and why."""

    request_id: str
    error: str


Question = Begin | Take | Forget
Answer = Ready | Allowed | Bad

encode = msgspec.msgpack.Encoder().encode
decode_answer = msgspec.msgpack.Decoder(Answer).decode
_decode_question = msgspec.msgpack.Decoder(Question).decode


def write_frame(stream: IO[bytes], message: Settings | Question | Answer) -> None:
    """A message with its length in front."""
    body = encode(message)
    stream.write(_LENGTH.pack(len(body)) + body)
    stream.flush()


def read_frame(stream: IO[bytes]) -> bytes | None:
    """The next message's bytes; None at the end."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    body = stream.read(_LENGTH.unpack(head)[0])
    return body if len(body) == _LENGTH.unpack(head)[0] else None


class Grammars:
    """Compiled grammars, and where each answer stands in its own."""

    def __init__(self, settings: Settings) -> None:
        self._bytes = -(-settings.vocab_size // 8)
        eos = list(settings.eos_token_ids) or None
        self._tokenizer = LLTokenizer(settings.tokenizer, n_vocab=settings.vocab_size, eos_token=eos)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._answers: dict[str, tuple[LLMatcher, int]] = {}

    def answer(self, question: Question) -> Answer | None:
        if isinstance(question, Forget):
            self._answers.pop(question.request_id, None)
            return None
        if isinstance(question, Begin):
            matcher, position = self._compile(question.grammar).deep_copy(), len(question.tokens)
            matcher.consume_tokens(list(question.tokens))
        else:
            matcher, position = self._answers[question.request_id]
            matcher.consume_token(question.token)
            position += 1
        self._answers[question.request_id] = matcher, position
        allowed = matcher.compute_bitmask()[: self._bytes]
        if matcher.is_error():
            return Bad(question.request_id, _first_words(matcher.get_error()))
        if not any(allowed):
            return Bad(question.request_id, "no token of this model can go on from here")
        return Allowed(question.request_id, position, allowed)

    def _compile(self, grammar: str) -> LLMatcher:
        found = self._compiled.pop(grammar, None)
        if found is None:
            limits = LLParserLimits(verbose_errors=False)
            found = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0, limits=limits)
        self._compiled[grammar] = found
        if len(self._compiled) > CACHED_GRAMMARS:
            self._compiled.popitem(last=False)
        return found


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = read_frame(source)
    if first is None:
        return
    settings = msgspec.msgpack.decode(first, type=Settings)
    grammars = Grammars(settings)
    resource.setrlimit(resource.RLIMIT_AS, (settings.limit_bytes, settings.limit_bytes))
    for limit in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(limit, signal.SIG_DFL)
    write_frame(sink, Ready())
    while (body := read_frame(source)) is not None:
        # No handler: Python would run it only after the library's call has returned.
        signal.setitimer(signal.ITIMER_PROF, settings.limit_s)
        signal.setitimer(signal.ITIMER_REAL, STALLED * settings.limit_s)
        answer = grammars.answer(_decode_question(body))
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if answer is not None:
            write_frame(sink, answer)


def _first_words(error: str) -> str:
    """llguidance's message without its excerpt of the grammar and its state."""
    text = error.split("<state>")[0].split("\n   1 |")[0]
    _, found, rest = text.partition("failed to compile JSON schema: ")
    return " ".join((rest if found else text).split())[:300]


if __name__ == "__main__":
    main()
