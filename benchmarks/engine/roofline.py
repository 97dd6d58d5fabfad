"""The committed results against the card's two limits, as a picture and a table: docs/images/roofline.svg and docs/benchmarks.md.

python benchmarks/engine/roofline.py          # rewrite both
python benchmarks/engine/roofline.py --check  # exit 1 when they differ from benchmarks/results/engine.json

The floor of a step is the larger of two times: its bytes (weights once, keys and values of every request) at the speed of a copy,
and its multiply-adds at the speed of large bf16 products, both measured on the same card. Activations are left out: at these
shapes they stay in the L2 cache. W3 has no floor: its requests come and go.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS, PICTURE, PAGE = (
    ROOT / name for name in ("benchmarks/results/engine.json", "docs/images/roofline.svg", "docs/benchmarks.md")
)

COPY_BYTES_PER_S = 4.22e12  # one H200, a device copy: read and written bytes
FLOP_PER_S = 747e12  # one H200, bf16 product of 8192³
GROUP = 128  # weights that share a scale of two bytes

# Requests and mean context of a decode step; prompts of W4.
DECODES = {"W1": (1, 384), "W2-B8": (8, 640), "W2-B64": (64, 640), "W2-B256": (256, 640), "W2-B256-2048": (256, 2032)}
PROMPTS, PROMPT_TOKENS, STEP_TOKENS = 128, 1024, 16384


@dataclass(frozen=True)
class Shape:
    """The sizes that bytes and multiply-adds follow from."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int = 8192
    vocab: int = 128256

    @property
    def layer_weights(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.hidden * self.vocab

    def attention_flop(self, context: float) -> float:
        """Of one query token over all layers: scores and values."""
        return 4.0 * self.layers * self.heads * self.head_dim * context

    def kv_bytes(self, variant: str) -> float:
        """Keys and values of one token; 8-bit ones have a scale of two bytes per token and head."""
        each = 2 * self.head_dim if not variant.startswith("kv-") else self.head_dim + 2
        return 2.0 * self.layers * self.kv_heads * each


SHAPES = {"1b": Shape(2048, 16, 32, 8, 64), "3b": Shape(3072, 28, 24, 8, 128)}


@dataclass(frozen=True)
class Point:
    """One result: FLOP and bytes of a step, and the seconds that it took."""

    label: str
    model: str
    variant: str
    system: str
    flop: float
    bytes: float
    seconds: float

    @property
    def floor(self) -> float:
        return max(self.bytes / COPY_BYTES_PER_S, self.flop / FLOP_PER_S)

    @property
    def percent(self) -> float:
        return 100 * self.floor / self.seconds


def weight_bytes(shape: Shape, variant: str) -> float:
    """Of one pass over the weights. Weight-only: the head has 8 bits, or 6 where layers have 4; W8A8: it stays bf16, and channels'
    scales are left out."""
    if variant.startswith("w8a8-"):
        return 1.0 * shape.layer_weights + 2.0 * shape.head_weights
    bits = {"w-int8": (8, 8), "w-int4": (4, 6)}.get(variant)
    if bits is None:
        return 2.0 * (shape.layer_weights + shape.head_weights)
    layers, head = bits
    scales = 2 * (shape.layer_weights + shape.head_weights) / GROUP
    return (shape.layer_weights * layers + shape.head_weights * head) / 8 + scales


def point(record: dict[str, Any]) -> Point | None:
    """The step that a record is about; None where no floor is known: that of steps with adapters would leave out the adapters' bytes."""
    shape, variant, workload = SHAPES[record["model"]], record["variant"], record["workload"]
    if variant.startswith("lora"):
        return None
    names = (workload, record["model"], variant, record["system"])
    if workload in DECODES:
        batch, context = DECODES[workload]
        flop = batch * (2.0 * (shape.layer_weights + shape.head_weights) + shape.attention_flop(context))
        moved = weight_bytes(shape, variant) + batch * context * shape.kv_bytes(variant)
        return Point(*names, flop, moved, record["value"] / 1e3)
    if workload == "W4" and not variant.startswith("w8a8-"):  # the speed of large 8-bit products was not measured
        tokens = PROMPTS * PROMPT_TOKENS
        flop = tokens * (2.0 * shape.layer_weights + shape.attention_flop(PROMPT_TOKENS / 2)) + PROMPTS * 2.0 * shape.head_weights
        moved = tokens / STEP_TOKENS * weight_bytes(shape, variant) + tokens * shape.kv_bytes(variant)
        return Point(*names, flop, moved, tokens / record["value"])
    return None


def table(points: Sequence[Point]) -> str:
    """Percent of the floor's speed, and which of the two limits it is."""
    lines = [
        "| workload | model | variant | system | floor | measured | of the limit | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        limit = "bytes" if p.bytes / COPY_BYTES_PER_S > p.flop / FLOP_PER_S else "multiply-adds"
        cells = (
            p.label,
            p.model,
            p.variant,
            p.system,
            f"{p.floor * 1e3:.3g} ms",
            f"{p.seconds * 1e3:.3g} ms",
            f"{p.percent:.0f} %",
            limit,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 440, 70, 150, 20, 50
X_RANGE, Y_RANGE = (0.7, 30000.0), (1.5, 1500.0)  # FLOP per byte; TFLOP/s
COLOURS = ("#0b6e8a", "#b4531b", "#4c7a2c", "#7a4fa3", "#9a6b00", "#a8325f", "#2f4b7c", "#7f7f3b", "#5b3a29", "#d1495b")


def picture(points: Sequence[Point]) -> str:
    """Both axes logarithmic; a mark per result, round for 1B and square for 3B, a colour per system and variant."""
    kinds = list(dict.fromkeys((p.system, p.variant) for p in points))
    colour = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    ridge = FLOP_PER_S / COPY_BYTES_PER_S
    roof = [(X_RANGE[0], X_RANGE[0] * COPY_BYTES_PER_S / 1e12), (ridge, FLOP_PER_S / 1e12), (X_RANGE[1], FLOP_PER_S / 1e12)]
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif" font-size="12">',
        "<title>Steps of the engine on one H200, against the limits of the card</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fbfaf7"/>',
    ]
    for value in (1, 10, 100, 1000, 10000):
        x = _x(value)
        parts.append(f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{bottom}" stroke="#d9d7cf"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" text-anchor="middle" fill="#5f696d">{value:,}</text>')
    for value in (10, 100, 1000):
        y = _y(value)
        parts.append(f'<line x1="{LEFT}" x2="{right}" y1="{y}" y2="{y}" stroke="#d9d7cf"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y}" dy="0.32em" text-anchor="end" fill="#5f696d">{value:,}</text>')
    line = " ".join(f"{_x(x)},{_y(y)}" for x, y in roof)
    parts.append(f'<polyline points="{line}" fill="none" stroke="#1d2326" stroke-width="1.5"/>')
    parts.append(_text((LEFT + right) / 2, HEIGHT - 10, "FLOP per byte that a step must read", "middle"))
    parts.append(
        f'<text transform="translate(18 {(TOP + bottom) / 2:g}) rotate(-90)" text-anchor="middle" fill="#5f696d">TFLOP/s</text>'
    )
    for p in points:
        x, y, fill = _x(p.flop / p.bytes), _y(p.flop / p.seconds / 1e12), colour[p.system, p.variant]
        tip = f"<title>{escape(f'{p.label} {p.model} {p.variant} {p.system}: {p.percent:.0f} % of the limit')}</title>"
        mark = (
            f'<circle cx="{x}" cy="{y}" r="4.5"'
            if p.model == "1b"
            else f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"'
        )
        parts.append(f'{mark} fill="{fill}" fill-opacity="0.8">{tip}</{mark[1:].split()[0]}>')
    for i, (system, variant) in enumerate(kinds):
        parts.append(f'<circle cx="{right + 14}" cy="{TOP + 10 + 18 * i}" r="4.5" fill="{colour[system, variant]}"/>')
        parts.append(_text(right + 24, TOP + 14 + 18 * i, f"{system} {variant}", "start"))
    parts.append(_text(right + 10, TOP + 24 + 18 * len(kinds), "round: 1B, square: 3B", "start"))
    return "\n".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" fill="#5f696d">{escape(text)}</text>'


def _x(value: float) -> float:
    return _place(value, X_RANGE, LEFT, WIDTH - RIGHT)


def _y(value: float) -> float:
    return _place(value, Y_RANGE, HEIGHT - BOTTOM, TOP)


def _place(value: float, between: tuple[float, float], low: float, high: float) -> float:
    low_log, high_log = (math.log10(end) for end in between)
    return round(low + (math.log10(value) - low_log) / (high_log - low_log) * (high - low), 1)


def _page(points: Sequence[Point]) -> str:
    begin, end = "<!-- roofline: begin -->", "<!-- roofline: end -->"
    before, _, rest = PAGE.read_text().partition(begin)
    return f"{before}{begin}\n{table(points)}\n{end}{rest.partition(end)[2]}"


def main() -> None:
    points = [p for record in json.loads(RESULTS.read_text()) if (p := point(record)) is not None]
    made: dict[Path, Callable[[Sequence[Point]], str]] = {PICTURE: picture, PAGE: _page}
    stale = [path for path, make in made.items() if not path.exists() or path.read_text() != make(points)]
    if "--check" in sys.argv:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"run python benchmarks/engine/roofline.py: {names}" if stale else 0)
    for path in stale:
        path.write_text(made[path](points))


if __name__ == "__main__":
    main()
