"""silu(gate) * up over rows of [gate, up]."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _swiglu_kernel(gate_up, out, wide, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    inside = k < wide
    gate = tl.load(gate_up + row * 2 * wide + k, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * wide + wide + k, mask=inside, other=0.0).to(tl.float32)
    # The activation is rounded before the product, as the reference does.
    act = (gate * tl.sigmoid(gate)).to(tl.bfloat16).to(tl.float32)
    tl.store(out + row * wide + k, (act * up).to(tl.bfloat16), mask=inside)


def swiglu(gate_up: torch.Tensor, out: torch.Tensor, pdl: bool = False) -> torch.Tensor:
    """gate_up: bf16 [rows, 2 * intermediate], gate first; out: bf16 [rows, intermediate], returned."""
    rows, wide = out.shape
    block = min(2048, triton.next_power_of_2(wide))
    extra = {"launch_pdl": True} if pdl else {}
    _swiglu_kernel[(triton.cdiv(wide, block), rows)](gate_up, out, wide, BLOCK=block, PDL=pdl, num_warps=4, **extra)
    return out
