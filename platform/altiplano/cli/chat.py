"""`altiplano chat`: talk to the endpoint."""

import json
from collections.abc import Iterator
from typing import Annotated

import httpx
import typer

from altiplano.cli.console import err, out

Message = dict[str, str]


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Ask this and leave; without it, a conversation.", show_default=False)
    ] = None,
    url: Annotated[str, typer.Option(help="Address of the endpoint.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[
        str | None, typer.Option(help="Model name; default: the first tuned one that the endpoint serves.", show_default=False)
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
) -> None:
    """Chat with the deployed model."""
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    with httpx.Client(base_url=url, timeout=httpx.Timeout(120, connect=5)) as client:
        chosen = model or _default_model(client)
        if message is not None:
            _turn(client, chosen, [*history, {"role": "user", "content": message}], max_tokens, temperature)
            return
        err.print(f"Talking to {chosen}. Ctrl-D ends.", style="dim")
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                return
            history.append({"role": "user", "content": line})
            answer = _turn(client, chosen, history, max_tokens, temperature)
            history.append({"role": "assistant", "content": answer})


def _turn(client: httpx.Client, model: str, messages: list[Message], max_tokens: int, temperature: float) -> str:
    """Print the answer as it comes and return it."""
    pieces = []
    for piece in _stream(
        client, {"model": model, "messages": messages, "max_tokens": max_tokens, "temperature": temperature, "stream": True}
    ):
        out.print(piece, end="", markup=False)
        pieces.append(piece)
    out.print()
    return "".join(pieces)


def _stream(client: httpx.Client, body: dict[str, object]) -> Iterator[str]:
    try:
        with client.stream("POST", "/chat/completions", json=body) as response:
            if response.is_error:
                response.read()
                raise ValueError(_message(response))
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except httpx.TransportError as error:
        raise ConnectionError(_unreachable(client, error)) from error


def _default_model(client: httpx.Client) -> str:
    """The champion where there is one, else the base model."""
    try:
        response = client.get("/models")
    except httpx.TransportError as error:
        raise ConnectionError(_unreachable(client, error)) from error
    if response.is_error:
        raise ConnectionError(f"{response.url} answered {response.status_code}: {_message(response)}")
    names: list[str] = [entry["id"] for entry in response.json()["data"]]
    return "champion" if "champion" in names else names[0]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:300]


def _unreachable(client: httpx.Client, error: Exception) -> str:
    return f"no endpoint answers at {client.base_url} ({error}): deploy one with `altiplano run`, or give its address with --url"
