"""`altiplano chat`: talk to the endpoint."""

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import err, out
from altiplano.cli.generate import ApiKeyOption, ModelOption, ParamOption, UrlOption, parameters
from altiplano.client.endpoint import DEFAULT_URL

if TYPE_CHECKING:
    from altiplano.client import Sender

Message = dict[str, str]


def register(app: typer.Typer) -> None:
    app.command()(chat)


def chat(
    message: Annotated[
        str | None, typer.Argument(help="Ask this and leave; without it, a conversation.", show_default=False)
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    model: ModelOption = None,
    system: Annotated[str | None, typer.Option(help="System prompt.", show_default=False)] = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    param: ParamOption = None,
) -> None:
    """Chat with the deployed model."""
    history: list[Message] = [{"role": "system", "content": system}] if system else []
    body = {"max_tokens": max_tokens, "temperature": temperature} | parameters(param)
    asyncio.run(_chat(url, api_key, model, message, history, body))


async def _chat(
    url: str, api_key: str | None, model: str | None, message: str | None, history: list[Message], body: dict[str, Any]
) -> None:
    from altiplano.client import Endpoint, Sender
    from altiplano.client.endpoint import default_model
    from altiplano.client.retry import IMPATIENT

    endpoint = Endpoint(url, api_key)
    async with endpoint.open() as client:
        sender = Sender(endpoint, client, IMPATIENT)
        body["model"] = model or await default_model(endpoint, client)
        if message is not None:
            await _turn(sender, body, [*history, {"role": "user", "content": message}])
            return
        err.print(f"Talking to {body['model']}. Ctrl-D ends.", style="dim", markup=False)
        while (line := _read_line()) is not None:
            history.append({"role": "user", "content": line})
            history.append({"role": "assistant", "content": await _turn(sender, body, history)})


async def _turn(sender: "Sender", body: dict[str, Any], messages: list[Message]) -> str:
    """Print the answer as it comes and return it."""
    from altiplano.client import sse

    pieces = []
    async with sender.stream("chat/completions", body | {"messages": messages, "stream": True}) as response:
        async for chunk in sse.chunks(response):
            for choice in chunk["choices"]:
                piece = choice["delta"].get("content") or ""
                out.print(piece, end="", markup=False)
                pieces.append(piece)
    out.print()
    return "".join(pieces)


def _read_line() -> str | None:
    # Nothing else runs while a person types, so this may block the event loop.
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        return None
