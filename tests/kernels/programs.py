"""Programs of benchmarks/engine in a test."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks/engine"


@contextmanager
def imported(*names: str) -> Iterator[list[Any]]:
    """The programs of these names, by other names: `kernels` would pass for the package of that name, which transformers looks for.

    Their folder is on the path for the while that they are imported, and what they import from it is forgotten at the end.
    """
    before, found = set(sys.modules), []
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        for name in names:
            spec = importlib.util.spec_from_file_location(f"{name}_program", FOLDER / f"{name}.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            found.append(module)
    yield found
    own = {path.stem for path in FOLDER.iterdir()}
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in own:
            del sys.modules[name]
