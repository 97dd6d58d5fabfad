"""Which tiling is chosen, and what the launch tells the kernel; that needs no GPU."""

import ctypes
from pathlib import Path

import pytest
import torch

from altiplano_kernels import cuda_program
from altiplano_kernels.cuda_program import KernelBuildError
from altiplano_kernels.tile_linear import kernel as tile
from altiplano_kernels.tile_linear.kernel import DRAW, GATED, LEAST_ROWS, PARTS, SIZES, WHOLE, Tiling

# By kind, [n, k] of the weights of Llama 3.2 1B and 3B, and of cria's.
WEIGHTS = {
    WHOLE: [(3072, 2048), (5120, 3072), (384, 192)],
    PARTS: [(2048, 2048), (3072, 3072), (2048, 8192), (3072, 8192), (192, 192), (192, 512)],
    GATED: [(16384, 2048), (16384, 3072), (1024, 192)],
    DRAW: [(128256, 2048), (128256, 3072), (2048, 192)],
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_what_is_chosen_divides_the_weight(kind: int) -> None:
    for n, k in WEIGHTS[kind]:
        weight = torch.empty(n, k, device="meta")
        for rows in range(1, SIZES[-1] + 50):
            tiling = tile.choose(rows, weight, kind)
            if rows < LEAST_ROWS or (rows > SIZES[-1] and kind != DRAW):
                assert tiling is None
            elif tiling is not None:
                assert n % tiling.columns == 0 and k % (tiling.splits * tiling.depth) == 0, (rows, n, k)
                assert tiling.splits == 1 or kind == PARTS, "only parts may be left to the next kernel"
                assert tiling.rows <= 256, "a box has at most 256 rows"


def test_llamas_steps_of_64_rows_have_a_tiling_for_every_product() -> None:
    for kind, weights in WEIGHTS.items():
        for n, k in weights[:2]:
            assert tile.choose(64, torch.empty(n, k, device="meta"), kind) is not None, (kind, n, k)


def test_ahead_of_the_steps_all_that_they_will_need_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [(torch.empty(*some[0], device="meta"), kind) for kind, some in WEIGHTS.items()]
    made = set[tuple[Tiling, int]]()
    monkeypatch.setattr(tile, "compile_tiling", lambda tiling, kind: made.add((tiling, kind)))
    tile.compile_chosen(weights, 300, lambda: True)
    wanted = {(tile.choose(rows, w, kind), kind) for rows in range(1, 301) for w, kind in weights}
    assert made == {(tiling, kind) for tiling, kind in wanted if tiling is not None}
    made.clear()
    tile.compile_chosen(weights, 48, lambda: len(made) < 2)
    assert len(made) == 2
    tile.compile_chosen(weights, 8, lambda: True)
    assert len(made) == 2, "few rows have other kernels"


def test_what_does_not_compile_is_left_to_the_step_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(tiling: Tiling, kind: int) -> bytes:
        raise KernelBuildError("libnvrtc.so.13 was not found")

    monkeypatch.setattr(tile, "compile_tiling", no_compiler)
    tile.compile_chosen([(torch.empty(3072, 2048, device="meta"), WHOLE)], 64, lambda: True)


def test_a_ring_that_shared_memory_has_no_room_for_does_not_fit() -> None:
    assert tile.fits(Tiling(1, 1, 128, 1, 8), 128, 512)
    assert not tile.fits(Tiling(1, 1, 128, 1, 8, resident=2), 128, 512)
    assert not tile.fits(Tiling(2, 2, 128, 1, 5), 128, 512)
    assert not tile.fits(Tiling(1, 1, 128, 3, 4), 128, 512) and not tile.fits(Tiling(1, 1, 128, 1, 4), 192, 512)


def test_a_draw_has_as_many_blocks_as_there_is_room_for() -> None:
    """Each has a tile of columns at least; several blocks of rows share the room."""
    two = Tiling(2, 1, 128, 1, 3, resident=2)
    assert tile.draw_blocks(128, 128256, two, 132) == 264 and tile.draw_blocks(129, 128256, two, 132) == 132
    assert tile.draw_blocks(128, 5 * 128, two, 132) == 5
    assert tile.draw_blocks(1 << 20, 128256, two, 132) == 1


def test_arguments_lie_where_the_kernel_reads_them() -> None:
    """Two descriptions of 128 bytes, which must be at multiples of 64; then pointers and numbers as in linear.cu."""
    arguments = tile._Args
    assert ctypes.sizeof(arguments) % 64 == 0 and (arguments.x.offset, arguments.w.offset) == (0, 128)
    fields = ("out", "rows", "columns", "depth", "values", "ids", "slots", "temperatures", "seeds", "steps")
    offsets = [getattr(arguments, name).offset for name in fields]
    assert offsets == [256, 264, 268, 272, 280, 288, 296, 304, 312, 320]


def test_what_a_source_includes_is_part_of_what_is_compiled_and_kept(tmp_path: Path) -> None:
    """Machine code is found again by the text, so a change of a header must make another text."""
    (tmp_path / "kernel").mkdir()
    source, header = tmp_path / "kernel" / "one.cu", tmp_path / "shared.cuh"
    source.write_text('// First.\n#include "../shared.cuh"\nint x;\n')
    for text in ("int a;\n", "int b;\n"):
        header.write_text(text)
        assert cuda_program._whole(source).decode() == f"// First.\n{text}\nint x;\n"
