"""A benchmark as one value, and its run: data set, arrivals, warm-up, load."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from altiplano.client.bench import samples
from altiplano.client.bench.arrivals import RampUp, ramp, schedule
from altiplano.client.bench.load import Record, Run, raise_file_limit, run_load
from altiplano.client.bench.parts import run_parts
from altiplano.client.bench.ruler import Ruler, calibrate
from altiplano.client.endpoint import Endpoint, default_model
from altiplano.client.errors import EndpointGoneError

CONNECT_TIMEOUT_S = 60.0


class Backend(StrEnum):
    """Which of OpenAI's endpoints is asked. vLLM's names."""

    openai = "openai"
    openai_chat = "openai-chat"

    @property
    def path(self) -> str:
        return "/v1/completions" if self is Backend.openai else "/v1/chat/completions"


class DataSetName(StrEnum):
    """Where prompts come from. vLLM's names."""

    random = "random"
    sharegpt = "sharegpt"
    custom = "custom"
    prefix_repetition = "prefix_repetition"
    mooncake_trace = "mooncake_trace"


@dataclass(frozen=True)
class DataSet:
    """Prompts and lengths, in tokens. A field counts for the data set that it names."""

    name: DataSetName = DataSetName.random
    path: Path | None = None
    random_input_len: int = 1024
    random_output_len: int = 128
    random_range_ratio: float = 0.0
    random_prefix_len: int = 0
    sharegpt_output_len: int | None = None
    custom_output_len: int = 256
    prefix_repetition_prefix_len: int = 256
    prefix_repetition_suffix_len: int = 256
    prefix_repetition_num_prefixes: int = 10
    prefix_repetition_output_len: int = 128
    trace_block_size: int = 512


@dataclass(frozen=True)
class Arrivals:
    """When requests leave. `request_rate` per second; with a ramp, the rate goes from start to end instead."""

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp_up_strategy: RampUp | None = None
    ramp_up_start_rps: float | None = None
    ramp_up_end_rps: float | None = None

    def draw(self, count: int, rng: random.Random) -> list[float]:
        if self.ramp_up_strategy is None:
            return schedule(count, self.request_rate, self.burstiness, rng)
        if self.ramp_up_start_rps is None or self.ramp_up_end_rps is None:
            raise ValueError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps")
        return ramp(count, self.ramp_up_start_rps, self.ramp_up_end_rps, self.ramp_up_strategy, self.burstiness, rng)


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is sent. The same plan sends the same requests at the same times."""

    backend: Backend = Backend.openai
    model: str | None = None
    lora_modules: tuple[str, ...] = ()
    """Models that requests take in turn, instead of `model`."""
    data: DataSet = field(default_factory=DataSet)
    arrivals: Arrivals = field(default_factory=Arrivals)
    num_prompts: int = 1000
    num_warmups: int = 1
    repeat: int = 1
    processes: int = 1
    """Of the load generator; one follows about 30,000 chunks per second."""
    seed: int = 0
    fields: dict[str, Any] = field(default_factory=dict)
    """More fields of each request."""


async def run_plan(
    plan: Plan, endpoint: Endpoint, on_end: Callable[[int, Record], None] = lambda run, record: None
) -> tuple[Plan, list[Run]]:
    """The plan with its model named, and each repetition's run. Repetition i has seed + i, so that no prompt comes twice.

    Raises:
        EndpointGoneError: nobody answers, or the warm-up fails.
        ValueError: an option or a data set that must change.
    """
    raise_file_limit()
    async with endpoint.open(connections=None, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        plan = replace(plan, model=plan.model or await default_model(endpoint, client))
        path = endpoint.root + plan.backend.path
        runs = list[Run]()
        for number in range(plan.repeat):
            rng = random.Random(plan.seed + number)
            asked = await _samples(plan, endpoint, client, rng)
            models = plan.lora_modules or (plan.model,)
            bodies = [
                samples.payload(sample, path, {"model": models[i % len(models)]} | plan.fields) for i, sample in enumerate(asked)
            ]
            recorded = [sample.arrival for sample in asked if sample.arrival is not None]
            times = recorded or plan.arrivals.draw(len(bodies), rng)
            if number == 0:
                await _warm_up(client, path, bodies[: plan.num_warmups])
            if plan.processes == 1:
                run = await run_load(client, path, bodies, times, plan.arrivals.max_concurrency, partial(on_end, number))
            else:
                run = await run_parts(
                    endpoint, CONNECT_TIMEOUT_S, path, bodies, times, plan.arrivals.max_concurrency, plan.processes
                )
            runs.append(run)
        return plan, runs


async def _warm_up(client: httpx.AsyncClient, path: str, bodies: list[dict[str, Any]]) -> None:
    records = (await run_load(client, path, bodies, [0.0] * len(bodies))).records if bodies else []
    failed = [record.error for record in records if record.error is not None]
    if failed:
        raise EndpointGoneError(f"the first request fails, so nothing is measured: {failed[0]}")


async def _samples(plan: Plan, endpoint: Endpoint, client: httpx.AsyncClient, rng: random.Random) -> list[samples.Sample]:
    data, count = plan.data, plan.num_prompts
    assert plan.model is not None
    ruler: Ruler | None = None
    if data.name in (DataSetName.random, DataSetName.prefix_repetition):
        if plan.backend is Backend.openai_chat:
            ruler = await calibrate(endpoint, client, plan.model, endpoint.root + plan.backend.path)
        if data.name is DataSetName.random:
            return samples.random_samples(
                count,
                data.random_input_len,
                data.random_output_len,
                ruler,
                rng,
                range_ratio=data.random_range_ratio,
                prefix_len=data.random_prefix_len,
            )
        return samples.prefix_repetition_samples(
            count,
            data.prefix_repetition_prefix_len,
            data.prefix_repetition_suffix_len,
            data.prefix_repetition_num_prefixes,
            data.prefix_repetition_output_len,
            ruler,
            rng,
        )
    if data.path is None or not data.path.is_file():
        raise ValueError(f"--dataset-name {data.name} needs --dataset-path, a file; {data.path or 'none'} is given")
    if data.name is DataSetName.mooncake_trace:
        if plan.backend is not Backend.openai:
            raise ValueError("a trace is replayed in token ids: use --backend openai")
        return samples.trace_samples(data.path, count, data.trace_block_size, plan.seed)
    if data.name is DataSetName.custom:
        return samples.custom_samples(data.path, count, data.custom_output_len, rng)
    return await samples.sharegpt_samples(data.path, count, data.sharegpt_output_len, Ruler(endpoint, client, plan.model), rng)
