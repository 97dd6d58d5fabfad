"""What front end and engine process say to each other: length-prefixed msgpack over a unix socket. Never pickle."""

import asyncio
import struct

import msgspec

from altiplano.engine.steps import Histogram, StepRecord

LENGTH = struct.Struct("<I")  # of a message, in front of it
MAX_MESSAGE = 64 << 20


class Sampling(msgspec.Struct, frozen=True, omit_defaults=True):
    """The engine's SamplingParams on the wire; names are the same."""

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False


class Add(msgspec.Struct, frozen=True, tag="add"):
    """Start a request. `grammar`, in llguidance's dialect of Lark, says what its answer may be."""

    request_id: str
    prompt: list[int]
    sampling: Sampling
    adapter: str | None = None
    priority: int = 0
    namespace: str = ""
    grammar: str | None = None


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """End a request; its pages are free at once."""

    request_id: str


class LoadAdapter(msgspec.Struct, frozen=True, tag="load"):
    """Load or replace an adapter; answered by Done."""

    call: int
    name: str
    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload"):
    """Forget an adapter; answered by Done."""

    call: int
    name: str


class AskStats(msgspec.Struct, frozen=True, tag="stats"):
    """Ask for counters and the last `steps` steps; answered by Done. A hung engine does not answer."""

    call: int
    steps: int = 0


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Sleep at a level of Engine.sleep once no request is left, those that `abort` ends included; answered by Done when it sleeps."""

    call: int
    level: int
    abort: bool = False


class WakeUp(msgspec.Struct, frozen=True, tag="wake_up"):
    """Wake up; takes back a Sleep that still waits. Answered by Done."""

    call: int


Command = Add | Abort | LoadAdapter | UnloadAdapter | AskStats | Sleep | WakeUp


class Token(msgspec.Struct, frozen=True, array_like=True):
    """News of one request from one step."""

    request_id: str
    token_id: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    num_cached_tokens: int = 0
    prompt_logprobs: tuple[float, ...] = ()
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] = ()


class Step(msgspec.Struct, frozen=True, tag="step", omit_defaults=True):
    """All news of one step, in one message. `waits`: seconds in the queue, of requests whose first token is here."""

    tokens: list[Token]
    waits: dict[str, float] = {}


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """A request that the engine does not take, and why."""

    request_id: str
    error: str


class Done(msgspec.Struct, frozen=True, tag="done"):
    """The answer to a call: `error` is set when it failed, what follows when it asked for it."""

    call: int
    error: str | None = None
    stats: dict[str, float] | None = None
    histograms: dict[str, Histogram] | None = None
    steps: list[StepRecord] | None = None


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """The engine is loaded."""

    vocab_size: int
    eos_token_ids: tuple[int, ...]


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The engine cannot go on; the process ends after this."""

    error: str


Report = Step | Refused | Done | Ready | Failed

encode = msgspec.msgpack.Encoder().encode
decode_command = msgspec.msgpack.Decoder(Command).decode
decode_report = msgspec.msgpack.Decoder(Report).decode


def frame(message: Command | Report) -> bytes:
    """A message with its length in front."""
    body = encode(message)
    return LENGTH.pack(len(body)) + body


async def read_frame(stream: asyncio.StreamReader) -> bytes:
    """The next message's bytes.

    Raises:
        asyncio.IncompleteReadError: the other side is gone.
        ValueError: a length that no message of ours has.
    """
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    if length > MAX_MESSAGE:
        raise ValueError(f"a message of {length} bytes is larger than {MAX_MESSAGE}")
    return await stream.readexactly(length)
