"""vLLM as an engine, up to its surface (tests/engine/vllm_surface.py): what is asked of it, and what is made of its answers."""

import inspect
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from altiplano.engine import (
    AdapterError,
    Engine,
    EngineAsleepError,
    EngineConfig,
    EngineError,
    PromptTooLongError,
    SamplingParams,
    TokenOutput,
    UnknownAdapterError,
    VllmEngine,
)
from altiplano.engine.vllm import mapping
from altiplano.engine.vllm.adapters import LORA_RANKS, room_for
from altiplano.engine.vllm.mapping import engine_args

from . import vllm_signatures, vllm_surface
from .conftest import make_adapter
from .vllm_surface import LLMEngine, Platform, RequestOutputKind, modules


@pytest.fixture
def config(llama: tuple[Path, LlamaForCausalLM]) -> EngineConfig:
    return EngineConfig(llama[0], device="cuda", dtype="bfloat16", max_model_len=512, max_num_seqs=4, num_blocks=64, max_loras=2)


@pytest.fixture
def engine(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    for name, module in modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    return VllmEngine(config)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "lora", 1, "lora")
    return tmp_path / "lora"


def changed(adapter: Path, **settings: object) -> Path:
    """The adapter with other settings."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return adapter


def inside(engine: VllmEngine) -> LLMEngine:
    found = engine._engine
    assert isinstance(found, LLMEngine)
    return found


def run(engine: VllmEngine) -> dict[str, list[TokenOutput]]:
    told: dict[str, list[TokenOutput]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            told.setdefault(output.request_id, []).append(output)
    return told


def test_it_has_the_methods_of_our_engine_that_the_engines_process_calls() -> None:
    for name in (
        "add_request",
        "abort",
        "has_unfinished",
        "is_blocked",
        "step",
        "load_adapter",
        "unload_adapter",
        "stats",
        "check_sleep",
        "sleep",
        "wake_up",
    ):
        ours, theirs = (inspect.signature(getattr(kind, name)).parameters for kind in (Engine, VllmEngine))
        assert [*theirs][: len(ours)] == [*ours]
        assert all(theirs[more].default is not inspect.Parameter.empty for more in [*theirs][len(ours) :])


def test_settings_arrive_under_vllms_names(engine: VllmEngine, config: EngineConfig) -> None:
    args = inside(engine).args
    # One block of vLLM's is nobody's.
    assert (args.model, args.max_model_len, args.num_gpu_blocks_override, args.block_size) == (str(config.model), 512, 65, 32)
    assert args.enable_lora and args.max_loras == 2 and args.scheduling_policy == "priority" and not args.trust_remote_code
    assert args.max_lora_rank == 64 and engine_args(replace(config, max_lora_rank=9))["max_lora_rank"] == 16
    assert args.kv_cache_dtype == "auto" and args.quantization is None and args.enable_sleep_mode
    assert engine_args(replace(config, kv_cache_dtype="int8"))["kv_cache_dtype"] == "int8_per_token_head"
    assert engine_args(replace(config, quantization="w8a8-fp8"))["quantization"] == "fp8"
    assert engine_args(replace(config, max_num_batched_tokens=2))["max_num_batched_tokens"] == 4
    assert "max_loras" not in engine_args(replace(config, max_loras=0))
    assert engine.runner.vocab_size == 120 and engine.runner.eos_token_ids == (1,)


def test_parameters_of_a_request_arrive_under_vllms_names(engine: VllmEngine) -> None:
    params = SamplingParams(
        max_tokens=3,
        min_tokens=2,
        temperature=0.7,
        top_k=9,
        top_p=0.8,
        min_p=0.1,
        seed=5,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.1,
        logit_bias={7: 2.0},
        stop_token_ids=(50,),
        ignore_eos=True,
        logprobs=2,
    )
    engine.add_request("x", [5, 6], params, priority=-3, namespace="tenant")
    (asked,) = inside(engine).seen
    for name in (
        "max_tokens",
        "min_tokens",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "logit_bias",
        "ignore_eos",
        "logprobs",
    ):
        assert getattr(asked.params, name) == getattr(params, name), name
    for name in ("presence_penalty", "frequency_penalty", "repetition_penalty"):
        assert getattr(asked.params, name) == getattr(params, name), name
    assert asked.params.stop_token_ids == [50] and asked.params.output_kind is RequestOutputKind.DELTA
    assert not asked.params.detokenize and asked.params.prompt_logprobs is None
    assert asked.prompt == {"type": "token", "prompt_token_ids": [5, 6], "cache_salt": "tenant"} and asked.priority == -3


def test_ends_and_seeds_are_as_ours(engine: VllmEngine) -> None:
    engine.add_request("x", [5], SamplingParams(stop_token_ids=(50,), seed=-1))
    (asked,) = inside(engine).seen
    assert asked.params.stop_token_ids == [1, 50]  # 1 is the model's, wherever its files name it
    assert asked.params.seed == 2**63 - 1  # vLLM takes -1 for no seed
    assert asked.prompt == {"type": "token", "prompt_token_ids": [5]}


def test_answers_come_token_by_token_with_their_ends(engine: VllmEngine) -> None:
    engine.add_request("long", [5, 6], SamplingParams(max_tokens=5, temperature=0.0))
    engine.add_request("stopped", [20], SamplingParams(max_tokens=9, stop_token_ids=(23,)))
    told = run(engine)
    assert [o.token_id for o in told["long"]] == [7, 8, 9, 10, 11]
    assert [o.finish_reason for o in told["long"]] == [None] * 4 + ["length"]
    assert [o.token_id for o in told["stopped"]] == [21, 22, 23] and told["stopped"][-1].finish_reason == "stop"
    assert [o.num_cached_tokens for o in told["long"]] == [16, 0, 0, 0, 0]
    assert [o.queue_seconds for o in told["long"]] == [0.5, None, None, None, None]
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_running) == (3, 8, 0)


def test_its_load_is_what_vllm_says_while_there_is_one(engine: VllmEngine) -> None:
    engine.add_request("a", [5, 6], SamplingParams(max_tokens=50))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_held, stats.preemptions) == (1, 0, 0.25, 3)
    engine.abort("a")  # vLLM's gauges are those of the last step
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.kv_cache_held) == (0, 0, 0.0)


def test_log_probabilities_are_of_the_token_and_of_as_many_as_were_asked_for(engine: VllmEngine) -> None:
    engine.add_request("two", [5, 6, 7], SamplingParams(max_tokens=2, logprobs=2, prompt_logprobs=True))
    engine.add_request("none", [5, 6, 7], SamplingParams(max_tokens=2, logprobs=0))
    engine.add_request("six", [5, 6, 7], SamplingParams(max_tokens=2, logprobs=6))
    told = run(engine)
    first = told["two"][0]
    assert first.logprob == -2.5 and first.top_logprobs == ((1001, -0.1), (1002, -0.2))
    assert first.prompt_logprobs == (-2.5, -2.5) and first.prompt_top == (((1001, -0.1), (1002, -0.2)),) * 2
    assert told["two"][1].prompt_logprobs == ()
    assert told["none"][0].logprob == -2.5 and told["none"][0].top_logprobs == ()
    assert [token for token, _ in told["six"][0].top_logprobs] == [1001, 1002, 1003, 8, 1005, 1006]


def test_scoring_tells_no_token(engine: VllmEngine) -> None:
    engine.add_request("s", [5, 6, 7], SamplingParams(max_tokens=0, temperature=0.0, prompt_logprobs=True))
    (told,) = run(engine)["s"]
    assert (told.token_id, told.finish_reason, told.prompt_logprobs) == (None, "length", (-2.5, -2.5))
    assert engine.stats().generation_tokens == 0


def test_an_aborted_request_is_told_once_and_forgotten(engine: VllmEngine) -> None:
    engine.add_request("a", [5], SamplingParams(max_tokens=50))
    engine.step()
    engine.abort("a")
    engine.abort("a")
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("a", "abort")]
    assert not engine.has_unfinished() and not inside(engine).requests


def test_adapters_go_with_their_requests_and_a_successor_has_a_new_id(engine: VllmEngine, adapter: Path) -> None:
    engine.load_adapter("a", adapter)
    engine.add_request("x", [5], SamplingParams(max_tokens=2), adapter="a")
    with pytest.raises(AdapterError, match="in use"):
        engine.unload_adapter("a")
    run(engine)
    first = inside(engine).seen[0].lora_request
    engine.load_adapter("a", adapter)
    engine.add_request("y", [5], SamplingParams(max_tokens=2), adapter="a")
    second = inside(engine).seen[1].lora_request
    assert first is not None and second is not None
    assert first.lora_path == str(adapter) and first.lora_int_id != second.lora_int_id and first.lora_name != second.lora_name
    assert [*inside(engine).loras] == [second.lora_int_id] and engine.adapters == ["a"]
    run(engine)
    engine.unload_adapter("a")
    assert not inside(engine).loras


def test_adapters_that_cannot_run_are_refused(engine: VllmEngine, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="nobody"):
        engine.add_request("x", [5], SamplingParams(), adapter="nobody")
    with pytest.raises(AdapterError, match="cannot be read"):
        engine.load_adapter("gone", tmp_path / "gone")
    make_adapter(tmp_path / "forbidden", 2, "lora")
    with pytest.raises(AdapterError, match="no such adapter"):
        engine.load_adapter("f", tmp_path / "forbidden")
    make_adapter(tmp_path / "dora", 3, "dora")
    with pytest.raises(AdapterError, match="DoRA"):
        engine.load_adapter("d", tmp_path / "dora")
    with pytest.raises(AdapterError, match="rank_pattern"):
        engine.load_adapter("p", changed(adapter, rank_pattern={"q_proj": 2}))
    with pytest.raises(AdapterError, match="rank 65, and vLLM has made room for 64 at its start"):
        engine.load_adapter("r", changed(adapter, rank_pattern=None, r=65))
    assert engine.adapters == [] and not inside(engine).loras


def test_an_adapter_of_another_base_is_refused(engine: VllmEngine, adapter: Path) -> None:
    """vLLM copies matrices that are too small into a corner of its own."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor[..., :4].contiguous() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="another base"):
        engine.load_adapter("a", adapter)


def test_no_adapter_is_thrown_out_for_another_in_silence(engine: VllmEngine, adapter: Path) -> None:
    for name in ("a", "b"):
        engine.load_adapter(name, adapter)
    with pytest.raises(AdapterError, match="max_loras is 2"):
        engine.load_adapter("c", adapter)
    engine.load_adapter("a", adapter)
    names = sorted(lora.lora_name for lora in inside(engine).loras.values())
    # vLLM tells cached prefixes apart by these names.
    assert names == ["a#3", "b#2"] and engine.adapters == ["a", "b"]


def test_room_is_made_for_the_adapters_that_are_known(adapter: Path, tmp_path: Path) -> None:
    assert room_for([]) == room_for([str(adapter), str(tmp_path / "gone")]) == 64
    assert room_for([str(changed(adapter, r=100))]) == 100
    assert room_for([str(changed(adapter, r=4096))]) == 512


def test_a_grammar_is_vllms_to_keep(engine: VllmEngine) -> None:
    structured = SamplingParams(max_tokens=4, structured=True)
    engine.add_request("s", [5], structured, grammar='start: "yes" | "no"')
    (asked,) = inside(engine).seen
    assert asked.params.structured_outputs is not None and asked.params.structured_outputs.grammar == 'start: "yes" | "no"'
    assert not engine.is_blocked()
    with pytest.raises(EngineError, match="grammar"):
        engine.add_request("t", [5], structured)


def test_a_request_that_vllm_gives_up_ends_in_an_error(engine: VllmEngine) -> None:
    engine.add_request("e", [5], SamplingParams(max_tokens=9, structured=True, logprobs=1), grammar="start: error")
    engine.add_request("o", [7], SamplingParams(max_tokens=2))
    told = run(engine)
    assert [(o.token_id, o.finish_reason) for o in told["e"]] == [(None, "error")]
    assert [o.token_id for o in told["o"]] == [8, 9]


def test_trouble_with_one_request_is_not_everybodys(engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="ModuleNotFoundError: No module named 'lmformatenforcer'"):
        engine.add_request("x", [5], SamplingParams(structured=True), grammar="start: lmfe")
    assert not engine.has_unfinished()


def test_requests_that_cannot_run_are_refused(engine: VllmEngine) -> None:
    with pytest.raises(PromptTooLongError, match="512"):
        engine.add_request("x", [5] * 500, SamplingParams(max_tokens=20))
    with pytest.raises(ValueError, match="empty"):
        engine.add_request("x", [], SamplingParams())
    engine.add_request("x", [5], SamplingParams())
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("x", [5], SamplingParams())
    for prompt, params, words in (
        ([5, 120], SamplingParams(), "outside 0 … 119"),
        ([5], SamplingParams(logit_bias={120: 1.0}), r"logit_bias and stop_token_ids name token ids \[120\]"),
        ([5], SamplingParams(stop_token_ids=(-1,)), r"token ids \[-1\]"),
        ([5], SamplingParams(temperature=2.5), "temperature must be at most 2"),
    ):
        with pytest.raises(ValueError, match=words):
            engine.add_request("y", prompt, params)
    assert engine.unfinished == ["x"]


def test_more_than_vllms_sampler_has_room_for_is_refused(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM itself finds out in the step, which ends the engine."""
    monkeypatch.setattr(mapping, "MAX_LOGIT_BIAS", 3)
    monkeypatch.setattr(mapping, "MAX_BANNED_STOPS", 3)
    with pytest.raises(EngineError, match="logit_bias must name at most 3 tokens with engine vllm, not 4"):
        engine.add_request("x", [5], SamplingParams(logit_bias=dict.fromkeys(range(4), 1.0)))
    with pytest.raises(EngineError, match="stop_token_ids must name at most 3 tokens with engine vllm, not 4"):
        engine.add_request("x", [5], SamplingParams(stop_token_ids=(7, 8, 9), min_tokens=1))
    engine.add_request("x", [5], SamplingParams(stop_token_ids=(7, 8, 9)))


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quantization": "int4"}, "quantization int4"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype int4"),
        ({"max_lora_rank": 1024}, "max_lora_rank 1024"),
        ({"device": "cuda:1"}, "device cuda:1.*CUDA_VISIBLE_DEVICES"),
        ({"block_size": 8}, "block_size 8"),
        ({"device": "cpu", "dtype": "float32"}, "device cpu"),
        ({"device": "cpu", "itl_target_ms": 9.0}, "itl_target_ms"),
        ({"device": "cpu", "deterministic": True}, "deterministic"),
        ({"device": "cpu", "num_speculative_tokens": 2}, "num_speculative_tokens"),
    ],
)
def test_settings_that_it_lacks_are_refused_at_the_start(config: EngineConfig, settings: dict[str, object], word: str) -> None:
    with pytest.raises(EngineError, match=f"{word}.*engine altiplano"):
        VllmEngine(replace(config, **settings))  # type: ignore[arg-type]


def test_without_its_package_the_error_says_what_to_install(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(EngineError, match=r"install vllm>=0\.26.*or use engine altiplano"):
        VllmEngine(config)


def test_its_steps_are_booked_as_far_as_vllm_tells(engine: VllmEngine) -> None:
    for name, prompt in (("a", [5, 6]), ("b", [7, 8, 9])):
        engine.add_request(name, prompt, SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True))
    told = run(engine)
    found = engine.step_log.last()
    assert sum(record.generated_tokens for record in found) == sum(map(len, told.values())) == 6
    assert sum(record.prompt_tokens + record.cached_tokens for record in found) == 5
    assert [record.decodes for record in found] == [0, *[2] * (len(found) - 1)] and len(found) == engine.stats().steps > 1
    assert sum(record.seconds for record in found) == pytest.approx(engine.stats().step_seconds)


def test_what_keeps_vllm_from_starting_is_told(config: EngineConfig, engine: VllmEngine) -> None:
    with pytest.raises(EngineError, match="vLLM does not start: CUDA out of memory"):
        VllmEngine(replace(config, num_blocks=9000))


def test_it_sleeps_when_nobody_is_answered(engine: VllmEngine, adapter: Path) -> None:
    engine.add_request("a", [5, 6], SamplingParams(max_tokens=3))
    assert engine.unfinished == ["a"]
    with pytest.raises(EngineError, match="1 requests are under way"):
        engine.sleep(1)
    run(engine)
    with pytest.raises(EngineError, match="level 2: use 1"):
        engine.check_sleep(2)
    for _ in range(2):
        engine.sleep(1)
    assert inside(engine).asleep == 1
    with pytest.raises(EngineAsleepError):
        engine.add_request("b", [5], SamplingParams())
    with pytest.raises(EngineAsleepError):
        engine.load_adapter("a", adapter)
    engine.wake_up()
    engine.wake_up()
    engine.add_request("c", [5, 6], SamplingParams(max_tokens=1))
    assert run(engine)["c"][-1].token_id == 7 and not inside(engine).asleep


def test_who_cannot_wake_up_sleeps_on(engine: VllmEngine) -> None:
    engine.sleep(1)
    inside(engine).args.seed = 666
    with pytest.raises(EngineError, match="vLLM does not wake up: CUDA out of memory"):
        engine.wake_up()
    with pytest.raises(EngineAsleepError):
        engine.add_request("b", [5], SamplingParams())


def test_where_vllm_cannot_sleep_it_starts_and_says_so(
    config: EngineConfig, engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Platform, "sleeps", False)
    awake = VllmEngine(config)
    assert not inside(awake).args.enable_sleep_mode
    with pytest.raises(EngineError, match="cannot sleep on this platform"):
        awake.check_sleep(1)


def test_the_stand_in_has_vllms_signatures() -> None:
    """Against what vllm_signatures.py has read from the source of the supported version."""
    source = json.loads(vllm_signatures.HERE.read_text())
    for name in ("EngineArgs", "SamplingParams", "StructuredOutputsParams", "LoRARequest", "Logprob", "CompletionOutput"):
        unknown = {field.name for field in fields(getattr(vllm_surface, name))} - {*source["fields"][name]}
        assert not unknown, f"{name} has no {unknown}"
    assert {field.name for field in fields(vllm_surface.RequestStateStats)} <= {*source["fields"]["RequestStateStats"]}
    assert {field.name for field in fields(vllm_surface.Gauge)} <= {*source["fields"]["Gauge"], *source["fields"]["Metric"]}
    assert [kind.name for kind in RequestOutputKind] == source["fields"]["RequestOutputKind"]
    names = {parameter.partition("=")[0] for parameter in source["methods"]["RequestOutput.__init__"]}
    assert {field.name for field in fields(vllm_surface.RequestOutput)} <= names
    for method, wanted in source["methods"].items():
        kind, _, name = method.partition(".")
        if name != "__init__":
            assert parameters(getattr(getattr(vllm_surface, kind), name)) == [one.partition("=")[0] for one in wanted], method
    assert parameters(vllm_surface.tokens_input) == [one.partition("=")[0] for one in source["functions"]["tokens_input"]]


def parameters(function: object) -> list[str]:
    assert callable(function)
    return [name for name in inspect.signature(function).parameters if name != "self"]


def test_the_mapping_knows_vllms_values(engine: VllmEngine) -> None:
    values = json.loads(vllm_signatures.HERE.read_text())["values"]
    assert [*LORA_RANKS] == values["MaxLoRARanks"] and {*mapping.CACHE_DTYPES.values()} <= {*values["CacheDType"]}
    assert values["MAX_NUM_LOGIT_BIAS_TOKENS"] == mapping.MAX_LOGIT_BIAS
    assert values["MAX_NUM_STOP_TOKEN_IDS"] == mapping.MAX_BANNED_STOPS
    assert {"stop", "length", "abort", "error"} <= {*values["FINISH_REASON_STRINGS"]}
    assert {metric.name for metric in inside(engine).get_metrics()} <= {*json.loads(vllm_signatures.HERE.read_text())["metrics"]}
