"""Guesses, the rows that check them and what was right, against Python: on a GPU where there is one, else by Triton's interpreter."""

import os
import random

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels.guessing import kernel, reference  # noqa: E402
from altiplano_kernels.sampling.kernel import RING  # noqa: E402

SLOTS, WIDTH, PAGES, FIRST = 5, 2600, 9, 5  # slots of requests; rows that check guesses begin behind them
ROWS = FIRST + 48 + 1  # the last is scratch


class Table:
    """The columns of a slot table, random where it should not matter."""

    def __init__(self, dice: random.Random) -> None:
        def ints(low: int, high: int, *shape: int) -> torch.Tensor:
            torch.manual_seed(dice.randrange(1 << 30))
            return torch.randint(low, high, shape, dtype=torch.int32, device=DEVICE)

        self.tokens, self.steps = ints(0, 100, ROWS), ints(0, 300, ROWS)
        self.positions = ints(0, 50, ROWS)
        self.temperatures, self.top_ps, self.min_ps = (torch.rand(ROWS, device=DEVICE) for _ in range(3))
        self.seeds, self.top_ks = ints(0, 1 << 30, ROWS).long(), ints(0, 9, ROWS)
        self.ring, self.history, self.tables = ints(0, 100, ROWS, RING), ints(0, 100, ROWS, WIDTH), ints(0, 99, ROWS, PAGES)
        self.guessed = ints(0, 9, ROWS)
        self.guesses = torch.full((kernel.MOST, kernel.MOST), 77, dtype=torch.int32, device=DEVICE)

    @property
    def state(self) -> tuple[torch.Tensor, ...]:
        filters = (self.top_ks, self.top_ps, self.min_ps)
        return (self.tokens, self.positions, self.steps, self.temperatures, self.seeds, *filters, self.ring)

    def say(self, slot: int, text: list[int]) -> None:
        self.history[slot, : len(text)] = torch.tensor(text, dtype=torch.int32, device=DEVICE)
        self.positions[slot], self.tokens[slot] = len(text) - 1, text[-1]


def slots(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=DEVICE)


def test_guesses_are_what_followed_the_last_words_before() -> None:
    dice = random.Random(3)
    table = Table(dice)
    for k in (1, 4, 15):
        lengths = (1, 2, 3, 4, 7, 40, 1030, 2100)
        texts = [[dice.randrange(symbols) for _ in range(n)] for n in lengths for symbols in (1, 2, 6, 30)]
        for text in texts:
            table.say(2, text)
            table.guesses.fill_(77)
            kernel.look_up(slots(4, 2), table.positions, table.history, table.guesses, k)
            assert table.guesses[1, :k].tolist() == reference.look_up(text, k), text
            assert (table.guesses[1, k:] == 77).all(), "places beyond k are not touched"


@pytest.mark.parametrize("behind", [0, 1])
@pytest.mark.parametrize("drafted", [False, True])
def test_rows_hold_what_the_request_would_have_with_each_guess(behind: int, drafted: bool) -> None:
    table, k, parents, lanes = Table(random.Random(5)), 3, (3, 0), (20, 22)
    for slot, text in zip(parents, ([5, 6, 7, 8], [9]), strict=True):
        table.say(slot, text)
    wanted = [[11, 12, 13], [21, 22, 23]]
    for i in range(2):
        if drafted:
            for n in range(k):
                table.ring[lanes[i], (int(table.steps[parents[i]]) + n) % RING] = wanted[i][n]
        else:
            table.guesses[i, :k] = slots(*wanted[i])
    before = [column.clone() for column in table.state]
    kernel.spread(
        slots(*parents), table.guesses, slots(*lanes) if drafted else None, table.state, table.history, table.tables, FIRST, k, behind
    )  # fmt: skip
    assert table.guesses[:2, :k].tolist() == wanted
    for i, parent in enumerate(parents):
        text = [[5, 6, 7, 8], [9]][i]
        for row in range(behind + 1 + k):
            at, ahead = FIRST + i * (behind + 1 + k) + row, row - behind
            position = max(len(text) - 1 + ahead, 0)
            assert int(table.tokens[at]) == (wanted[i][ahead - 1] if ahead > 0 else text[position])
            assert int(table.positions[at]) == position
            assert int(table.steps[at]) == max(int(table.steps[parent]) + ahead, 0)
            for column in (table.temperatures, table.seeds, table.top_ks, table.top_ps, table.min_ps):
                assert column[at] == column[parent]
            assert (table.tables[at] == table.tables[parent]).all()
    for column, old in zip(table.state, before, strict=True):
        assert (column[:FIRST] == old[:FIRST]).all(), "the requests themselves are as before"


def test_a_row_without_a_guess_computes_something_valid() -> None:
    table = Table(random.Random(6))
    table.say(1, [4, 5])
    table.guesses[0, :2] = -1
    kernel.spread(slots(1), table.guesses, None, table.state, table.history, table.tables, FIRST, 2)
    assert table.tokens[FIRST : FIRST + 3].tolist() == [5, 0, 0]


@pytest.mark.parametrize("seed", range(4))
def test_a_request_moves_on_by_the_right_guesses_and_one_token(seed: int) -> None:
    dice = random.Random(seed)
    for k in (1, 3, 15):
        table, parents = Table(dice), (2, ROWS - 1, 4)
        texts = {slot: [dice.randrange(3) for _ in range(dice.randrange(1, 2 * RING))] for slot in (2, 4)}
        for slot, text in texts.items():
            table.say(slot, text)
        for i in range(3):
            table.guesses[i, :k] = slots(*(dice.choice((-1, 0, 1)) for _ in range(k)))
            for j in range(k + 1):
                table.tokens[FIRST + i * (k + 1) + j] = dice.choice((0, 1))
        old = {name: getattr(table, name).clone() for name in ("tokens", "positions", "steps", "ring", "history", "guessed")}
        kernel.accept(
            slots(*parents), table.guesses, table.tokens, table.positions, table.steps, table.ring, table.history, table.guessed, FIRST, k
        )  # fmt: skip
        for i, slot in enumerate(parents):
            if slot == ROWS - 1:
                assert all((getattr(table, name)[slot] == column[slot]).all() for name, column in old.items()), (
                    "scratch stands still"
                )
                continue
            drawn = old["tokens"][FIRST + i * (k + 1) :][: k + 1].tolist()
            guesses = table.guesses[i, :k].tolist()
            said = drawn[: reference.count_right(guesses, drawn) + 1]
            step, last = int(old["steps"][slot]), len(texts[slot]) - 1
            assert int(table.tokens[slot]) == said[-1]
            assert int(table.steps[slot]) == step + len(said) and int(table.positions[slot]) == last + len(said)
            assert [int(table.ring[slot, (step + j) % RING]) for j in range(len(said))] == said
            assert table.history[slot, : last + 1 + len(said)].tolist() == texts[slot] + said
            assert int(table.guessed[slot]) == int(old["guessed"][slot]) + sum(guess >= 0 for guess in guesses)
            untouched = [place for place in range(RING) if (place - step) % RING >= len(said)]
            assert (table.ring[slot, untouched] == old["ring"][slot, untouched]).all()


def test_the_last_token_of_each_row_is_noted_at_its_position() -> None:
    table = Table(random.Random(9))
    table.positions[3], table.positions[1] = WIDTH, 7  # past the end: nowhere
    before = table.history.clone()
    kernel.note(slots(1, 3), table.tokens, table.positions, table.history)
    assert table.history[1, 7] == table.tokens[1]
    before[1, 7] = table.tokens[1]
    assert (table.history == before).all()
