"""lm-eval on cria, with a task of our own: its public ones need a network."""

import json
from pathlib import Path

import pytest

from altiplano.evaluate.harness import HarnessError, lm_eval_scores
from altiplano.models.cria import cria_path

# Sockets of tests before are collected here: lm-eval asks for it.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_scores_come_per_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"question": f"Anna has a {right} cart. What colour is it?", "choices": ["red", "blue"], "answer": i}
        for i, right in enumerate(("red", "blue"))
    ]
    # The first answer turned round: a model that knows the colours gets it wrong.
    rows.append({**rows[0], "answer": 1})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "colours.yaml"
    task.write_text(TASK.format(rows=tmp_path / "rows.jsonl"))
    scores = lm_eval_scores(cria_path(), None, [str(task)], limit=None)
    assert scores == {str(task): [1.0, 1.0, 0.0]}


def test_what_is_no_task_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("- 1\n")
    for name, words in (
        ("absent.yaml", "cannot be read"),
        (str(tmp_path / "empty.yaml"), "describes no lm-eval task"),
        ("no_such_task", "lm-eval failed"),
    ):
        with pytest.raises(HarnessError, match=words):
            lm_eval_scores(cria_path(), None, [name], limit=1)
