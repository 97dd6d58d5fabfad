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
from altiplano_kernels.filtered_sampling.kernel import draw_filtered  # noqa: E402
from altiplano_kernels.sampling.kernel import DrawWorkspace, draw  # noqa: E402
from altiplano_kernels.sampling.reference import sample  # noqa: E402

from .captured import captured  # noqa: E402

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
    found = engine.generate(PROMPTS[:batch], params(temperature=0.7, top_p=1e-6, seed=2))
    assert [answer.token_ids for answer in found] == alone


@pytest.mark.parametrize("batch", [1, 24])
def test_min_p_of_one_keeps_the_largest_logits_and_nothing_else(engine: OverlappedEngine, batch: int) -> None:
    """Several where bf16 makes them equal. So where an answer leaves the greedy one, it takes a token that is as good as the best."""
    alone = engine.generate(PROMPTS[:batch], params(temperature=1.0, top_k=1, seed=1))
    strict = engine.generate(PROMPTS[:batch], params(temperature=1.3, min_p=1.0, seed=3))
    for prompt, best, drawn in zip(PROMPTS, alone, strict, strict=False):
        parted = next((i for i, (a, b) in enumerate(zip(best.token_ids, drawn.token_ids, strict=True)) if a != b), None)
        if parted is not None:
            text = [*prompt, *best.token_ids[:parted]]
            scores = engine.score([[*text, best.token_ids[parted]], [*text, drawn.token_ids[parted]]])
            # Equal in bf16, whose step is 1/8 at this model's logits; and a prompt's logits are not those of a step to the last bit.
            assert abs(scores[0][-1] - scores[1][-1]) < 0.125 + 0.075


# top_k, top_p, min_p
KINDS = [
    (0, 0.9, 0.0),
    (50, 1.0, 0.0),
    (0, 1.0, 0.05),
    (1000, 0.8, 0.01),
    (0, 0.1, 0.0),
    (0, 1.0, 0.0),
    (3000, 0.9, 0.0),
    (40, 0.95, 1.0),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "scale"), [(1, 0.9), (16, 4.0), (200, 0.9)])
def test_draws_from_a_whole_vocabulary_are_the_references(rows: int, scale: float, dtype: torch.dtype) -> None:
    """In a graph whose launches overlap, as the engine has it; the filters change between its replays."""
    vocab, generator = 128256, torch.Generator("cuda").manual_seed(rows)
    logits = (torch.randn(rows, vocab, generator=generator, device="cuda") * scale).to(dtype)
    slots, seeds = torch.randperm(rows, device="cuda").int(), torch.arange(rows, device="cuda") * 2**33
    steps, temperatures = torch.zeros(rows, dtype=torch.int32, device="cuda"), torch.full((rows,), 0.8, device="cuda")
    top_ks, top_ps, min_ps = torch.zeros_like(steps), torch.ones_like(temperatures), torch.zeros_like(temperatures)
    work, at = DrawWorkspace(rows, vocab, "cuda"), slots.long()

    def launch() -> None:
        draw(logits, slots, temperatures, seeds, steps, work, True)
        draw_filtered(logits, slots, temperatures, top_ks, top_ps, min_ps, seeds, steps, work, True)

    graph, _ = captured(launch)
    for step in range(4):
        mine = [KINDS[(row + step) % len(KINDS)] for row in range(rows)]
        for column, values in zip((top_ks, top_ps, min_ps), zip(*mine, strict=True), strict=True):
            column[at] = torch.tensor(values, dtype=column.dtype, device="cuda")
        steps.fill_(step)
        graph.replay()
        found = work.ids.view(rows, -1).gather(1, work.values.view(rows, -1).argmax(1, keepdim=True))[:, 0]
        filters = (top_ks[at].long(), top_ps[at], min_ps[at])
        wanted = sample(logits.float(), temperatures[at], *filters, seeds[at], steps[at].long())
        # A running sum of 128 256 probabilities in float32 is not exact, and may keep one token more or less at the edge of top-p.
        exact = torch.tensor([p == 1 for _, p, _ in mine], device="cuda")
        assert bool((found == wanted)[exact].all())
        assert int((found != wanted).sum()) <= rows // 50


def test_filtered_requests_do_not_end_the_bursts(engine: OverlappedEngine) -> None:
    def launches() -> int:
        return sum(engine.step_log.histograms()["iteration_gap_seconds"].counts)

    before = launches()
    engine.generate(PROMPTS[:4], params(temperature=0.8, top_k=40, top_p=0.9, seed=7))
    assert launches() - before < 20, "40 tokens came in bursts"


@pytest.mark.parametrize("batch", [3, 12, 21])
def test_a_filtered_request_does_not_change_its_neighbours(engine: OverlappedEngine, batch: int) -> None:
    """Its logits now are written before the draw, but not rounded. All steps here have rows enough for the same kernels."""
    plain = [params(temperature=0.0), params(temperature=0.9, seed=11), params(temperature=1.3, seed=12)] * (batch // 3)
    filtered = params(temperature=0.8, top_p=0.5, seed=5)
    asked = [*PROMPTS[: len(plain)], PROMPTS[3]]
    alone = engine.generate(asked, [*plain, params(temperature=0.8, seed=5)])
    mixed = engine.generate(asked, [*plain, filtered])
    assert [answer.token_ids for answer in mixed[:-1]] == [answer.token_ids for answer in alone[:-1]]
