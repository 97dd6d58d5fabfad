"""One process: adapters of every kind learn, bad numbers are survived, and what comes after them is slower."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from altiplano.data import Prepared
from altiplano.train.trainer import NonFiniteLossError, build_trainer
from altiplano.train.worker import Curve

from .conftest import Nowhere, pipeline

PreparedData = tuple[Path, Prepared]


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"lora": {"use_rslora": True}},
        {"lora": {"use_dora": True}},
        {"data": {"packing": False}},
        {"training": {"gradient_checkpointing": True}},
        {"model": {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}},
    ],
    ids=["lora", "rslora", "dora", "unpacked", "checkpointing", "qlora-nf4"],
)
def test_the_loss_falls(rows: Path, prepared: PreparedData, tmp_path: Path, sections: dict[str, Any]) -> None:
    trainer = build_trainer(pipeline(rows, **sections), prepared[1].train, tmp_path, Nowhere())
    before = trainer.held_out_loss(prepared[1].eval)
    trainer.train()
    assert trainer.held_out_loss(prepared[1].eval) < before - 0.5
    assert trainer.tokens_seen == sum(len(example.input_ids) for example in prepared[1].train)


def test_an_evaluation_leaves_the_gradients_of_a_4_bit_base_as_they_are(
    prepared: PreparedData, rows: Path, tmp_path: Path
) -> None:
    """bitsandbytes would pack the weights for inference, where the CPU can, and the product of packed ones has no gradients."""
    four_bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    trainer = build_trainer(pipeline(rows, model=four_bits), prepared[1].train, tmp_path, Nowhere())
    ids = torch.arange(10, 40)[None]

    def gradients() -> torch.Tensor:
        trainer.model.train()
        trainer.model.zero_grad()
        trainer.model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])

    before = gradients()
    trainer.held_out_loss(prepared[1].eval)
    torch.testing.assert_close(gradients(), before)


def test_micro_batches_do_not_change_the_step(rows: Path, prepared: PreparedData, tmp_path: Path) -> None:
    losses = []
    for micro in (128, 4096):
        trainer = build_trainer(
            pipeline(rows, training={"micro_batch_tokens": micro}), prepared[1].train, tmp_path / str(micro), Nowhere()
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


class Poison(TrainerCallback):
    """Makes the gradients of some steps infinite, through the weights of the adapter."""

    def __init__(self, steps: set[int]) -> None:
        self._steps, self._saved = steps, dict[str, torch.Tensor]()

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        name, weight = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
        if state.global_step in self._steps:
            self._saved[name] = weight.data.clone()
            weight.data.fill_(float("nan"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, weight in model.named_parameters():
            if name in self._saved:
                weight.data.copy_(self._saved.pop(name))


def test_a_step_that_is_not_finite_is_skipped_and_three_end_the_run(rows: Path, prepared: PreparedData, tmp_path: Path) -> None:
    trainer = build_trainer(pipeline(rows), prepared[1].train, tmp_path / "a", Nowhere(), callbacks=[Poison({2, 3})])
    trainer.train()
    assert all(bool(p.isfinite().all()) for p in trainer.model.parameters())
    trainer = build_trainer(pipeline(rows), prepared[1].train, tmp_path / "b", Nowhere(), callbacks=[Poison({1, 2, 3})])
    with pytest.raises(NonFiniteLossError, match="learning_rate"):
        trainer.train()


def test_after_numbers_that_were_not_finite_every_step_has_half_the_rate(
    rows: Path, prepared: PreparedData, tmp_path: Path
) -> None:
    settings = pipeline(rows, training={"lr_scheduler_type": "constant", "save_steps": 4})
    first = build_trainer(settings, prepared[1].train, tmp_path, Nowhere(), save_steps=4)
    first.train()
    saved = min(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))
    curve = Curve(prepared[1], 1000, Nowhere(), scale=0.5)
    second = build_trainer(settings, prepared[1].train, tmp_path / "again", Nowhere(), callbacks=[curve])
    curve.trainer = second
    second.train(resume_from_checkpoint=str(saved))
    rates = {entry["step"]: entry["learning_rate"] for entry in second.state.log_history if "learning_rate" in entry}
    before, full = int(saved.name.rsplit("-", 1)[1]), settings.training.learning_rate
    assert [rate for step, rate in rates.items() if step <= before] == [full] * before
    later = [rate for step, rate in rates.items() if step > before]
    assert later and later == pytest.approx([full / 2] * len(later))
