"""What every benchmark prints: where it ran, a table to read, and one JSON object to keep."""

import contextlib
import json
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from loramux.server.bench.tables import table

__all__ = ["environment", "publish", "table"]


def environment() -> dict[str, Any]:
    """Machine, versions and date of this run; threads and card are torch's, None where it is missing or broken."""
    threads = card = None
    with contextlib.suppress(ImportError, OSError):  # OSError: a torch whose libraries do not load
        import torch

        threads = torch.get_num_threads()
        card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    packages = {}
    for name in ("torch", "transformers", "peft", "triton", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        cpu = f"{models[0]} x {len(models)}" if models else cpu
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "packages": packages,
        "cpu": cpu,
        "threads": threads,
        "card": card,
    }


def publish(result: dict[str, Any], out: Path | None) -> None:
    """Prints the JSON object on one line and writes it to `out` when given."""
    text = json.dumps(result, sort_keys=True)
    sys.stdout.write(text + "\n")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n")
