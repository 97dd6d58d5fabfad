"""How prompts' attention in CUDA C++ is launched; that needs no GPU."""

import ctypes
from itertools import product

import pytest
import torch

from altiplano_kernels.hopper import runs_on
from altiplano_kernels.prefill_attention import groups
from altiplano_kernels.prefill_attention.groups import choose, fits, shared_bytes

MOST_SHARED = 232_448 - 1024  # bytes that a block may have, less what is static
SIZES = [
    (32, 8, 64),
    (24, 8, 128),
    (9, 3, 64),
    (15, 5, 64),
    (4, 2, 64),
    (3, 3, 64),
    (12, 2, 64),
    (16, 2, 128),
    (8, 8, 128),
    (5, 1, 128),
]

PAGES = (8, 16, 32, 64, 128, 192, 320)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SIZES)
def test_what_is_chosen_fits_a_processor_and_divides_the_heads(heads: int, kv_heads: int, dim: int, coded: bool) -> None:
    for tiles, page in product((1, 8, 64, 128, 4096), PAGES):
        assert fits(heads, kv_heads, dim, page)
        shape = choose(tiles, heads, kv_heads, dim, page, coded, 132)
        assert heads // kv_heads % shape.groups == 0 and shape.keys in (64, 128)
        assert page % shape.keys == 0 or shape.keys % page == 0, "boxes are of one page"
        assert shared_bytes(shape, dim, coded) * shape.resident <= MOST_SHARED
        # A group needs its sums, a tile of scores, and these as bf16 when products overlap; 26 registers are for the rest.
        needed = dim // 2 + shape.keys // 2 + (shape.keys // 4 if shape.overlap else 0) + 26
        assert needed * shape.groups * shape.resident <= 512 - 32 * shape.resident, (tiles, shape)


@pytest.mark.parametrize(("heads", "dim"), [(32, 64), (24, 128)])
def test_few_tiles_are_spread_over_more_blocks_and_many_share_keys(heads: int, dim: int) -> None:
    few, many = (choose(tiles, heads, 8, dim, 32, False, 132) for tiles in (8, 128))
    assert few.groups < many.groups == heads // 8
    assert choose(8, heads, 8, dim, 32, True, 132).groups >= few.groups, "codes become bf16 once for each block"


def test_ahead_of_the_prompts_all_shapes_that_they_will_need_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    made = list[dict[str, int]]()
    monkeypatch.setattr(groups, "compile_source", lambda _, macros, architecture: made.append(macros))
    for kind in groups.KINDS:
        made.clear()
        groups.compile_shapes((32, 8, 64, 32), kind, 132, lambda: True)
        coded = kind is not torch.bfloat16
        wanted = {choose(tiles, 32, 8, 64, 32, coded, 132) for tiles in range(1, 300)}
        assert len(made) == len(wanted)
        assert all(groups.options_of((32, 8, 64, 32), shape, groups.KINDS[kind]) in made for shape in wanted)
    made.clear()
    groups.compile_shapes((32, 8, 64, 32), torch.bfloat16, 132, lambda: not made)
    assert len(made) == 1


def test_other_shapes_are_left_to_triton() -> None:
    assert fits(32, 8, 64, 32) and fits(24, 8, 128, 16) and fits(8, 8, 64, 128)
    assert not fits(6, 2, 32, 32) and not fits(32, 8, 64, 4) and not fits(32, 8, 64, 48) and not fits(32, 5, 64, 32)
    assert not runs_on(torch.device("cpu"))


def test_arguments_lie_where_the_kernel_reads_them() -> None:
    """Two descriptions of 128 bytes, which must be at multiples of 64; then pointers and numbers as in prefill.cu."""
    arguments = groups._Args
    assert ctypes.sizeof(arguments) == 320 and (arguments.query.offset, arguments.cache.offset) == (0, 128)
    fields = ("scales", "tables", "tiles", "out", "count", "stride_table", "stride_out", "softmax_scale")
    assert [getattr(arguments, name).offset for name in fields] == [256, 264, 272, 280, 288, 292, 296, 300]
