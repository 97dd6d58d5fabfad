"""One program per token: rotate its queries in place, rotate its keys, and store keys and values in its page.

8-bit caches keep one float16 scale per token and head beside the pages (largest magnitude of the vector over the largest code).
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from altiplano_kernels.w8a8.reference import LARGEST

LEAST = tl.constexpr(6e-8)  # the smallest float16: a scale of zero would make NaN of a vector of zeros


@triton.jit
def _half_pairs(base, rows, stride, cos, sin, HALF: tl.constexpr, mask):
    """Rotated halves of the rows at `base`, float32 [rows, HALF] each."""
    d = tl.arange(0, HALF)
    first = tl.load(base + rows[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(base + rows[:, None] * stride + HALF + d[None, :], mask=mask, other=0.0).to(tl.float32)
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _encode(x, scale, CODE: tl.constexpr, out_type: tl.constexpr):
    """x / scale as the cache's code: rounded half to even for int8 (the cast alone would cut)."""
    y = x / scale
    if CODE == 127.0:
        # Adding and taking away 1.5 * 2**23 rounds a small float32 to the nearest integer.
        y = (y + 12582912.0) - 12582912.0
    return y.to(out_type)


@triton.jit
def _rope_kv_kernel(
    qkv, positions, slots, tables, cos_sin, cache, scales,
    stride_qkv, stride_table,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, HEADS_PAD: tl.constexpr, KV_PAD: tl.constexpr,
    CODE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    HALF: tl.constexpr = DIM // 2
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    position = tl.load(positions + token)
    slot = tl.load(slots + token).to(tl.int64)
    page = tl.load(tables + slot * stride_table + position // PAGE).to(tl.int64)
    d = tl.arange(0, HALF)
    cos = tl.load(cos_sin + position.to(tl.int64) * DIM + d)[None, :]
    sin = tl.load(cos_sin + position.to(tl.int64) * DIM + HALF + d)[None, :]
    base = qkv + token * stride_qkv
    heads = tl.arange(0, HEADS_PAD)
    seen = (heads < HEADS)[:, None]
    first, second = _half_pairs(base, heads, DIM, cos, sin, HALF, seen)
    at = base + heads[:, None] * DIM + d[None, :]
    tl.store(at, first.to(tl.bfloat16), mask=seen)
    tl.store(at + HALF, second.to(tl.bfloat16), mask=seen)
    kv = tl.arange(0, KV_PAD)
    live = (kv < KV_HEADS)[:, None]
    first, second = _half_pairs(base + HEADS * DIM, kv, DIM, cos, sin, HALF, live)
    value_at = base + (HEADS + KV_HEADS) * DIM + kv[:, None] * DIM + d[None, :]
    third = tl.load(value_at, mask=live, other=0.0).to(tl.float32)
    fourth = tl.load(value_at + HALF, mask=live, other=0.0).to(tl.float32)
    row = (page * 2 * KV_HEADS + kv[:, None]) * PAGE + position % PAGE
    target, lower = cache + row * DIM + d[None, :], KV_HEADS * PAGE * DIM
    kind: tl.constexpr = cache.dtype.element_ty
    if CODE > 0:
        key_scale = tl.maximum(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1) / CODE, LEAST)
        value_scale = tl.maximum(tl.max(tl.maximum(tl.abs(third), tl.abs(fourth)), 1) / CODE, LEAST)
        # Codes are made with the scale as it is stored, so that rounding of the scale costs nothing.
        key_scale, value_scale = key_scale.to(tl.float16), value_scale.to(tl.float16)
        where = scales + (page * 2 * KV_HEADS + kv) * PAGE + position % PAGE
        tl.store(where, key_scale, mask=kv < KV_HEADS)
        tl.store(where + KV_HEADS * PAGE, value_scale, mask=kv < KV_HEADS)
        ks, vs = key_scale.to(tl.float32)[:, None], value_scale.to(tl.float32)[:, None]
        tl.store(target, _encode(first, ks, CODE, kind), mask=live)
        tl.store(target + HALF, _encode(second, ks, CODE, kind), mask=live)
        tl.store(target + lower, _encode(third, vs, CODE, kind), mask=live)
        tl.store(target + lower + HALF, _encode(fourth, vs, CODE, kind), mask=live)
    else:
        tl.store(target, first.to(kind), mask=live)
        tl.store(target + HALF, second.to(kind), mask=live)
        tl.store(target + lower, third.to(kind), mask=live)
        tl.store(target + lower + HALF, fourth.to(kind), mask=live)


def rope_and_write(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    tables: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    scales: torch.Tensor | None,
    heads: int,
    pdl: bool = False,
) -> None:
    """Rotate q of qkv in place, write rotated k and v to the page of each token.

    qkv: bf16 [tokens, (heads + 2 kv_heads) * head_dim]; positions, slots: int32 [tokens] (slot: row of `tables`);
    tables: int32 [slots, pages]; cos_sin: float32 [positions, head_dim] (cosines, then sines);
    cache: [blocks, 2, kv_heads, page, head_dim], bf16, float16, e4m3 or int8; scales: float16 [blocks, 2, kv_heads, page] for 8 bit.
    """
    _, _, kv_heads, page, dim = cache.shape
    code = LARGEST.get(cache.dtype, 0.0)
    extra = {"launch_pdl": True} if pdl else {}
    _rope_kv_kernel[(qkv.shape[0],)](
        qkv, positions, slots, tables, cos_sin, cache, cache if scales is None else scales,
        qkv.stride(0), tables.stride(0),
        HEADS=heads, KV_HEADS=kv_heads, DIM=dim, PAGE=page,
        HEADS_PAD=triton.next_power_of_2(heads), KV_PAD=triton.next_power_of_2(kv_heads), CODE=code, PDL=pdl, num_warps=4, **extra,
    )  # fmt: skip
