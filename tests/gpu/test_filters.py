"""Requests under top-k, top-p and min-p stay in the graphs, with the tokens that the reference draws from the same logits."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402
from altiplano.models.cria import cria_path  # noqa: E402

PROMPTS = [[0, 60, 70, 80, 90 + i] for i in range(24)]


@pytest.fixture(scope="module")
def engine() -> OverlappedEngine:
    config = EngineConfig(
        Path(cria_path()), device="cuda", dtype="bfloat16", max_model_len=256, num_blocks=512, max_num_seqs=32, debug=True
    )
    return OverlappedEngine(config, CudaRunner(config))


def params(**wanted: float) -> SamplingParams:
    return SamplingParams(max_tokens=40, ignore_eos=True, **wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_filters_that_leave_one_token_are_greedy(engine: OverlappedEngine, batch: int) -> None:
    """Both kinds of step: up to 16 rows and more. The same kernels compute the logits that both draws look at."""
    greedy = params(temperature=1.0, top_k=1, seed=1)
    alone = [found.token_ids for found in engine.generate(PROMPTS[:batch], greedy)]
    for one in (params(temperature=0.7, top_p=1e-6, seed=2), params(temperature=1.3, min_p=1.0, seed=3)):
        found = [answer.token_ids for answer in engine.generate(PROMPTS[:batch], one)]
        same = sum(a == b for a, b in zip(found, alone, strict=True))
        # bf16 logits may tie: then top-p and top-k keep the first of them, min-p both.
        assert same == batch if one.top_p < 1 else same >= 0.8 * batch


def test_filtered_requests_do_not_end_the_bursts(engine: OverlappedEngine) -> None:
    before = engine.stats().steps
    engine.generate(PROMPTS[:4], params(temperature=0.8, top_k=40, top_p=0.9, seed=7))
    assert engine.stats().steps - before < 20, "40 tokens came in bursts"


def test_a_filtered_request_does_not_change_its_neighbours(engine: OverlappedEngine) -> None:
    plain = params(temperature=0.9, seed=11)
    alone = engine.generate([PROMPTS[20]] * 3, plain)
    mixed = engine.generate([PROMPTS[20], PROMPTS[20], PROMPTS[3]], [plain, plain, params(temperature=0.8, top_p=0.5, seed=5)])
    agree = [a == b for a, b in zip(alone[0].token_ids, mixed[0].token_ids, strict=True)]
    # Its logits now are written before the draw, and rounded to bf16: the first tokens are equal, later ones may part.
    assert all(agree[:4])
    assert mixed[0].token_ids == mixed[1].token_ids
