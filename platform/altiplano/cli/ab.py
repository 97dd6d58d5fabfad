"""`altiplano ab`: what the arms of a running test do, with intervals that hold whenever one looks."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from altiplano.cli.console import Output, OutputOption, err, out, print_json, table
from altiplano.cli.generate import ApiKeyOption, UrlOption
from altiplano.client.endpoint import DEFAULT_URL

if TYPE_CHECKING:
    from altiplano.serve.evidence import Reading

ab = typer.Typer(help="Compare the arms of a running test.", no_args_is_help=True)

NAMES = {
    "error_rate": "error rate",
    "ttft_s": "TTFT, s",
    "tokens_per_s": "tokens/s",
    "e2e_s": "response time, s",
    "feedback": "feedback",
}


def register(app: typer.Typer) -> None:
    app.add_typer(ab, name="ab")


@ab.callback()
def _group() -> None:
    """Keeps `report` a command of its own."""


@ab.command()
def report(
    url: UrlOption = DEFAULT_URL,
    api_key: ApiKeyOption = None,
    baseline: Annotated[str, typer.Option(help="The arm that the others are compared with.")] = "champion",
    confidence: Annotated[float, typer.Option(min=0.5, max=0.9999, help="Of each interval, over all looks together.")] = 0.95,
    output: OutputOption = Output.text,
) -> None:
    """Requests, errors, latency, speed and feedback of each arm since the test began, on the replicas that run now."""
    from altiplano.serve.ab import report as compared
    from altiplano.serve.evidence import AbClient
    from altiplano.serve.outcomes import merged

    reading = AbClient(url, api_key).read()
    found = compared(merged(reading.replicas.values()), baseline, 1 - confidence)
    found |= {"test": reading.test, "replicas": len(reading.replicas), "weights": _weights(reading), "shadow": _shadow(reading)}
    if output is Output.json:
        print_json(found)
        return
    if reading.test is None:
        err.print("no test is running: start one with `altiplano rollout start`", markup=False)
        return
    _show(found)


def _weights(reading: "Reading") -> dict[str, float] | None:
    """Shares of the arms, from a replica that is in the test."""
    return next((told["weights"] for told in reading.snapshots if told["test"] == reading.test), None)


def _shadow(reading: "Reading") -> dict[str, Any] | None:
    from altiplano.serve.shadow import ShadowSums

    parts = [
        ShadowSums.from_json(told["shadow"]) for told in reading.snapshots if told["shadow"] and told["test"] == reading.test
    ]
    return ShadowSums.merged(parts).described() if parts else None


def _show(found: dict[str, Any]) -> None:
    shares = found["weights"] or {}
    columns = ["arm", ">share", ">requests", ">errors", ">TTFT p50", ">TTFT p95", ">tokens/s", ">ratings", ">mean rating"]
    rows = [
        [
            arm,
            f"{shares.get(arm, 0):.1%}",
            str(values["requests"]),
            str(values["errors"]),
            _seconds(values["ttft_s"]["p50"]),
            _seconds(values["ttft_s"]["p95"]),
            _number(values["tokens_per_s"]["geometric_mean"]),
            str(values["feedback"]["count"]),
            _number(values["feedback"]["mean"]),
        ]
        for arm, values in found["arms"].items()
    ]
    out.print(table(f"test {found['test']} on {found['replicas']} replicas", columns, rows))
    for arm, metrics in found["comparisons"].items():
        rows = [_comparison(name, values) for name, values in metrics.items()]
        title = f"{arm} against {found['baseline']}, {found['confidence']:.0%} confidence at every look"
        out.print(table(title, ["", f">{found['baseline']}", f">{arm}", ">effect", ">interval", "verdict"], rows))
    if found["shadow"]:
        said = ", ".join(f"{name.replace('_', ' ')} {_number(value)}" for name, value in found["shadow"].items())
        out.print(f"shadow: {said}", markup=False)


def _comparison(name: str, values: dict[str, Any]) -> list[str]:
    ratio = values["effect_unit"] == "ratio"
    interval = values["interval"]
    shown = [_number(values["baseline"]), _number(values["candidate"])]
    effect = "" if values["effect"] is None else f"x {values['effect']:.3g}" if ratio else f"{values['effect']:+.3g}"
    bounds = "" if interval is None else f"{interval['low']:.3g} … {interval['high']:.3g}"
    return [NAMES[name], *shown, effect, bounds, values["verdict"]]


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.3g} s"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
