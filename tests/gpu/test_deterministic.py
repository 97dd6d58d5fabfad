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
from altiplano_kernels.tile_linear import reference  # noqa: E402

from ..kernels.paged import KINDS, Sizes  # noqa: E402
from ..kernels.test_steady_attention import Sequences  # noqa: E402
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


WIDTHS = {
    "qkv": (3072, 2048),
    "o": (2048, 2048),
    "down": (2048, 8192),
    "head": (4096, 3072),
    "few": (256, 512),
    "odd": (1000, 512),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_row_of_a_product_is_the_same_in_any_number_of_rows(name: str) -> None:
    """Of tiles, whole and in parts; and in Triton, where w does not divide into tiles."""
    n, k = WIDTHS[name]
    torch.manual_seed(k)
    x, w = torch.randn(700, k, device="cuda").bfloat16(), (torch.randn(n, k, device="cuda") * k**-0.5).bfloat16()
    wanted = x.double() @ w.double().T
    products = {
        "bf16": lambda rows: steady.linear(rows, w),
        "float32": lambda rows: steady.linear(rows, w, torch.float32),
        "parts": lambda rows: steady.add(steady.linear_parts(rows, w)),
    }
    for kind, product in products.items():
        whole = product(x)
        assert float((whole.double() - wanted).norm() / wanted.norm()) < (1e-5 if kind == "float32" else 3e-3)
        for rows in (1, 2, 15, 16, 17, 64, 65, 128, 129, 256, 257, 512):
            first = random.Random(rows).randrange(700 - rows + 1)
            assert torch.equal(product(x[first : first + rows]), whole[first : first + rows]), (kind, rows)


@pytest.mark.parametrize(("n", "k"), [(8192, 2048), (1024, 512), (96, 512)])
def test_rows_without_an_adapter_are_those_of_a_step_without_adapters(n: int, k: int) -> None:
    """The activation is in the product's epilogue, or behind sums that adapters add to: to the bit the same, for all kinds of gates."""
    torch.manual_seed(n)
    gate_up = (torch.randn(2 * n, k, device="cuda") * k**-0.5).bfloat16()
    for rows, spread in ((1, 1.0), (64, 30.0), (65, 1e-3), (300, 100.0), (1500, 1.0)):
        x = (torch.randn(rows, k, device="cuda") * spread).bfloat16()
        found, wanted = steady.swiglu_linear(x, gate_up), reference.swiglu_linear(x, gate_up)
        assert float((found.double() - wanted).norm() / wanted.norm()) < 6e-3
        assert torch.equal(steady.activate(steady.swiglu_sums(x, gate_up)), found), rows
        assert torch.equal(steady.swiglu_linear(x[-1:], gate_up), found[-1:])


@pytest.mark.parametrize("sizes", [Sizes(8, 4, 64, 32), Sizes(8, 3, 128, 32), Sizes(1, 20, 64, 16)], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_token_sees_the_same_in_any_chunk_and_in_any_step(kind: torch.dtype, sizes: Sizes) -> None:
    """In programs of one head and of a group, of 64 queries and of 16, that share a row or not."""
    given = Sequences(kind, 3, sizes)
    whole = given.chunks([(slot, 0, count) for slot, count in enumerate(given.lengths)])
    assert max(given.error(found, slot) for slot, found in enumerate(whole)) < 8e-3
    longest, work = len(whole) - 1, given.workspace()
    for cuts in ((1, 200, 300), (64, 128, 256, 512), (255, 256, 257, 524)):
        ends = (*cuts, given.lengths[longest])
        parts = given.chunks([(longest, start, end - start) for start, end in zip((0, *cuts), ends, strict=True)])
        assert torch.equal(torch.cat(parts), whole[longest]), cuts
    shared = set()
    for rows in (1, 3, 16, 17, 64, 150):
        slots = [(longest + i) % len(whole) for i in range(rows)]
        shared.add(work.workers(rows * sizes.kv_heads) > 1)
        for _ in range(2):
            assert torch.equal(given.decode(slots, work), torch.stack([whole[slot][-1] for slot in slots])), rows
    assert shared == {False, True}


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


def test_the_length_of_chunks_changes_no_bit(checkpoint: Path) -> None:
    """Prompts of several parts of keys, in chunks of 48 to 2 000 tokens, and so with other numbers of rows in each product."""
    asked = prompts(5, 500, 900)
    params = SamplingParams(max_tokens=20, temperature=0.0, logprobs=3, ignore_eos=True)
    found = []
    for budget in (48, 257, 2000):
        engine = make(checkpoint, max_num_batched_tokens=budget)
        found.append([(answer.token_ids, answer.logprobs) for answer in engine.generate(asked, params)])
    assert found[0] == found[1] == found[2]
