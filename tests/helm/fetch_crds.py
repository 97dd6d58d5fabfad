"""Download upstream's CRD files, pinned by crds.json: `make crds`. They are data of other projects and never part of this repository."""

import hashlib
import json
import sys
import urllib.request
from pathlib import Path


def main() -> int:
    """Every file whose digest is right is kept; 1 when one is missing or another."""
    target = Path(sys.argv[1])
    files = json.loads((Path(__file__).parent / "crds.json").read_text())
    wrong = 0
    for name, source in files.items():
        path = target / name
        if path.exists() and _digest(path.read_bytes()) == source["sha256"]:
            continue
        try:
            with urllib.request.urlopen(source["url"], timeout=60) as response:
                data = response.read()
        except OSError as error:
            print(f"{source['url']}: {error}", file=sys.stderr)
            wrong += 1
            continue
        if _digest(data) != source["sha256"]:
            print(f"{source['url']}: its digest is {_digest(data)}, not {source['sha256']}", file=sys.stderr)
            wrong += 1
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return 1 if wrong else 0


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
