"""Launches of begin.cu and linear.cu. All kernels are programmatic dependents: each starts while the one before it ends."""

from pathlib import Path
from typing import NamedTuple

import torch

from altiplano_kernels.cuda_program import build, struct
from altiplano_kernels.few_rows.quantized import Packed

LINEAR, BEGIN = (Path(__file__).with_name(name) for name in ("linear.cu", "begin.cu"))
MOST_ROWS = 16
PLAIN, RESIDUAL, QKV, SWIGLU, DRAW, LOGITS = range(6)
# Bytes that a block may have, less its static variables: 33 KiB at 16 warps and more than eight rows, else less.
SHARED = (227 - 33) * 1024
CHUNK = {16: 64, 8: 128, 6: 128, 4: 128}  # k of one warp's turn, by bits of a weight
Weight = torch.Tensor | Packed
_Begin = struct(
    "Begin", "slots", "tokens", "positions_of", "tables", "embedding", "cos_sin", "residual", "positions", "lines", "rope",
    "stride_table:i",
)  # fmt: skip
_Linear = struct(
    "Linear", "w", "scales", "x", "gamma", "out", "positions", "lines", "rope", "cache", "slots", "temperatures", "seeds", "steps", "values",
    "ids", "turn", "eps:f", "rows:i", "tiles:i", "stride_x:i", "stride_out:i", "limit:i",
)  # fmt: skip


class Plan(NamedTuple):
    """Warps of a block; chunks per warp on their way; most blocks (0: one per tile); whether blocks take tiles in turns, not equal shares;
    KiB of shared memory that a block takes at least, for what is left to the L1 cache and to other blocks is worth more at some sizes
    (measured, not understood); whether dependents may start at once; whether rows that are not normed go through shared memory; whether
    a block of one tile turns its codes into bf16 before it waits."""

    warps: int
    depth: int
    blocks: int = 0
    turns: bool = False
    room: int = 0
    early: bool = True
    staged: bool = False
    ahead: bool = False


class Step:
    """What `begin` gathers for the rows of a step, and the scratch of its kernels; static, so that graphs can hold it."""

    def __init__(self, hidden: int, query: int, intermediate: int, head_dim: int, blocks: int, device: str) -> None:
        def bf16(width: int) -> torch.Tensor:
            return torch.empty(MOST_ROWS, width, dtype=torch.bfloat16, device=device)

        self.residual, self.query, self.mixed, self.wide = bf16(hidden), bf16(query), bf16(query), bf16(intermediate)
        self.positions = torch.empty(MOST_ROWS, dtype=torch.int32, device=device)
        self.lines = torch.empty(MOST_ROWS, dtype=torch.int64, device=device)
        self.rope = torch.empty(MOST_ROWS, head_dim, dtype=torch.float32, device=device)
        self.values = torch.empty(MOST_ROWS * blocks, dtype=torch.float32, device=device)
        self.ids = torch.empty(MOST_ROWS * blocks, dtype=torch.int32, device=device)
        self.turn = torch.zeros(1, dtype=torch.int32, device=device)  # zero between launches: one at a time may have it


# Measured on an H200 by benchmarks/engine/tune_few_rows.py: (mode, n, k, bits) to plans for one row and for two to eight.
TUNED = {
    (QKV, 3072, 2048, 16): (Plan(4, 4, room=72), Plan(8, 4)),
    (RESIDUAL, 2048, 2048, 16): (Plan(8, 4, room=72), Plan(8, 4, room=72)),
    (SWIGLU, 16384, 2048, 16): (Plan(8, 4, 528, room=44), Plan(8, 4, 264, room=72)),
    (RESIDUAL, 2048, 8192, 16): (Plan(16, 2), Plan(16, 2)),
    (DRAW, 128256, 2048, 16): (Plan(8, 2, 528, turns=True, room=44), Plan(8, 2, 396, turns=True)),
    (QKV, 5120, 3072, 16): (Plan(4, 4), Plan(4, 4)),
    (RESIDUAL, 3072, 3072, 16): (Plan(12, 2), Plan(12, 2)),
    (SWIGLU, 16384, 3072, 16): (Plan(16, 3, 528, room=44), Plan(8, 6, 264, room=72)),
    (RESIDUAL, 3072, 8192, 16): (Plan(16, 1), Plan(8, 4, room=72)),
    (DRAW, 128256, 3072, 16): (Plan(12, 2, 132, turns=True, room=72), Plan(12, 2, 132, turns=True)),
    (SWIGLU, 16384, 2048, 8): (Plan(16, 1, 264), Plan(8, 2, 264)),
    (RESIDUAL, 2048, 8192, 8): (Plan(16, 1), Plan(8, 4)),
    (RESIDUAL, 2048, 2048, 8): (Plan(8, 2, ahead=True), Plan(8, 2)),
    (DRAW, 128256, 2048, 8): (Plan(8, 2, 264, turns=True, room=44), Plan(8, 2, 264)),
    (QKV, 3072, 2048, 4): (Plan(8, 2, room=72), Plan(8, 2, ahead=True)),
    (RESIDUAL, 2048, 2048, 4): (Plan(8, 2, room=72, staged=True, ahead=True), Plan(16, 1, room=44, ahead=True)),
    (SWIGLU, 16384, 2048, 4): (Plan(16, 1, 264, room=72), Plan(8, 2, 264, room=72)),
    (RESIDUAL, 2048, 8192, 4): (Plan(16, 2, room=72), Plan(16, 2, room=44)),
    (DRAW, 128256, 2048, 6): (Plan(8, 2, 264, turns=True, room=72), Plan(16, 1, 264, turns=True, room=44)),
    (QKV, 5120, 3072, 8): (Plan(4, 3), Plan(4, 3, room=44)),
    (RESIDUAL, 3072, 3072, 8): (Plan(4, 6, room=44, staged=True, ahead=True), Plan(8, 3)),
    (SWIGLU, 16384, 3072, 8): (Plan(6, 4, 264, turns=True, room=44), Plan(12, 1, 264, room=44)),
    (RESIDUAL, 3072, 8192, 8): (Plan(16, 1, staged=True), Plan(8, 2)),
    (DRAW, 128256, 3072, 8): (Plan(12, 2, 132, turns=True, room=72), Plan(8, 3, 264)),
    (QKV, 5120, 3072, 4): (Plan(4, 6, room=44), Plan(4, 6)),
    (RESIDUAL, 3072, 3072, 4): (Plan(4, 6, room=44, staged=True, ahead=True), Plan(6, 4)),
    (SWIGLU, 16384, 3072, 4): (Plan(4, 2, 528, turns=True), Plan(6, 4, 264, room=44)),
    (RESIDUAL, 3072, 8192, 4): (Plan(8, 2, room=72, staged=True), Plan(8, 2, room=72)),
    (DRAW, 128256, 3072, 6): (Plan(4, 6, 396, turns=True), Plan(8, 3, 264, turns=True, room=44)),
}


def divides(k: int, bits: int = 16) -> bool:
    """Whether sums over k can be split among the warps of a block."""
    return any(k % (warps * CHUNK[bits]) == 0 for warps in (4, 6))


def most_rows(hidden: int) -> int:
    """Rows whose normed values fit into a block's shared memory, at most MOST_ROWS: 16 up to a hidden size of 6,176, 12 at 8,192."""
    return min(MOST_ROWS, SHARED // _row_bytes(hidden))


def _row_bytes(k: int) -> int:
    return (k + 32) * 2  # XPAD of linear.cu


def choose_plan(mode: int, n: int, k: int, rows: int, bits: int = 16) -> Plan:
    """The plan that was measured to be best for `rows` of x and w: [n, k], or one that divides k.

    Raises:
        ValueError: k is a multiple of neither 256 nor 384 (512 nor 768 with fewer bits).
    """
    mode = DRAW if mode == LOGITS else mode  # whose sums they have, to the bit
    if (mode, n, k, bits) in TUNED and rows <= 8:
        return TUNED[mode, n, k, bits][rows > 1]
    if not divides(k, bits):
        unit = 2 * CHUNK[bits]
        raise ValueError(
            f"the kernels for few rows with {bits} bits need sums over a multiple of {2 * unit} or {3 * unit}, not {k}"
        )
    chunks = k // CHUNK[bits]
    warps = next(warps for warps in (8, 6, 4) if chunks % warps == 0)
    most = 4 if rows <= 8 or mode in (QKV, SWIGLU, DRAW) else 2
    depth = next(depth for depth in range(most, 0, -1) if chunks // warps % depth == 0)
    # Blocks of a wide product keep several tiles, so that rows are normalised less often.
    wide = mode == DRAW or (mode == SWIGLU and rows > 1)
    return Plan(warps, depth, 264 if wide else 0)


def steady_plan(mode: int, n: int, k: int, rows: int, bits: int = 16) -> Plan:
    """A plan whose sums for a row are the same, to the bit, for any number of rows: the order of additions depends on the warps alone."""
    plan = choose_plan(mode, n, k, 8, bits)
    if rows <= 8:
        return plan
    plan = plan._replace(staged=False, ahead=False)  # they change no sum, and twice the rows and columns may not fit
    if mode != RESIDUAL:
        return plan
    # Twice the columns: what is on its way must fit into the registers.
    steps = k // (plan.warps * CHUNK[bits])
    return plan._replace(depth=next(depth for depth in (2, 1) if steps % depth == 0))


def begin(
    slots: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    tables: torch.Tensor,
    embedding: torch.Tensor,
    cos_sin: torch.Tensor,
    cache: torch.Tensor,
    step: Step,
) -> None:
    """Fill `step` for the rows whose slots are in `slots`: int32 [rows]; the others as in `embed_rows` and `rope_and_write`."""
    _, _, kv_heads, page, dim = cache.shape
    options = (("HIDDEN", embedding.shape[1]), ("HEAD_DIM", dim), ("KV_HEADS", kv_heads), ("PAGE", page))
    kernel = build(BEGIN, "few_rows_begin", options, slots.device.index)
    arguments = _Begin(
        slots.data_ptr(), tokens.data_ptr(), positions.data_ptr(), tables.data_ptr(), embedding.data_ptr(), cos_sin.data_ptr(),
        step.residual.data_ptr(), step.positions.data_ptr(), step.lines.data_ptr(), step.rope.data_ptr(), tables.stride(0),
    )  # fmt: skip
    kernel.launch((slots.shape[0], 1, 1), 256, arguments)


def linear(
    x: torch.Tensor,
    w: Weight,
    out: torch.Tensor,
    gamma: torch.Tensor | None = None,
    eps: float = 0.0,
    plan: Plan | None = None,
) -> None:
    """out = x @ w.T, of rms_norm(x) * gamma where gamma is given. x: bf16 [rows, k]; w: bf16 [n, k], n a multiple of 16; out: bf16 [rows, n]."""
    _launch(PLAIN, x, w, plan, w.shape[0] // 16, gamma, eps=eps, out=out, stride_out=out.stride(0))


def add_linear(x: torch.Tensor, w: Weight, residual: torch.Tensor, plan: Plan | None = None) -> None:
    """residual += x @ w.T. x: bf16 [rows, k]; w: bf16 [n, k], n a multiple of 16; residual: bf16 [rows, n]."""
    _launch(RESIDUAL, x, w, plan, w.shape[0] // 16, out=residual, stride_out=residual.stride(0))


def norm_qkv(
    x: torch.Tensor,
    w: Weight,
    gamma: torch.Tensor,
    eps: float,
    step: Step,
    cache: torch.Tensor,
    heads: int,
    plan: Plan | None = None,
    first: bool = True,
) -> None:
    """Rotated queries of rms_norm(x) * gamma into step.query; rotated keys, and values, into their pages.

    The kernel after it may read what came from before the step's `first` layer without waiting.

    x: bf16 [rows, k]; w: bf16 [(heads + 2 kv_heads) * head_dim, k]; cache: bf16 [blocks, 2, kv_heads, page, head_dim].
    """
    _, _, kv_heads, page, dim = cache.shape
    plan = (plan or choose_plan(QKV, w.shape[0], x.shape[1], x.shape[0], w.bits if isinstance(w, Packed) else 16))._replace(
        early=not first
    )
    _launch(
        QKV, x, w, plan, w.shape[0] // 16, gamma, (heads, kv_heads, dim, page), eps=eps, out=step.query,
        stride_out=step.query.stride(0), lines=step.lines, rope=step.rope, cache=cache,
    )  # fmt: skip


def norm_swiglu(
    x: torch.Tensor,
    gate_up: Weight,
    gamma: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    plan: Plan | None = None,
    turn: torch.Tensor | None = None,
) -> None:
    """out = silu(y @ gate.T) * (y @ up.T) of y = rms_norm(x) * gamma. gate_up: bf16 [2 n, k], gate first; out: bf16 [rows, n];
    turn: a step's, without which all blocks have equal shares."""
    half = gate_up.shape[0] // 2
    _launch(SWIGLU, x, gate_up, plan, half // 8, gamma, turn=turn, eps=eps, out=out, stride_out=out.stride(0), limit=half)


def norm_draw(
    x: torch.Tensor,
    head: Weight,
    gamma: torch.Tensor,
    eps: float,
    slots: torch.Tensor,
    temperatures: torch.Tensor,
    seeds: torch.Tensor,
    steps: torch.Tensor,
    step: Step,
    plan: Plan | None = None,
) -> int:
    """Best token and value per row and block into step.ids and step.values, [rows, blocks] each; returns blocks.

    Logits stay in registers; the noise of rows with a temperature is that of `sampling.kernel.draw_and_advance`.
    """
    return _launch(
        DRAW, x, head, plan, head.shape[0] // 16, gamma, turn=step.turn, eps=eps, slots=slots, temperatures=temperatures, seeds=seeds, steps=steps,
        values=step.values, ids=step.ids,
    )  # fmt: skip


def norm_logits(
    x: torch.Tensor,
    head: Weight,
    gamma: torch.Tensor,
    eps: float,
    out: torch.Tensor,
    plan: Plan | None = None,
    turn: torch.Tensor | None = None,
) -> None:
    """out = y @ head.T of y = rms_norm(x) * gamma: float32 [rows, n], to the bit what `norm_draw` draws from under a plan of as many warps.
    turn: as for `norm_swiglu`."""
    _launch(LOGITS, x, head, plan, head.shape[0] // 16, gamma, turn=turn, eps=eps, out=out, stride_out=out.stride(0))


def _launch(
    mode: int,
    x: torch.Tensor,
    w: Weight,
    plan: Plan | None,
    tiles: int,
    gamma: torch.Tensor | None = None,
    shape: tuple[int, int, int, int] = (0, 0, 16, 1),
    turn: torch.Tensor | None = None,
    **values: object,
) -> int:
    rows, k = x.shape
    heads, kv_heads, dim, page = shape
    bits = w.bits if isinstance(w, Packed) else 16
    plan = plan or choose_plan(mode, w.shape[0], k, rows, bits)
    norm = gamma is not None
    columns = 1 if rows <= 8 else 2
    turns = plan.turns and norm and turn is not None
    blocks = min(tiles, plan.blocks or tiles)
    ahead = plan.ahead and blocks == tiles
    options = (
        ("MODE", mode), ("NORM", int(norm)), ("BITS", bits), ("K", k), ("WARPS", plan.warps), ("DEPTH", plan.depth), ("NT", columns),
        ("EARLY", int(plan.early)), ("TURNS", int(turns)), ("STAGED", int(plan.staged)), ("AHEAD", int(ahead)), ("HEAD_DIM", dim),
        ("HEADS", heads), ("KV_HEADS", kv_heads), ("PAGE", page),
    )  # fmt: skip
    kernel = build(LINEAR, "few_rows_linear", options, x.device.index)
    shared = max(rows * _row_bytes(k) if norm or plan.staged else 0, plan.room * 1024)
    kernel.allow(shared)
    given = {name: value.data_ptr() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    if gamma is not None:
        given["gamma"] = gamma.data_ptr()
    if turns and turn is not None:
        given["turn"] = turn.data_ptr()
    codes, scales = (w.codes.data_ptr(), w.scales.data_ptr()) if isinstance(w, Packed) else (w.data_ptr(), 0)
    arguments = _Linear(w=codes, scales=scales, x=x.data_ptr(), rows=rows, tiles=tiles, stride_x=x.stride(0), **given)
    kernel.launch((blocks, 1, 1), plan.warps * 32, arguments, shared)
    return blocks


def unpack(w: Packed, out: torch.Tensor) -> torch.Tensor:
    """w as bf16 [n, k] in `out` (any tensor of at least that size), for products of more rows; returns the view."""
    (n, k), bits = w.shape, w.bits
    mode = QKV if w.head_dim > 16 else SWIGLU if w.halves else PLAIN
    warps = next(warps for warps in (8, 6, 4) if k % (warps * CHUNK[bits]) == 0)
    options = (
        ("MODE", mode), ("NORM", 0), ("BITS", bits), ("K", k), ("WARPS", warps), ("DEPTH", 1), ("NT", 1), ("EARLY", 0), ("TURNS", 0),
        ("STAGED", 0), ("AHEAD", 0), ("HEAD_DIM", w.head_dim), ("HEADS", 0), ("KV_HEADS", 0), ("PAGE", 1),
    )  # fmt: skip
    found = out.view(-1)[: n * k].view(n, k)
    arguments = _Linear(w=w.codes.data_ptr(), scales=w.scales.data_ptr(), out=found.data_ptr(), limit=n // 2)
    build(LINEAR, "few_rows_unpack", options, out.device.index).launch((n // 16, 1, 1), warps * 32, arguments, pdl=False)
    return found
