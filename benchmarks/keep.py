"""Keep what programs have measured: their records go into benchmarks/results, and the tables and the picture follow.

python benchmarks/keep.py ours.json vllm.json …

A record takes the place of the one with the same workload, model, variant, system and unit, or, of a kernel, the same kernel, model
and shape; a new one goes to the end.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ("command", "commit", "hardware", "versions", "date")
NAMES = ("workload", "model", "variant", "system", "unit")
KEYS = ("suite", *NAMES, "value", "higher_is_better", "runs", "min", "max", *SOURCE)
KERNEL_NAMES = ("kernel", "model", "shape")
KERNEL_KEYS = ("suite", *KERNEL_NAMES, "us", "min", "max", "runs", "bytes", "flops", "percent", "limit", *SOURCE)
Record = dict[str, Any]


def merged(old: Iterable[Record], new: Iterable[Record]) -> list[Record]:
    """`old` with `new` in their places."""

    return list(({name(record): record for record in old} | {name(record): record for record in new}).values())


def name(record: Record) -> tuple[Any, ...]:
    """What a record is about."""
    return tuple(record[key] for key in (KERNEL_NAMES if record["suite"] == "kernels" else NAMES))


def read(path: Path) -> list[Record]:
    """The records of a file.

    Raises:
        SystemExit: it is no list of records.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"{path} cannot be read: {error}")
    if not isinstance(found, list):
        sys.exit(f"{path} is no list of records: give what a program has written with --out")
    for record in found:
        keys = KERNEL_KEYS if isinstance(record, dict) and record.get("suite") == "kernels" else KEYS
        if not isinstance(record, dict) or set(record) != set(keys):
            sys.exit(f"{path}: a record must have the keys {', '.join(keys)}: run the program again, from this commit")
        if record["commit"] == "unknown":
            sys.exit(f"{path}: {', '.join(name(record)[:3])} does not say its commit: measure again with --commit")
    return found


def main(paths: list[str]) -> None:
    new = [record for path in paths for record in read(Path(path))]
    for suite in sorted({record["suite"] for record in new}):
        path = ROOT / f"benchmarks/results/{suite}.json"
        old = read(path) if path.exists() else []
        path.write_text(json.dumps(merged(old, (r for r in new if r["suite"] == suite)), indent=1) + "\n")
    for program in ("benchmarks/tables.py", "benchmarks/engine/roofline.py"):
        subprocess.run([sys.executable, str(ROOT / program)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
