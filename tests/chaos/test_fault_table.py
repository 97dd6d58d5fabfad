"""The table of faults in docs/operations.md: what it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`(test_\w+)`")


def rows() -> list[list[str]]:
    """failure, what happens, bound and tests of every fault."""
    text = (ROOT / "docs" / "operations.md").read_text().split("## When things break")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return lines[1:]


def test_every_fault_has_a_bound_and_tests_that_exist() -> None:
    known = {name for file in (ROOT / "tests").rglob("test_*.py") for name in re.findall(r"def (test_\w+)", file.read_text())}
    for row in rows():
        failure, _, bound, tests = row
        assert bound.strip(), failure
        names = TEST.findall(tests)
        assert names and not set(names) - known, f"{failure}: {sorted(set(names) - known) or 'no test'}"
    assert len(rows()) > 20
