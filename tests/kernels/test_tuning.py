"""The programs that tune and profile whole steps, without a GPU: what they refuse, where their steps begin and end, and whose time is whose."""

import os
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano.engine import EngineConfig
from altiplano.engine.cuda.slots import SlotTable
from altiplano_kernels.sampling.kernel import RING

from .programs import FOLDER, imported


@pytest.fixture(scope="module")
def programs() -> Iterator[Any]:
    with imported("tune_attention", "tune_few_rows", "profile_step") as [attention, few, profile]:
        yield SimpleNamespace(tune_attention=attention, tune_few_rows=few, profile_step=profile)


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("tune_attention", "8b 64", "invalid choice: '8b'"),
        ("tune_attention", "1b 64,8", "fewer than 9 rows take the few-row kernels, which have no tilings: ask for more than 8"),
        ("tune_attention", "1b 64 --context 2113", "between 3 and the 2112 tokens that a slot holds, not 2113"),
        ("tune_attention", "1b 64 --context 2", "between 3 and the 2112 tokens that a slot holds, not 2"),
        ("tune_attention", "1b 64 --kv-cache-dtype int4", "invalid choice: 'int4'"),
        ("tune_few_rows", "8b 1 none", "invalid choice: '8b'"),
        ("tune_few_rows", "1b 1,17 none", "take 1 to 16 rows, not 1,17"),
        ("tune_few_rows", "1b 1 fp8", "invalid choice: 'fp8'"),
        ("tune_few_rows", "1b 1 int8 640 o,gate", "no product gate: use some of gate_up, o, head, down, qkv"),
    ],
)
def test_what_cannot_be_tuned_is_refused(
    programs: Any, name: str, asked: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        getattr(programs, name).options_of(asked.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_what_is_asked_for_is_understood(programs: Any) -> None:
    attention = programs.tune_attention.options_of(["3b", "9,256", "--context", "2112", "--kv-cache-dtype", "fp8"])
    assert (attention.rows, attention.context, attention.kv_cache_dtype) == ([9, 256], 2112, "fp8")
    few = programs.tune_few_rows.options_of(["1b", "1,8", "int4", "2048", "head,o"])
    assert (few.rows, few.context, few.products) == ([1, 8], 2048, ["head", "o"])
    usual = programs.tune_few_rows.options_of(["1b", "1", "none"])
    assert usual.context == 640 and usual.products[:5] == usual.products[5:] == list(programs.tune_few_rows.PRODUCTS)


def test_contexts_grow_while_fewer_requests_are_left_and_fit_into_a_slot(programs: Any) -> None:
    tuning = programs.tune_attention
    assert tuning.contexts_of(3, 77) == [77] * 3
    means = []
    for rows in (9, 64, 128, 256, 1024):
        contexts = tuning.contexts_of(rows, None)
        assert len(contexts) == rows and tuning.contexts_of(rows, None) == contexts
        assert max(contexts) <= tuning.LONGEST and min(contexts) >= 130
        means.append(sum(contexts) / rows)
    assert means == sorted(means, reverse=True)


@pytest.mark.parametrize(("rows", "context"), [(9, None), (9, 33), (9, 2112), (64, None)])
def test_all_steps_begin_at_one_place_and_stay_in_their_own_pages(
    programs: Any, monkeypatch: pytest.MonkeyPatch, rows: int, context: int | None
) -> None:
    tuning = programs.tune_attention
    page, blocks = tuning.decode_steps.PAGE, tuning.blocks_of([rows], context)
    EngineConfig(model=FOLDER, device="cuda", max_model_len=tuning.LONGEST, block_size=page, num_blocks=blocks)  # has room for it
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    slots = SlotTable(rows, -(-(tuning.LONGEST + RING) // page), blocks, "cpu")
    own, begun = list(range(rows)), list[torch.Tensor]()

    def step(count: int, kind: object) -> None:
        assert count == rows
        pages = slots.tables[own].gather(1, slots.positions[own, None].long() // page)
        assert int(pages.max()) < blocks, "a page that no row has"
        slots.positions[slots.rows[:count].long()] += 1

    def capture(one: Any, steps: int) -> None:
        begun.append(slots.positions.clone())
        for _ in range(steps):
            one()

    runner = SimpleNamespace(slots=slots, _decode_step=step)
    monkeypatch.setattr(tuning.decode_steps, "capture", capture)
    contexts = tuning.contexts_of(rows, context)
    positions = tuning.place(runner, contexts, blocks)
    for choice in (None, tuning.SHAPES[0], tuning.TILINGS[0]):
        tuning.captured(runner, rows, positions, choice)
    assert len(begun) == 3 and all(torch.equal(where, positions) for where in begun)
    assert (slots.positions[own]).tolist() == contexts, "the last step's token is the last of the context"
    taken = [slots.tables[slot, : -(-context // page)].tolist() for slot, context in enumerate(contexts)]
    assert len({page for pages in taken for page in pages}) == sum(map(len, taken)), "no page has two rows"


def test_time_belongs_to_the_kernel_that_the_others_have_left_alone(programs: Any) -> None:
    spans = [("product", 10.0, 14.0), ("norm", 12.0, 15.0), ("draw", 20.0, 21.0), ("product", 11.0, 19.0)]
    found = programs.profile_step.shares(spans)
    assert found == {"product": [4.0, 4.0], "norm": [1.0], "draw": [2.0]}
    assert sum(map(sum, found.values())) == 21.0 - 10.0, "from the first start to the last end"
