"""loramux: one frozen base model, many LoRA adapters, one mixed batch, behind the OpenAI API."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("loramux")
except PackageNotFoundError:  # run from a checkout with PYTHONPATH=src
    __version__ = "0.0.0"

__all__ = ["__version__"]
