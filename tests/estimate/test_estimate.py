"""The plan that a user sees before paying: counts against known models, memory that grows as it should, advice that helps."""

import json
from pathlib import Path

import pytest

from altiplano import spec
from altiplano.estimate import Hardware, ModelShape, memory, plan, read_shape
from altiplano.estimate.plan import DoesNotFitError, flops_per_token
from altiplano.estimate.shape import ShapeError

LLAMA_1B = ModelShape(2048, 16, 32, 8, 64, 8192, 128256, True)
LLAMA_3B = ModelShape(3072, 28, 24, 8, 128, 8192, 128256, True)
BIG_GPU = Hardware("test GPU", flops=747e12, memory_bytes=140 << 30, useful_share=0.32)


def pipeline(**sections: object) -> spec.Pipeline:
    base: dict[str, object] = {
        "data": {"datasets": [{"path": "a.jsonl"}], "eval_datasets": [{"path": "b.jsonl"}], "max_length": 2048},
        "model": {"dtype": "bfloat16"},
        "run": {"name": "test"},
    }
    return spec.Pipeline.model_validate(base | sections)


def test_parameter_counts_are_those_of_the_published_models() -> None:
    assert (LLAMA_1B.total, LLAMA_3B.total) == (1_235_814_400, 3_212_749_824)
    assert LLAMA_1B.adapter(16) == 11_272_192
    assert LLAMA_3B.adapter(16) == 24_313_856


def test_flops_per_token_of_the_1b_model() -> None:
    # 5.41 GFLOP: 2 x 2 x (973 M + 263 M) for the weights, 0.4 G for causal attention over 2 048, 0.07 G for the adapter.
    assert flops_per_token(pipeline(), LLAMA_1B) == pytest.approx(5.21e9, rel=0.02)


def test_checkpointing_and_4bit_save_memory_and_checkpointing_costs_time() -> None:
    plain = memory(pipeline(), LLAMA_3B, 8192)
    checkpointed = memory(pipeline(training={"gradient_checkpointing": True}), LLAMA_3B, 8192)
    quantized = memory(pipeline(model={"dtype": "bfloat16", "load_in_4bit": True}), LLAMA_3B, 8192)
    assert checkpointed.activations < plain.activations / 5
    assert quantized.weights < plain.weights * 0.45
    slow = plan(pipeline(training={"gradient_checkpointing": True}), LLAMA_3B, BIG_GPU, 1_000_000)
    fast = plan(pipeline(), LLAMA_3B, BIG_GPU, 1_000_000)
    assert slow.hours > fast.hours * 1.3


def test_two_workers_take_half_the_time_and_the_same_money() -> None:
    one = plan(pipeline(), LLAMA_1B, BIG_GPU, 10_000_000, usd_per_worker_hour=4.0)
    two = plan(pipeline(scaling={"num_workers": 2}), LLAMA_1B, BIG_GPU, 10_000_000, usd_per_worker_hour=4.0)
    assert two.hours == pytest.approx(one.hours / 2)
    assert two.usd == pytest.approx(one.usd)
    assert one.hours_low < one.hours < one.hours_high


def test_a_run_that_cannot_fit_is_refused_with_settings_that_free_memory() -> None:
    small = Hardware("small GPU", 60e12, 6 << 30, 0.3)
    with pytest.raises(DoesNotFitError, match="gradient_checkpointing=true") as caught:
        plan(
            pipeline(data={"datasets": [{"path": "a"}], "eval_datasets": [{"path": "b"}], "max_length": 8192}), LLAMA_3B, small, 1
        )
    assert "GiB" in str(caught.value) and "load_in_4bit=true" in str(caught.value)


def test_the_sweep_is_counted_with_halving() -> None:
    tune = {
        "num_samples": 9,
        "scheduler": {"max_t": 900, "grace_period": 100, "reduction_factor": 3},
        "search_space": {"lora.r": {"choice": [8, 16]}},
    }
    # 9 trials to 100, 3 on to 300, 1 on to 900.
    assert plan(pipeline(tune=tune), LLAMA_1B, BIG_GPU, 1).tune_tokens == 9 * 100 + 3 * 200 + 600


def test_shape_from_config_json_and_its_errors(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config |= {"intermediate_size": 128, "vocab_size": 300, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path).head_dim == 16
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
    with pytest.raises(ShapeError, match="gpt2"):
        read_shape(tmp_path)
    with pytest.raises(ShapeError, match="cannot be read"):
        read_shape(tmp_path / "absent")
