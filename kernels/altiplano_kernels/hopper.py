"""What launches of sources with hopper.cuh share: which GPUs run them, and what the tensor copy engine must know of a matrix."""

import ctypes
import functools

import torch

from altiplano_kernels.cuda_program import driver

BOX = 64  # bf16 columns that it brings at once: 128 bytes, the width of the pattern
Map = ctypes.c_ubyte * 128
_BYTES, _BFLOAT16 = 0, 9  # CUtensorMapDataType
_PLAIN, _SWIZZLE_128, _PROMOTE_256 = 0, 3, 3  # CUtensorMapSwizzle, twice; CUtensorMapL2promotion


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether the GPU has wgmma: compute capability 9, which is Hopper, and neither older nor newer ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def processors_of(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.lru_cache(maxsize=1024)
def tensor_map(
    pointer: int, rows: int, columns: int, stride: int, box: int, of_bytes: bool = False
) -> ctypes.Array[ctypes.c_ubyte]:
    """The CUtensorMap of bf16 [rows, columns], whose rows are `stride` apart: boxes of BOX columns and `box` rows in the pattern of 128 bytes;
    rows past the end are zeros. `of_bytes`: of bytes instead, whole rows in a box, as they are."""
    # The driver wants it at a multiple of 64.
    room = ctypes.create_string_buffer(192)
    at = -(-ctypes.addressof(room) // 64) * 64
    kind, size, width, pattern = (_BYTES, 1, columns, _PLAIN) if of_bytes else (_BFLOAT16, 2, BOX, _SWIZZLE_128)
    driver(
        "cuTensorMapEncodeTiled", ctypes.c_void_p(at), kind, 2, ctypes.c_void_p(pointer), (ctypes.c_uint64 * 2)(columns, rows),
        (ctypes.c_uint64 * 1)(stride * size), (ctypes.c_uint32 * 2)(width, box), (ctypes.c_uint32 * 2)(1, 1), 0, pattern, _PROMOTE_256, 0,
    )  # fmt: skip
    return Map.from_buffer_copy(ctypes.string_at(at, 128))
