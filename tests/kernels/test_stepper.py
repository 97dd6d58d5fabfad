"""What a step draws is drawn from the sums themselves, whoever draws beside it. On Triton's interpreter; tests/gpu has the GPU's own kernels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("tests/gpu/test_filters.py shows this on the GPU itself", allow_module_level=True)

from altiplano.engine import EngineConfig

from .interpreted import cuda_interpreted

HIDDEN, VOCAB = 64, 96


@pytest.fixture(scope="module", autouse=True)
def interpreted() -> Iterator[None]:
    with cuda_interpreted():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": HIDDEN, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 64}
    rest = {"num_hidden_layers": 1, "vocab_size": VOCAB, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "tie_word_embeddings": False}
    (where / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 95, **shape, **rest}))
    return where


def nearly_equal(head: torch.Tensor) -> None:
    """Each token's row is another token's, but for the last bit of one number: rounded to bf16, many logits are the same."""
    base = torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    for token in range(VOCAB):
        row = base.clone()
        place = row.view(torch.int16)[token % HIDDEN]
        place += 1 if token < HIDDEN else -1
        head[token] = row


@pytest.mark.parametrize("filtered", [False, True])
def test_a_greedy_row_takes_the_largest_sum_with_and_without_a_filtered_row_beside_it(
    model: Path, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from altiplano.engine.cuda.runner import CudaRunner

    rows, settings = 6, {"max_model_len": 96, "max_num_seqs": 8, "num_blocks": 48, "block_size": 16}
    runner = CudaRunner(EngineConfig(model, device="cuda", dtype="bfloat16", load_format="dummy", **settings), device="cpu")
    head, slots = runner.model.weights.head, runner.slots
    nearly_equal(head)
    hidden = list[torch.Tensor]()
    decode = runner.model.decode_hidden

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        hidden.append(decode(*args, **options))
        return hidden[-1]

    monkeypatch.setattr(runner.model, "decode_hidden", watched)
    each = list(range(rows))
    for slot in each:
        slots.set_pages(slot, [slot], fresh=True)
    slots.upload_tables()
    filters = [(0, 1.0, 0.0)] * (rows - 1) + [(5, 0.9, 0.0) if filtered else (0, 1.0, 0.0)]
    slots.write(each, [7 * slot for slot in each], [0] * rows, [0] * rows, [0.0] * (rows - 1) + [0.8], each, filters)
    with torch.inference_mode():
        runner.stepper.step(torch.tensor(each, dtype=torch.int32), filtered=filtered)
    sums = hidden[0].double() @ head.double().T
    rounded = sums.bfloat16().argmax(-1)
    assert bool((sums.argmax(-1) != rounded)[:-1].any()), "rounding would be seen"
    assert torch.equal(slots.tokens[: rows - 1].long(), sums.argmax(-1)[:-1])


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each step that went to the kernels for few rows, which take any model."""
    from altiplano.engine.cuda.few_rows import FewRows

    found = list[int]()
    monkeypatch.setattr(FewRows, "supports", staticmethod(lambda *_: True))
    monkeypatch.setattr(FewRows, "step", lambda self, rows, fresh: found.append(len(rows)))
    return found


def make(model: Path) -> Any:
    from altiplano.engine.cuda.runner import CudaRunner

    config = EngineConfig(
        model, device="cuda", dtype="bfloat16", load_format="dummy", max_model_len=96, max_num_seqs=32, num_blocks=48
    )
    return CudaRunner(config, device="cpu")


def test_only_steps_of_few_rows_without_adapters_are_for_the_kernels_for_few_rows(model: Path, taken: list[int]) -> None:
    from altiplano.engine.config import read_config
    from altiplano.engine.cuda.adapter_pool import AdapterPool

    runner, pool = make(model), AdapterPool(read_config(model), 2, 16, 32, "cpu")
    rows = torch.full((17,), runner.slots.scratch, dtype=torch.int32)
    with torch.inference_mode():
        runner.stepper.step(rows[:16])
        runner.stepper.step(rows)
        pool.set_rows([], 16)
        runner.stepper.step(rows[:16], update=pool.decode_update(16))
    assert taken == [16]


def test_a_wide_model_has_fewer_rows_there(model: Path, taken: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block has all normed rows in shared memory."""
    from altiplano_kernels.few_rows import kernel as few

    assert [few.most_rows(hidden) for hidden in (2048, 3072, 6176, 8192, 16384, 1 << 20)] == [16, 16, 16, 12, 6, 0]
    monkeypatch.setattr(few, "most_rows", lambda hidden: 12)
    runner = make(model)
    rows = torch.full((16,), runner.slots.scratch, dtype=torch.int32)
    with torch.inference_mode():
        for count in (8, 12, 16):
            runner.stepper.step(rows[:count])
    assert taken == [8, 12]
