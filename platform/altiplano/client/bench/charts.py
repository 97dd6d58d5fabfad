"""Pictures as SVG text: axes with round ticks, lines, dots. Colours come from the page's CSS variables, so that dark mode works."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 14, 46
MAX_POINTS = 2000
Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """Points that are joined. `step`: a value holds until the next one. `marked`: every point gets a dot."""

    label: str
    points: Sequence[Point]
    step: bool = False
    marked: bool = False


@dataclass(frozen=True)
class Axis:
    """From `low` to `high`, with ticks at round numbers."""

    label: str
    low: float
    high: float

    def ticks(self) -> list[float]:
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def place(self, value: float) -> float:
        """0 at `low`, 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def line_chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, y_high: float | None = None) -> str:
    """Lines over a common x axis; both axes start at 0."""
    points = [point for line in lines for point in line.points]
    x, y = _axis(x_label, [point[0] for point in points]), _axis(y_label, [point[1] for point in points])
    if y_high is not None:
        y = Axis(y_label, 0.0, y_high)
    drawn = [
        f'<polyline class="line c{i}" points="{" ".join(_at(x, y, point) for point in _thinned(_path(line)))}"/>'
        for i, line in enumerate(lines)
    ]
    for i, line in enumerate(lines):
        drawn += [_circle(_at(x, y, point), f"mark c{i}", 3.0) for point in line.points if line.marked]
    if len(lines) > 1:
        drawn += [
            f'<text class="key c{i}" x="{WIDTH - RIGHT - 8}" y="{HEIGHT - BOTTOM - 10 - 16 * i}">{escape(line.label)}</text>'
            for i, line in enumerate(lines)
        ]
    return _frame(title, x, y, drawn)


def dot_chart(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """One dot per point."""
    x, y = _axis(x_label, [point[0] for point in points]), _axis(y_label, [point[1] for point in points])
    drawn = [_circle(_at(x, y, point), "dot", 2.2) for point in _thinned(points)]
    return _frame(title, x, y, drawn)


def _frame(title: str, x: Axis, y: Axis, drawn: list[str]) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">',
        f"<title>{escape(title)}</title>",
    ]
    for value in y.ticks():
        at = _at(x, y, (x.low, value)).split(",")[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text class="tick end" x="{LEFT - 8}" y="{at}" dy="0.32em">{value:,g}</text>')
    for value in x.ticks():
        at = _at(x, y, (value, y.low)).split(",")[0]
        parts.append(f'<text class="tick middle" x="{at}" y="{bottom + 18}">{value:,g}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text class="label middle" x="{(LEFT + right) / 2:g}" y="{HEIGHT - 8}">{escape(x.label)}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text class="label middle" transform="translate(14 {middle:g}) rotate(-90)">{escape(y.label)}</text>')
    return "".join([*parts, *drawn, "</svg>"])


def _circle(at: str, kind: str, radius: float) -> str:
    cx, cy = at.split(",")
    return f'<circle class="{kind}" cx="{cx}" cy="{cy}" r="{radius:g}"/>'


def _axis(label: str, values: Sequence[float]) -> Axis:
    high = max(values, default=0.0)
    return Axis(label, 0.0, high * 1.05 if high > 0 else 1.0)


def _at(x: Axis, y: Axis, point: Point) -> str:
    across = LEFT + x.place(point[0]) * (WIDTH - LEFT - RIGHT)
    up = HEIGHT - BOTTOM - y.place(point[1]) * (HEIGHT - TOP - BOTTOM)
    return f"{across:.1f},{up:.1f}"


def _path(line: Line) -> list[Point]:
    if not line.step:
        return list(line.points)
    path: list[Point] = []
    for x, y in line.points:
        if path:
            path.append((x, path[-1][1]))
        path.append((x, y))
    return path


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Every n-th point and the last, so that a long run stays a small file."""
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    return [*points[::stride], *points[-1:]] if stride > 1 else list(points)


def _round_step(rough: float) -> float:
    """The smallest of 1, 2, 5 · 10^n that is not below `rough`."""
    power: float = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))
