"""A pipeline file and its overrides become one `Pipeline`, with the origin of every value."""

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from altiplano.spec import document
from altiplano.spec.errors import Problem, SpecError
from altiplano.spec.sections import Pipeline
from altiplano.spec.space import check_space, samples

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Origin:
    """Where a value came from: `default`, `file` (with its line) or `command line`."""

    kind: str
    line: int | None = None

    def __str__(self) -> str:
        return f"line {self.line}" if self.kind == "file" else self.kind


@dataclass(frozen=True)
class Resolved:
    """A checked pipeline, the origin of each of its scalar values by dotted key, and the digest of the whole."""

    pipeline: Pipeline
    origins: dict[str, Origin]
    digest: str


def load(path: Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read the file at `path`, apply `overrides` (`section.key=value`), check everything.

    Relative data paths are taken from the directory of the file.

    Raises:
        SpecError: with every problem found.
    """
    parsed = document.parse(path)
    values = parsed.values
    given = dict(_split(text) for text in overrides)
    for key, value in given.items():
        _assign(values, key, value)
    try:
        pipeline = Pipeline.model_validate(values)
    except ValidationError as error:
        raise SpecError([_problem(path, parsed.lines, given, e) for e in _causes(error)]) from error
    wrong = [*check_space(pipeline)] or [*_refused_samples(pipeline)]
    problems = [Problem(_place(path, parsed.lines, given, key), key, message) for key, message in wrong]
    if problems:
        raise SpecError(problems)
    pipeline = _anchor(pipeline, path.resolve().parent)
    origins = {key: _origin(key, parsed.lines, given) for key, _ in flatten(pipeline.model_dump(mode="json"))}
    digest = hashlib.sha256(json.dumps(pipeline.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()
    return Resolved(pipeline, origins, digest)


def resolve_overrides(pipeline: Pipeline, changes: Mapping[str, Any]) -> Pipeline:
    """`pipeline` with dotted `changes`, checked again: how a trial gets its settings.

    Raises:
        SpecError: an unknown key or a value that its field refuses.
    """
    values = pipeline.model_dump(mode="json")
    for key, value in changes.items():
        _assign(values, key, value)
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        raise SpecError([_problem(Path("trial"), {}, dict(changes), e) for e in _causes(error)]) from error


def _refused_samples(pipeline: Pipeline) -> Iterator[tuple[str, str]]:
    """(dotted key, problem) for entries of a well-formed search space whose values no trial could use."""
    for key, written in (pipeline.tune.search_space if pipeline.tune else {}).items():
        for value in samples(written):
            try:
                resolve_overrides(pipeline, {key: value})
            except SpecError as error:
                yield f"tune.search_space.{key}", f"{value!r} would be refused: {error.problems[0].message}"
                break


def render(resolved: Resolved) -> Iterator[str]:
    """Lines `key: value  # origin`, one per value."""
    for key, value in flatten(resolved.pipeline.model_dump(mode="json")):
        yield f"{key}: {json.dumps(value)}  # {resolved.origins[key]}"


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, scalar) pairs; empty lists and mappings count as scalars."""
    if isinstance(values, dict) and values:
        for key, value in values.items():
            yield from flatten(value, f"{prefix}{key}.")
    elif isinstance(values, list) and values:
        for index, value in enumerate(values):
            yield from flatten(value, f"{prefix}{index}.")
    else:
        yield prefix[:-1], values


def _split(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise SpecError([Problem(COMMAND_LINE, text, "an override is written key=value, such as training.learning_rate=2e-4")])
    try:
        return key.strip(), document.scalar(value)
    except Exception as error:
        raise SpecError([Problem(COMMAND_LINE, key, f"{value!r} is not a YAML value: {error}")]) from error


def _assign(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one dotted key in place; missing sections are made, list items are reached by index."""
    *parents, last = dotted.split(".")
    at: Any = values
    for parent in parents:
        if isinstance(at, list):
            at = at[_index(at, parent, dotted)]
            continue
        if not isinstance(at.get(parent), dict | list):
            at[parent] = {}
        at = at[parent]
    if isinstance(at, list):
        at[_index(at, last, dotted)] = value
    else:
        at[last] = value


def _index(items: list[Any], part: str, dotted: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise SpecError([Problem(COMMAND_LINE, dotted, f"{part!r} is no item of a list of {len(items)}: use 0 to {len(items) - 1}")])


def _causes(error: ValidationError) -> list[dict[str, Any]]:
    """The errors without those that only follow from another: a list counts as too short when one of its items is wrong."""
    found: list[dict[str, Any]] = [dict(e) for e in error.errors(include_url=False)]
    return [e for e in found if not any(len(o["loc"]) > len(e["loc"]) and o["loc"][: len(e["loc"])] == e["loc"] for o in found)]


def _problem(path: Path, lines: Mapping[str, int], given: Mapping[str, Any], error: dict[str, Any]) -> Problem:
    key = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "unknown key" + _suggestion(error["loc"])
    elif error["type"] == "missing":
        message = "is required: add it"
    elif error["loc"] and error["type"] != "value_error":
        message = f"{message}, not {error['input']!r}"
    return Problem(_place(path, lines, given, key), key, message)


def _suggestion(loc: Sequence[Any]) -> str:
    """`: did you mean …?`, or the keys that there are."""
    known = _fields(loc[:-1])
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    if close:
        return f": did you mean {close[0]}?"
    elsewhere = [f"{section}.{loc[-1]}" for section in Pipeline.model_fields if loc[-1] in _fields([section])]
    if elsewhere:
        return f": did you mean {elsewhere[0]}?"
    return f": use one of {', '.join(known)}, or remove it"


def _fields(loc: Sequence[Any]) -> list[str]:
    """Names of the fields of the section at `loc`."""
    model: Any = Pipeline
    for part in loc:
        if isinstance(part, int) or model is None:
            continue
        field = model.model_fields.get(part)
        model = model_of(field.annotation) if field else None
    return sorted(model.model_fields) if model else []


def model_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for argument in get_args(annotation) if (found := model_of(argument))), None)


def _place(path: Path, lines: Mapping[str, int], given: Mapping[str, Any], key: str) -> str:
    """file:line of `key` or of the closest parent that the file has."""
    if any(key == k or key.startswith(f"{k}.") for k in given):
        return COMMAND_LINE
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        line = lines.get(".".join(parts[:length]))
        if line is not None:
            return f"{path}:{line}"
    return str(path)


def _origin(key: str, lines: Mapping[str, int], given: Mapping[str, Any]) -> Origin:
    if any(key == k or key.startswith(f"{k}.") for k in given):
        return Origin(COMMAND_LINE)
    return Origin("file", lines[key]) if key in lines else Origin("default")


def _anchor(pipeline: Pipeline, directory: Path) -> Pipeline:
    """Paths relative to the file become absolute; of data and model only where such a file exists, else it may be a hub id."""
    values = pipeline.model_dump()
    for source in (*values["data"]["datasets"], *values["data"]["eval_datasets"]):
        local = directory / source["path"]
        looks_like_a_file = Path(source["path"]).suffix in (".jsonl", ".json", ".parquet", ".gz") and "://" not in source["path"]
        if local.exists() or looks_like_a_file:
            source["path"] = str(local)
    if values["serve"]["api_keys_file"] is not None:
        values["serve"]["api_keys_file"] = str(directory / values["serve"]["api_keys_file"])
    model = directory / values["model"]["model_name_or_path"]
    if model.is_dir():
        values["model"]["model_name_or_path"] = str(model)
    return Pipeline.model_validate(values)
