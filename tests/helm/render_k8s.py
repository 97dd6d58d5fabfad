"""Write k8s/ from the chart: `python tests/helm/render_k8s.py`."""

import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from support import charts, kustomize


def main() -> None:
    """Replace base and overlays."""
    with tempfile.TemporaryDirectory() as directory:
        files = kustomize.files(charts.Helm4(), charts.working_copy(Path(directory)))
    for name in ("base", "overlays"):
        shutil.rmtree(kustomize.FOLDER / name, ignore_errors=True)
    for path, text in files.items():
        target = kustomize.FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    print(f"wrote {len(files)} files below {kustomize.FOLDER}")


if __name__ == "__main__":
    main()
