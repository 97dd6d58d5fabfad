"""Draw docs/images/demo.svg from a finished run: python docs/images/make_demo_picture.py .altiplano"""

import sys
from pathlib import Path

from rich.console import Console

from altiplano.cli import view
from altiplano.pipeline.summary import latest_run, summarize


def main() -> None:
    place = latest_run(Path(sys.argv[1]).resolve(), None)
    recorder = Console(record=True, width=118, highlight=False, file=Path("/dev/null").open("w"), force_terminal=True)  # noqa: SIM115
    view.out = recorder
    summary = summarize(place)
    recorder.print("$ make demo", style="bold")
    for name, stage in summary["stages"].items():
        recorder.print(f"[green]✓[/] [bold]{name:<9}[/] {stage['seconds']:.0f} s")
    view.show(summary)
    recorder.save_svg(str(Path(__file__).parent / "demo.svg"), title="altiplano")


if __name__ == "__main__":
    main()
