"""YAML text to plain values, with the line of every key."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from altiplano.spec.errors import Problem, SpecError

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe, and with the numbers of YAML 1.2: version 1.1 reads 2e-4 as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)


@dataclass(frozen=True)
class Document:
    """The values of a file and the line on which each dotted key stands (list items by index: `data.datasets.0.path`)."""

    values: dict[str, Any]
    lines: dict[str, int]


def parse(path: Path) -> Document:
    """Read `path`.

    Raises:
        SpecError: unreadable, too large, not YAML, not a mapping, or a key given twice.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SpecError([Problem(str(path), "", f"larger than {MAX_BYTES >> 20} MiB: this is not a pipeline file")])
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SpecError([Problem(str(path), "", f"cannot be read ({error.strerror}): check the path")]) from error
    except UnicodeDecodeError as error:
        raise SpecError([Problem(str(path), "", f"is not UTF-8 text (byte {error.start}): save it as UTF-8")]) from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise SpecError([Problem(str(path), "", "is empty: start from pipelines/demo/pipeline.yaml")])
        if not isinstance(node, yaml.MappingNode):
            raise SpecError(
                [Problem(f"{path}:{node.start_mark.line + 1}", "", "a pipeline file is a mapping of sections, such as `data:`")]
            )
        lines, twice = _lines(node)
        if twice:
            raise SpecError([Problem(f"{path}:{line}", key, "is given twice: remove one of them") for key, line in twice])
        values = loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        raise SpecError([Problem(place, "", f"is not valid YAML: {getattr(error, 'problem', error)}")]) from error
    return Document(values, lines)


def scalar(text: str) -> Any:
    """The value that `text` would have in a file: for overrides on the command line."""
    return yaml.load(text, _Loader)  # noqa: S506  (a SafeLoader)


def _lines(root: yaml.MappingNode) -> tuple[dict[str, int], list[tuple[str, int]]]:
    lines: dict[str, int] = {}
    twice = []
    for key, line in _walk(root, ""):
        if key in lines:
            twice.append((key, line))
        lines[key] = line
    return lines, twice


def _walk(node: yaml.Node, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line + 1
            yield from _walk(value, f"{name}.")
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{prefix}{index}", item.start_mark.line + 1
            yield from _walk(item, f"{prefix}{index}.")
