"""The records of a run, in the layout of benchmarks/results."""

import platform
import statistics
import subprocess
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from front_end import STREAMS

RESULTS = Path(__file__).parents[1] / "results/serving.json"
PACKAGES = ("ray", "uvicorn", "uvloop", "httptools", "fastapi", "msgspec", "torch")
SYSTEMS = {"bare": "bare", "uvicorn": "altiplano", "ray serve": "altiplano on Ray Serve with HAProxy"}


@dataclass(frozen=True)
class Series:
    """One measure: values by system, one per repetition."""

    workload: str
    variant: str
    unit: str
    values: dict[str, list[float]]
    higher_is_better: bool


def records(series: list[Series], *, pinned: bool) -> list[dict[str, Any]]:
    """One record per measure and system."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    same = {
        "command": "python benchmarks/serving/overhead.py --write" + (" --pin" if pinned else ""),
        "commit": head,
        "hardware": f"{psutil.cpu_count()} cores of {_processor()}" + (", engines on the first" if pinned else ""),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
        "date": date.today().isoformat(),
    }
    return [
        {
            "suite": "serving",
            "workload": f"{measure.workload}, {STREAMS} streams",
            "model": "cria",
            "variant": measure.variant,
            "system": SYSTEMS[system],
            "value": _rounded(statistics.median(values)),
            "unit": measure.unit,
            "higher_is_better": measure.higher_is_better,
            "runs": len(values),
            "min": _rounded(min(values)),
            "max": _rounded(max(values)),
        }
        | same
        for measure in series
        for system, values in measure.values.items()
    ]


def shown(found: list[dict[str, Any]]) -> str:
    """A line per record."""
    return "\n".join(
        f"{r['workload']:<24}{r['system']:<38}{r['value']:>10} {r['unit']:<14}({r['min']} to {r['max']}, {r['runs']} runs)"
        for r in found
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
