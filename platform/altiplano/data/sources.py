"""Files and hub data sets to raw rows, each with the number a person finds it under."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import fsspec
import pyarrow.parquet as pq

from altiplano.spec import DataSource

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


class SourceError(ValueError):
    """A source that cannot be read at all."""


@dataclass(frozen=True)
class RawRow:
    """One row as it stands in the file. `number` counts from 1 (lines of a JSONL file, rows of a table).

    `problem` is set, and `values` empty, when the row itself cannot be read.
    """

    source: str
    number: int
    values: dict[str, Any]
    problem: str | None = None


def read(source: DataSource) -> Iterator[RawRow]:
    """Rows of `source`: JSONL (also .gz), parquet, or a hub data set.

    Raises:
        SourceError: missing file, unknown suffix, a store or hub that does not answer.
    """
    path = source.path
    plain = path.removesuffix(".gz")
    try:
        if plain.endswith(JSON_SUFFIXES):
            with fsspec.open(path, "rb") as stream:
                yield from _json_lines(path, gzip.GzipFile(fileobj=stream) if path.endswith(".gz") else stream)  # type: ignore[arg-type]
        elif path.endswith(".parquet"):
            with fsspec.open(path, "rb") as stream:
                yield from _parquet(path, stream)
        else:
            yield from _hub(source)
    except FileNotFoundError as error:
        raise SourceError(
            f"{path} does not exist: check data.datasets and data.eval_datasets (paths are relative to the pipeline file)"
        ) from error
    except SourceError:
        raise
    except (OSError, ImportError, EOFError, ValueError, zlib.error) as error:
        raise SourceError(
            f"{path} cannot be read ({type(error).__name__}: {error}): check the path, the credentials and the network"
        ) from error


def _json_lines(path: str, stream: IO[bytes]) -> Iterator[RawRow]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            yield RawRow(path, number, {}, f"is not JSON ({error})")
            continue
        if isinstance(values, dict):
            yield RawRow(path, number, values)
        else:
            yield RawRow(path, number, {}, f"is a JSON {type(values).__name__}, not an object")


def _parquet(path: str, stream: IO[bytes]) -> Iterator[RawRow]:
    number = 0
    for batch in pq.ParquetFile(stream).iter_batches():
        for values in batch.to_pylist():
            number += 1
            yield RawRow(path, number, values)


def _hub(source: DataSource) -> Iterator[RawRow]:
    import datasets  # slow to import, and needed for hub ids only

    try:
        rows = datasets.load_dataset(source.path, split=source.split, revision=source.revision)
    except Exception as error:
        raise SourceError(
            f"{source.path} is neither a .jsonl or .parquet file nor a data set that the hub gives us ({type(error).__name__}: {error}): "
            "check the id, the split, and access to the hub"
        ) from error
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{source.path}[{source.split}]", number, dict(values))
