"""The picture and the table of the card's limits follow from the results, and the floors from the shapes."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks/engine/roofline.py"


@pytest.fixture(scope="module")
def roofline() -> Any:
    found = importlib.util.spec_from_file_location("roofline", PROGRAM)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["roofline"] = module
    found.loader.exec_module(module)
    return module


def test_picture_and_table_are_made_from_the_results(roofline: Any) -> None:
    subprocess.run([sys.executable, str(PROGRAM), "--check"], check=True)
    marks = [mark for mark in ElementTree.parse(roofline.PICTURE).iter() if mark.tag.endswith(("circle", "rect")) and len(mark)]
    rows = [line for line in roofline.PAGE.read_text().splitlines() if line.endswith((" bytes |", " multiply-adds |"))]
    assert len(marks) == len(rows) > 10


def test_the_shapes_are_the_public_ones(roofline: Any) -> None:
    """1 235 814 400 and 3 212 749 824 parameters, less the norms, which are not read as matrices."""
    for name, public in {"1b": 1_235_814_400, "3b": 3_212_749_824}.items():
        shape = roofline.SHAPES[name]
        norms = (2 * shape.layers + 1) * shape.hidden
        assert shape.layer_weights + shape.head_weights + norms == public


def test_the_floor_counts_weights_keys_and_values(roofline: Any) -> None:
    record = {"model": "1b", "variant": "bf16", "workload": "W1", "system": "altiplano", "value": 1.0}
    step = roofline.point(record)
    # 2.47 GB of weights and 384 tokens of 32 KiB each at 4.22 TB/s.
    assert step.floor == pytest.approx((2 * 1_235_746_816 + 384 * 32768) / 4.22e12, rel=1e-3)
    assert step.percent == pytest.approx(100 * step.floor / 1e-3)
    assert roofline.point(record | {"workload": "W3-256"}) is None
    eight_bits = roofline.point(record | {"variant": "kv-int8"})
    assert eight_bits.bytes == pytest.approx(step.bytes - 384 * 32768 * (1 - 66 / 128), rel=1e-9)
    layers = roofline.SHAPES["1b"].layer_weights
    assert roofline.point(record | {"variant": "w8a8-fp8"}).bytes == pytest.approx(step.bytes - layers, rel=1e-9)
    assert roofline.point(record | {"variant": "w8a8-fp8", "workload": "W4"}) is None
    # With 4 bits the head has 6; each 128 of both share a scale of two bytes.
    head = roofline.SHAPES["1b"].head_weights
    four_bits = roofline.point(record | {"variant": "w-int4"})
    saved = layers * (2 - 4 / 8 - 2 / 128) + head * (2 - 6 / 8 - 2 / 128)
    assert four_bits.bytes == pytest.approx(step.bytes - saved, rel=1e-9)
    assert roofline.point(record | {"workload": "quality-kl/prefill"}) is None
    assert roofline.point(record | {"variant": "lora-8"}) is None
