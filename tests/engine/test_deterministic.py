"""A request says the same, to the bit, alone and among others."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from altiplano.engine import Engine, EngineConfig, SamplingParams
from altiplano.engine.outputs import TokenOutput

from .conftest import VOCAB, make_adapter, make_draft

Llama = tuple[Path, LlamaForCausalLM]
Said = list[tuple[int | None, float | None, tuple[tuple[int, float], ...], tuple[float, ...]]]
NEEDLE = SamplingParams(max_tokens=20, temperature=0.9, seed=7, logprobs=4, prompt_logprobs=True, ignore_eos=True)


def needle(engine: Engine, prompt: list[int], rng: random.Random | None, params: SamplingParams, adapter: str | None) -> Said:
    """What the needle is told; with `rng` it comes at a random time among random others that come, go and share its prefix."""
    said: Said = []

    def take(outputs: list[TokenOutput]) -> None:
        said.extend(
            (o.token_id, o.logprob, o.top_logprobs, o.prompt_logprobs) for o in outputs if o.request_id.startswith("needle")
        )

    vocab = engine.runner.vocab_size
    for number in range(rng.randrange(1, 8) if rng else 0):
        assert rng is not None
        shared = prompt[: rng.randrange(len(prompt))] if rng.random() < 0.4 else []
        other = shared + [rng.randrange(3, vocab) for _ in range(rng.randrange(1, 40))]
        engine.add_request(
            f"{number}",
            other,
            SamplingParams(max_tokens=rng.randrange(1, 30), seed=number, ignore_eos=True),
            adapter=rng.choice([None, adapter]),
        )
        for _ in range(rng.randrange(3)):
            engine.step()
    engine.add_request("needle", prompt, params, adapter=adapter)
    while engine.has_unfinished():
        take(engine.step())
    return said


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("adapter", [None, "lora"])
def test_the_needle_is_the_same_to_the_bit_alone_and_in_random_batches(
    llama: Llama, tmp_path: Path, caching: bool, adapter: str | None
) -> None:
    rng = random.Random(3)
    prompt = [rng.randrange(3, VOCAB) for _ in range(33)]
    params = replace(NEEDLE, prompt_logprobs=not caching)  # prompts that are scored are not taken from the cache
    if adapter:
        make_adapter(tmp_path, 1, adapter)
    told = []
    for trial in range(8):
        settings = {"max_num_batched_tokens": rng.choice((9, 30, 500)), "num_blocks": rng.choice((20, 200))}
        engine = Engine(
            EngineConfig(
                llama[0],
                max_model_len=96,
                block_size=8,
                enable_prefix_caching=caching,
                deterministic=True,
                debug=True,
                **settings,
            )
        )
        if adapter:
            engine.load_adapter(adapter, tmp_path)
        told.append(needle(engine, prompt, rng if trial else None, params, adapter))
    assert len(told[0]) == 20
    assert all(said == told[0] for said in told[1:]), "equal, not nearly equal"


@pytest.mark.parametrize("guesses", [{"num_speculative_tokens": 4}, {"num_speculative_tokens": 3, "speculative_model": "draft"}])
def test_guesses_change_no_bit(llama: Llama, tmp_path: Path, guesses: dict[str, object]) -> None:
    make_draft(llama[1], tmp_path)
    if "speculative_model" in guesses:
        guesses = guesses | {"speculative_model": tmp_path}
    config = EngineConfig(llama[0], max_model_len=96, block_size=8, num_blocks=64, deterministic=True)
    prompt, params = [9, 8, 7, 6] * 6, replace(NEEDLE, temperature=0.0, max_tokens=40)
    plain = needle(Engine(config), prompt, None, params, None)
    engine = Engine(replace(config, **guesses), clock=lambda: 0.0)  # type: ignore[arg-type]
    assert needle(engine, prompt, None, params, None) == plain
    assert engine.stats().accepted_tokens > 0


def test_it_is_refused_where_it_does_not_exist() -> None:
    with pytest.raises(ValueError, match="deterministic is not for quantization w8a8-int8"):
        EngineConfig(Path("x"), device="cuda", deterministic=True, quantization="w8a8-int8")
