"""Options of other servers that this one cannot honour: refused by name at start, with what would work instead."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

ONE_DEVICE: Final = (
    "the model runs on one device; serve one that fits there (--dtype bfloat16 halves float32), or start a server per "
    "device behind a load balancer"
)
UNQUANTISED: Final = (
    "weights are served as they were trained; serve the unquantised checkpoint in bfloat16, float16 or float32"
)
REFUSED: Final[Mapping[str, tuple[frozenset[str], str]]] = {
    "tensor_parallel_size": (frozenset({"1"}), ONE_DEVICE),
    "pipeline_parallel_size": (frozenset({"1"}), ONE_DEVICE),
    "data_parallel_size": (frozenset({"1"}), ONE_DEVICE),
    "quantization": (frozenset({"none", "None"}), UNQUANTISED),
    "load_format": (
        frozenset({"auto", "safetensors"}),
        "only safetensors are read; convert the checkpoint with transformers' save_pretrained",
    ),
    "trust_remote_code": (
        frozenset({"false", "False", "0"}),
        "code of a model's repository is never run; serve an architecture that transformers has",
    ),
}
"""By setting: the values that ask for nothing unusual and pass, and why the others are refused."""
GGUF: Final = "GGUF files are not read; serve the model that they were made from, as a directory with safetensors"


def check_refused(asked: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings that ask for what there is not, and why. None and an empty text are not asking."""
    for name, (harmless, why) in REFUSED.items():
        value = asked.get(name)
        if value not in (None, "") and str(value) not in harmless:
            yield name, f"{str(value)[:80]} is not supported: {why}"


def check_model_name(model: str) -> str:
    """The name or path of a model. Raises ValueError for one that is GGUF by its name or its files."""
    path = Path(model).expanduser()
    if model.lower().endswith((".gguf", "-gguf")):
        raise ValueError(GGUF)
    if path.is_dir() and not (path / "config.json").is_file() and any(path.glob("*.gguf")):
        raise ValueError(GGUF)
    return model
