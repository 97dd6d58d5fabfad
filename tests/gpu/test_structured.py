"""Structured requests and scored prompts on the CUDA engine, beside requests that it runs ahead of."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import EngineConfig, SamplingParams, create_engine  # noqa: E402
from altiplano.models.cria import cria_path  # noqa: E402

PROMPT = [0, 60, 70, 80, 90]


def config(device: str) -> EngineConfig:
    return EngineConfig(Path(cria_path()), device=device, max_model_len=256, num_blocks=64, debug=True)


def bits(vocab: int, *tokens: int) -> bytes:
    mask = bytearray(-(-vocab // 8))
    for token in tokens:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def test_only_allowed_tokens_are_drawn_while_plain_requests_run_ahead() -> None:
    engine = create_engine(config("cuda"))
    plain = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    alone = engine.generate([PROMPT], plain)[0].token_ids
    engine.add_request("plain", PROMPT, plain)
    for _ in range(3):
        engine.step()
    engine.add_request("structured", PROMPT, SamplingParams(max_tokens=8, temperature=1.0, seed=3, structured=True))
    said: dict[str, list[int]] = {"plain": [], "structured": []}
    allowed = [[100 + i, 200 + i] for i in range(8)]
    while engine.has_unfinished():
        for output in engine.step():
            assert output.token_id is not None
            said[output.request_id].append(output.token_id)
        if len(said["structured"]) < 8:
            engine.allow("structured", bits(engine.runner.vocab_size, *allowed[len(said["structured"])]))
    assert all(token in choice for token, choice in zip(said["structured"], allowed, strict=True))
    assert alone[-len(said["plain"]) :] == said["plain"]


def test_a_scored_prompt_has_the_reference_backends_values() -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=True, logprobs=3)
    found = []
    for device in ("cuda", "cpu"):
        engine = create_engine(config(device))
        engine.add_request("scored", PROMPT, params)
        outputs = []
        while engine.has_unfinished():
            outputs += engine.step()
        found.append(outputs[0])
    # The tiny model's logits are wide: bf16 weights and rows against float32 ones.
    assert found[0].prompt_logprobs == pytest.approx(found[1].prompt_logprobs, abs=0.15)
    assert [row[0][0] for row in found[0].prompt_top] == [row[0][0] for row in found[1].prompt_top]
