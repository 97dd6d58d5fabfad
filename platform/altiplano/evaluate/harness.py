"""Public benchmarks through lm-eval, where it is installed (`pip install 'altiplano[eval]'`) and its data sets can be had."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml


class HarnessError(RuntimeError):
    """lm-eval is not installed, or a task of it failed."""


def lm_eval_scores(model: Path, adapter: Path | None, names: Sequence[str], limit: int | None) -> dict[str, list[float]]:
    """Accuracy (or the task's first metric) per document, for each task in `names`: tasks of lm-eval, or YAML files of own ones.

    Raises:
        HarnessError: see the class.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise HarnessError(
            "evaluate.tasks names lm_eval tasks, and lm-eval is not installed: pip install 'altiplano[eval]'"
        ) from error
    tasks = {name: _task(name) for name in names}
    arguments = f"pretrained={model}" + (f",peft={adapter}" if adapter else "")
    try:
        result = lm_eval.simple_evaluate(
            model="hf",
            model_args=arguments,
            tasks=list(tasks.values()),
            limit=limit,
            log_samples=True,
            apply_chat_template=True,
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
    except Exception as error:
        raise HarnessError(f"lm-eval failed on {', '.join(names)} ({type(error).__name__}: {error})") from error
    found = result["samples"]
    return {
        name: [_value(sample) for sample in found[task if isinstance(task, str) else task["task"]]]
        for name, task in tasks.items()
    }


def _task(name: str) -> str | dict[str, Any]:
    """What lm-eval is given: its own task's name, or the content of a file that describes one."""
    if not name.endswith((".yaml", ".yml")):
        return name
    try:
        described = yaml.safe_load(Path(name).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise HarnessError(f"the lm-eval task {name} cannot be read ({error})") from error
    if not isinstance(described, dict) or "task" not in described:
        raise HarnessError(f"{name} describes no lm-eval task: it needs at least the keys task, dataset_path and doc_to_text")
    return described


def _value(sample: dict[str, object]) -> float:
    """The first metric of a document, as lm-eval logs it."""
    metrics = sample["metrics"]
    assert isinstance(metrics, list)
    return float(sample[metrics[0]])  # type: ignore[arg-type]
