"""From the `data` section and a tokenizer to examples on disk: read, check, encode, audit, save."""

import hashlib
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from altiplano.data import audit
from altiplano.data.formats import Row, RowError, canonical
from altiplano.data.sources import read
from altiplano.data.templates import ChatTemplate, Example, Message, encode_text
from altiplano.models.manifest import verify_manifest, write_manifest
from altiplano.spec import Data, DataSource


@dataclass(frozen=True)
class EvalRow:
    """A held-out row: what the model is asked, and the answer that is compared with its own. Without a question (a plain text,
    or a conversation that does not end with the assistant) the prompt is the first token alone, and `reference` is empty."""

    number: int
    messages: list[Message]
    prompt_ids: list[int]
    reference: str
    input_ids: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Prepared:
    """Data ready for training and evaluation. `digest` covers tokens, template and mask."""

    train: list[Example]
    eval: list[Example]
    eval_rows: list[EvalRow]
    report: audit.AuditReport
    digest: str
    template_digest: str

    def save(self, directory: Path) -> None:
        """Write to `directory` with a manifest; a crash leaves what was there or nothing, never half."""
        scratch = directory.with_name(directory.name + ".tmp")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        _write_lines(scratch / "train.jsonl", (asdict(e) for e in self.train))
        _write_lines(scratch / "eval.jsonl", (asdict(r) for r in self.eval_rows))
        meta = {"digest": self.digest, "template_digest": self.template_digest, "report": self.report.to_dict()}
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1))
        write_manifest(scratch)
        shutil.rmtree(directory, ignore_errors=True)
        scratch.rename(directory)

    @classmethod
    def load(cls, directory: Path) -> "Prepared":
        """Read what `save` wrote.

        Raises:
            ManifestError: a file is missing or was changed.
        """
        verify_manifest(directory)
        meta = json.loads((directory / "meta.json").read_text())
        report = meta["report"]
        findings = {
            kind: tuple(audit.Finding(**{**f, "rows": tuple(f["rows"])}) for f in report[kind]) for kind in ("errors", "warnings")
        }
        bars = {int(bound): count for bound, count in report["histogram"].items()}
        rows = [EvalRow(**values) for values in _read_lines(directory / "eval.jsonl")]
        return cls(
            train=[Example(**values) for values in _read_lines(directory / "train.jsonl")],
            eval=[Example(row.input_ids, row.labels) for row in rows],
            eval_rows=rows,
            report=audit.AuditReport(**{**report, **findings, "histogram": bars}),
            digest=meta["digest"],
            template_digest=meta["template_digest"],
        )


def prepare(data: Data, tokenizer: Any) -> Prepared:
    """Read, encode and audit everything that `data` names.

    Raises:
        SourceError: a file or data set that cannot be read.
        AuditError: rows that must not be trained on; all of them are listed.
    """
    errors, template = audit.Findings(), ChatTemplate(data.date_string)
    train_rows, eval_rows = _rows(data.datasets, errors), _rows(data.eval_datasets, errors)
    train_rows, train = _encode(train_rows, template, tokenizer, data.assistant_only_loss, errors)
    eval_rows, evaluation = _encode(eval_rows, template, tokenizer, data.assistant_only_loss, errors)
    for rows, examples in ((train_rows, train), (eval_rows, evaluation)):
        audit.check_examples([(r.source, r.number) for r in rows], examples, data.max_length, errors)
    warnings = audit.Findings()
    duplicates = audit.find_duplicates((r.source, r.number, _whole(r)) for r in train_rows).all()
    overlap = audit.find_overlap(
        (_question(r) for r in train_rows), ((r.source, r.number, _question(r)) for r in eval_rows)
    ).all()
    stops = [*errors.all(), *(() if data.allow_duplicates else duplicates), *(() if data.allow_overlap else overlap)]
    notes = [*warnings.all(), *(duplicates if data.allow_duplicates else ()), *(overlap if data.allow_overlap else ())]
    report = _report(train, evaluation, stops, notes)
    report.raise_for_errors()
    if not train or not evaluation:
        raise audit.AuditError(
            f"there are {len(train)} training and {len(evaluation)} evaluation rows: at least one of each is needed"
        )
    held_out = [_eval_row(r, e, template, tokenizer) for r, e in zip(eval_rows, evaluation, strict=True)]
    return Prepared(train, evaluation, held_out, report, _digest(train, evaluation, template), template.digest)


def _rows(sources: Sequence[DataSource], errors: audit.Findings) -> list[Row]:
    rows = []
    for source in sources:
        for raw in read(source):
            if raw.problem is not None:
                errors.add(raw.source, raw.number, raw.problem, "correct or remove them")
                continue
            try:
                rows.append(canonical(raw, source.format))
            except RowError as error:
                errors.add(raw.source, raw.number, str(error), "correct or remove them")
    return rows


def _encode(
    rows: Sequence[Row], template: ChatTemplate, tokenizer: Any, assistant_only: bool, errors: audit.Findings
) -> tuple[list[Row], list[Example]]:
    """The rows that the format can express, and their tokens."""
    bos, eos = tokenizer.convert_tokens_to_ids("<|begin_of_text|>"), tokenizer.convert_tokens_to_ids("<|end_of_text|>")
    kept, examples = [], []
    for row in rows:
        try:
            if row.text is not None:
                example = encode_text(tokenizer, row.text, bos, eos)
            else:
                example = template.encode(tokenizer, row.messages, assistant_only=assistant_only)
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            errors.add(row.source, row.number, f"does not fit the chat format ({error})", "correct or remove them")
            continue
        kept.append(row)
        examples.append(example)
    return kept, examples


def _eval_row(row: Row, example: Example, template: ChatTemplate, tokenizer: Any) -> EvalRow:
    """The question is everything before the last assistant message; a plain text has no question."""
    if row.text is not None or row.messages[-1]["role"] != "assistant":
        return EvalRow(row.number, list(row.messages), example.input_ids[:1], "", example.input_ids, example.labels)
    prompt = template.encode_prompt(tokenizer, row.messages[:-1])
    # As the model writes it, tool calls included: what is generated is decoded the same way.
    reference = tokenizer.decode(example.input_ids[len(prompt) :], skip_special_tokens=True).strip()
    return EvalRow(row.number, list(row.messages), prompt, reference, example.input_ids, example.labels)


def _report(
    train: Sequence[Example], evaluation: Sequence[Example], errors: Iterable[audit.Finding], warnings: Iterable[audit.Finding]
) -> audit.AuditReport:
    lengths = [len(example.input_ids) for example in train]
    learned = sum(label != -100 for example in train for label in example.labels)
    return audit.AuditReport(
        errors=tuple(errors),
        warnings=tuple(warnings),
        train_rows=len(train),
        eval_rows=len(evaluation),
        train_tokens=sum(lengths),
        longest=max(lengths, default=0),
        supervised_fraction=learned / max(1, sum(lengths)),
        histogram=audit.histogram(lengths),
    )


def _digest(train: Sequence[Example], evaluation: Sequence[Example], template: ChatTemplate) -> str:
    sha = hashlib.sha256(template.digest.encode())
    for example in (*train, *evaluation):
        sha.update(json.dumps([example.input_ids, example.labels]).encode())
    return sha.hexdigest()


def _whole(row: Row) -> str:
    return row.text if row.text is not None else "\n".join(str(m["content"]) for m in row.messages)


def _question(row: Row) -> str:
    return row.text if row.text is not None else "\n".join(str(m["content"]) for m in row.messages if m["role"] != "assistant")


def _write_lines(path: Path, values: Iterable[dict[str, Any]]) -> None:
    with path.open("w") as stream:
        for value in values:
            stream.write(json.dumps(value) + "\n")


def _read_lines(path: Path) -> Iterable[dict[str, Any]]:
    with path.open() as stream:
        for line in stream:
            yield json.loads(line)
