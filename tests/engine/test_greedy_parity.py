"""The engine answers what transformers answers, however a request is cut, cached or thrown out on the way."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.models.cria import cria_path

from .conftest import VOCAB, greedy, make_adapter, make_llama

Llama = tuple[Path, LlamaForCausalLM]
GREEDY = SamplingParams(max_tokens=24, min_tokens=24, temperature=0.0)
ROOMY = {"num_blocks": 256, "block_size": 8, "max_model_len": 256, "debug": True}


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 3 to 60 tokens, half of them with a common beginning."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, VOCAB) for _ in range(30)]
    made = []
    for index in range(count):
        own = [rng.randrange(3, VOCAB) for _ in range(rng.randint(3, 30))]
        made.append(shared + own if index % 2 else own)
    return made


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"enable_prefix_caching": False},
        {"max_num_batched_tokens": 7},
        {"max_num_seqs": 2},
        {"num_blocks": 16, "max_model_len": 100},
        {"num_blocks": 30, "max_model_len": 100, "max_num_batched_tokens": 11},
        {"block_size": 32, "num_blocks": 64},
    ],
    ids=["plain", "no-cache", "chunks-of-7", "two-at-a-time", "tiny-cache", "tiny-cache-and-chunks", "large-pages"],
)
def test_greedy_tokens_equal_transformers(llama: Llama, settings: dict[str, object]) -> None:
    directory, model = llama
    engine = Engine(EngineConfig(directory, **(ROOMY | settings)))  # type: ignore[arg-type]
    asked = prompts(8)
    answers = [c.token_ids for c in engine.generate(asked, GREEDY)]
    assert answers == [greedy(model, prompt, 24) for prompt in asked]
    if settings.get("num_blocks") == 16:
        assert engine.stats().preemptions > 0
    # Everything but cached prefixes is free again.
    assert round(engine.stats().kv_cache_usage * engine.config.num_blocks) == engine.stats().num_cached_pages


def test_a_second_round_hits_the_prefix_cache_and_says_the_same(llama: Llama) -> None:
    directory, _ = llama
    engine = Engine(EngineConfig(directory, **ROOMY))  # type: ignore[arg-type]
    asked = prompts(6, seed=1)
    first = [c.token_ids for c in engine.generate(asked, GREEDY)]
    before = engine.stats().cached_tokens
    assert [c.token_ids for c in engine.generate(asked, GREEDY)] == first
    assert engine.stats().cached_tokens - before >= sum((len(p) - 1) // 8 * 8 for p in asked)


def test_namespaces_do_not_share_prefixes(llama: Llama) -> None:
    directory, _ = llama
    engine = Engine(EngineConfig(directory, **ROOMY))  # type: ignore[arg-type]
    for namespace in ("a", "b", "a"):
        engine.add_request(namespace, list(range(3, 40)), replace(GREEDY, max_tokens=1, min_tokens=0), namespace=namespace)
        while engine.has_unfinished():
            outputs = engine.step()
        assert (outputs[-1].num_cached_tokens > 0) == (engine.stats().steps == 3)


def test_cria_answers_as_transformers_does(cria: LlamaForCausalLM) -> None:
    engine = Engine(EngineConfig(cria_path(), num_blocks=64, max_model_len=256))
    prompt = list(range(20, 90))
    assert engine.generate([prompt], replace(GREEDY))[0].token_ids == greedy(cria, prompt, 24)


def test_scores_are_the_models_log_probabilities(llama: Llama) -> None:
    directory, model = llama
    engine = Engine(EngineConfig(directory, **(ROOMY | {"max_num_batched_tokens": 13})))  # type: ignore[arg-type]
    asked = prompts(5, seed=2)
    for prompt, scores in zip(asked, engine.score(asked), strict=True):
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(logprobs[i, prompt[i + 1]]) for i in range(len(prompt) - 1)]
        assert scores == pytest.approx(expected, abs=1e-4)


def test_logprobs_of_chosen_and_top_tokens(llama: Llama) -> None:
    directory, model = llama
    engine = Engine(EngineConfig(directory, **ROOMY))  # type: ignore[arg-type]
    prompt = prompts(1, seed=3)[0]
    engine.add_request("x", prompt, SamplingParams(max_tokens=1, temperature=0.0, logprobs=5))
    (output,) = engine.step()
    with torch.no_grad():
        values, ids = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1).topk(5)
    assert [token for token, _ in output.top_logprobs] == ids.tolist()
    assert [p for _, p in output.top_logprobs] == pytest.approx(values.tolist(), abs=1e-4)
    assert output.logprob == pytest.approx(float(values[0]), abs=1e-4)


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora"])
def test_adapters_and_base_in_one_batch(llama: Llama, tmp_path: Path, kind: str) -> None:
    directory, model = llama
    expected = {name: make_adapter(tmp_path / name, seed, kind) for seed, name in enumerate(("one", "two"))}
    engine = Engine(EngineConfig(directory, **ROOMY))  # type: ignore[arg-type]
    for name in expected:
        engine.load_adapter(name, tmp_path / name)
    prompt = prompts(1, seed=4)[0]
    said: dict[str, list[int]] = {"one": [], "two": [], "base": []}
    for name in said:
        engine.add_request(name, prompt, GREEDY, adapter=None if name == "base" else name)
    while engine.has_unfinished():
        for output in engine.step():
            assert output.token_id is not None
            said[output.request_id].append(output.token_id)
    assert said["base"] == greedy(model, prompt, 24)
    for name, tuned in expected.items():
        assert said[name] == greedy(tuned, prompt, 24), name
    assert said["one"] != said["base"] != said["two"]


def test_old_key_names_shards_and_tied_weights_load_alike(tmp_path: Path) -> None:
    model = make_llama(tmp_path, seed=5, tied=True)
    prompt = prompts(1, seed=5)[0]
    expected = greedy(model, prompt, 24)
    config = json.loads((tmp_path / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": config.pop("dtype")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / file)
        weight_map |= dict.fromkeys(part, file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    engine = Engine(EngineConfig(tmp_path, **ROOMY))  # type: ignore[arg-type]
    assert engine.generate([prompt], GREEDY)[0].token_ids == expected
