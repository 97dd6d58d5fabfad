"""What the interpreter runs also compiles for the GPU, into shared memory that it has, and onto its tensor cores."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_hopper_without_a_gpu(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("hopper.py")
    ran = subprocess.run(
        [sys.executable, str(program)],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = dict(line.split() for line in ran.stdout.splitlines())
    attention, rows, loras, eight_bits, draws = 2 * 3 * 4 + 2 * 2, 2 * 3 + 2, 4, 2 * 12 + 2, 4 * 5
    assert len(found) == attention + rows + loras + eight_bits + draws
    multiply = ("decode", "prefill", "steady", "lora", "w8a8-linear")
    products = {name: unit for name, unit in found.items() if name.startswith(multiply)}
    # Sixteen rows are too few for the large instruction, unless columns come first.
    wanted = {name: "mma" if name.startswith("decode") or name.endswith("decode") else "wgmma" for name in products}
    assert products == wanted
