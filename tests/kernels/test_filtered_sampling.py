"""Draws under filters against the sorting reference: on a GPU where there is one, else by Triton's interpreter."""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.filtered_sampling.kernel import SIZES, Sizes, draw_filtered  # noqa: E402
from altiplano_kernels.sampling.kernel import DrawWorkspace, draw  # noqa: E402
from altiplano_kernels.sampling.reference import sample  # noqa: E402

VOCAB, SMALL = 700, Sizes(256, 8, 128, 8)
# Too little room for lists, or for more than one next draw: most rows are given up and done slowly.
CRAMPED = [Sizes(64, 4, 16, 8), Sizes(256, 8, 128, 1), Sizes(32, 4, 64, 2)]
# top_k, top_p, min_p
FILTERS = [
    (0, 0.9, 0.0), (0, 0.3, 0.0), (0, 1e-6, 0.0), (1, 1.0, 0.0), (7, 1.0, 0.0), (50, 0.8, 0.0), (699, 1.0, 0.0), (700, 0.5, 0.0),
    (0, 1.0, 0.1), (0, 1.0, 1.0), (20, 0.95, 0.02), (5000, 0.7, 0.0), (3, 0.5, 0.5),
]  # fmt: skip


def drawn(
    logits: torch.Tensor,
    filters: list[tuple[int, float, float]],
    temperature: float,
    seed: int,
    sizes: Sizes = SIZES if DEVICE == "cuda" else SMALL,
) -> list[int]:
    """The token of each row: of the plain draw, or of the filtered one behind it."""
    rows = len(logits)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    slots = order.int().to(DEVICE)

    def column(values: list[float], dtype: torch.dtype) -> torch.Tensor:
        found = torch.empty(rows, dtype=dtype)
        found[order] = torch.tensor(values, dtype=dtype)
        return found.to(DEVICE)

    workspace, temperatures = DrawWorkspace(rows, logits.shape[1], DEVICE), column([temperature] * rows, torch.float32)
    seeds, steps = column([seed + row for row in range(rows)], torch.int64), column([i % 5 for i in range(rows)], torch.int32)
    draw(logits, slots, temperatures, seeds, steps, workspace)
    draw_filtered(
        logits,
        slots,
        temperatures,
        column([k for k, _, _ in filters], torch.int32),
        column([p for _, p, _ in filters], torch.float32),
        column([m for _, _, m in filters], torch.float32),
        seeds,
        steps,
        workspace,
        sizes=sizes,
    )
    values, ids = workspace.values.view(rows, -1), workspace.ids.view(rows, -1)
    best = values == values.amax(1, keepdim=True)
    return ids.where(best, logits.shape[1]).amin(1).tolist()


def wanted(logits: torch.Tensor, filters: list[tuple[int, float, float]], temperature: float, seed: int) -> list[int]:
    rows = len(logits)
    found = sample(
        logits.float().cpu(),
        torch.full((rows,), temperature),
        torch.tensor([k for k, _, _ in filters]),
        torch.tensor([p for _, p, _ in filters]),
        torch.tensor([m for _, _, m in filters]),
        torch.tensor([seed + row for row in range(rows)]),
        torch.tensor([row % 5 for row in range(rows)]),
    )
    return found.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "temperature"), [(0.02, 1.0), (3.0, 0.7), (12.0, 1.5)])
def test_the_token_is_the_references(dtype: torch.dtype, scale: float, temperature: float) -> None:
    generator = torch.Generator().manual_seed(int(scale * 100))
    logits = (torch.randn(len(FILTERS), VOCAB, generator=generator) * scale).to(dtype).to(DEVICE)
    for seed in (1, 2**40 + 3):
        assert drawn(logits, FILTERS, temperature, seed) == wanted(logits, FILTERS, temperature, seed)


@pytest.mark.parametrize("sizes", [Sizes(256, 8, 128, 8), *CRAMPED])
def test_no_token_too_many_or_too_few_is_kept(sizes: Sizes) -> None:
    """Rows with many equal logits, whose draws among few tokens would show one more of them; and rows that do not fit."""
    kinds = [
        (2, 1.0, 0.0),
        (3, 1.0, 0.0),
        (22, 1.0, 0.0),
        (20, 1.0, 0.6),
        (0, 0.03, 0.0),
        (30, 0.1, 0.0),
        (0, 0.1, 0.2),
        (0, 1.0, 0.5),
    ]
    generator, filters = torch.Generator().manual_seed(8), kinds * 6
    logits = torch.randn(len(filters), 300, generator=generator)
    logits[::2] = logits[::2].round()
    logits = logits.bfloat16().to(DEVICE)
    assert drawn(logits, filters, 1.6, 3, sizes) == wanted(logits, filters, 1.6, 3)


def test_a_part_that_may_know_better_than_its_list_says_stops_the_search() -> None:
    """Four next draws a part: behind the third of the row, the best of a part may be a fifth one that it has not listed."""
    logits = torch.randn(80, 512, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    filters = [(0, 0.02, 0.0)] * len(logits)
    assert drawn(logits, filters, 3.0, 7, Sizes(256, 8, 64, 4)) == wanted(logits, filters, 3.0, 7)


def test_of_equal_logits_the_lower_ids_are_kept() -> None:
    logits = torch.zeros(5, VOCAB, device=DEVICE)
    logits[:, 500:] = -1.0
    logits[1, ::2] = -0.0  # a zero is a zero
    logits[4] = torch.linspace(0, -3, VOCAB, device=DEVICE).round(decimals=1)  # about 23 of each
    filters = [(3, 1.0, 0.0), (3, 1.0, 0.0), (502, 1.0, 0.0), (0, 0.004, 0.0), (30, 1.0, 0.0)]
    for seed in range(4):
        found = drawn(logits, filters, 1.0, seed)
        assert found == wanted(logits, filters, 1.0, seed)
        assert found[0] < 3 and found[1] < 3 and found[2] < 502 and found[4] < 30


def test_what_is_impossible_is_never_drawn() -> None:
    logits = torch.full((5, VOCAB), float("-inf"), device=DEVICE)
    logits[0, 70] = 1.0
    logits[1, [3, 600]] = torch.tensor([2.0, 2.0], device=DEVICE)
    found = drawn(logits, [(40, 0.9, 0.0), (40, 0.5, 0.0), (0, 0.5, 0.0), (0, 1.0, 0.3), (9, 0.5, 0.1)], 0.8, 5)
    assert found[0] == 70 and found[1] in (3, 600)
    assert found[2:] == [0, 0, 0], "a row of nothing is left to the plain draw"


def test_greedy_rows_and_rows_without_filters_are_left_alone() -> None:
    torch.manual_seed(10)
    logits = torch.randn(2, VOCAB, device=DEVICE)
    plain = [(0, 1.0, 0.0)] * 2
    assert drawn(logits, plain, 1.0, 0) == wanted(logits, plain, 1.0, 0)
    assert drawn(logits, [(5, 0.5, 0.1), (0, 1.0, 0.0)], 0.0, 0) == logits.argmax(1).tolist()
