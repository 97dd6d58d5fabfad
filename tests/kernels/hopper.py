"""Compile kernels to machine code for compute capability 9.0; needs no GPU, for Triton brings its own assembler. Prints one line a kernel.

Run as a program, for a process that interprets kernels cannot compile them.
"""

from collections.abc import Mapping

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from altiplano_kernels.embed_norm import kernel as norms
from altiplano_kernels.filtered_sampling import kernel as filtered
from altiplano_kernels.kv_write import kernel as write
from altiplano_kernels.multi_lora import kernel as lora
from altiplano_kernels.paged_attention import kernel as paged
from altiplano_kernels.prefill_attention import kernel as chunks
from altiplano_kernels.sampling import kernel as sampling
from altiplano_kernels.steady_attention import kernel as invariant
from altiplano_kernels.steady_linear import kernel as steady
from altiplano_kernels.swiglu import kernel as swiglu
from altiplano_kernels.w8a8 import kernel as w8a8

HOPPER = GPUTarget("cuda", 90, 32)
SHARED = 227 * 1024  # bytes that a block may have
SIZES = filtered.SIZES
VOCABULARY = {
    "PART": SIZES.part,
    "GROUP": SIZES.group,
    "LIST": SIZES.listed,
    "MEMBERS": SIZES.members,
    "PARTS": 16,
    "DRAWN": 16,
}
SETTINGS, DRAWN = "*i32 *fp32 *i32 *fp32 *fp32", "*fp32 *i32"
FILTERS = [  # kernel, types behind the logits, warps
    (filtered._survey_kernel, f"{SETTINGS} {DRAWN} *fp32 *fp32 i32 i32 i32", 8),
    (filtered._narrow_kernel, f"{SETTINGS} *i64 *i32 {DRAWN} *fp32 *i32 *fp32 *fp32 *i32 i32 i32 i32", 16),
    (filtered._weigh_kernel, "*i32 *fp32 *fp32 *fp32 *i32 *fp32 *fp32 *i32 *fp32 *i32 i32 i32", 8),
    (filtered._finish_kernel, f"{SETTINGS} *i64 *i32 {DRAWN} *fp32 *fp32 *i32 *i32 *i32 *fp32 *i32 i32 i32 i32 i32", 16),
]


def compile_kernel(name: str, kernel: triton.JITFunction, types: str, constants: Mapping[str, object], warps: int) -> None:
    """`types`: of the arguments that are not constants, in order. Pointers and integers other than counts are multiples of 16."""
    arguments = [argument for argument in kernel.arg_names if argument not in constants]
    given = dict(zip(arguments, types.split(), strict=True))
    signature = {argument: given.get(argument, "constexpr") for argument in kernel.arg_names}
    place = {argument: (at,) for at, argument in enumerate(kernel.arg_names)}
    aligned = {
        place[a]: [["tt.divisibility", 16]] for a in arguments if given[a].startswith("*") or a.startswith(("stride", "vocab"))
    }
    source = ASTSource(kernel, signature, {place[a]: value for a, value in constants.items()}, aligned)
    built = triton.compile(source, target=HOPPER, options={"num_warps": warps})
    tensor_cores = "wgmma" if "wgmma" in built.asm["ptx"] else "mma" if "mma.sync" in built.asm["ptx"] else "none"
    assert built.asm["cubin"] and built.metadata.shared <= SHARED, name
    print(name, tensor_cores, flush=True)


def loras() -> None:
    for name, shape, columns in (("decode", lora.DECODE, 256), ("prefill", lora.PREFILL, 128)):
        sizes = {
            "WIDE": 192,
            "RANK": 64,
            "ROWS": shape.rows,
            "HEADER": lora.HEADER,
            "INTERPRETED": False,
            "PDL": name == "decode",
        }
        shrink = {"K": 2048, "COLUMNS": 16, "SPAN": shape.span, "DEPTH": shape.depth, **sizes}
        compile_kernel(f"lora-shrink-{name}", lora._shrink_kernel, "*bf16 *bf16 *fp32 *i32 i32 i32", shrink, 4)
        types = "*fp32 *bf16 *bf16 *bf16 *i32 i32 i32 i32 i32"
        expand = {"N": 3072, "COLUMNS": columns, "SPLITS": -(-2048 // shape.span), **sizes}
        compile_kernel(f"lora-expand-{name}", lora._expand_kernel, types, expand, columns // 32)


def eight_bits() -> None:
    for name, kind, largest in (("fp8", "*fp8e4nv", 448.0), ("int8", "*i8", 127.0)):
        options = {"LARGEST": largest, "WHOLE": name == "int8", "INTERPRETED": False, "PDL": True}
        types = {
            w8a8._quantize_kernel: f"*bf16 {kind} *fp32 i32 i32",
            w8a8._swiglu_kernel: f"*bf16 {kind} *fp32 i32",
        }
        for kernel, given in types.items():
            compile_kernel(f"w8a8{kernel.__name__}-{name}", kernel, given, {"PAD": 2048, **options}, 8)
        for x, splits in (("*bf16", 1), ("*fp32", 4)):
            given = f"{x} *bf16 *bf16 {kind} *fp32 fp32 i32 i32"
            compile_kernel(
                f"w8a8_add_norm-{name}-{splits}", w8a8._add_norm_kernel, given, {"PAD": 2048, "SPLITS": splits, **options}, 8
            )
        for tiling in (w8a8.FEW, w8a8.NARROW, w8a8.SOME, w8a8.MANY, *([w8a8.LARGE] if name == "fp8" else [])):
            for splits, out in ((1, "*bf16"), (4, "*fp32")):
                sizes = {
                    "K": 2048,
                    "ROWS": tiling.rows,
                    "COLUMNS": tiling.columns,
                    "DEPTH": tiling.depth,
                    "STAGES": tiling.stages,
                }
                rest = {"SPLITS": splits, "SWAPPED": tiling.swapped, "WHOLE": name == "int8", "INTERPRETED": False, "PDL": True}
                given = f"{kind} *fp32 {kind} *fp32 {out} i32 i32 i32"
                label = f"w8a8-linear-{name}-{tiling.rows}x{tiling.columns}-{splits}"
                compile_kernel(label, w8a8._linear_kernel, given, {**sizes, **rest}, tiling.warps)


def draws() -> None:
    for kind in ("*bf16", "*fp32"):
        for early in (False, True):  # starting while the kernel before ends
            for kernel, types, warps in FILTERS:
                name, given = f"{kernel.__name__[1:-7]}-{kind[1:]}-{early}", {"WIDE": kind == "*fp32", "PDL": early, **VOCABULARY}
                constants = {argument: value for argument, value in given.items() if argument in kernel.arg_names}
                compile_kernel(f"draw-{name}", kernel, f"{kind} {types}", constants, warps)
            types = f"{kind} *i32 *fp32 *i64 *i32 *fp32 *i32 i32 i32 i32"
            constants = {"CHUNK": sampling.CHUNK, "BLOCK": sampling.BLOCK, "PDL": early}
            compile_kernel(f"draw-{kind[1:]}-{early}", sampling._best_kernel, types, constants, 4)


CACHES = {"bf16": ("*bf16", "*bf16", 0.0), "fp8": ("*fp8e4nv", "*fp16", 448.0), "int8": ("*i8", "*fp16", 127.0)}
HEADS = {"1b": (32, 64), "3b": (24, 128)}  # and their dimension; 8 KV heads


INVARIANT = (("1b", "bf16"), ("3b", "fp8"))


def invariants(name: str, group: int, pages: str, common: Mapping[str, object]) -> None:
    types = f"*bf16 *bf16 {pages} *i32 *i32 *i32 *i32 *fp32 *fp32 *i32 i32 i32 i32 i32 fp32"
    sizes = {"TILE": invariant.TILE, "PART": invariant.PART, "STAGES": invariant.STAGES, "SUBTILES": 1, **common}
    chunk = {"ROWS": invariant.ROWS, "HEADS": 1, "SHARED": False, "CHUNKS": True, "PDL": False, **sizes}
    compile_kernel(f"steady-{name}", invariant._steady_attention_kernel, types, chunk, invariant.WARPS)
    row = {"ROWS": invariant.FEW_ROWS, "HEADS": group, "SHARED": True, "CHUNKS": False, "PDL": True, **sizes}
    compile_kernel(f"decode-steady-{name}", invariant._steady_attention_kernel, types, row, invariant.FEW_WARPS)


def attention() -> None:
    for model, (heads, dim) in HEADS.items():
        for name, (cache, scales, code) in CACHES.items():
            sizes: dict[str, object] = {"KV_HEADS": 8, "DIM": dim, "PAGE": 32}
            common = {"GROUP": heads // 8, "SCALED": code > 0, **sizes}
            for tile, stages, warps, splits in ((32, 4, 1, 8), (64, 3, 2, 1)):
                constants = {"SPLITS": splits, "TILE": tile, "STAGES": stages, "ROWS": paged.GROUP_ROWS, "PDL": True, **common}
                types = f"*bf16 *bf16 {cache} {scales} *i32 *i32 *i32 *fp32 *fp32 *i32 i32 i32 i32 fp32"
                compile_kernel(f"decode-{model}-{name}-{splits}", paged._decode_kernel, types, constants, warps)
            constants = {"ROWS": chunks.QUERY_TILE, "TILE": 64, "STAGES": 3, **common}
            types = f"*bf16 *bf16 {cache} {scales} *i32 *i32 i32 i32 i32 fp32"
            compile_kernel(f"prefill-{model}-{name}", chunks._prefill_kernel, types, constants, 4)
            if (model, name) in INVARIANT:
                invariants(f"{model}-{name}", heads // 8, f"{cache} {scales}", common)
            constants = {"HEADS": heads, "HEADS_PAD": 32, "KV_PAD": 8, "CODE": code, "PDL": True, **sizes}
            types = f"*bf16 *i32 *i32 *i32 *fp32 {cache} {scales} i32 i32"
            compile_kernel(f"write-{model}-{name}", write._rope_kv_kernel, types, constants, 4)


def rows() -> None:
    for hidden, pad, pdl in ((2048, 2048, 2), (3072, 4096, 1)):  # the next kernel starts before the wait, and after it
        sizes = {"HIDDEN": hidden, "PAD": pad, "PDL": pdl}
        types = "*i32 *i32 *i32 *bf16 *bf16 *bf16 *bf16 *i32 fp32"
        compile_kernel(f"embed-{hidden}", norms._embed_kernel, types, sizes, 8)
        compile_kernel(f"add-{hidden}", norms._add_kernel, "*bf16 *bf16 *bf16 *bf16 fp32", sizes, 8)
        parts = {"SPLITS": 4, **sizes}
        compile_kernel(f"add-parts-{hidden}", norms._add_parts_kernel, "*fp32 *bf16 *bf16 *bf16 fp32 i32", parts, 8)
    compile_kernel("swiglu", swiglu._swiglu_kernel, "*bf16 *bf16 i32", {"BLOCK": 2048, "PDL": True}, 4)
    tile = {name: getattr(steady, name) for name in ("ROWS", "COLUMNS", "DEPTH", "STAGES")}
    compile_kernel("steady", steady._steady_kernel, "*bf16 *bf16 *bf16 i32 i32 i32 i32", {"K": 2048, **tile}, steady.WARPS)


if __name__ == "__main__":
    attention()
    rows()
    loras()
    eight_bits()
    draws()
