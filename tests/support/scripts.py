"""A script of benchmarks/ as a module, with the short names that it imports by."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[2] / "benchmarks"


@contextmanager
def benchmark_script(name: str) -> Iterator[ModuleType]:
    """benchmarks/<name>.py as `python benchmarks/<name>.py` imports it; the path and the short names are put back."""
    names = [path.stem for path in FOLDER.glob("*.py")]
    before = {short: sys.modules.pop(short) for short in names if short in sys.modules}
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
        for short in names:
            sys.modules.pop(short, None)
        sys.modules.update(before)
