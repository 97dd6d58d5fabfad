"""A file of rows to a file of answers: concurrent, resumable, atomic."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from altiplano.client.errors import EndpointGoneError, RefusedError
from altiplano.client.journal import Journal
from altiplano.client.retry import Sender
from altiplano.client.rows import Asking, Row, RowFormat, format_of, read_rows
from altiplano.client.written import write_answers

# So many rows in a row that nobody answered mean that the endpoint is gone; fewer mean rows that it cannot stand.
GONE_AFTER = 8


@dataclass
class Progress:
    """Counts of one run. `resumed` rows were answered by an earlier run; tokens are of this run's answers."""

    total: int
    resumed: int = 0
    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Batch:
    """One batch: where rows come from, where answers go, how rows are asked."""

    input: Path
    output: Path
    asking: Asking
    concurrency: int = 16

    @property
    def failed_path(self) -> Path:
        """Where refused rows go, such as answers.failed.jsonl."""
        return self.output.with_name(f"{self.output.stem}.failed{self.output.suffix}")

    @property
    def journal_path(self) -> Path:
        return self.output.with_name(f"{self.output.name}.journal")


async def run_batch(batch: Batch, sender: Sender, on_row: Callable[[Progress], None] = lambda progress: None) -> Progress:
    """Ask every row that has no answer yet, then write both outputs.

    All rows are read once before the first is asked, so that a bad row costs nothing. A failed row is one that the endpoint
    refused; run the same batch again and only failed rows are asked.

    Raises:
        ValueError: a bad row, or an output that belongs to other rows.
        EndpointGoneError: nobody answers any more. What was answered is kept: run the same command again.
    """
    if batch.output.resolve() == batch.input.resolve():
        raise ValueError(f"{batch.output} is the input: choose another output")
    keys = [row.key() for row in checked(batch)]
    if not keys:
        raise ValueError(f"{batch.input} has no rows")
    if batch.output.exists() and not batch.journal_path.exists():
        raise ValueError(f"{batch.output} exists already: choose another output, or ask everything again with --overwrite")
    batch.output.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with Journal(batch.journal_path) as journal:
        known = sum(key in journal for key in keys)
        if batch.output.exists() and not known:
            raise ValueError(f"{batch.output} holds answers to other rows: choose another output, or use --overwrite")
        refused = sum(journal.is_failure(key) for key in keys)
        progress = Progress(total=len(keys), resumed=known - refused, failed=refused)
        waiting = (row for row in read_rows(batch.input, batch.asking) if keys[row.index] not in journal)
        try:
            await _Run(sender, journal, progress, on_row).ask_all(waiting, batch.concurrency)
        finally:
            progress.retries, progress.seconds = sender.retries, time.monotonic() - started
        rows = ((row, journal.result(keys[row.index])) for row in read_rows(batch.input, batch.asking))
        write_answers(rows, batch.output, batch.failed_path, batch.asking.answer_column)
        if progress.failed:
            journal.finish()
        else:
            journal.remove()
    return progress


def checked(batch: Batch) -> Iterator[Row]:
    """The rows, refused with a ValueError where the output's format cannot hold their answers."""
    columns: list[str] | None = None
    for row in read_rows(batch.input, batch.asking):
        if format_of(batch.output) is RowFormat.csv:
            columns = columns or list(row.source)
            if row.custom_id is not None or list(row.source) != columns:
                raise ValueError(f"{row.where}: only rows that all have the same columns fit into CSV: name the output *.jsonl")
        yield row


class _Run:
    """The rows in flight."""

    def __init__(self, sender: Sender, journal: Journal, progress: Progress, on_row: Callable[[Progress], None]) -> None:
        self._sender, self._journal, self._progress, self._on_row = sender, journal, progress, on_row
        self._unanswered: list[tuple[Row, dict[str, Any]]] = []
        self._last_word: EndpointGoneError | None = None

    async def ask_all(self, rows: Iterator[Row], concurrency: int) -> None:
        workers = [asyncio.create_task(self._worker(rows)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*workers)
            if self._last_word is not None and not self._progress.answered:
                raise self._last_word
            self._settle()
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self, rows: Iterator[Row]) -> None:
        for row in rows:
            try:
                reply = await self._sender.post(row.path, row.body)
            except RefusedError as error:
                if error.status in (401, 403):
                    raise  # every other row would be told the same
                self._note(row, {"status_code": error.status, "request_id": error.request_id, "error": _error(error, error.code)})
            except EndpointGoneError as error:
                self._last_word = error
                self._unanswered.append(
                    (row, {"status_code": error.status, "request_id": None, "error": _error(error, "unavailable")})
                )
                if len(self._unanswered) >= GONE_AFTER:
                    raise
            else:
                self._settle()
                usage = reply.body.get("usage") or {}
                self._progress.prompt_tokens += usage.get("prompt_tokens", 0)
                self._progress.completion_tokens += usage.get("completion_tokens", 0)
                self._note(row, {"status_code": reply.status, "request_id": reply.request_id, "body": reply.body})

    def _settle(self) -> None:
        """The endpoint lives: rows that got no answer have themselves to blame."""
        for row, result in self._unanswered:
            self._note(row, result)
        self._unanswered.clear()

    def _note(self, row: Row, result: dict[str, Any]) -> None:
        self._journal.add(row.key(), result)
        if "error" in result:
            self._progress.failed += 1
        else:
            self._progress.answered += 1
        self._on_row(self._progress)


def _error(error: Exception, code: str | None) -> dict[str, Any]:
    return {"code": code, "message": str(error)}
