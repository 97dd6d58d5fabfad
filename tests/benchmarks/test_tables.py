"""The tables of results: a column per system that was measured, and what the reader wants to know from them."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/tables.py"


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The program, reading results from a folder of its own."""
    found = importlib.util.spec_from_file_location("tables", PROGRAM)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["tables"] = module
    found.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    return module


def result(workload: str, value: float, system: str = "altiplano", **others: Any) -> dict[str, Any]:
    unit, higher = ("ms/step", False) if workload[:2] in ("W1", "W2") else ("tok/s", True)
    return {
        "workload": workload, "model": "1b", "variant": "bf16", "system": system, "value": value, "min": value, "max": value,
        "unit": unit, "higher_is_better": higher, "hardware": "NVIDIA H200", "versions": {system: "1.2.3"}, "commit": "abc", **others,
    }  # fmt: skip


def keep(tables: Any, *rows: dict[str, Any]) -> None:
    (tables.ROOT / "benchmarks/results/engine.json").write_text(json.dumps(rows))


def test_our_speed_stands_against_the_better_peer(tables: Any) -> None:
    keep(
        tables,
        result("W1", 0.75, min=0.7, max=0.8),
        result("W4", 280000),
        result("W1", 1.98, "vllm"),
        result("W4", 266000, "vllm"),
        result("W1", 1.2, "sglang"),
        result("W1", 0.6, variant="w-int8"),
    )
    assert tables.engine().splitlines() == [
        "| workload | model | variant | unit | altiplano | vllm | sglang | times the speed of the better peer |",
        "|---|---|---|---|---|---|---|---|",
        "| W1 | 1b | bf16 | ms/step | 0.75 (0.7 to 0.8) | 1.98 | 1.2 | 1.60 |",
        "| W4 | 1b | bf16 | tok/s | 280,000 | 266,000 |  | 1.05 |",
        "| W1 | 1b | w-int8 | ms/step | 0.6 |  |  |  |",
        "",
        "Median (range) on NVIDIA H200; random weights; at least 3 runs each; peers: vllm 1.2.3, sglang 1.2.3.",
    ]


def test_a_peer_of_another_session_is_marked(tables: Any) -> None:
    keep(tables, result("W1", 0.75, commit="new"), result("W1", 1.5, "vllm", commit="old"), result("W4", 3, commit="old"))
    assert tables.engine_short().splitlines()[2:] == [
        "| W1 | 1b | bf16 | ms/step | 0.75 | 1.5 † | 2.00 |",
        "",
        "Median (range) on NVIDIA H200; random weights; at least 3 runs each; †: in another session than ours, on a card of the same kind; "
        "peers: vllm 1.2.3.",
    ]


def test_a_median_is_not_rounded_out_of_its_range(tables: Any) -> None:
    keep(tables, result("W2-B256-2048", 5.505, min=5.5, max=5.506))
    assert "| 5.505 (5.5 to 5.506) |" in tables.engine()


def test_without_peers_there_is_no_column_for_them(tables: Any) -> None:
    keep(tables, result("W1", 0.75))
    assert tables.engine().startswith("| workload | model | variant | unit | altiplano |\n")
    assert tables.start() == tables.quality() == "Not measured yet."


def test_the_parts_of_a_start_are_one_row(tables: Any) -> None:
    seconds: dict[str, Any] = {"unit": "s", "higher_is_better": False}
    keep(
        tables,
        result("cold-start", 30.0, **seconds),
        result("cold-start/imports", 4.0, **seconds),
        result("start", 8.0, **seconds),
        result("start-answer", 9.5, **seconds),
        result("start/imports", 3.9, **seconds),
        result("start/weights", 1.25, **seconds),
        result("start", 50.0, "vllm", **seconds),
        result("start/engine", 45.0, "vllm", **seconds),
    )
    assert tables.start().splitlines()[:5] == [
        "| model | system | kernel caches | imports | weights | engine | first token | 16th token |",
        "|---|---|---|---|---|---|---|---|",
        "| 1b | altiplano | empty | 4.00 |  |  | 30.00 |  |",
        "| 1b | altiplano | warm | 3.90 | 1.25 |  | 8.00 | 9.50 |",
        "| 1b | vllm | warm |  |  | 45.00 | 50.00 |  |",
    ]
    engine = tables.engine()
    assert "| start | 1b | bf16 | s | 8 | 50 | 6.25 |" in engine and "imports" not in engine and "answer" not in engine


def test_decode_steps_show_their_worst_batch(tables: Any) -> None:
    keep(
        tables,
        result("W1", 0.75),
        result("quality-kl/prefill", 1e-5, "transformers"),
        result("quality-kl/prefill", 2e-5),
        result("quality-kl/decode-1", 3e-5),
        result("quality-kl/decode-8", 5e-5),
        result("quality-kl-max/prefill", 9e-5),
        result("quality-logprob-max/prefill", 0.02, max=0.03),
    )
    lines = tables.quality().splitlines()
    assert lines[0].startswith("| model | variant | mean KL, prompts | mean KL, decode steps |")
    assert lines[2:4] == ["| 1b | bf16 (transformers) | 1e-05 |  |  |  |  |  |", "| 1b | bf16 | 2e-05 | 5e-05 |  |  | 0.03 |  |"]


def kernel(name: str, model: str, shape: str, us: float, percent: float, limit: str = "bytes") -> dict[str, Any]:
    return {
        "kernel": name, "model": model, "shape": shape, "us": us, "percent": percent, "limit": limit, "hardware": "NVIDIA H200",
    }  # fmt: skip


def test_a_kernels_models_stand_side_by_side(tables: Any) -> None:
    assert tables.kernels() == "Not measured yet."
    rows = [
        kernel("gemm", "1b", "down, 8 192 rows", 401.26, 91.7, "operations"),
        kernel("gemm", "1b", "head, 1 row", 140.0, 88.96),
        kernel("gemm", "3b", "down, 8 192 rows", 590.12345, 100.4, "operations"),
        kernel("sampling", "any", "greedy, 1 row", 1.5, 0.0312),
    ]
    (tables.ROOT / "benchmarks/results/kernels.json").write_text(json.dumps(rows))
    assert tables.kernels().splitlines() == [
        "| kernel | shape | 1b, µs | of the limit | 3b, µs | of the limit |",
        "|---|---|---|---|---|---|",
        "| gemm | down, 8 192 rows | 401.3 | 92 % (operations) | 590.1 | 100 % (operations) |",
        "| gemm | head, 1 row | 140 | 89 % (bytes) |  |  |",
        "| sampling | greedy, 1 row | 1.5 | 0.031 % (bytes) | 1.5 | 0.031 % (bytes) |",
        "",
        "Medians on NVIDIA H200; random numbers; in brackets what the limit is of.",
    ]


def test_a_page_without_a_place_for_a_table_is_refused(tables: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("text <!-- engine: begin --> old <!-- engine: end --> after")
    keep(tables, result("W1", 0.75))
    monkeypatch.setattr(tables, "PAGES", {page: ("engine",)})
    new = tables.rewritten(page)
    assert new.startswith("text <!-- engine: begin -->\n| workload") and new.endswith("\n<!-- engine: end --> after")
    page.write_text("text")
    with pytest.raises(SystemExit, match="no place for the table engine"):
        tables.rewritten(page)
