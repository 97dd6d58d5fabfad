"""Where output goes: results to standard output, everything else to standard error; JSON when asked."""

import json
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table


class Output(StrEnum):
    """Formats of the commands that read."""

    text = "text"
    json = "json"


OutputOption = Annotated[Output, typer.Option("-o", "--output", help="text for people, json for programs.")]

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


def problem(message: str) -> None:
    """One clear message on standard error."""
    err.print(f"[bold red]error:[/] {_escape(message)}")


def hint(message: str) -> None:
    err.print(_escape(message), style="dim")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A rich table; numbers are right-aligned by their column name's leading '>'."""
    made = Table(title=title or None, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(_escape(cell) for cell in row))
    return made


def _escape(text: str) -> str:
    return text.replace("[", "\\[")
