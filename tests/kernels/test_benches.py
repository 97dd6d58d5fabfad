"""Every kernel has a bench whose inputs fit it: at the shapes of Llama without numbers, and launched at small ones where that needs no GPU."""

import ctypes
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton")

from altiplano_kernels import hopper  # noqa: E402
from altiplano_kernels.cluster_attention import kernel as clusters  # noqa: E402
from altiplano_kernels.few_rows import kernel as few  # noqa: E402
from altiplano_kernels.tile_linear import kernel as tiles  # noqa: E402

from .interpreted import KERNELS, patch_kernels  # noqa: E402
from .programs import imported  # noqa: E402

ROOT = Path(__file__).parents[2]
PROGRAM, FOLDERS = ROOT / "benchmarks/engine/kernels.py", ROOT / "kernels/altiplano_kernels"
CUDA_SOURCES = ["few_rows", "cluster_attention", "tile_linear"]


@pytest.fixture(scope="module")
def program() -> Iterator[Any]:
    """benchmarks/engine/kernels.py."""
    with imported("kernels") as [found]:
        yield found


@pytest.fixture(scope="module")
def small(program: Any) -> Any:
    return program.Model("1b", 512, 512, 4, 1, 128, 1024, decodes=(3, 5), prompts=(2, 40), contexts=(40, 60))


def test_a_case_is_named_once(program: Any) -> None:
    names = [(case.kernel, case.model, case.shape) for case in program.cases(program.BENCHES)]
    assert len(names) == len(set(names)) and {model for _, model, _ in names} == {"1b", "3b", "any"}


@pytest.mark.parametrize("name", [*KERNELS, "gemm"])
def test_inputs_are_what_the_kernel_takes(program: Any, small: Any, name: str) -> None:
    """Two turns are prepared, and the second launched."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu":
            patch_kernels(patch)
        for case in program.cases([name], [small]):
            _, second = case.prepare(DEVICE, 2)
            result = second()
            assert not isinstance(result, torch.Tensor) or bool(result.float().isfinite().all()), case.shape


class Recorded:
    """Stands for a kernel of CUDA C++, which only a GPU runs: keeps how it was asked for and launched."""

    def __init__(self) -> None:
        self.options: dict[str, int] = {}
        self.launched: list[tuple[dict[str, int], tuple[int, int, int], int, int]] = []

    def build(self, source: Path, name: str, options: tuple[tuple[str, int], ...], device: int | None) -> "Recorded":
        assert source.exists() and 'extern "C" __global__' in source.read_text() and name in source.read_text()
        self.options = dict(options)
        return self

    def allow(self, shared: int, large_cluster: bool = False) -> None:
        assert shared <= 227 * 1024

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure, shared: int = 0, pdl: bool = True
    ) -> None:
        self.launched.append((self.options, grid, threads, shared))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    kernel = Recorded()
    for module in (few, clusters, tiles):
        monkeypatch.setattr(module, "build", kernel.build)
    monkeypatch.setattr(hopper, "driver", lambda call, *arguments: None)  # which describes tensors to the GPU
    monkeypatch.setattr(tiles, "processors_of", lambda device: 132)
    return kernel


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", CUDA_SOURCES)
def test_cuda_kernels_get_their_arguments(program: Any, small: Any, recorded: Recorded, name: str, device: str) -> None:
    """With numbers at a small shape, and without at those of Llama."""
    for case in program.cases([name], [small] if device == "cpu" else program.MODELS):
        for launch in case.prepare(device, 2):
            launch()
        (options, grid, threads, _), again = recorded.launched[-2:]
        assert recorded.launched[-1] == recorded.launched[-2], again
        assert min(grid) > 0 and threads % 32 == 0 and 32 <= threads <= 1024, case.shape
        if "K" in options:
            assert options["K"] % (options["WARPS"] * options["DEPTH"] * few.CHUNK[options["BITS"]]) == 0, (case.shape, options)


@pytest.mark.parametrize("name", [*KERNELS, "gemm"])
def test_inputs_can_be_made_at_the_shapes_of_llama(program: Any, name: str) -> None:
    for case in program.cases([name]):
        assert len(case.prepare("meta", 2)) == 2 and case.bytes > 0, case.shape


def found(program: Any, kernel: str, model: str, shape: str) -> Any:
    [case] = [case for case in program.cases([kernel]) if (case.model, case.shape) == (model, shape)]
    return case


def test_every_kernel_has_a_bench_and_a_reference(program: Any) -> None:
    """A reference of its own, or one of another kernel that its package names."""
    launched = [path.parent for path in FOLDERS.glob("*/kernel.py")]
    assert {folder.name for folder in launched} == set(program.BENCHES) - {"gemm"}
    for folder in launched:
        other = re.search(r"`(\w+)\.reference`", (folder / "__init__.py").read_text())
        assert ((FOLDERS / other[1] if other else folder) / "reference.py").exists(), folder.name


@pytest.mark.parametrize(("model", "layer", "head"), [("1b", 121.6e6, 525e6), ("3b", 201.3e6, 788e6)])
def test_bytes_are_those_of_the_model(program: Any, model: str, layer: float, head: float) -> None:
    """All weights of a layer, and of the head, once; the rest of a step of one row is next to nothing."""
    products = [found(program, "few_rows", model, f"{name}, bf16, 1 row") for name in ("qkv", "o", "gate_up", "down")]
    assert sum(case.bytes for case in products) == pytest.approx(layer, rel=2e-3)
    assert sum(case.flops for case in products) == pytest.approx(layer, rel=2e-3)  # two bytes and two operations a weight
    assert found(program, "few_rows", model, "head, bf16, 1 row").bytes == pytest.approx(head, rel=2e-3)
    four, eight = (found(program, "few_rows", model, f"gate_up, {kind}, 1 row").bytes for kind in ("int4", "int8"))
    assert (four / products[2].bytes, eight / products[2].bytes) == pytest.approx((33 / 128, 65 / 128), rel=2e-3)


@pytest.mark.parametrize(("model", "token", "work"), [("1b", 2048, 8.2e3), ("3b", 4096, 12.3e3)])
def test_attention_reads_what_a_token_leaves(program: Any, model: str, token: int, work: float) -> None:
    """2 and 4 KiB of keys and values a token and layer; half of it and a scale per head of two bytes in 8 bits."""
    tokens = 256 * 2048
    for name in ("cluster_attention", "paged_attention"):
        plain, eight = (found(program, name, model, f"{kind}, 256 rows, context 2048") for kind in ("bf16", "int8"))
        assert plain.bytes == pytest.approx(tokens * token, rel=5e-3) and plain.flops == pytest.approx(tokens * work, rel=5e-3)
        assert eight.bytes == pytest.approx(tokens * (token / 2 + 2 * 8 * 2), rel=5e-3)
    prompts = found(program, "prefill_attention", model, "bf16, 8 x 1024 tokens")
    assert prompts.flops == pytest.approx(8 * 1024 * 512 * work, rel=5e-3) and prompts.limit == "operations"


def test_percent_is_of_the_limit_that_is_nearer(program: Any) -> None:
    wide = found(program, "gemm", "1b", "gate_up, 8 192 rows")
    assert wide.limit == "operations" and wide.percent(2 * 8192 * 16384 * 2048 / 747e6) == pytest.approx(100)
    narrow = found(program, "gemm", "1b", "gate_up, 1 row")
    # The handbook's own measurement: 18.1 us are 3.71 TB/s, 88 % of a copy.
    assert narrow.limit == "bytes" and narrow.percent(18.1) == pytest.approx(88, abs=0.5)


def test_no_input_comes_from_the_cache(program: Any) -> None:
    """What takes turns is four times the L2 cache of 50 MB, but for what the engine has there too."""
    from kernel_benches.timing import MOST_LAUNCHES, in_turns

    for case in program.cases(program.BENCHES):
        assert case.turns >= 2 and (case.turns * case.bytes >= 200e6 or case.bytes < 2e6), (case.kernel, case.shape)
        launches = [print] * case.turns
        order = in_turns(launches, case.floor_us)
        assert len(order) % len(launches) == 0 and len(launches) <= len(order) <= max(MOST_LAUNCHES, len(launches))


def test_a_case_that_fails_costs_only_itself(
    program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measure(case: Any) -> list[float]:
        if case.shape.startswith("advance"):
            raise RuntimeError("an illegal memory access was encountered")
        return [3.0, 2.0, 4.0]

    out = tmp_path / "out.json"
    monkeypatch.setattr(program, "measure", measure)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["kernels.py", "sampling", "--commit", "abc", "--out", str(out)])
    with pytest.raises(SystemExit, match="without a result: sampling, any, advance, 256 rows"):
        program.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    rows = json.loads(out.read_text())
    assert [line for line in lines if "error" not in line] == rows and len(rows) == len(lines) - 1
    assert (rows[0]["us"], rows[0]["min"], rows[0]["max"], rows[0]["runs"], rows[0]["commit"]) == (3.0, 2.0, 4.0, 3, "abc")
    assert rows[0]["percent"] == pytest.approx(100 * rows[0]["bytes"] / 4.22e12 / 3e-6, abs=0.01) and rows[0]["limit"] == "bytes"


@pytest.fixture(scope="module")
def tuning(program: Any) -> Iterator[Any]:
    with imported("tune_kernels") as [found]:
        yield found


@pytest.mark.parametrize("name", ["decode", "prefill", "w8a8"])
def test_what_is_tried_are_ways_to_launch_the_same_case(tuning: Any, small: Any, name: str) -> None:
    """Each can be prepared; the first and the kernel's own are launched, where that needs no GPU."""
    for case, own, others, chosen in tuning.TASKS[name](small, 3):
        choices = [tuple(own), *map(tuple, others)]
        assert len(set(choices)) > 2 and chosen(own).shape == case.shape
        for choice in choices:
            other = chosen(choice)
            assert other.flops == case.flops and len(other.prepare("meta", 2)) == 2
        if case.kernel not in CUDA_SOURCES and ("bf16" in case.shape or name == "w8a8"):
            with pytest.MonkeyPatch.context() as patch:
                if DEVICE == "cpu":
                    patch_kernels(patch)
                for choice in choices[:2]:
                    chosen(choice).prepare(DEVICE, 1)[0]()


def test_what_has_no_bench_is_refused(program: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["kernels.py", "gemm", "gemv"])
    with pytest.raises(SystemExit):
        program.main()
    assert "no bench gemv: use some of gemm, few_rows" in capsys.readouterr().err
