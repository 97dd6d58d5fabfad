"""`altiplano bench`: measure an endpoint under load."""

import asyncio
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, err, out, print_json, table
from altiplano.cli.generate import ApiKeyOption, ModelOption, ParamOption, parameters
from altiplano.client.bench.arrivals import RampUp
from altiplano.client.bench.plan import Arrivals, Backend, DataSet, DataSetName, Plan

if TYPE_CHECKING:
    from altiplano.client.bench.load import Record, Run

# Above these the load generator was a bottleneck of its own.
LATE_MS, LAG_MS, BUSY_SHARE = 100.0, 20.0, 0.8
DATA, LOAD, RESULT = "Data set", "Load", "Result"


def register(app: typer.Typer) -> None:
    app.command()(bench)
    app.command()(bench_report)


def bench(
    base_url: Annotated[str, typer.Option(help="Address of the server, with or without /v1.")] = "http://127.0.0.1:8000",
    backend: Annotated[
        Backend, typer.Option(help="openai: /v1/completions; openai-chat: /v1/chat/completions.")
    ] = Backend.openai,
    api_key: ApiKeyOption = None,
    model: ModelOption = None,
    lora_modules: Annotated[
        list[str] | None, typer.Option(help="Models that requests take in turn; repeat the option.", show_default=False)
    ] = None,
    dataset_name: Annotated[DataSetName, typer.Option(rich_help_panel=DATA)] = DataSetName.random,
    dataset_path: Annotated[Path | None, typer.Option(rich_help_panel=DATA, show_default=False)] = None,
    num_prompts: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 1000,
    random_input_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 1024,
    random_output_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 128,
    random_range_ratio: Annotated[float, typer.Option(help="Lengths vary by this share.", rich_help_panel=DATA)] = 0.0,
    random_prefix_len: Annotated[int, typer.Option(min=0, help="Shared prefix.", rich_help_panel=DATA)] = 0,
    sharegpt_output_len: Annotated[int | None, typer.Option(min=1, rich_help_panel=DATA, show_default=False)] = None,
    custom_output_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 256,
    prefix_repetition_prefix_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 256,
    prefix_repetition_suffix_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 256,
    prefix_repetition_num_prefixes: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 10,
    prefix_repetition_output_len: Annotated[int, typer.Option(min=1, rich_help_panel=DATA)] = 128,
    trace_block_size: Annotated[int, typer.Option(min=1, help="Tokens per hash id of a trace.", rich_help_panel=DATA)] = 512,
    request_rate: Annotated[float, typer.Option(help="Requests per second; inf: all at once.", rich_help_panel=LOAD)] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="Shape of the gamma-distributed gaps; 1: Poisson, below: bursts.", rich_help_panel=LOAD)
    ] = 1.0,
    max_concurrency: Annotated[
        int | None,
        typer.Option(min=1, help="Hold requests back over so many; reported as queue.", rich_help_panel=LOAD, show_default=False),
    ] = None,
    ramp_up_strategy: Annotated[RampUp | None, typer.Option(rich_help_panel=LOAD, show_default=False)] = None,
    ramp_up_start_rps: Annotated[float | None, typer.Option(rich_help_panel=LOAD, show_default=False)] = None,
    ramp_up_end_rps: Annotated[float | None, typer.Option(rich_help_panel=LOAD, show_default=False)] = None,
    num_warmups: Annotated[int, typer.Option(min=0, rich_help_panel=LOAD)] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Loads, each with prompts of its own.", rich_help_panel=LOAD)] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes of the load generator.", rich_help_panel=LOAD)] = 1,
    seed: Annotated[int, typer.Option(rich_help_panel=LOAD)] = 0,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Always generate the whole length.", rich_help_panel=LOAD)
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, rich_help_panel=LOAD)] = 0.0,
    param: ParamOption = None,
    percentile_metrics: Annotated[str, typer.Option(rich_help_panel=RESULT)] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(rich_help_panel=RESULT)] = "50,90,95,99",
    goodput: Annotated[
        list[str] | None,
        typer.Option(help="Objectives in ms, such as 'ttft:500 tpot:50'.", rich_help_panel=RESULT, show_default=False),
    ] = None,
    save_result: Annotated[bool, typer.Option("--save-result", help="Write the JSON file.", rich_help_panel=RESULT)] = False,
    save_detailed: Annotated[
        bool, typer.Option("--save-detailed", help="With one entry per request.", rich_help_panel=RESULT)
    ] = False,
    result_dir: Annotated[Path, typer.Option(file_okay=False, rich_help_panel=RESULT)] = Path("."),
    result_filename: Annotated[str | None, typer.Option(rich_help_panel=RESULT, show_default=False)] = None,
    label: Annotated[
        str | None, typer.Option(help="Name of this server in comparisons.", rich_help_panel=RESULT, show_default=False)
    ] = None,
    metadata: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Into the file.", rich_help_panel=RESULT, show_default=False)
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Write a page with pictures here.", rich_help_panel=RESULT, dir_okay=False, show_default=False),
    ] = None,
    output: OutputOption = Output.text,
) -> None:
    """Measure an endpoint: open-loop load, vLLM's names and formulas."""
    from altiplano.client.bench.metrics import parse_goodput
    from altiplano.client.bench.result import details, median_run, result

    data = DataSet(
        dataset_name,
        dataset_path,
        random_input_len,
        random_output_len,
        random_range_ratio,
        random_prefix_len,
        sharegpt_output_len,
        custom_output_len,
        prefix_repetition_prefix_len,
        prefix_repetition_suffix_len,
        prefix_repetition_num_prefixes,
        prefix_repetition_output_len,
        trace_block_size,
    )
    arrivals = Arrivals(request_rate, burstiness, max_concurrency, ramp_up_strategy, ramp_up_start_rps, ramp_up_end_rps)
    fields: dict[str, Any] = {"temperature": temperature} | ({"ignore_eos": True} if ignore_eos else {}) | parameters(param)
    plan = Plan(
        backend, model, tuple(lora_modules or ()), data, arrivals, num_prompts, num_warmups, repeat, processes, seed, fields
    )
    metrics, percentiles = _names(percentile_metrics), _numbers(metric_percentiles)
    objectives = parse_goodput(goodput) if goodput else None
    more = {"label": label} | {key: str(value) for key, value in parameters(metadata).items()}

    plan, runs = asyncio.run(_run(plan, base_url, api_key))
    # The command line may carry the key: the file must not.
    command = [word for word in sys.argv[1:] if api_key is None or api_key not in word]
    found = result(plan, runs, percentiles, objectives, command, more)
    chosen = runs[median_run(runs)].records
    if save_result or save_detailed or result_filename:
        path = result_dir / (
            result_filename or f"{backend}-{request_rate:g}qps-{str(plan.model).split('/')[-1]}-{found['date']}.json"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found | (details(chosen) if save_detailed else {}), indent=1) + "\n")
        err.print(f"result: {path}", markup=False)
    if report is not None:
        from altiplano.client.bench.report import page

        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(page(found, chosen, percentiles), encoding="utf-8")
        err.print(f"report: {report}", markup=False)
    if output is Output.json:
        print_json(found)
    else:
        _show(found, metrics, percentiles)
    if not found["completed"]:
        raise RuntimeError(f"no request was answered: {next(iter(found['errors_seen']))}")


def bench_report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULT...", help="Result files.", show_default=False, exists=True, dir_okay=False)
    ],
    report: Annotated[Path, typer.Option(help="Write the page here.", dir_okay=False)] = Path("bench.html"),
) -> None:
    """Lay results of `bench` (or of `vllm bench serve`) side by side: a page with latency against throughput."""
    from altiplano.client.bench.comparison import comparison, read_result

    html = comparison([(path.name, read_result(path)) for path in results])
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(html, encoding="utf-8")
    out.print(str(report), markup=False)


async def _run(plan: Plan, base_url: str, api_key: str | None) -> "tuple[Plan, list[Run]]":
    from altiplano.client.bench.plan import run_plan
    from altiplano.client.endpoint import Endpoint

    endpoint = Endpoint(base_url.rstrip("/").removesuffix("/v1") + "/v1", api_key)
    ended = failed = 0
    with err.status("warming up") as status:

        def show(run: int, record: "Record") -> None:
            nonlocal ended, failed
            ended, failed = ended + 1, failed + (record.error is not None)
            # The screen must not cost the measurement its time.
            if ended % 16 == 0:
                status.update(f"{ended:,} of {plan.num_prompts * plan.repeat:,} requests ended, {failed:,} failed")

        return await run_plan(plan, endpoint, show)


def _show(found: dict[str, Any], metrics: list[str], percentiles: list[float]) -> None:
    counts = [
        ["requests answered", f"{found['completed']:,} of {found['completed'] + found['failed']:,}"],
        ["duration", f"{found['duration']:.2f} s"],
        ["tokens in, out", f"{found['total_input_tokens']:,}, {found['total_output_tokens']:,}"],
        ["requests per second", f"{found['request_throughput']:.2f}"],
        ["output tokens per second", f"{found['output_throughput']:.1f}"],
        ["all tokens per second", f"{found['total_token_throughput']:.1f}"],
        ["most requests in flight", f"{found['max_concurrent_requests']:,}"],
    ]
    if found["request_goodput"] is not None:
        counts.append(["good requests per second", f"{found['request_goodput']:.2f}"])
    out.print(table(f"{found['model_id']} at {found['request_rate']} requests per second", ["", ">"], counts))
    shown = [*metrics, *(["queue"] if found["max_concurrency"] else [])]
    columns = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    rows = [[name, *(_ms(found[f"{column}_{name}_ms"]) for column in columns)] for name in shown]
    out.print(table("milliseconds", ["metric", *(f">{column}" for column in columns)], rows))
    for error, count in found["errors_seen"].items():
        err.print(f"{count:,} times: {error}", markup=False)
    late, lag, busy = found["max_schedule_lag_ms"], found["client_loop_lag_ms"], found["client_cpu_share"]
    if late > LATE_MS or lag > LAG_MS or busy > BUSY_SHARE:
        err.print(
            f"the load generator was short of time (requests left up to {late:.0f} ms late, chunks were seen up to {lag:.0f} ms late, "
            f"{busy:.0%} of a core busy), so latencies are partly its own: lower the rate, raise --processes, or use another machine",
            markup=False,
        )


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _names(text: str) -> list[str]:
    from altiplano.client.bench.metrics import METRICS

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"--percentile-metrics: {unknown[0]!r} is none of {', '.join(METRICS)}")
    return names


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(number) for number in text.split(",") if number.strip()]
    except ValueError:
        numbers = [-1.0]
    if not all(0 <= number <= 100 for number in numbers):
        raise ValueError(f"--metric-percentiles {text}: write numbers from 0 to 100 with commas between them")
    return numbers
