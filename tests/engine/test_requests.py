"""What a caller may ask, what it gets, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from altiplano.engine import (
    AdapterError,
    Engine,
    EngineConfig,
    PromptTooLongError,
    SamplingParams,
    UnknownAdapterError,
    WeightsError,
)

from .conftest import make_llama

Llama = tuple[Path, LlamaForCausalLM]
PROMPT = list(range(5, 30))


@pytest.fixture
def engine(llama: Llama) -> Engine:
    return Engine(EngineConfig(llama[0], num_blocks=64, block_size=8, max_model_len=128, debug=True))


def test_a_seed_draws_the_same_tokens_alone_and_in_a_crowd(engine: Engine) -> None:
    wild = SamplingParams(max_tokens=20, min_tokens=20, temperature=1.3, seed=7)
    alone = engine.generate([PROMPT], wild)[0].token_ids
    crowd = engine.generate([PROMPT, *([5 + i, 9, 11] for i in range(7))], [wild, *(replace(wild, seed=i) for i in range(7))])
    assert crowd[0].token_ids == alone
    assert engine.generate([PROMPT], replace(wild, seed=8))[0].token_ids != alone


def test_filters_that_leave_one_token_are_greedy(engine: Engine) -> None:
    greedy = engine.generate([PROMPT], SamplingParams(max_tokens=12, temperature=0.0))[0].token_ids
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        params = SamplingParams(max_tokens=12, temperature=1.5, seed=3, **narrow)  # type: ignore[arg-type]
        assert engine.generate([PROMPT], params)[0].token_ids == greedy, narrow


def test_draws_follow_the_distribution(llama: Llama) -> None:
    engine = Engine(EngineConfig(llama[0], num_blocks=1024, block_size=8, max_model_len=64, max_num_seqs=256))
    with torch.no_grad():
        expected = llama[1](torch.tensor([PROMPT])).logits[0, -1].softmax(-1)
    many = 3000
    drawn = [
        c.token_ids[0] for c in engine.generate([PROMPT] * many, [SamplingParams(max_tokens=1, seed=i) for i in range(many)])
    ]
    counts = torch.bincount(torch.tensor(drawn), minlength=len(expected)) / many
    # Five standard deviations of a share, for the likeliest tokens.
    for token in expected.topk(5).indices:
        share = float(expected[token])
        assert float(counts[token]) == pytest.approx(share, abs=5 * (share * (1 - share) / many) ** 0.5 + 1e-3)


def test_penalties_bias_and_forbidden_ends(engine: Engine) -> None:
    plain = SamplingParams(max_tokens=30, temperature=0.0)
    said = engine.generate([PROMPT], plain)[0].token_ids
    fresh = engine.generate([PROMPT], replace(plain, frequency_penalty=2.0, presence_penalty=2.0, repetition_penalty=5.0))[
        0
    ].token_ids
    assert len(set(fresh)) >= len(set(said))
    assert set(engine.generate([PROMPT], replace(plain, logit_bias={42: 100.0}))[0].token_ids) == {42}
    forced = replace(plain, logit_bias={1: 100.0})
    assert engine.generate([PROMPT], forced)[0].token_ids == [1]
    long = engine.generate([PROMPT], replace(forced, min_tokens=5))[0]
    assert len(long.token_ids) == 6 and long.finish_reason == "stop"
    assert engine.generate([PROMPT], replace(forced, ignore_eos=True, max_tokens=3))[0].token_ids == [1, 1, 1]
    assert engine.generate([PROMPT], replace(plain, logit_bias={42: 100.0}, stop_token_ids=(42,)))[0].finish_reason == "stop"


def test_abort_frees_the_pages_at_once(engine: Engine) -> None:
    for name in "abc":
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=60, temperature=0.0))
    engine.step()
    for name in "abc":
        engine.abort(name)
    stats = engine.stats()
    assert stats.num_running == stats.num_waiting == 0
    assert round(stats.kv_cache_usage * 64) == stats.num_cached_pages
    assert {(o.request_id, o.finish_reason) for o in engine.step()} == {("a", "abort"), ("b", "abort"), ("c", "abort")}
    engine.abort("never heard of")


def test_lower_priority_values_go_first(llama: Llama) -> None:
    engine = Engine(EngineConfig(llama[0], num_blocks=64, block_size=8, max_model_len=128, max_num_seqs=1))
    for name, priority in (("late", 5), ("urgent", -1), ("normal", 0)):
        engine.add_request(name, PROMPT, SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True), priority=priority)
    ended = []
    while engine.has_unfinished():
        ended += [o.request_id for o in engine.step() if o.finish_reason]
    assert ended == ["urgent", "normal", "late"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_k", 2**32 + 1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("presence_penalty", float("inf")),
        ("repetition_penalty", 0.0),
        ("max_tokens", -1),
        ("logprobs", 21),
        ("seed", 2**63),
    ],
)
def test_sampling_values_out_of_range_name_their_field(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})  # type: ignore[arg-type]


def test_requests_that_cannot_run_are_refused(engine: Engine) -> None:
    with pytest.raises(PromptTooLongError, match="128"):
        engine.add_request("x", PROMPT, SamplingParams(max_tokens=120))
    with pytest.raises(ValueError, match="empty"):
        engine.add_request("x", [], SamplingParams())
    with pytest.raises(ValueError, match="another tokenizer"):
        engine.add_request("x", [100_000], SamplingParams())
    with pytest.raises(UnknownAdapterError, match="nobody"):
        engine.add_request("x", PROMPT, SamplingParams(), adapter="nobody")
    engine.add_request("x", PROMPT, SamplingParams())
    with pytest.raises(ValueError, match="in use"):
        engine.add_request("x", PROMPT, SamplingParams())
    with pytest.raises(ValueError, match="raise num_blocks"):
        EngineConfig(engine.config.model, num_blocks=2, block_size=8, max_model_len=128)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make_llama(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    small = {"num_blocks": 16, "block_size": 8, "max_model_len": 64}
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.up_proj" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"layers\.1\.mlp\.up_proj"):
        Engine(EngineConfig(tmp_path, **small))  # type: ignore[arg-type]
    save_file(tensors | {"model.norm.weight": torch.zeros(7)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"\(7,\)"):
        Engine(EngineConfig(tmp_path, **small))  # type: ignore[arg-type]
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightsError, match="pickles"):
        Engine(EngineConfig(tmp_path, **small))  # type: ignore[arg-type]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mystery"}}))
    with pytest.raises(WeightsError, match="mystery"):
        Engine(EngineConfig(tmp_path, **small))  # type: ignore[arg-type]


def test_adapters_that_do_not_fit_are_refused(engine: Engine, tmp_path: Path) -> None:
    good = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    for bad, words in (
        ({"init_lora_weights": "pissa"}, "changes the base weights"),
        ({"r": 1000}, "max_lora_rank"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "bias"),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(good | bad))
        with pytest.raises(AdapterError, match=words):
            engine.load_adapter("x", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(good))
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({key: torch.zeros(4, 999)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="another base"):
        engine.load_adapter("x", tmp_path)
    save_file({key: torch.full((4, 48), float("nan"))}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="diverged"):
        engine.load_adapter("x", tmp_path)
    assert engine.adapters == []
