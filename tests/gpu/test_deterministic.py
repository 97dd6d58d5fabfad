"""Deterministic mode: to the bit, nobody's answer depends on who else runs."""

import random
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

from altiplano.engine import EngineConfig, SamplingParams  # noqa: E402
from altiplano.engine.cuda.overlap import OverlappedEngine  # noqa: E402
from altiplano.engine.cuda.runner import CudaRunner  # noqa: E402
from altiplano_kernels.steady_linear import kernel as steady  # noqa: E402

from .test_runner import prompts, random_checkpoint  # noqa: E402


@pytest.fixture(scope="module", params=["1b-like", "3b-like"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(request.param, 0.05, tmp_path_factory)


def make(where: Path, kind: str = "bf16", quantization: str = "none", guesses: int = 0, **settings: int) -> OverlappedEngine:
    values = {"max_model_len": 1024, "max_num_seqs": 64, "num_blocks": 1200, "max_num_batched_tokens": 512, **settings}
    config = EngineConfig(
        where,
        device="cuda",
        dtype="bfloat16",
        debug=True,
        deterministic=True,
        num_speculative_tokens=guesses,
        quantization=quantization,
        **values,
    )
    return OverlappedEngine(config, CudaRunner(config, kind, quantization=quantization))


@pytest.mark.parametrize("k", [512, 2048])
def test_a_row_of_a_product_is_the_same_in_any_number_of_rows(k: int) -> None:
    x, w = torch.randn(300, k, device="cuda").bfloat16(), torch.randn(1000, k, device="cuda").bfloat16()
    whole = steady.linear(x, w)
    wanted = x.double() @ w.double().T
    assert float((whole.double() - wanted).norm() / wanted.norm()) < 3e-3
    for rows in (1, 2, 15, 16, 17, 64, 65, 128):
        first = random.Random(rows).randrange(300 - rows + 1)
        assert torch.equal(steady.linear(x[first : first + rows], w), whole[first : first + rows])
    exact = steady.linear(x, w, torch.float32)
    assert float((exact.double() - wanted).norm() / wanted.norm()) < 1e-5


NEEDLES = (
    SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.9, seed=5, ignore_eos=True),
    SamplingParams(max_tokens=40, temperature=0.9, seed=5, top_p=0.9, top_k=30, ignore_eos=True),
    SamplingParams(max_tokens=12, temperature=0.0, logprobs=2, ignore_eos=True),
)


@pytest.mark.parametrize(("kind", "quantization"), [("bf16", "none"), ("fp8", "none"), ("int8", "int4")])
def test_a_needle_says_the_same_alone_and_inside_random_batches(checkpoint: Path, kind: str, quantization: str) -> None:
    needle = prompts(1, 150, 150)[0]
    engine = make(checkpoint, kind, quantization)
    alone = [engine.generate([needle], params)[0] for params in NEEDLES]
    dice = random.Random(1)
    for size in (3, 20, 50):
        hay = prompts(size, 1, 400)
        others = [
            SamplingParams(max_tokens=dice.randint(1, 60), temperature=dice.choice((0.0, 1.0)), seed=9, ignore_eos=True)
            for _ in hay
        ]
        at = dice.randrange(size)
        for params, wanted in zip(NEEDLES, alone, strict=True):
            found = make(checkpoint, kind, quantization).generate(
                [*hay[:at], needle, *hay[at:]], [*others[:at], params, *others[at:]]
            )[at]
            assert found.token_ids == wanted.token_ids
            assert found.logprobs == wanted.logprobs


def test_a_cached_prefix_a_preemption_and_guesses_change_no_bit(checkpoint: Path) -> None:
    asked = prompts(8, 100, 250)
    params = SamplingParams(max_tokens=100, temperature=0.8, seed=3, ignore_eos=True)
    roomy = make(checkpoint)
    wanted = [answer.token_ids for answer in roomy.generate(asked, params)]
    assert [answer.token_ids for answer in roomy.generate(asked, params)] == wanted
    assert roomy.stats().cached_tokens > 0
    tight = make(checkpoint, num_blocks=40, max_model_len=512)
    assert [answer.token_ids for answer in tight.generate(asked, params)] == wanted
    assert tight.stats().preemptions > 0
    guessing = make(checkpoint, guesses=3)
    assert [guessing.generate([prompt], params)[0].token_ids for prompt in asked] == wanted
