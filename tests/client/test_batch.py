"""A file of rows becomes a file of answers, whatever happens on the way."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from altiplano import spec
from altiplano.client import Backoff, EndpointGoneError, RefusedError, Sender
from altiplano.client.batch import Batch, Progress, run_batch
from altiplano.client.rows import Asking
from altiplano.serve.governance import Governance
from altiplano.serve.keys import KeyFile

from ..serve.conftest import Server, settings
from .conftest import CLOSE, Scripted, VirtualTime, with_sender

ALTIPLANO = [sys.executable, "-m", "altiplano.cli"]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "prompt": f"row {i}"} for i in range(count)]


def run(scripted: Scripted, time: VirtualTime, batch: Batch, backoff: Backoff | None = None) -> Progress:
    async def ask(sender: Sender) -> Progress:
        return await run_batch(batch, sender)

    progress: Progress = with_sender(scripted.url, time, ask, backoff)
    return progress


def make(tmp_path: Path, rows: list[dict[str, Any]], output: str = "out.jsonl", concurrency: int = 4, **asking: Any) -> Batch:
    return Batch(write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / output, Asking("cria", **asking), concurrency)


def test_answers_keep_the_order_and_the_columns_of_the_rows(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    batch = make(tmp_path, prompts(20), system="Be short.", parameters={"max_tokens": 5})
    progress = run(scripted, time, batch)
    assert progress.answered == 20 and progress.completion_tokens == 40 and not progress.failed
    assert [(row["id"], row["answer"]) for row in read_jsonl(batch.output)] == [(i, f"re: row {i}") for i in range(20)]
    assert scripted.seen[0].body["messages"][0] == {"role": "system", "content": "Be short."}
    assert scripted.seen[0].body["max_tokens"] == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_openais_batch_format_goes_in_and_comes_out(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    rows = [
        {
            "custom_id": f"q-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"model": "gpt-x", "messages": [{"role": "user", "content": f"row {i}"}], "temperature": 0.5},
        }
        for i in range(3)
    ]
    scripted.plan = lambda seen: (400, {}) if seen.prompt == "row 1" else (200, {})
    batch = make(tmp_path, rows, model="champion", parameters={"temperature": 0.0, "max_tokens": 7})
    assert run(scripted, time, batch).failed == 1
    assert scripted.seen[0].body["model"] == "champion"
    assert (scripted.seen[0].body["temperature"], scripted.seen[0].body["max_tokens"]) == (0.5, 7)
    good, bad = read_jsonl(batch.output), read_jsonl(batch.failed_path)
    assert [row["custom_id"] for row in good] == ["q-0", "q-2"]
    assert good[1]["response"]["body"]["choices"][0]["message"]["content"] == "re: row 2"
    assert good[1]["response"]["status_code"] == 200 and good[1]["error"] is None
    assert bad[0]["custom_id"] == "q-1" and bad[0]["error"] == {"code": "said_no", "message": "400: no: row 1"}


def test_csv_with_a_template(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text('name,note\nThea,"two, small\npies"\nOmar,"say ""hi"""\n')
    batch = Batch(source, tmp_path / "out.csv", Asking("cria", template="{name}: {note}"))
    run(scripted, time, batch)
    with batch.output.open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert [row["answer"] for row in rows] == ["re: Thea: two, small\npies", 're: Omar: say "hi"']
    assert rows[0]["note"] == "two, small\npies" and rows[1]["completion_tokens"] == "2"


def test_failed_rows_get_their_own_file_and_are_asked_again_on_demand(
    scripted: Scripted, time: VirtualTime, tmp_path: Path
) -> None:
    batch = make(tmp_path, prompts(6))
    scripted.plan = lambda seen: (400, {}) if seen.prompt in ("row 1", "row 4") else (200, {})
    assert run(scripted, time, batch).failed == 2
    assert [row["id"] for row in read_jsonl(batch.failed_path)] == [1, 4]
    assert read_jsonl(batch.failed_path)[0]["error"] == "400: no: row 1"

    scripted.plan, scripted.seen = lambda seen: (200, {}), []
    again = run(scripted, time, batch)
    assert sorted(scripted.prompts()) == ["row 1", "row 4"]
    assert (again.resumed, again.answered, again.failed) == (4, 2, 0)
    assert [row["id"] for row in read_jsonl(batch.output)] == list(range(6))
    assert not batch.failed_path.exists() and not batch.journal_path.exists()


def test_a_row_that_the_endpoint_cannot_stand_does_not_stop_the_others(
    scripted: Scripted, time: VirtualTime, tmp_path: Path
) -> None:
    batch = make(tmp_path, prompts(5))
    scripted.plan = lambda seen: (CLOSE, {}) if seen.prompt == "row 2" else (200, {})
    assert run(scripted, time, batch, Backoff(max_retries=2)).failed == 1
    assert [row["id"] for row in read_jsonl(batch.failed_path)] == [2]
    assert scripted.prompts().count("row 2") == 3


def test_an_endpoint_that_goes_away_stops_the_run_and_costs_no_row(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    batch = make(tmp_path, prompts(40))
    scripted.plan = lambda seen: (503, {}) if len(scripted.seen) > 15 else (200, {})
    with pytest.raises(EndpointGoneError, match="503"):
        run(scripted, time, batch, Backoff(max_retries=1))
    assert not batch.output.exists()
    asked = set(scripted.prompts()[:15])

    scripted.plan, scripted.seen = lambda seen: (200, {}), []
    progress = run(scripted, time, batch)
    assert progress.failed == 0 and progress.resumed == 15
    assert not asked & set(scripted.prompts())
    assert [row["answer"] for row in read_jsonl(batch.output)] == [f"re: row {i}" for i in range(40)]


def test_a_wrong_key_stops_the_run_at_once(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    scripted.plan = lambda seen: (401, {})
    with pytest.raises(RefusedError, match="401"):
        run(scripted, time, make(tmp_path, prompts(50), concurrency=1))
    assert len(scripted.seen) == 1


def test_a_killed_run_goes_on_without_asking_answered_rows_again(scripted: Scripted, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", prompts(12)), tmp_path / "out.jsonl"
    command = [*ALTIPLANO, "batch", str(source), str(output), "--url", scripted.url, "--concurrency", "2", "-o", "json"]
    scripted.hold = lambda seen: int(seen.prompt.split()[1]) >= 7
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        # Both of its two workers wait for held rows, so every other answer is noted.
        for _ in range(2):
            assert scripted.held.acquire(timeout=120)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not output.exists()
    journal = output.with_name("out.jsonl.journal")
    journal.write_bytes(journal.read_bytes() + b'{"key": "torn')

    scripted.hold = lambda seen: False
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["resumed"], report["answered"]) == (7, 5)
    assert all(scripted.prompts().count(f"row {i}") == 1 for i in range(7))
    assert [row["answer"] for row in read_jsonl(output)] == [f"re: row {i}" for i in range(12)]


def test_two_runs_cannot_write_the_same_output(scripted: Scripted, tmp_path: Path, time: VirtualTime) -> None:
    batch = make(tmp_path, prompts(2))

    async def both(sender: Sender) -> None:
        def second(progress: Progress) -> None:
            with pytest.raises(ValueError, match="another batch"):
                from altiplano.client.journal import Journal

                Journal(batch.journal_path).__enter__()

        await run_batch(batch, sender, second)

    with_sender(scripted.url, time, both)


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("in.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2.*no JSON"),
        ("in.jsonl", "[1]\n", "line 1.*object"),
        ("in.jsonl", '{"prompt": NaN}\n', "NaN"),
        ("in.jsonl", '{"text": "a"}\n', "columns text"),
        ("in.jsonl", '{"prompt": "a", "answer": "b"}\n', "--answer-column"),
        ("in.jsonl", '{"custom_id": "a", "body": {}, "url": "/v1/embeddings"}\n', "/v1/chat/completions"),
        ("in.jsonl", '{"custom_id": "a", "body": {"stream": true}, "url": "/v1/completions"}\n', "streamed"),
        ("in.jsonl", '{"custom_id": "a", "body": {}, "url": "/v1/completions"}\n' * 2, "used twice"),
        ("in.jsonl", "\n", "no rows"),
        ("in.csv", "prompt,b\n1\n", "line 2.*2 columns"),
        ("in.csv", "prompt,prompt\n1,2\n", "used twice"),
        ("in.xlsx", "x", "jsonl or .csv"),
    ],
)
def test_a_bad_row_stops_the_run_before_the_first_question(
    scripted: Scripted, time: VirtualTime, tmp_path: Path, name: str, text: str, words: str
) -> None:
    source = tmp_path / name
    source.write_text(text)
    with pytest.raises(ValueError, match=f"(?s){words}"):
        run(scripted, time, Batch(source, tmp_path / "out.jsonl", Asking("cria")))
    assert not scripted.seen


def test_rows_that_do_not_fit_into_csv_are_told_so_first(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 2.*\.jsonl"):
        run(scripted, time, make(tmp_path, [{"prompt": "a"}, {"prompt": "b", "more": 1}], output="out.csv"))
    assert not scripted.seen


def test_a_finished_output_is_not_overwritten_by_accident(scripted: Scripted, time: VirtualTime, tmp_path: Path) -> None:
    batch = make(tmp_path, prompts(2))
    run(scripted, time, batch)
    with pytest.raises(ValueError, match="--overwrite"):
        run(scripted, time, batch)


def test_a_quota_is_waited_for(adapter: Path, tmp_path: Path, time: VirtualTime) -> None:
    """The endpoint's own quota, on the client's virtual clock: 10 requests a minute make 25 rows take a minute and a half."""
    keys = KeyFile(tmp_path / "keys.json")
    _, text = keys.create("batch", requests_per_minute=10)
    governance = Governance.of(spec.Serve(host="0.0.0.0", api_keys_file=str(keys.path)), clock=time.clock)
    served = Server(settings(adapter), governance)
    try:
        batch = make(tmp_path, prompts(25), model="cria", parameters={"max_tokens": 2})
        begun = time.now

        async def ask(sender: Sender) -> Progress:
            return await run_batch(batch, sender)

        progress: Progress = with_sender(f"{served.url}/v1", time, ask, Backoff(max_retries=0), text)
    finally:
        served.close()
    assert (progress.answered, progress.failed) == (25, 0) and progress.retries > 0
    assert time.now - begun >= 90


def test_ctrl_c_keeps_what_is_answered(scripted: Scripted, tmp_path: Path) -> None:
    source, output = write_jsonl(tmp_path / "in.jsonl", prompts(4)), tmp_path / "out.jsonl"
    scripted.hold = lambda seen: seen.prompt == "row 3"
    command = [*ALTIPLANO, "batch", str(source), str(output), "--url", scripted.url, "--concurrency", "1"]
    # A shell's background job ignores SIGINT, and so would what it starts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    assert scripted.held.acquire(timeout=120)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "run the same command to go on" in said and "Traceback" not in said
    assert len(output.with_name("out.jsonl.journal").read_text().splitlines()) == 3


def test_the_command_against_cria(server: Server, tmp_path: Path) -> None:
    """Good rows are answered, a row that asks too much lands in the failed file, and the exit code says so."""
    note = "Priya wants 3 melon pies at 14 Elm Street on Friday. Where?"
    rows = [
        {"custom_id": "a", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": note}]}},
        {"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": note}], "n": 99}},
    ]
    source, output = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    command = [
        *ALTIPLANO,
        "batch",
        str(source),
        str(output),
        "--url",
        f"{server.url}/v1",
        "--model",
        "cria",
        "--max-tokens",
        "40",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "1 of 2 rows answered" in done.stdout and "out.failed.jsonl" in done.stderr
    assert read_jsonl(output)[0]["response"]["body"]["choices"][0]["message"]["content"] == "14 Elm Street"
    assert "n:" in read_jsonl(tmp_path / "out.failed.jsonl")[0]["error"]["message"]
