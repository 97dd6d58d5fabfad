"""What is wrong with the data, found before a GPU starts: files, row numbers, what to change."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from altiplano.data.templates import IGNORED, Example

SHOWN = 10  # row numbers per finding


class AuditError(ValueError):
    """The data cannot be trained on."""


@dataclass(frozen=True)
class Finding:
    """One kind of problem in one file. `rows` are the first row numbers, `count` all of them."""

    source: str
    problem: str
    fix: str
    rows: tuple[int, ...]
    count: int

    def __str__(self) -> str:
        more = f" and {self.count - len(self.rows)} more" if self.count > len(self.rows) else ""
        rows = ", ".join(str(row) for row in self.rows)
        return f"{self.source}: row{'s' if self.count > 1 else ''} {rows}{more}: {self.problem}; {self.fix}"


@dataclass(frozen=True)
class AuditReport:
    """Errors stop a run, warnings do not. Lengths are in tokens, histograms are {upper bound: rows}."""

    errors: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    train_rows: int
    eval_rows: int
    train_tokens: int
    longest: int
    supervised_fraction: float
    histogram: dict[int, int]

    def raise_for_errors(self) -> None:
        """Raises AuditError with every error."""
        if self.errors:
            raise AuditError("the data audit found:\n" + "\n".join(f"  {finding}" for finding in self.errors))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report for people."""
        width = max(self.histogram.values(), default=1)
        bars = [
            f"  ≤ {bound:>6,} tokens {'█' * max(1, round(40 * count / width))} {count:,}"
            for bound, count in self.histogram.items()
        ]
        return [
            f"{self.train_rows:,} training rows, {self.train_tokens:,} tokens, longest {self.longest:,}; {self.eval_rows:,} evaluation rows",
            f"{self.supervised_fraction:.1%} of the tokens are learned",
            *bars,
            *(f"warning: {finding}" for finding in self.warnings),
        ]


@dataclass
class Findings:
    """Collects problems row by row and groups them by file and kind."""

    _rows: dict[tuple[str, str, str], list[int]] = field(default_factory=lambda: defaultdict(list))

    def add(self, source: str, number: int, problem: str, fix: str) -> None:
        self._rows[(source, problem, fix)].append(number)

    def all(self) -> tuple[Finding, ...]:
        return tuple(Finding(s, p, f, tuple(rows[:SHOWN]), len(rows)) for (s, p, f), rows in self._rows.items())


def check_examples(rows: Sequence[tuple[str, int]], examples: Sequence[Example], max_length: int, errors: Findings) -> None:
    """Rows that would teach nothing, or whose answer would be cut. `rows` are (source, number)."""
    for (source, number), example in zip(rows, examples, strict=True):
        length = len(example.input_ids)
        if length > max_length:
            errors.add(
                source,
                number,
                f"longer than data.max_length ({max_length} tokens)",
                f"shorten them, or set data.max_length={_round_up(length)}",
            )
        if all(label == IGNORED for label in example.labels[1:]):
            errors.add(
                source, number, "no token to learn from (no assistant message)", "add the assistant's answer, or remove them"
            )


def find_duplicates(rows: Iterable[tuple[str, int, str]]) -> Findings:
    """Rows with the text of an earlier row. `rows` are (source, number, text)."""
    seen: set[bytes] = set()
    found = Findings()
    for source, number, text in rows:
        key = _key(text)
        if key in seen:
            found.add(source, number, "the same as an earlier row", "remove them, or set data.allow_duplicates=true")
        seen.add(key)
    return found


def find_overlap(train: Iterable[str], evaluation: Iterable[tuple[str, int, str]]) -> Findings:
    """Evaluation rows whose prompt also occurs in the training data: they measure memory, not skill."""
    known = {_key(text) for text in train}
    found = Findings()
    for source, number, text in evaluation:
        if _key(text) in known:
            found.add(source, number, "also in the training data", "remove them from one side, or set data.allow_overlap=true")
    return found


def histogram(lengths: Sequence[int]) -> dict[int, int]:
    """Counts by powers of two."""
    counts: dict[int, int] = {}
    for length in lengths:
        bound = 1 << max(0, length - 1).bit_length()
        counts[bound] = counts.get(bound, 0) + 1
    return dict(sorted(counts.items()))


def _key(text: str) -> bytes:
    """Digest of the text without regard to case and spacing."""
    return hashlib.sha256(" ".join(text.lower().split()).encode()).digest()


def _round_up(length: int) -> int:
    return -(-length // 64) * 64
