"""The CUDA backend without a GPU: Triton's interpreter computes, and what only a driver can do is done at once.

Streams and events mean nothing where every call returns when its work is done; a graph is its steps, taken again. The kernels in
CUDA C++ cannot be interpreted: everything takes the path of models that they do not fit. So this shows what the host decides
(who computes what when, on which pages, and what is believed of it), not what a GPU computes; for that there is tests/gpu.
"""

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

# Where there is a GPU, other tests compile.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton.runtime.interpreter import tl as triton_language

from .events import Event

KERNELS = (
    "sampling", "filtered_sampling", "guessing", "embed_norm", "kv_write", "steady_linear", "steady_attention", "paged_attention",
    "prefill_attention", "swiglu", "multi_lora", "w8a8",
)  # fmt: skip


class Stream:
    """There is one order of things."""

    def __init__(self, device: str) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass


def _dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, *_: object) -> TensorHandle:
    """The interpreter's own multiplies bf16 by its bits."""
    wide = [
        (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == triton_language.bfloat16 else x.data
        for x in (a, b)
    ]
    return TensorHandle(np.matmul(*wide, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def patch_kernels(patch: pytest.MonkeyPatch) -> None:
    """Products of bf16 are multiplied as such, and nothing waits for the kernel before."""
    patch.setattr(InterpreterBuilder, "create_dot", _dot)
    for name in KERNELS:
        module = importlib.import_module(f"altiplano_kernels.{name}.kernel")
        for wait in ("gdc_wait", "gdc_launch_dependents"):
            if hasattr(module, wait):
                patch.setattr(module, wait, lambda: None)


def patch_rounding(patch: pytest.MonkeyPatch) -> None:
    """float32 is rounded to bf16, float16 and e4m3 as a GPU does; the interpreter cuts the first off and loses carries of the last."""
    convert = interpreter._convert_float
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8e4nv": torch.float8_e4m3fn}

    def rounded(values: "np.ndarray[Any, Any]", given: object, wanted: object, mode: object) -> "np.ndarray[Any, Any]":
        if str(given) != "fp32" or str(wanted) not in kinds:
            found: np.ndarray[Any, Any] = convert(values, given, wanted, mode)
            return found
        wide, kind = torch.tensor(values.view(np.float32)), kinds[str(wanted)]
        if kind is torch.float8_e4m3fn:
            # The largest code is as far as its conversion goes.
            return wide.clamp(-448, 448).to(kind).view(torch.uint8).numpy()
        return wide.to(kind).view(torch.int16).numpy().view(np.uint16)

    patch.setattr(interpreter, "_convert_float", rounded)


@contextlib.contextmanager
def cuda_interpreted() -> Iterator[None]:
    """Inside, `CudaRunner(config, device="cpu")` works."""
    from altiplano.engine.cuda import graphs, model
    from altiplano.engine.cuda.few_rows import FewRows

    def replay(self: graphs.DecodeGraphs, bucket: int, times: int, kind: graphs.Kind = graphs.PLAIN) -> None:
        for _ in range(times):
            self._step(bucket, kind)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "Event": Event, "Stream": Stream, "stream": lambda _: contextlib.nullcontext(), "is_available": lambda: True,
            "get_device_capability": lambda _: (9, 0), "mem_get_info": lambda: (1 << 40, 1 << 40), "synchronize": lambda: None,
            "graph_pool_handle": lambda: None,
        }.items():  # fmt: skip
            patch.setattr(torch.cuda, name, value)
        multiply = torch.mm

        def mm(a: torch.Tensor, b: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
            return multiply(a, b) if out_dtype is None else multiply(a.to(out_dtype), b.to(out_dtype))

        patch.setattr(torch, "mm", mm)  # a CPU has none of another type
        patch.setattr(torch.Tensor, "pin_memory", lambda self: self)
        patch.setattr(graphs.DecodeGraphs, "ensure", lambda self, bucket, kind=graphs.PLAIN: None)
        patch.setattr(graphs.DecodeGraphs, "replay", replay)
        patch.setattr(FewRows, "supports", staticmethod(lambda config, page, bits=16: False))
        patch.setattr(model, "fits", lambda heads, kv_heads, head_dim, page: False)
        patch_kernels(patch)
        yield
