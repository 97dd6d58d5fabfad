"""The frame of the benchmark's pages: one file each, which asks nothing of anybody."""

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --back: #fbfaf7; --ink: #1d2326; --dim: #5f696d; --rule: #d9d7cf; --c0: #0b6e8a; --c1: #b4531b;
  --c2: #4c7a2c; --c3: #7a4fa3; --c4: #9a6b00; --c5: #a8325f; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14181a; --ink: #e6e4de; --dim: #9aa4a8; --rule: #333b3f; --c0: #58b9d6; --c1: #e8925a;
    --c2: #93c26b; --c3: #bd9be0; --c4: #d8b04a; --c5: #e889ab; }
}
body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; } h2 { font-size: 1rem; margin: 2rem 0 .5rem; } p { color: var(--dim); margin: .2rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .8rem; border-bottom: 1px solid var(--rule); text-align: right; font-weight: normal; }
thead th { color: var(--dim); } th[scope=row] { text-align: left; } .bad { color: var(--c1); }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1.5rem; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .3rem; } svg { width: 100%; height: auto; }
.grid { stroke: var(--rule); } .axis { stroke: var(--dim); } .tick, .label { fill: var(--dim); font-size: 12px; }
.end, .key { text-anchor: end; } .middle { text-anchor: middle; } .key { font-size: 13px; }
.line { fill: none; stroke-width: 1.8; } .mark { fill: currentColor; }
.line { stroke: currentColor; } .key { fill: currentColor; } .dot { fill: var(--c0); fill-opacity: .55; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
pre { overflow: auto; background: color-mix(in srgb, var(--rule) 35%, transparent); padding: .8rem; }
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A page of these parts, which are HTML already."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</body></html>\n",
        ]
    )


def figures(pictures: Sequence[tuple[str, str]]) -> str:
    """Titles and SVG pictures, side by side where there is room."""
    made = (f"<figure><figcaption>{escape(title)}</figcaption>{picture}</figure>" for title, picture in pictures)
    return f'<div class="pictures">{"".join(made)}</div>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first cell of a row names it."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    head = f"<thead><tr>{names}</tr></thead>" if columns else ""
    body = []
    for row in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>')
    return f"<table>{head}<tbody>{''.join(body)}</tbody></table>"


def number(value: float | None) -> str:
    """Two digits after the point; a dash for what is not known."""
    return "-" if value is None else f"{value:,.2f}"
