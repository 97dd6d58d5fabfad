"""From files to rows: formats, stores, and rows that must not be learned from."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer
from transformers import AutoTokenizer

from altiplano import spec
from altiplano.data import AuditError, Prepared, prepare
from altiplano.data.formats import RowError, canonical
from altiplano.data.sources import RawRow, SourceError, read
from altiplano.models.cria import cria_path
from altiplano.models.manifest import ManifestError

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(cria_path())


def jsonl(path: Path, rows: list[Any]) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def data(train: str, evaluation: str, **more: Any) -> spec.Data:
    return spec.Data.model_validate(
        {"datasets": [{"path": train}], "eval_datasets": [{"path": evaluation}], "max_length": 128} | more
    )


def chat(question: str, answer: str = "yes") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


@pytest.mark.parametrize(
    "values",
    [
        CHAT,
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"prompt": "hi", "completion": "hello"},
        {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "hello"}]},
        {"instruction": "hi", "input": "", "output": "hello"},
    ],
)
def test_dialogue_formats_are_detected_and_mean_the_same(values: dict[str, Any]) -> None:
    assert list(canonical(RawRow("f", 1, values), "auto").messages) == CHAT["messages"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"foo": 1}, "fit no format"),
        ({"messages": []}, "no messages"),
        ({"messages": "hi"}, "not a list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "role 'robot'"),
        ({"messages": [{"role": "user", "content": " "}]}, "is empty"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "only the first"),
        ({"text": ""}, "text is empty"),
    ],
)
def test_rows_that_break_their_format_say_how(values: dict[str, Any], words: str) -> None:
    with pytest.raises(RowError, match=words):
        canonical(RawRow("f", 1, values), "auto")


def test_jsonl_gzip_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(5)]
    plain = jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for name in ("rows.jsonl", "rows.jsonl.gz", "rows.parquet"):
        found = list(read(spec.DataSource(path=str(tmp_path / name))))
        assert [row.values for row in found] == rows, name
        assert [row.number for row in found] == [1, 2, 3, 4, 5]


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """An S3 server with one bucket."""
    import boto3

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    patch = pytest.MonkeyPatch()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "FSSPEC_S3_ENDPOINT_URL": endpoint,
    }.items():
        patch.setenv(name, value)
    boto3.client("s3", endpoint_url=endpoint).create_bucket(Bucket="rows")
    yield endpoint
    patch.undo()
    server.stop()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_rows_come_from_an_object_store(bucket: str) -> None:
    import boto3

    boto3.client("s3", endpoint_url=bucket).put_object(Bucket="rows", Key="a/train.jsonl", Body=json.dumps(CHAT).encode())
    (row,) = read(spec.DataSource(path="s3://rows/a/train.jsonl"))
    assert row.values == CHAT
    with pytest.raises(SourceError, match="does not exist"):
        list(read(spec.DataSource(path="s3://rows/a/absent.jsonl")))


def test_a_missing_file_says_where_to_look(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data\.datasets"):
        list(read(spec.DataSource(path=str(tmp_path / "absent.jsonl"))))


def test_the_audit_lists_everything_that_is_wrong(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(
        tmp_path / "train.jsonl",
        [
            chat("one"),
            "{not json",
            chat("two"),
            chat("TWO "),
            {"messages": [{"role": "user", "content": "nobody answers"}]},
            chat("three", "long " * 200),
            chat("asked"),
        ],
    )
    evaluation = jsonl(tmp_path / "eval.jsonl", [chat("asked", "no"), chat("new")])
    with pytest.raises(AuditError) as caught:
        prepare(data(train, evaluation), tokenizer)
    text = str(caught.value)
    for words in (
        f"{train}: row 2: is not JSON",
        f"{train}: row 4: the same as an earlier row",
        f"{train}: row 5: no token to learn from",
        f"{train}: row 6: longer than data.max_length",
        f"{evaluation}: row 1: also in the training data",
    ):
        assert words in text


def test_duplicates_and_overlap_can_be_allowed(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", [chat("one"), chat("one")])
    evaluation = jsonl(tmp_path / "eval.jsonl", [chat("one")])
    report = prepare(data(train, evaluation, allow_duplicates=True, allow_overlap=True), tokenizer).report
    assert [finding.rows for finding in report.warnings] == [(2,), (1,)]


def test_prepared_data_survives_the_disk_and_notices_a_flipped_byte(tmp_path: Path, tokenizer: Any) -> None:
    train = jsonl(tmp_path / "train.jsonl", [chat(f"question {i}", f"answer {i}") for i in range(20)])
    evaluation = jsonl(tmp_path / "eval.jsonl", [chat("new", "Yes.")])
    prepared = prepare(data(train, evaluation), tokenizer)
    prepared.save(tmp_path / "out")
    assert Prepared.load(tmp_path / "out") == prepared
    (row,) = prepared.eval_rows
    assert row.reference == "Yes."
    assert row.input_ids[: len(row.prompt_ids)] == row.prompt_ids
    lines = bytearray((tmp_path / "out/train.jsonl").read_bytes())
    lines[40] ^= 1
    (tmp_path / "out/train.jsonl").write_bytes(lines)
    with pytest.raises(ManifestError, match=r"train\.jsonl"):
        Prepared.load(tmp_path / "out")


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(json.dumps(CHAT).encode() + b"\n" for _ in range(2000)))
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "no.parquet").write_bytes(b"PAR1 this is none")
    for name in ("cut.jsonl.gz", "no.parquet"):
        with pytest.raises(SourceError, match=f"{name} cannot be read"):
            list(read(spec.DataSource(path=str(tmp_path / name))))


def test_rows_that_the_chat_format_cannot_express_are_named(tmp_path: Path, tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "buy", "arguments": {"item": "pie"}}}
    twice = {"messages": [{"role": "user", "content": "Buy"}, {"role": "assistant", "content": "", "tool_calls": [call, call]}]}
    with pytest.raises(AuditError, match=r"train.jsonl: row 2: does not fit the chat format"):
        prepare(data(jsonl(tmp_path / "train.jsonl", [chat("a"), twice]), jsonl(tmp_path / "eval.jsonl", [chat("b")])), tokenizer)


def test_what_is_compared_is_what_the_model_would_write(tmp_path: Path, tokenizer: Any) -> None:
    call = {"type": "function", "function": {"name": "buy", "arguments": {"item": "pie"}}}
    rows = [
        {"messages": [{"role": "user", "content": "Buy"}, {"role": "assistant", "content": "", "tool_calls": [call]}]},
        {
            "messages": [
                {"role": "user", "content": "a?"},
                {"role": "assistant", "content": "first"},
                *chat("b?", "second")["messages"],
            ]
        },
    ]
    found = prepare(data(jsonl(tmp_path / "train.jsonl", [chat("x")]), jsonl(tmp_path / "eval.jsonl", rows)), tokenizer).eval_rows
    assert json.loads(found[0].reference) == {"name": "buy", "parameters": {"item": "pie"}}
    assert found[1].reference == "second"
