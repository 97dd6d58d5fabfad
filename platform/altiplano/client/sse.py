"""Server-sent events, as OpenAI-compatible endpoints stream them: one JSON object per event, `[DONE]` at the end."""

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from altiplano.client.errors import EndpointGoneError, RefusedError

DONE = b"[DONE]"


class EventParser:
    """Bytes in pieces of any size to the data of whole events (WHATWG HTML, section 9.2, without ids and names)."""

    def __init__(self) -> None:
        self._rest = b""

    def push(self, data: bytes) -> Iterator[bytes]:
        """Data of the events that `data` completes. Comments and other fields are skipped."""
        # A CR that ends a piece may be half of a CRLF: keep it until the LF has come.
        held = b"\r" if data.endswith(b"\r") else b""
        self._rest += data[: len(data) - len(held)]
        if b"\r" in self._rest:
            self._rest = self._rest.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        *events, self._rest = self._rest.split(b"\n\n")
        self._rest += held
        for event in events:
            lines = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield b"\n".join(lines)


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The chunks of a streamed answer.

    Raises:
        RefusedError: the stream carries an error object.
        EndpointGoneError: the connection closed before `[DONE]`.
    """
    parser = EventParser()
    async for data in response.aiter_bytes():
        for event in parser.push(data):
            if event == DONE:
                return
            chunk: dict[str, Any] = json.loads(event)
            if "error" in chunk:
                error = chunk["error"]
                raise RefusedError(str(error.get("message", error)), response.status_code, error.get("code"))
            yield chunk
    raise EndpointGoneError("the stream broke off before its end")
