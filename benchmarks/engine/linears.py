"""Tilings of the few-row products against cuBLAS: microseconds, weights from device memory.

usage: PYTHONPATH=platform:kernels python benchmarks/engine/linears.py MODEL ROWS [ROWS …]
"""

import sys

import torch
from kernels import BUFFERS, SHAPES, graph_ms, say

from altiplano_kernels.linear.kernel import Tiling, linear_parts, swiglu_linear

PLAIN = {
    64: ((64, 64, 128, 4, 4, 4), (64, 64, 128, 2, 4, 4), (64, 32, 128, 2, 4, 4), (64, 32, 256, 2, 3, 4), (64, 128, 64, 8, 4, 4)),
    256: ((128, 128, 64, 4, 4, 8), (128, 128, 64, 2, 4, 8), (128, 64, 128, 2, 3, 4), (128, 64, 64, 4, 4, 4)),
}
GATED = {
    64: ((64, 64, 64, 1, 4, 4), (64, 32, 128, 1, 4, 4), (64, 64, 128, 1, 3, 8), (64, 32, 128, 1, 3, 4)),
    256: ((128, 128, 64, 1, 3, 8), (128, 64, 64, 1, 4, 8), (128, 64, 64, 1, 4, 4)),
}


def main(model: str, rows: list[int]) -> None:
    hidden, wide, heads, kv_heads, dim = SHAPES[model]
    shapes = {
        "qkv": ((heads + 2 * kv_heads) * dim, hidden),
        "o": (hidden, heads * dim),
        "down": (hidden, wide),
        "gate_up": (2 * wide, hidden),
    }
    for name, (n, k) in shapes.items():
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(BUFFERS)]
        for m in rows:
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            found = [(round(graph_ms(lambda i, x=x, w=weights: x @ w[i].T) * 1e3, 2), ("cublas",))]
            for shape in (GATED if name == "gate_up" else PLAIN)[m]:
                run = swiglu_linear if name == "gate_up" else linear_parts
                try:
                    ms = graph_ms(lambda i, x=x, w=weights, run=run, tiling=Tiling(*shape): run(x, w[i], tiling, pdl=True))
                    found.append((round(ms * 1e3, 2), shape))
                except Exception as error:
                    say(failed=repr(error)[:80], shape=shape)
            if name != "gate_up":
                right = x.double() @ weights[0].double().T
                worst = (linear_parts(x, weights[0], Tiling(*PLAIN[m][0])).sum(0).double() - right).norm() / right.norm()
                assert worst < 1e-3, float(worst)
            say(name=name, m=m, found=sorted(found))


if __name__ == "__main__":
    main(sys.argv[1], [int(m) for m in sys.argv[2:]])
