"""The engine's options on their way from the endpoint's arguments into the engine's process."""

import asyncio
from pathlib import Path

import pytest

from altiplano.models.cria import cria_path
from altiplano.serve import messages as m
from altiplano.serve.application import parse
from altiplano.serve.engine_client import EngineClient, engine_settings
from altiplano.serve.metrics import Metrics
from altiplano.serve.settings import ServeSettings

PROMPT = list(range(30, 60))


async def answer(settings: ServeSettings) -> tuple[list[int | None], dict[str, float]]:
    """One greedy answer of a process with these settings, and its counters."""
    client = EngineClient(settings)
    await client.start()
    try:
        sampling = m.Sampling(max_tokens=40, temperature=0.0, ignore_eos=True)
        said = [token.token_id async for token in client.generate("x", PROMPT, sampling)]
        return said, await client.stats()
    finally:
        await client.stop()


def test_a_draft_a_latency_target_and_determinism_reach_the_engine_and_change_no_word() -> None:
    plain, _ = parse({"model": "cria"})
    full, _ = parse(
        {
            "model": "cria",
            "num_speculative_tokens": 4,
            "speculative_model": "cria",
            "itl_target_ms": 50,
            "deterministic": True,
        }
    )
    assert full.speculative_model == str(cria_path())

    async def both() -> tuple[list[int | None], list[int | None], dict[str, float]]:
        said, _ = await answer(plain)
        return said, *(await answer(full))

    said, again, stats = asyncio.run(both())
    assert again == said and len(said) == 40
    assert stats["accepted_tokens"] == stats["guessed_tokens"] > 0, "a draft that is the model itself is always right"
    assert stats["steps"] < 40 and stats["draft_seconds"] > 0
    metrics = Metrics()
    metrics.set_engine(stats, restarts=0)
    shown = metrics.render().decode()
    assert f"altiplano_spec_decode_num_draft_tokens {stats['guessed_tokens']}" in shown
    assert f"altiplano_spec_decode_num_accepted_tokens {stats['accepted_tokens']}" in shown
    assert f"altiplano_spec_decode_steps {stats['guessed_steps']}" in shown


def test_the_process_reads_every_option() -> None:
    settings = ServeSettings(
        str(cria_path()),
        "cria",
        num_speculative_tokens=2,
        speculative_model="/drafts/1b",
        speculative_quantization="int4",
        itl_target_ms=20.0,
    )
    read = engine_settings(settings)
    assert (read["speculative_model"], read["itl_target_ms"], read["deterministic"]) == ("/drafts/1b", 20.0, False)
    assert read["speculative_quantization"] == "int4"
    assert Path(read["model"]) == cria_path()


def test_an_engine_or_a_draft_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="altiplano or vllm, not 'sglang'"):
        parse({"model": "cria", "engine": "sglang"})
    with pytest.raises(ValueError, match="/nowhere"):
        parse({"model": "cria", "num_speculative_tokens": 4, "speculative_model": "/nowhere"})


def test_an_engine_that_cannot_be_started_says_why_to_the_front_end() -> None:
    """vLLM on a laptop: refused by the engine's process before anything is loaded."""
    settings, _ = parse({"model": "cria", "engine": "vllm"})

    async def start() -> None:
        await EngineClient(settings).start()

    with pytest.raises(RuntimeError, match=r"vLLM cannot be started with device cpu.*use engine altiplano"):
        asyncio.run(start())
