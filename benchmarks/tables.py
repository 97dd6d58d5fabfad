"""Tables of the committed results, written between markers in README.md and docs/benchmarks.md.

python benchmarks/tables.py          # rewrite both
python benchmarks/tables.py --check  # exit 1 when they differ from the results
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = {
    ROOT / "README.md": ("engine-short", "serving"),
    ROOT / "docs/benchmarks.md": ("engine", "start", "quality", "kernels", "training", "serving"),
}
PEERS = ("vllm", "sglang")
# What the README shows of reduced numbers: where each of them is meant to pay.
HEADLINES = {("W2-B256-2048", "kv-fp8"), ("W2-B256-2048", "kv-int8"), ("W1", "w-int4"), ("W4", "w8a8-fp8")}
# By how a start was made: what its caches of compiled kernels held.
CACHES = {"cold-start": "empty", "start": "warm", "first-start": "as it found them"}
Record = dict[str, Any]


def records(suite: str) -> list[Record]:
    """All records of a suite, in the order of the file."""
    path = ROOT / f"benchmarks/results/{suite}.json"
    found: list[Record] = json.loads(path.read_text()) if path.exists() else []
    return found


def by_system(rows: Sequence[Record], note: str) -> str:
    """One row per workload, model, variant and unit; one column per system, and our distance from the better peer if one was measured."""
    systems = list(dict.fromkeys(r["system"] for r in rows))
    cells: dict[tuple[str, str, str, str], dict[str, Record]] = {}
    for r in rows:
        cells.setdefault((r["workload"], r["model"], r["variant"], r["unit"]), {})[r["system"]] = r
    peers = [system for system in systems if system in PEERS]
    distance = [f"times the speed of {peers[0] if len(peers) == 1 else 'the better peer'}"] if peers else []
    heads = ["workload", "model", "variant", "unit", *systems, *distance]
    lines = [
        [*key, *(_shown(by[s]) + _mark(by, s) if s in by else "" for s in systems), *([_times(by)] if peers else [])]
        for key, by in cells.items()
    ]
    if any(_mark(by, s) for by in cells.values() for s in by):
        note += "; †: in another session than ours, on a card of the same kind"
    named = {r["system"]: f"{r['system']} {r['versions'][r['system']]}" for r in rows if r["system"] in PEERS}
    return _table(
        heads, lines, rows, "Median (range)", "; ".join([note, *([f"peers: {', '.join(named.values())}"] if named else [])])
    )


def engine(rows: Sequence[Record] | None = None) -> str:
    """W1-W4, and the seconds of a start."""
    rows = engine_rows() if rows is None else rows
    note = "random weights; at least 3 runs each" + (", but for starts" if any("start" in r["workload"] for r in rows) else "")
    return by_system(rows, note)


def engine_rows() -> list[Record]:
    return [r for r in records("engine") if r["workload"].startswith("W") or r["workload"] in ("start", "cold-start")]


def engine_short() -> str:
    """Of ours one commit, which is that of batch 1: bf16, and each reduction where it is meant to pay. Of peers what there is of the same."""
    rows = engine_rows()
    commits = [
        r["commit"] for r in rows if (r["workload"], r["model"], r["variant"], r["system"]) == ("W1", "1b", "bf16", "altiplano")
    ]
    shown = [r for r in rows if r["variant"] == "bf16" or (r["workload"], r["variant"]) in HEADLINES]
    ours = [r for r in shown if r["system"] not in PEERS and r["commit"] in commits]
    about = {(r["workload"], r["model"], r["variant"]) for r in ours}
    return engine([*ours, *(r for r in shown if r["system"] in PEERS and (r["workload"], r["model"], r["variant"]) in about)])


def start() -> str:
    """The parts of the time to the first token: one row per model, system and state of the caches."""
    columns: dict[str, str] = {}
    found: dict[tuple[str, str, str], dict[str, Record]] = {}
    rows = []
    for r in records("engine"):
        whole, _, part = r["workload"].partition("/")
        kind = whole.removesuffix("-answer")
        if kind in CACHES:
            rows.append(r)
            found.setdefault((r["model"], r["system"], CACHES[kind]), {})[r["workload"].removeprefix(kind)] = r
            columns |= {f"/{part}": part} if part else {}
    columns |= {"": "first token", "-answer": "16th token"}
    lines = [[*key, *(f"{by[c]['value']:.2f}" if c in by else "" for c in columns)] for key, by in found.items()]
    return _table(
        ["model", "system", "kernel caches", *columns.values()], lines, rows, "Median seconds", "random weights in the page cache"
    )


def quality() -> str:
    """One row per model and variant; of decode steps the worst batch size."""
    rows = [r for r in records("engine") if r["workload"].startswith("quality-")]
    columns = {
        "mean KL, prompts": ("quality-kl", "prefill"),
        "mean KL, decode steps": ("quality-kl", "decode"),
        "mean error, prompts": ("quality-logprob", "prefill"),
        "mean error, decode steps": ("quality-logprob", "decode"),
        "largest error, prompts": ("quality-logprob-max", "prefill"),
        "largest error, decode steps": ("quality-logprob-max", "decode"),
    }
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for r in rows:
        measure, _, path = r["workload"].partition("/")
        variant = r["variant"] if r["system"] == "altiplano" else f"{r['variant']} ({r['system']})"
        worst = found.setdefault((r["model"], variant), {})
        at = measure, path.partition("-")[0]
        worst[at] = max(worst.get(at, 0.0), r["max"] if measure.endswith("-max") else r["value"])
    lines = [[*key, *(f"{by[at]:.2g}" if at in by else "" for at in columns.values())] for key, by in found.items()]
    return _table(
        ["model", "variant", *columns],
        lines,
        rows,
        "Nats",
        "random weights, against transformers in float32, over at least 3 draws of tokens",
    )


def kernels() -> str:
    """One row per kernel and shape; of each model the microseconds, and how near they are to the limit that is nearer."""
    rows = records("kernels")
    models = [model for model in dict.fromkeys(r["model"] for r in rows) if model != "any"]
    found: dict[tuple[str, str], dict[str, Record]] = {}
    for r in rows:
        of_models = models if r["model"] == "any" else [r["model"]]
        found.setdefault((r["kernel"], r["shape"]), {}).update(dict.fromkeys(of_models, r))
    heads = [head for model in models for head in (f"{model}, µs", "of the limit")]
    places = list(dict.fromkeys(kernel for kernel, _ in found))
    together = sorted(found.items(), key=lambda item: places.index(item[0][0]))  # rows that came later join their kernel's
    lines = [[*key, *(cell for model in models for cell in _kernel_cells(by.get(model)))] for key, by in together]
    return _table(["kernel", "shape", *heads], lines, rows, "Medians", "random numbers; in brackets what the limit is of")


def _kernel_cells(r: Record | None) -> tuple[str, str]:
    if r is None:
        return "", ""
    percent = f"{r['percent']:.0f}" if r["percent"] >= 10 else f"{r['percent']:.2g}"
    return f"{r['us']:.4g}", f"{percent} % ({r['limit']})"


TABLES: dict[str, Callable[[], str]] = {
    "engine": engine,
    "engine-short": engine_short,
    "start": start,
    "quality": quality,
    "kernels": kernels,
    "training": lambda: by_system(records("training"), "random weights; medians of single steps"),
    "serving": lambda: by_system(records("serving"), "clients and servers share the cores, and what is compared ran in turn"),
}


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]], rows: Sequence[Record], figure: str, note: str) -> str:
    if not rows:
        return "Not measured yet."
    hardware = ", ".join(sorted({r["hardware"] for r in rows}))
    shown = [f"| {' | '.join(cells)} |" for cells in (heads, *lines)]
    return "\n".join([shown[0], "|" + "---|" * len(heads), *shown[1:], "", f"{figure} on {hardware}; {note}."])


def _mark(by: dict[str, Record], system: str) -> str:
    """Whether a peer was measured beside another commit of ours than the one in its row, which was in another session."""
    ours = by.get("altiplano")
    return " †" if system in PEERS and ours is not None and ours["commit"] != by[system]["commit"] else ""


def _shown(r: Record) -> str:
    value = f"{r['value']:,.0f}" if r["value"] >= 1000 else f"{r['value']:.4g}"
    return value + (f" ({r['min']:,.6g} to {r['max']:,.6g})" if r["min"] < r["max"] else "")


def _times(by: dict[str, Record]) -> str:
    """Our speed over the better peer's; nothing where one of the two is missing."""
    ours, theirs = by.get("altiplano"), [by[peer]["value"] for peer in PEERS if peer in by]
    if ours is None or not theirs:
        return ""
    factor = ours["value"] / max(theirs) if ours["higher_is_better"] else min(theirs) / ours["value"]
    return f"{factor:.2f}"


def rewritten(page: Path) -> str:
    """The text of a page with its tables as the results say."""
    text = page.read_text()
    for name in PAGES[page]:
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not (opened and closed):
            sys.exit(f"{page} has no place for the table {name}: add the lines {begin} and {end}")
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{after}"
    return text


def main() -> None:
    stale = [page for page in PAGES if page.read_text() != rewritten(page)]
    if "--check" in sys.argv:
        sys.exit(f"run python benchmarks/tables.py: {', '.join(str(p) for p in stale)}" if stale else 0)
    for page in stale:
        page.write_text(rewritten(page))


if __name__ == "__main__":
    main()
