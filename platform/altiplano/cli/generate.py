"""`altiplano generate`: continue a text."""

import asyncio
import json
import sys
from typing import Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, out, print_json
from altiplano.client.endpoint import DEFAULT_URL

UrlOption = Annotated[str, typer.Option(help="Address of the endpoint.")]
ApiKeyOption = Annotated[
    str | None, typer.Option(envvar="ALTIPLANO_API_KEY", help="Key of the endpoint.", show_default=False, show_envvar=True)
]
ModelOption = Annotated[
    str | None, typer.Option(help="Model name; default: champion where there is one, else the base model.", show_default=False)
]
ParamOption = Annotated[
    list[str] | None,
    typer.Option(
        "--param", "-p", metavar="KEY=VALUE", help="Any other field of the request, such as top_p=0.9.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    app.command()(generate)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; default or -: standard input.", show_default=False)
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    model: ModelOption = None,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    param: ParamOption = None,
    output: OutputOption = Output.text,
) -> None:
    """Continue a text with the deployed model, as it is, without a chat template."""
    text = sys.stdin.read() if prompt in (None, "-") else prompt
    if not text:
        raise ValueError("the prompt is empty: give it as an argument or on standard input")
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": temperature} | parameters(param)
    asyncio.run(_generate(url, api_key, model, body, output))


def parameters(pairs: list[str] | None) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it reads as JSON, else a text."""
    found = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise ValueError(f"--param {pair}: write KEY=VALUE, such as top_p=0.9")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


async def _generate(url: str, api_key: str | None, model: str | None, body: dict[str, Any], output: Output) -> None:
    from altiplano.client import Endpoint, Sender, sse
    from altiplano.client.endpoint import default_model
    from altiplano.client.retry import IMPATIENT

    endpoint = Endpoint(url, api_key)
    async with endpoint.open() as client:
        sender = Sender(endpoint, client, IMPATIENT)
        body = {"model": model or await default_model(endpoint, client)} | body
        if output is Output.json:
            print_json((await sender.post("completions", body)).body)
            return
        if body.get("n", 1) != 1:
            raise ValueError("several answers do not stream into one text: add -o json")
        async with sender.stream("completions", body | {"stream": True}) as response:
            async for chunk in sse.chunks(response):
                for choice in chunk["choices"]:
                    out.print(choice["text"], end="", markup=False)
        out.print()
