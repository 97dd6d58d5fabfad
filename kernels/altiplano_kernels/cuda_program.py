"""CUDA C++ kernels built at first use with NVRTC, which torch's wheels bring along: no compiler has to be installed.

A built kernel is kept in ~/.cache/altiplano/kernels (0700) under the hash of its source, options and compiler: machine code, no
pickle. Launches can be programmatic dependents (the kernel starts while the one before it ends) and can be captured in graphs.
"""

import contextlib
import ctypes
import functools
import glob
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch

CACHE = Path.home() / ".cache" / "altiplano" / "kernels"
_MAX_DYNAMIC_SHARED, _NON_PORTABLE_CLUSTER = 8, 14  # CUfunction_attribute
_PROGRAMMATIC = 6  # CUlaunchAttributeID


class KernelBuildError(RuntimeError):
    """The kernel cannot be built or loaded here; the message says what is missing."""


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Kernel:
    """One loaded `extern "C"` kernel that takes one struct by value."""

    def __init__(self, cubin: bytes, name: str) -> None:
        torch.cuda.current_stream()  # makes sure that torch's context is there
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver("cuModuleLoadData", ctypes.byref(self._module), cubin)
        driver("cuModuleGetFunction", ctypes.byref(self._function), self._module, name.encode())

    def allow(self, shared: int, large_cluster: bool = False) -> None:
        """Permit up to `shared` bytes of dynamic shared memory, and clusters of 16 blocks."""
        if shared > 0:
            driver("cuFuncSetAttribute", self._function, _MAX_DYNAMIC_SHARED, shared)
        if large_cluster:
            driver("cuFuncSetAttribute", self._function, _NON_PORTABLE_CLUSTER, 1)

    def launch(
        self, grid: tuple[int, int, int], threads: int, arguments: ctypes.Structure, shared: int = 0, pdl: bool = True
    ) -> None:
        """Launch on torch's current stream."""
        attribute = _Attribute(_PROGRAMMATIC, b"", 1)
        launch = _Launch(
            (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream,
            ctypes.pointer(attribute), int(pdl),
        )  # fmt: skip
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        driver("cuLaunchKernelEx", ctypes.byref(launch), self._function, pointers, None)


def struct(name: str, *fields: str) -> type[ctypes.Structure]:
    """A kernel's argument struct. Fields are "name" (pointer), "name:i" (int) or "name:f" (float)."""
    kinds: dict[str, type[ctypes.c_void_p] | type[ctypes.c_int] | type[ctypes.c_float]]
    kinds = {"": ctypes.c_void_p, "i": ctypes.c_int, "f": ctypes.c_float}
    split = [field.partition(":") for field in fields]
    return type(name, (ctypes.Structure,), {"_fields_": [(key, kinds[kind]) for key, _, kind in split]})


@functools.cache
def build(source: Path, name: str, options: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """The kernel `name` of a .cu file with `options` as macros, for the GPU `device`; built once per process, compiled once per machine.

    Raises:
        KernelBuildError: NVRTC is not there, the source does not compile, or the driver refuses the kernel.
    """
    major, minor = torch.cuda.get_device_capability(device)
    return Kernel(compile_source(source, dict(options), f"sm_{major}{minor}a" if major >= 9 else f"sm_{major}{minor}"), name)


def compile_source(source: Path, macros: Mapping[str, int], architecture: str) -> bytes:
    """Machine code for `architecture`; needs no GPU. Raises KernelBuildError."""
    nvrtc, text = _nvrtc(), _whole(source)
    version = (ctypes.c_int(), ctypes.c_int())
    nvrtc.nvrtcVersion(ctypes.byref(version[0]), ctypes.byref(version[1]))
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{key}={value}" for key, value in macros.items())]
    key = hashlib.sha256(repr((text, options, version[0].value, version[1].value)).encode()).hexdigest()
    kept = CACHE / f"{key}.cubin"
    if kept.exists():
        return kept.read_bytes()
    cubin = _compile(nvrtc, text, source.name, [option.encode() for option in options])
    _keep(kept, cubin)
    return cubin


def compile_ahead(jobs: Iterable[Callable[[], object]], go_on: Callable[[], bool]) -> None:
    """Compile one after another; `go_on` is asked before each. What does not compile is left to the launch that needs it, whose error somebody
    hears."""
    with contextlib.suppress(KernelBuildError):
        for job in jobs:
            if go_on():
                job()


def _whole(source: Path) -> bytes:
    """The text of a file with the files that it includes, which are named from its folder, in their places."""
    return re.sub(
        rb'^#include "(.+)"$',
        lambda line: (source.parent / line[1].decode()).read_bytes(),
        source.read_bytes(),
        flags=re.MULTILINE,
    )


def _compile(nvrtc: ctypes.CDLL, text: bytes, name: str, options: list[bytes]) -> bytes:
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)):
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise KernelBuildError(f"{name} does not compile with {b' '.join(options).decode()}:\n{log.value.decode()}")
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _keep(path: Path, cubin: bytes) -> None:
    """Into the cache in one move; a cache that cannot be written only costs the next start its time."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)
    except OSError:
        return


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    found = [
        path for root in sys.path for path in sorted(glob.glob(f"{root}/nvidia/**/libnvrtc.so.{major}", recursive=True)) if root
    ]
    for name in (*found, f"libnvrtc.so.{major}", "libnvrtc.so"):
        try:
            # NVRTC asks for its second library by name only, which finds nothing in a wheel unless it is loaded already.
            for second in glob.glob(f"{os.path.dirname(name)}/libnvrtc-builtins.so.*") if "/" in name else ():
                ctypes.CDLL(second)
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise KernelBuildError(
        f"libnvrtc.so.{major} was not found: it builds the engine's CUDA kernels; install nvidia-cuda-nvrtc, which torch's wheels for CUDA require"
    )


def driver(call: str, *arguments: object) -> None:
    """Call a function of CUDA's driver. Raises KernelBuildError with what the driver says."""
    library = _driver_library()
    code = getattr(library, call)(*arguments)
    if code:
        message = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(message))
        raise KernelBuildError(f"{call} failed: {(message.value or b'unknown error').decode()} ({code})")


@functools.cache
def _driver_library() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
