"""Public benchmarks through lm-eval, where it is installed (`pip install 'altiplano[eval]'`) and its data sets can be had."""

from collections.abc import Sequence
from pathlib import Path


class HarnessError(RuntimeError):
    """lm-eval is not installed, or a task of it failed."""


def lm_eval_scores(model: Path, adapter: Path | None, names: Sequence[str], limit: int | None) -> dict[str, list[float]]:
    """Accuracy (or the task's first metric) per document, for each task in `names`.

    Raises:
        HarnessError: see the class.
    """
    try:
        import lm_eval
    except ImportError as error:
        raise HarnessError(
            "evaluate.tasks names lm_eval tasks, and lm-eval is not installed: pip install 'altiplano[eval]'"
        ) from error
    arguments = f"pretrained={model}" + (f",peft={adapter}" if adapter else "")
    try:
        result = lm_eval.simple_evaluate(
            model="hf", model_args=arguments, tasks=list(names), limit=limit, log_samples=True, apply_chat_template=True
        )
    except Exception as error:
        raise HarnessError(f"lm-eval failed on {', '.join(names)} ({type(error).__name__}: {error})") from error
    return {name: [_value(sample) for sample in result["samples"][name]] for name in names}


def _value(sample: dict[str, object]) -> float:
    """The first metric of a document, as lm-eval logs it."""
    metrics = sample["metrics"]
    assert isinstance(metrics, list)
    return float(sample[metrics[0]])  # type: ignore[arg-type]
