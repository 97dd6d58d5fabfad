"""`altiplano keys`: API keys of an endpoint. A running endpoint sees a change within a second or two."""

import re
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, err, out, print_json, table
from altiplano.serve.keys import Key, KeyFile, Scope

FileOption = Annotated[Path, typer.Option("--file", help="The endpoint's key file (serve.api_keys_file).")]
DEFAULT = Path(".altiplano/keys.json")
UNITS = {"m": 60, "h": 3600, "d": 86400}

keys = typer.Typer(help="Create, list and revoke API keys.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    app.add_typer(keys, name="keys")


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="Who or what uses it, for people.")],
    file: FileOption = DEFAULT,
    scope: Annotated[
        Scope, typer.Option(help="user asks models; metrics reads /metrics and nothing else; admin may all.")
    ] = Scope.user,
    expires: Annotated[str | None, typer.Option(help="After how long it ends: 90m, 12h, 30d. Default: never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Default: serve.limits.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, help="Prompt and answer. Default: serve.limits.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at a time. Default: serve.limits.")] = None,
    output: OutputOption = Output.text,
) -> None:
    """Make a key and print it: it is shown this once, the file keeps only its hash."""
    key, text = KeyFile(file).create(
        name,
        scope,
        expires_in_s=None if expires is None else _seconds(expires),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        max_concurrency=max_concurrency,
    )
    if output is Output.json:
        print_json({**_public(key), "key": text, "file": str(file)})
        return
    err.print(f"{key.scope} key {key.id} for {name}, in {file}. It is shown this once:", markup=False)
    out.print(text, markup=False)


@keys.command(name="list")
def list_keys(file: FileOption = DEFAULT, output: OutputOption = Output.text) -> None:
    """List keys; a secret is never among what is shown."""
    found = KeyFile(file).read()
    if output is Output.json:
        print_json([_public(key) for key in found])
        return
    columns = ["id", "name", "scope", "state", "created", "expires", ">req/min", ">tok/min", ">at once"]
    out.print(table("", columns, [_row(key) for key in found]))


@keys.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `altiplano keys list` shows it.")],
    file: FileOption = DEFAULT,
    output: OutputOption = Output.text,
) -> None:
    """Refuse a key from now on. Answers that are on their way are completed."""
    key = KeyFile(file).revoke(key_id)
    if output is Output.json:
        print_json(_public(key))
        return
    out.print(f"revoked {key.id} ({key.name})", markup=False)


def _public(key: Key) -> dict[str, Any]:
    return {
        "id": key.id,
        "name": key.name,
        "scope": str(key.scope),
        "state": key.state(time.time()),
        "created": key.created,
        "expires": key.expires,
        "revoked": key.revoked,
        "requests_per_minute": key.requests_per_minute,
        "tokens_per_minute": key.tokens_per_minute,
        "max_concurrency": key.max_concurrency,
    }


def _row(key: Key) -> list[str]:
    limits = (key.requests_per_minute, key.tokens_per_minute, key.max_concurrency)
    return [
        key.id,
        key.name,
        str(key.scope),
        key.state(time.time()),
        _day(key.created),
        "never" if key.expires is None else _day(key.expires),
        *("default" if limit is None else str(limit) for limit in limits),
    ]


def _day(seconds: int) -> str:
    return time.strftime("%Y-%m-%d", time.localtime(seconds))


def _seconds(text: str) -> int:
    found = re.fullmatch(r"([1-9]\d{0,5})([mhd])", text)
    if found is None:
        raise ValueError(f"--expires {text!r} is not a time: write a number and m, h or d, for example 30d")
    return int(found[1]) * UNITS[found[2]]
