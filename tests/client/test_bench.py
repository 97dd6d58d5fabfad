"""The load generator against servers: what is sent, when, and what is noted."""

import asyncio
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from altiplano.client import Endpoint, EndpointGoneError, RefusedError
from altiplano.client.bench.load import Record, run_load
from altiplano.client.bench.plan import CONNECT_TIMEOUT_S, Arrivals, Backend, DataSet, DataSetName, Plan, run_plan
from altiplano.client.bench.samples import custom_samples, prefix_repetition_samples, random_samples, trace_samples

from ..serve.conftest import Server
from .conftest import Scripted, read_body, respond, serve_app

VLLM_KEYS = {
    f"{statistic}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el") for statistic in ("mean", "median", "std", "p99")
} | {
    "date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens", "total_output_tokens", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "max_output_tokens_per_s", "max_concurrent_requests",
    "input_lens", "output_lens", "ttfts", "itls", "start_times", "generated_texts", "errors",
}  # fmt: skip


@dataclass
class Streaming:
    """Streams three words, the first only once `wait_for` requests are in flight together."""

    wait_for: int = 1
    usage: bool = True
    words: tuple[str, ...] = ("one", " two", " three")
    break_after: int | None = None
    in_flight: int = 0
    most: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.enough = asyncio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        body = await read_body(receive)
        if scope["path"] == "/tokenize":
            await respond(send, 200, {"count": len(body["prompt"].split())})
            return
        self.bodies.append(body)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        if self.in_flight >= self.wait_for:
            self.enough.set()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})

        async def event(value: Any) -> None:
            data = value if isinstance(value, str) else json.dumps(value)
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        await event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        await self.enough.wait()
        for number, word in enumerate(self.words):
            if number == self.break_after:
                self.in_flight -= 1
                await send({"type": "http.response.body", "body": b""})
                return
            await event({"choices": [{"delta": {"content": word}, "finish_reason": None}]})
        await event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        if self.usage:
            await event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
        self.in_flight -= 1
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def streaming() -> Iterator[Streaming]:
    app = Streaming()
    for url in serve_app(app):
        app.url = url
        yield app


def load(url: str, count: int, max_concurrency: int | None = None) -> list[Record]:
    async def main() -> list[Record]:
        async with Endpoint(url).open(None, CONNECT_TIMEOUT_S) as client:
            bodies = [{"model": "cria", "prompt": "x", "number": i} for i in range(count)]
            return (
                await run_load(client, "chat/completions", bodies, [0.001 * i for i in range(count)], max_concurrency)
            ).records

    return asyncio.run(main())


def plan_records(url: str, plan: Plan) -> list[Record]:
    return asyncio.run(run_plan(plan, Endpoint(url)))[1][0].records


def test_requests_leave_on_time_while_no_answer_comes(streaming: Streaming) -> None:
    """The server answers nobody before all have asked. A client that waits for answers would wait forever."""
    streaming.wait_for = 50
    records = load(streaming.url, 50)
    assert streaming.most == 50
    assert all(record.error is None and record.started >= record.scheduled for record in records)
    assert [body["number"] for body in sorted(streaming.bodies, key=lambda body: body["number"])] == list(range(50))


def test_several_processes_send_one_load(streaming: Streaming) -> None:
    """All forty are in flight together, although each process has twenty."""
    streaming.wait_for = 40
    plan = Plan(
        model="cria",
        data=DataSet(random_input_len=5, random_range_ratio=0.9),
        num_prompts=40,
        num_warmups=0,
        processes=2,
        arrivals=Arrivals(request_rate=400.0, max_concurrency=40),
    )
    (run,) = asyncio.run(run_plan(plan, Endpoint(streaming.url)))[1]
    assert streaming.most == 40 and all(record.error is None for record in run.records)
    assert [record.scheduled for record in run.records] == sorted(record.scheduled for record in run.records)
    assert all(0 <= record.scheduled <= record.released <= record.started for record in run.records)
    assert run.cpu_share > 0
    wrong = replace(plan, processes=3, arrivals=Arrivals(max_concurrency=2))
    with pytest.raises(ValueError, match="--max-concurrency 2"):
        asyncio.run(run_plan(wrong, Endpoint(streaming.url)))


def test_a_bound_on_concurrency_holds_and_the_wait_is_told(streaming: Streaming) -> None:
    records = load(streaming.url, 30, max_concurrency=3)
    assert streaming.most <= 3
    assert all(record.scheduled <= record.released <= record.started <= record.first <= record.ended for record in records)
    assert max(record.started - record.released for record in records) > 0


def test_only_text_is_a_token_and_usage_counts(streaming: Streaming) -> None:
    (record,) = load(streaming.url, 1)
    assert len(record.pieces) == 3 and record.text == "one two three"
    assert (record.prompt_tokens, record.output_tokens, record.has_usage) == (9, 4, True)
    assert record.ended >= record.pieces[-1] > record.started


def test_without_usage_chunks_are_counted_and_that_is_noted(streaming: Streaming) -> None:
    streaming.usage = False
    (record,) = load(streaming.url, 1)
    assert (record.output_tokens, record.has_usage) == (3, False)


def test_failures_are_records(streaming: Streaming, scripted: Scripted) -> None:
    streaming.break_after = 1
    (broken,) = load(streaming.url, 1)
    assert broken.error == "the stream broke off before the answer's end"
    streaming.break_after, streaming.words = None, ()
    (silent,) = load(streaming.url, 1)
    assert silent.error is None and silent.first == silent.ended > 0
    scripted.plan = lambda seen: (429, {"retry-after": "1"})
    assert (load(scripted.url, 1)[0].error or "").startswith("429")
    assert "ConnectError" in (load("http://127.0.0.1:9/v1", 1)[0].error or "")


def test_random_prompts_have_their_length_and_repeat_by_seed(server: Server) -> None:
    data = DataSet(random_input_len=40, random_output_len=6, random_range_ratio=0.5, random_prefix_len=10)
    plan = Plan(model="cria", data=data, num_prompts=8, fields={"ignore_eos": True, "temperature": 0}, seed=3)
    records = plan_records(server.url + "/v1", plan)
    asked = random_samples(8, 40, 6, None, random.Random(3), range_ratio=0.5, prefix_len=10)
    assert [record.prompt_tokens for record in records] == [len(sample.prompt) for sample in asked]
    assert [record.output_tokens for record in records] == [sample.output_len for sample in asked]
    assert len({sample.output_len for sample in asked}) > 1
    assert all(record.error is None and record.has_usage for record in records)
    assert all(sample.prompt[:10] == asked[0].prompt[:10] for sample in asked)


def test_random_text_for_chats_is_measured_with_the_endpoints_own_tokens(server: Server) -> None:
    plan = Plan(Backend.openai_chat, "cria", data=DataSet(random_input_len=100, random_output_len=3), num_prompts=12)
    lengths = [record.prompt_tokens for record in plan_records(server.url + "/v1", plan)]
    empty = {"model": "cria", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=empty, timeout=60)
    overhead = response.json()["usage"]["prompt_tokens"] - 1
    # Random words: each prompt varies, their mean does not.
    assert sum(lengths) / len(lengths) - overhead == pytest.approx(100, rel=0.08)


def test_repeated_prefixes_hit_the_prefix_cache(server: Server) -> None:
    def cached() -> float:
        stats = server.run(server.generator.client.stats())
        return float(stats["cached_tokens"])

    data = DataSet(
        DataSetName.prefix_repetition,
        prefix_repetition_prefix_len=64,
        prefix_repetition_suffix_len=8,
        prefix_repetition_num_prefixes=2,
        prefix_repetition_output_len=2,
    )
    before = cached()
    plan = Plan(model="cria", data=data, num_prompts=8, num_warmups=0, arrivals=Arrivals(max_concurrency=1))
    records = plan_records(server.url + "/v1", plan)
    assert all(record.prompt_tokens == 72 for record in records)
    # Six of eight find their prefix, in whole pages.
    assert cached() - before == 6 * 64
    with pytest.raises(ValueError, match="--num-prompts"):
        prefix_repetition_samples(3, 4, 4, 10, 1, None, random.Random(0))


def test_custom_rows_bring_their_lengths_and_small_files_repeat(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 5}\n\n{"prompt": "b"}\n')
    asked = custom_samples(path, 5, 9, random.Random(0))
    assert [(sample.prompt, sample.output_len) for sample in asked[:2]] == [("a", 5), ("b", 9)]
    assert len(asked) == 5
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match=r"line 2.*prompt"):
        custom_samples(path, 5, 9, random.Random(0))


def test_sharegpt_takes_first_turns_of_a_useful_length(streaming: Streaming, tmp_path: Path) -> None:
    path = tmp_path / "sharegpt.json"
    turns = [("one two three four five", "1 2 3 4 5 6"), ("hi", "hello there my good friend"), ("w " * 1100, "1 2 3 4 5")]
    talks = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in turns]
    path.write_text(json.dumps([*talks, {"conversations": []}]))
    plan = Plan(Backend.openai_chat, "cria", data=DataSet(DataSetName.sharegpt, path), num_prompts=2, num_warmups=0)
    plan_records(streaming.url, plan)
    assert [(body["messages"][0]["content"], body["max_tokens"]) for body in streaming.bodies] == [
        ("one two three four five", 6)
    ] * 2
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"ShareGPT|usable"):
        plan_records(streaming.url, plan)


def test_a_trace_brings_its_arrivals_and_its_shared_prefixes(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    rows = [(5000, 40, 2, [1, 2]), (5100, 70, 3, [1, 3, 4]), (5050, 20, 1, [1])]
    path.write_text(
        "".join(json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h}) + "\n" for t, i, o, h in rows)
    )
    data = DataSet(DataSetName.mooncake_trace, path, trace_block_size=32)
    records = plan_records(server.url + "/v1", Plan(model="cria", data=data, fields={"ignore_eos": True}, num_warmups=0))
    assert [record.scheduled for record in records] == pytest.approx([0.0, 0.05, 0.1])
    assert [(record.prompt_tokens, record.output_tokens) for record in records] == [(40, 2), (20, 1), (70, 3)]
    first, _, last = (sample.prompt for sample in trace_samples(path, 9, 32, 0))
    assert first[:32] == last[:32] and first[32:] != last[32:40]
    with pytest.raises(ValueError, match="--backend openai"):
        plan_records(server.url + "/v1", Plan(Backend.openai_chat, "cria", data=data, num_warmups=0))
    path.write_text('{"timestamp": 0}\n')
    with pytest.raises(ValueError, match=r"line 1.*input_length"):
        trace_samples(path, 9, 32, 0)


def test_models_take_turns(streaming: Streaming) -> None:
    plan = Plan(model="cria", lora_modules=("a", "b"), data=DataSet(random_input_len=4), num_prompts=4, num_warmups=0)
    assert [record.model for record in plan_records(streaming.url, plan)] == ["a", "b", "a", "b"]
    assert {body["model"] for body in streaming.bodies} == {"a", "b"}


def test_a_load_that_cannot_work_is_not_measured(scripted: Scripted, tmp_path: Path) -> None:
    scripted.plan = lambda seen: (400, {})
    with pytest.raises(EndpointGoneError, match="400"):
        plan_records(scripted.url, Plan(data=DataSet(random_input_len=4)))
    with pytest.raises(ValueError, match="--dataset-path"):
        plan_records(scripted.url, Plan(data=DataSet(DataSetName.custom)))
    path = tmp_path / "s.json"
    path.write_text(json.dumps([{"conversations": [{"value": "q"}, {"value": "a"}]}]))
    with pytest.raises((RefusedError, KeyError), match="count"):
        plan_records(scripted.url, Plan(data=DataSet(DataSetName.sharegpt, path)))


def test_the_command_writes_vllms_keys_and_a_report(server: Server, tmp_path: Path) -> None:
    arguments = [
        "bench", "--base-url", server.url, "--model", "cria", "--random-input-len", "20", "--random-output-len", "5",
        "--num-prompts", "6", "--request-rate", "200", "--ignore-eos", "--goodput", "ttft:60000 tpot:60000", "--api-key", "s3cret",
        "--save-detailed", "--result-dir", str(tmp_path), "--result-filename", "r.json", "--report", str(tmp_path / "r.html"),
        "--metadata", "commit=abc",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "altiplano.cli", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"requests answered +6 of 6", done.stdout) and re.search(r"^ttft +\d", done.stdout, re.MULTILINE)
    text = (tmp_path / "r.json").read_text()
    found = json.loads(text)
    assert set(found) >= VLLM_KEYS
    assert found["total_output_tokens"] == 30 and found["output_lens"] == [5] * 6 and found["input_lens"] == [20] * 6
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert found["commit"] == "abc" and "s3cret" not in text
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--base-url", "http://127.0.0.1:9"], 4, "no endpoint answers"),
        (["--goodput", "itl:3"], 2, "ttft, tpot, e2el"),
        (["--metric-percentiles", "101"], 2, "0 to 100"),
        (["--percentile-metrics", "speed"], 2, "ttft"),
        (["--dataset-name", "custom", "--model", "x"], 2, "--dataset-path"),
    ],
)
def test_what_is_wrong_is_said_with_an_exit_code(arguments: list[str], code: int, words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "altiplano.cli", "bench", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == code and words in done.stderr and "Traceback" not in done.stderr
