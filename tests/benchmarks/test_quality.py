"""The comparison of distributions that the engine's quality is measured by."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks/engine"


@pytest.fixture(scope="module")
def quality() -> Any:
    found = importlib.util.spec_from_file_location("quality", FOLDER / "quality.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["quality"] = module
    found.loader.exec_module(module)
    return module


def test_the_folder_does_not_hide_packages_that_transformers_looks_for(quality: Any) -> None:
    assert str(FOLDER.resolve()) not in sys.path


def test_equal_distributions_have_no_error_and_known_ones_the_known(quality: Any) -> None:
    logits, targets = torch.randn(130, 50), torch.arange(130) % 50
    same = quality.compare(logits, logits + torch.randn(130, 1), targets).measures()
    assert all(abs(value) < 1e-6 for value in same.values())

    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([[0.25, 0.75], [0.25, 0.75]])
    found = quality.compare(p.log(), q.log(), torch.tensor([0, 1])).measures()
    divergence = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert found["quality-kl"] == pytest.approx(float(divergence) / 2, rel=1e-5)
    assert found["quality-kl-max"] == pytest.approx(float(divergence), rel=1e-5)
    assert found["quality-logprob-max"] == pytest.approx(float(torch.tensor(2.0).log()), rel=1e-5)


def test_the_reference_judges_the_tokens_that_the_engine_scores(quality: Any, tmp_path: Path) -> None:
    """The same checkpoint on the CPU engine gives the log-probabilities that the reference gives to its targets."""
    from altiplano.engine import Engine, EngineConfig

    config = quality.model_config("1b") | {
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "vocab_size": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    quality.write_checkpoint(config, tmp_path)
    tokens = quality.draw_tokens(0, vocab=512)[:3, :100]
    (logits,) = quality.reference_logits(tmp_path, [tokens], torch.float32, "cpu")
    targets = quality.judged_targets(tokens)
    assert logits.shape == (3 * quality.JUDGED, 512)
    wanted = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]

    scored = Engine(EngineConfig(model=tmp_path, dtype="float32")).score(tokens.tolist())
    found = torch.tensor([row[-quality.JUDGED :] for row in scored]).flatten()
    assert torch.allclose(found, wanted, atol=1e-4)
    assert float(wanted.std()) > 0.01


def test_a_path_that_fails_costs_only_itself(
    quality: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [torch.randint(20, (2, quality.JUDGED + 1)) for _ in range(3)]
    wanted = [torch.randn(2 * quality.JUDGED, 20) for _ in tokens]
    left = iter(wanted)

    def broken() -> torch.Tensor:
        raise RuntimeError("no such kernel")

    def paths(_: object, ids: torch.Tensor) -> Any:
        reference = next(left)
        assert ids.shape == (2, quality.JUDGED)
        yield "prefill", 2, lambda: reference + 0.5
        yield "decode-1", 1, broken
        yield "decode-2", 2, lambda: reference.roll(1, 1)

    monkeypatch.setattr(quality, "make_runner", lambda *_: None)
    monkeypatch.setattr(quality, "paths", paths)
    records = quality.Records("1b", "altiplano", "abc", "NVIDIA H200", {})
    quality.measure(records, Path("nowhere"), "w-int4", tokens, wanted)
    rows = {row["workload"]: row for row in records.rows}
    assert len(rows) == 8 and not any("decode-1" in name for name in rows)
    assert all(row["runs"] == 3 and row["variant"] == "w-int4" and row["unit"] == "nats" for row in rows.values())
    assert rows["quality-kl-max/prefill"]["max"] < 1e-6 < 0.1 < rows["quality-kl/decode-2"]["min"]
    assert "no such kernel" in capsys.readouterr().err


def test_what_is_committed_is_within_the_bounds_and_a_worse_run_is_named(quality: Any) -> None:
    records = [
        record
        for record in json.loads((FOLDER.parent / "results/engine.json").read_text())
        if record["workload"].startswith("quality-kl/")
    ]
    assert {record["variant"] for record in records} == set(quality.VARIANTS)
    assert quality.above_bounds(records) == []
    worse = [{**record, "max": 2 * record["max"]} for record in records]
    named_too = {tuple(line.split()[:2]) for line in quality.above_bounds(worse)}
    assert named_too == {(record["model"], record["variant"]) for record in worse}
    assert {model for model, _ in named_too} == {"1b", "3b"}
    (named,) = quality.above_bounds([{**records[0], "variant": "kv-fp8", "max": 0.009}])
    assert "kv-fp8 quality-kl/prefill: 0.009, and 0.008 is allowed" in named
