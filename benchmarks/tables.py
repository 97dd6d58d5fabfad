"""Tables of the committed results, written between markers in README.md and docs/benchmarks.md.

python benchmarks/tables.py          # rewrite both
python benchmarks/tables.py --check  # exit 1 when they differ from the results
"""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "README.md": ("engine", "serving"), ROOT / "docs/benchmarks.md": ("engine", "training", "serving")}


RUNS = {
    "engine": "random weights; at least 3 runs each",
    "training": "random weights; medians of single steps",
    "serving": "clients and servers share the cores, and what is compared ran in turn",
}


def records(suite: str) -> list[dict[str, Any]]:
    """All records of a suite, in the order of the file."""
    path = ROOT / f"benchmarks/results/{suite}.json"
    found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    return found


def table(suite: str) -> str:
    """One row per workload, model, variant and unit; one column per system."""
    rows = records(suite)
    systems = list(dict.fromkeys(r["system"] for r in rows))
    cells: dict[tuple[str, str, str, str], dict[str, str]] = {}
    for r in rows:
        shown = f"{r['value']:,.0f}" if r["value"] >= 1000 else f"{r['value']:.3g}"
        spread = f" ({r['min']:,.6g} to {r['max']:,.6g})" if r["min"] < r["max"] else ""
        cells.setdefault((r["workload"], r["model"], r["variant"], r["unit"]), {})[r["system"]] = shown + spread
    lines = ["| workload | model | variant | unit | " + " | ".join(systems) + " |", "|---|---|---|---|" + "---|" * len(systems)]
    lines += ["| " + " | ".join([*key, *(by.get(s, "") for s in systems)]) + " |" for key, by in cells.items()]
    hardware = ", ".join(sorted({r["hardware"] for r in rows}))
    return "\n".join([*lines, "", f"Median (range) on {hardware}; {RUNS[suite]}."]) if rows else ""


def rewritten(page: Path) -> str:
    """The text of a page with its tables as the results say."""
    text = page.read_text()
    for suite in PAGES[page]:
        begin, end = f"<!-- {suite}: begin -->", f"<!-- {suite}: end -->"
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table(suite)}\n{end}{after}"
    return text


def main() -> None:
    stale = [page for page in PAGES if page.read_text() != rewritten(page)]
    if "--check" in sys.argv:
        sys.exit(f"run python benchmarks/tables.py: {', '.join(str(p) for p in stale)}" if stale else 0)
    for page in stale:
        page.write_text(rewritten(page))


if __name__ == "__main__":
    main()
