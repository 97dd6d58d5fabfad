"""The sections of a pipeline file, under the names of TRL, PEFT, Ray and Optuna.

Each field says what it trades. Unknown keys are errors; values never change after validation.
"""

import re
from ipaddress import ip_address
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

DataFormat = Literal["auto", "messages", "prompt_completion", "alpaca", "sharegpt", "text"]
Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9._-]{0,61}[a-z0-9])?$")]
Probability = Annotated[float, Field(gt=0.0, lt=1.0)]


class Section(BaseModel):
    """One section: closed (an unknown key is an error), frozen, without NaN or infinity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Model(Section):
    """The base model that stays frozen under the adapter."""

    model_name_or_path: str = Field("cria", description="`cria` (ships with the package), a directory, or a hub id.")
    model_revision: str | None = Field(None, description="Commit of a hub model. A hub model is promoted only when this is set.")
    dtype: Dtype = Field("float32", description="bfloat16 halves memory and is faster on a GPU; float32 on a CPU.")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3"] = "sdpa"
    load_in_4bit: bool = Field(False, description="QLoRA: base weights in 4 bits. Saves memory, costs some speed.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    bnb_4bit_use_double_quant: bool = True
    bnb_4bit_compute_dtype: Dtype = "bfloat16"


class Lora(Section):
    """The adapter, as in `peft.LoraConfig`."""

    r: int = Field(16, ge=1, le=512, description="Rank: a higher one learns more and costs memory and time.")
    lora_alpha: float = Field(32.0, gt=0, description="The update is scaled by lora_alpha / r (or / sqrt(r) with use_rslora).")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = Field(
        True, description="PEFT's pissa and olora change the base weights, which adapters here share: they are not offered."
    )


class DataSource(Section):
    """One file, directory or data set."""

    path: str = Field(description="JSONL or parquet file (local or s3://), or a hub id.")
    split: str = "train"
    format: DataFormat = "auto"
    revision: str | None = None


class Data(Section):
    """What is learned from, and how rows become tokens."""

    datasets: tuple[DataSource, ...] = Field(min_length=1)
    eval_datasets: tuple[DataSource, ...] = Field(min_length=1)
    max_length: int = Field(2048, ge=16, description="Longest row in tokens; longer rows are refused by the audit, not cut.")
    packing: bool = Field(True, description="Best-fit packing of several rows into one sequence of max_length: less padding.")
    assistant_only_loss: bool = Field(True, description="Learn the assistant's words only, not the user's.")
    date_string: str = Field("26 Jul 2024", description="The date in Llama 3.2's system header; pinned, the same at serving.")
    allow_duplicates: bool = False
    allow_overlap: bool = Field(False, description="Allow evaluation rows that also occur in the training data.")


class Training(Section):
    """One fine-tune, under the names of TrainingArguments."""

    learning_rate: float = Field(4e-4, gt=0, lt=1)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_ratio: float = Field(0.03, ge=0, lt=1, description="Share of all steps over which the learning rate rises.")
    weight_decay: float = Field(0.0, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    num_train_epochs: float = Field(1.0, gt=0)
    tokens_per_step: int = Field(16384, ge=16, description="Global batch in tokens; the same for any number of workers.")
    micro_batch_tokens: int | None = Field(
        None, ge=16, description="Tokens per forward pass of one worker; null: 16 384 on a GPU, 2 048 on a CPU."
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations: much less memory, about 1.4 times the time.")
    seed: int = Field(42, ge=0, lt=2**31)
    logging_steps: int = Field(5, ge=1)
    eval_steps: int = Field(50, ge=1)
    save_steps: int = Field(50, ge=1)
    max_checkpoints: int = Field(2, ge=1)


class AshaScheduler(Section):
    """Asynchronous successive halving: stops the trials that fall behind."""

    type: Literal["asha"] = "asha"
    time_attr: Literal["tokens_seen"] = "tokens_seen"
    max_t: int = Field(ge=1, description="Tokens that a surviving trial trains on.")
    grace_period: int = Field(ge=1, description="No trial is stopped before this many tokens.")
    reduction_factor: int = Field(3, ge=2)

    @model_validator(mode="after")
    def _grace_within_budget(self) -> "AshaScheduler":
        if self.grace_period > self.max_t:
            raise ValueError(f"grace_period ({self.grace_period}) is above max_t ({self.max_t}): no trial could ever be stopped")
        return self


class OptunaSearch(Section):
    """Optuna's sampler."""

    type: Literal["optuna"] = "optuna"
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0


class Tune(Section):
    """The sweep. Keys of `search_space` are dotted paths of this file."""

    metric: Literal["eval/loss"] = "eval/loss"
    mode: Literal["min"] = "min"
    num_samples: int = Field(8, ge=1)
    max_concurrent_trials: int = Field(2, ge=1)
    time_budget_s: float | None = Field(None, gt=0)
    eval_rows: int = Field(128, ge=1, description="Size of the fixed slice on which all trials are compared.")
    scheduler: AshaScheduler
    search_alg: OptunaSearch = OptunaSearch()
    search_space: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="dotted path -> {loguniform: [low, high]} | {uniform: [low, high]} | {choice: [...]} | {randint: [low, high]}",
    )


class Scaling(Section):
    """Workers of the final run, as in `ray.train.ScalingConfig`."""

    num_workers: int = Field(1, ge=1)
    use_gpu: bool = False
    cpus_per_worker: float = Field(1.0, gt=0)
    cpus_per_trial: float = Field(1.0, gt=0)


class Failure(Section):
    """What a run survives, as in `ray.train.FailureConfig`."""

    max_failures: int = Field(3, ge=-1, description="Worker failures before the run fails; -1: no limit.")
    max_preemption_failures: int = Field(-1, ge=-1)
    start_timeout_s: float = Field(600.0, gt=0, description="A run whose workers cannot be placed for this long fails.")


class Run(Section):
    """Where results live."""

    name: Name
    storage_path: str = Field(".altiplano", description="Local directory or mounted volume that all workers see.")


class Evaluate(Section):
    """How the candidate, the base and the champion are measured, on the same rows."""

    tasks: tuple[str, ...] = Field(
        ("perplexity", "exact_match"),
        min_length=1,
        description="perplexity, exact_match, json_validity, or lm_eval:<task or file.yaml>.",
    )
    max_new_tokens: int = Field(256, ge=1)
    batch_size: int = Field(64, ge=1)
    limit: int | None = Field(None, ge=1, description="Rows to evaluate; null: all.")


class Gate(Section):
    """When a candidate may replace the champion."""

    primary: str = "exact_match"
    min_delta: float = Field(0.0, ge=0, description="The lower confidence bound of the gain must be above this.")
    alpha: Probability = Field(0.05, description="Chance of promoting a model that is no better.")
    non_inferiority: dict[str, float] = Field(default_factory=dict, description="task -> largest loss that is tolerated.")
    max_latency_regression: float = Field(0.25, ge=0, description="Tolerated relative growth of time per generated token.")
    bootstrap_samples: int = Field(10_000, ge=100)


class Tracking(Section):
    """MLflow."""

    tracking_uri: str | None = Field(None, description="null: the server that `altiplano up` starts.")
    backend_store_uri: str | None = Field(
        None,
        pattern=r"^(sqlite|postgresql(\+psycopg)?)://",
        description="Database of that server, as in postgresql+psycopg://user@host/name (password: PGPASSWORD). null: SQLite in storage_path.",
    )
    experiment_name: str | None = Field(None, description="null: run.name.")
    registered_model_name: Name | None = Field(None, description="null: run.name.")

    @model_validator(mode="after")
    def _one_server(self) -> "Tracking":
        if self.tracking_uri and self.backend_store_uri:
            raise ValueError("backend_store_uri is for the server that altiplano starts: remove it, or remove tracking_uri")
        if self.backend_store_uri and re.search(r"//[^/@]*:[^/@]*@", self.backend_store_uri):
            raise ValueError("backend_store_uri holds a password, which would be copied into every run: set PGPASSWORD instead")
        return self


class ServeLimits(Section):
    """What one client may ask of one replica. Beyond a limit: 400, 413, 408, or 429 with Retry-After."""

    requests_per_minute: int | None = Field(None, ge=1, description="Of a key that has no limit of its own; null: any number.")
    tokens_per_minute: int | None = Field(None, ge=1, description="Prompt and generated tokens of such a key.")
    max_concurrency: int | None = Field(None, ge=1, description="Requests of such a key at the same time.")
    max_queued_seqs: int = Field(256, ge=0, description="Answers that may wait beyond max_num_seqs: more hides overload longer.")
    max_body_bytes: int = Field(2 << 20, ge=1024)
    max_header_bytes: int = Field(16 << 10, ge=1024)
    max_json_depth: int = Field(48, ge=4)
    max_json_values: int = Field(1 << 18, ge=16, description="Values in one body; a prompt of token ids has one for each.")
    max_schema_depth: int = Field(24, ge=1, description="Levels of a JSON schema, as it is written.")
    max_schema_values: int = Field(4096, ge=1)
    body_timeout_s: float = Field(30.0, gt=0, description="A client that sends its body slower than this is refused.")
    stalled_client_timeout_s: float = Field(
        60.0, gt=0, description="A client that takes nothing for this long is cut off; its answer and pages are freed."
    )


class ServeAutoscaling(Section):
    """How many replicas run. The largest of three rules counts; while a signal is missing, their number is held."""

    min_replicas: int = Field(1, ge=0, description="0: nothing runs without requests, and the first one waits for a replica.")
    max_replicas: int = Field(1, ge=1)
    target_num_seqs: float | None = Field(
        None, gt=0, description="Answers, running and waiting, that one replica should have. null: 0.8 of max_num_seqs."
    )
    target_kv_cache_usage: float = Field(0.8, gt=0, le=1, description="Part of the KV cache that may be in use.")
    target_ttft_s: float | None = Field(
        None, gt=0, description="Time to the first token that 95 of 100 answers should keep. null: no such rule."
    )
    upscale_delay_s: float = Field(10.0, ge=0, description="More replicas only when they were wanted for this long.")
    downscale_delay_s: float = Field(300.0, ge=0, description="Fewer replicas only when they were wanted for this long.")
    downscale_to_zero_delay_s: float = Field(600.0, ge=0, description="The last replica goes after this long without requests.")

    @model_validator(mode="after")
    def _ordered(self) -> "ServeAutoscaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"serve.autoscaling.min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas}): raise max_replicas"
            )
        return self


class ServeRemote(Section):
    """An endpoint of another cluster, such as the chart's. It gets adapter and alias in place; everything else of it stays as it is."""

    dashboard_url: str = Field(description="Ray's dashboard there.")
    token_file: str | None = Field(
        None, description="File with Ray's token of that cluster. null: the variable ALTIPLANO_SERVE_RAY_TOKEN."
    )
    url: str = Field(
        description="The endpoint's address, such as http://altiplano-endpoint-serve-svc:8000/v1. Key: ALTIPLANO_API_KEY."
    )


Quantization = Literal["none", "int8", "int4", "w8a8-fp8", "w8a8-int8"]
MOST_GUESSES_ON_A_GPU = 15  # a step checks 16 tokens at once
VLLM_QUANTIZATIONS = ("none", "w8a8-fp8")
VLLM_BLOCK_SIZES = (16, 32, 64, 128)


class Serve(Section):
    """The endpoint, under vLLM's names."""

    enabled: bool = True
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=1, le=65535)
    engine: Literal["altiplano", "vllm"] = Field(
        "altiplano", description="Our own engine, or vLLM where its package is installed in the image; vllm needs a GPU."
    )
    max_model_len: int = Field(2048, ge=16)
    max_num_seqs: int = Field(64, ge=1)
    max_num_batched_tokens: int = Field(2048, ge=16)
    block_size: int = Field(32, ge=1, description="Tokens per page of KV cache.")
    kv_cache_tokens: int = Field(65536, ge=32, description="Size of the KV cache in tokens.")
    kv_cache_dtype: Literal["auto", "bf16", "fp8", "int8"] = Field(
        "auto", description="8 bits with a scale per token and head: twice the context in the same memory; on a GPU only."
    )
    quantization: Quantization = Field(
        "none",
        description="Made while loading, less exact, on a GPU only. int8, int4: weights in groups of 128 (the head of int4 has 6 bits), for "
        "small batches, where reading them is what takes time. w8a8-fp8, w8a8-int8: products of 8 bits by 8 bits, for prompts and large "
        "batches.",
    )
    num_speculative_tokens: int = Field(
        0,
        ge=0,
        le=32,
        description="Tokens guessed per step, from the request's own text (prompt lookup: for answers that copy) or by speculative_model; "
        "switched off by itself where it does not pay. At most 15 on a GPU, where they are shared by up to 8 requests that run: a step with "
        "3 guesses takes 5 to 9 % longer than one without for a single request, and every right guess saves a step.",
    )
    speculative_model: str | None = Field(
        None,
        min_length=1,
        description="A smaller Llama with the same tokenizer that guesses: a directory or a hub id. It needs memory of its own.",
    )
    speculative_quantization: Quantization = Field(
        "none",
        description="Of speculative_model's weights, as quantization: it guesses sooner and a little worse, answers stay the same; on a GPU only.",
    )
    itl_target_ms: float | None = Field(
        None,
        gt=0,
        description="95 of 100 gaps between two tokens of an answer are to stay below it: prompts are computed in smaller chunks beside answers, "
        "so a first token comes later; null: no target, and on a GPU answers wait for every other step that long prompts fill.",
    )
    deterministic: bool = Field(
        False,
        description="The same tokens and log-probabilities to the bit, alone and in any batch. On a CPU as slow as one request at a time; on a GPU "
        "requests still share steps, which take longer, and quantization must be none, int8 or int4.",
    )
    enable_prefix_caching: bool = True
    api_keys_file: str | None = Field(None, description="File of `altiplano keys`. null: no keys, and a loopback host only.")
    limits: ServeLimits = ServeLimits()
    response_cache_bytes: int = Field(
        0, ge=0, description="Memory for answers to identical greedy requests of one key; 0: every request is computed."
    )
    usd_per_hour: float | None = Field(None, ge=0, description="Price of one replica, for the cost per key and model.")
    otlp_endpoint: str | None = Field(None, description="Where traces go (OTLP over HTTP); null: no traces.")
    metrics_port: int = Field(
        9464,
        ge=1024,
        le=65000,
        description="Where a replica shows its own /metrics; replicas that share a node count up from it.",
    )
    http_proxy: Literal["haproxy", "python"] = Field(
        "haproxy",
        description="What stands before the replicas: haproxy adds 0.6 ms to a request, Ray's own proxy in Python 4 ms or more.",
    )
    routing: Literal["least_loaded", "session"] = Field(
        "least_loaded",
        description="session: requests with the same x-session-id go to the same replica, whose cache holds their prefix.",
    )
    autoscaling: ServeAutoscaling = ServeAutoscaling()
    remote: ServeRemote | None = Field(None, description="null: the cluster in which the pipeline runs.")
    graceful_shutdown_timeout_s: float = Field(
        600.0, gt=0, description="How long a replica that leaves may finish its answers: as long as the longest stream."
    )
    health_check_timeout_s: float = Field(
        30.0, gt=0, description="An engine that says nothing for this long is started again: longer than its longest step."
    )

    @model_validator(mode="after")
    def _guarded(self) -> "Serve":
        if self.api_keys_file is None and not is_loopback(self.host):
            raise ValueError(
                f"serve.host is {self.host!r}, which others can reach, and there are no API keys: make one with `altiplano keys create`"
                " and set serve.api_keys_file, or set serve.host to 127.0.0.1"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host` (a name or an address)."""
    if host.lower() == "localhost":
        return True
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


class Pipeline(Section):
    """One pipeline file."""

    model: Model = Model()
    lora: Lora = Lora()
    data: Data
    training: Training = Training()
    tune: Tune | None = Field(None, description="null: no sweep, `lora` and `training` are used as written.")
    scaling: Scaling = Scaling()
    failure: Failure = Failure()
    run: Run
    evaluate: Evaluate = Evaluate()
    gate: Gate = Gate()
    tracking: Tracking = Tracking()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _consistent(self) -> "Pipeline":
        if self.gate.primary not in self.evaluate.tasks:
            raise ValueError(
                f"gate.primary is {self.gate.primary!r}, which is not in evaluate.tasks {list(self.evaluate.tasks)}: add it there"
            )
        self._check_engine()
        missing = sorted(set(self.gate.non_inferiority) - set(self.evaluate.tasks))
        if missing:
            raise ValueError(
                f"gate.non_inferiority names {missing}, not in evaluate.tasks {list(self.evaluate.tasks)}: add them there"
            )
        if self.data.max_length > self.training.tokens_per_step:
            raise ValueError(
                f"training.tokens_per_step ({self.training.tokens_per_step}) is below data.max_length ({self.data.max_length}): "
                "one row would not fit in a step; raise tokens_per_step"
            )
        if self.model.load_in_4bit and self.lora.use_dora and self.scaling.use_gpu is False:
            raise ValueError("model.load_in_4bit with lora.use_dora needs a GPU: set scaling.use_gpu or turn one of them off")
        return self

    def _check_engine(self) -> None:
        """What the engine would refuse when it starts, hours of training later."""
        serve, gpu = self.serve, self.scaling.use_gpu
        if not gpu and (serve.kv_cache_dtype, serve.quantization, serve.speculative_quantization) != ("auto", "none", "none"):
            raise ValueError(
                "serve.kv_cache_dtype, serve.quantization and serve.speculative_quantization need a GPU: leave them out, or set scaling.use_gpu=true"
            )
        if serve.engine == "vllm":
            self._check_vllm()
        if gpu and serve.num_speculative_tokens > MOST_GUESSES_ON_A_GPU:
            raise ValueError(
                f"serve.num_speculative_tokens is {serve.num_speculative_tokens}, and a GPU checks at most {MOST_GUESSES_ON_A_GPU} guesses in a "
                "step: lower it, 4 is a start"
            )
        if serve.speculative_model is not None and not serve.num_speculative_tokens:
            raise ValueError("serve.speculative_model guesses nothing: set serve.num_speculative_tokens above 0, 4 for a start")
        if serve.speculative_quantization != "none" and serve.speculative_model is None:
            raise ValueError("serve.speculative_quantization has no serve.speculative_model: name one, or leave it out")
        if {"int8", "int4"} & {serve.quantization, serve.speculative_quantization} and serve.block_size % 16:
            raise ValueError(
                f"serve.block_size is {serve.block_size}, and quantized weights need a multiple of 16: leave it out, or set 32"
            )
        if serve.deterministic and serve.quantization.startswith("w8a8"):
            raise ValueError(f"serve.deterministic is not for serve.quantization {serve.quantization}: use none, int8 or int4")

    def _check_vllm(self) -> None:
        serve = self.serve
        if not self.scaling.use_gpu:
            raise ValueError("serve.engine vllm needs a GPU: set scaling.use_gpu=true, or serve.engine to altiplano")
        if serve.quantization not in VLLM_QUANTIZATIONS:
            raise ValueError(
                f"serve.engine vllm has no serve.quantization {serve.quantization}: use {' or '.join(VLLM_QUANTIZATIONS)}, or set serve.engine "
                "to altiplano"
            )
        if serve.block_size not in VLLM_BLOCK_SIZES:
            raise ValueError(
                f"serve.engine vllm has no serve.block_size {serve.block_size}: use one of {', '.join(map(str, VLLM_BLOCK_SIZES))}"
            )
        if self.lora.use_dora:
            raise ValueError(
                "serve.engine vllm does not run what lora.use_dora makes: turn it off, or set serve.engine to altiplano"
            )
        if serve.num_speculative_tokens or serve.itl_target_ms is not None or serve.deterministic:
            raise ValueError(
                "serve.num_speculative_tokens, serve.itl_target_ms and serve.deterministic are not for serve.engine vllm: leave them out, or set "
                "serve.engine to altiplano"
            )
