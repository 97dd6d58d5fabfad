"""vLLM as an engine, up to its documented surface (tests/engine/vllm_surface.py): what is asked of it, and what is made of its answers."""

import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from altiplano.engine import (
    AdapterError,
    Engine,
    EngineConfig,
    EngineError,
    PromptTooLongError,
    SamplingParams,
    TokenOutput,
    UnknownAdapterError,
    VllmEngine,
)
from altiplano.engine.vllm.mapping import engine_args

from .vllm_surface import LLMEngine, RequestOutputKind, modules


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
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    return tmp_path


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
    assert (args.model, args.max_model_len, args.num_gpu_blocks_override, args.block_size) == (str(config.model), 512, 64, 32)
    assert args.enable_lora and args.max_loras == 2 and args.scheduling_policy == "priority" and not args.trust_remote_code
    assert args.kv_cache_dtype == "auto"
    assert engine_args(replace(config, kv_cache_dtype="fp8"))["kv_cache_dtype"] == "fp8"
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
    assert asked.prompt == {"prompt_token_ids": [5, 6], "cache_salt": "tenant"} and asked.priority == -3


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
    assert (stats.prompt_tokens, stats.generation_tokens, stats.num_running, stats.kv_cache_held) == (3, 8, 0, 0.25)


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
    assert first.lora_path == str(adapter) and first.lora_int_id != second.lora_int_id
    assert [*inside(engine).loras] == [second.lora_int_id] and engine.adapters == ["a"]
    run(engine)
    engine.unload_adapter("a")
    assert not inside(engine).loras


def test_adapters_that_cannot_run_are_refused(engine: VllmEngine, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownAdapterError, match="nobody"):
        engine.add_request("x", [5], SamplingParams(), adapter="nobody")
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "use_dora": True}))
    with pytest.raises(AdapterError, match="DoRA"):
        engine.load_adapter("d", adapter)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterError, match="no tensors"):
        engine.load_adapter("b", tmp_path / "broken")
    assert engine.adapters == []


def test_a_grammar_is_vllms_to_keep(engine: VllmEngine) -> None:
    structured = SamplingParams(max_tokens=4, structured=True)
    engine.add_request("s", [5], structured, grammar='start: "yes" | "no"')
    (asked,) = inside(engine).seen
    assert asked.params.structured_outputs is not None and asked.params.structured_outputs.grammar == 'start: "yes" | "no"'
    assert not engine.is_blocked()
    with pytest.raises(EngineError, match="grammar"):
        engine.add_request("t", [5], structured)


def test_requests_that_cannot_run_are_refused(engine: VllmEngine) -> None:
    with pytest.raises(PromptTooLongError, match="512"):
        engine.add_request("x", [5] * 500, SamplingParams(max_tokens=20))
    with pytest.raises(ValueError, match="empty"):
        engine.add_request("x", [], SamplingParams())
    engine.add_request("x", [5], SamplingParams())
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("x", [5], SamplingParams())


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"quantization": "int4"}, "quantization int4"),
        ({"kv_cache_dtype": "int8"}, "kv_cache_dtype int8"),
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


def test_it_does_not_sleep_and_says_so_before_anybody_is_aborted(engine: VllmEngine) -> None:
    engine.add_request("a", [5, 6], SamplingParams(max_tokens=3))
    assert engine.unfinished == ["a"]
    for refuse in (engine.check_sleep, engine.sleep):
        with pytest.raises(EngineError, match="use engine altiplano"):
            refuse(1)
    engine.wake_up()
    assert run(engine)["a"][-1].finish_reason is not None
