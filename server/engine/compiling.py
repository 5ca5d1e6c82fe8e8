"""Regional compilation: torch.compile of the repeated layer, around the operations that are ours.

Norms, rotary embedding, gated activation and residual additions between our projections and attention are fused into
a few generated kernels; one compilation serves all layers and all batch sizes. Our own operations are called as they
are, from between the compiled parts.
"""

from collections.abc import Sequence as Seq
from typing import Any

import torch

from loramux.server.engine.attention import LayerCache
from loramux.server.engine.linears import SiteProjection, SliceOf
from loramux.server.engine.loading import LoadedModel, UnsupportedModelError
from loramux.server.engine.runner import Runner
from loramux.server.engine.step import Chunk


def compile_layers(model: LoadedModel) -> None:
    """Compiles the model's layers at their first use. Raises UnsupportedModelError where there are none to compile."""
    if not model.layers:
        name = type(model.module).__name__
        raise UnsupportedModelError(f"{name} has no list of layers that --compile-layers could compile")
    for layer in model.layers.values():
        for inner in layer.modules():
            if isinstance(inner, SiteProjection | SliceOf):
                _keep_out(inner, "forward")
        layer.compile(dynamic=True)


def keep_caches_out(layers: Seq[LayerCache]) -> None:
    """Keeps the attention over these caches out of the compiled parts."""
    for layer in layers:
        _keep_out(layer, "attend")


def first_compiled_step(runner: Runner, chunks: Seq[Chunk]) -> None:
    """Compiles by computing one step. Raises UnsupportedModelError when torch cannot, say for want of a compiler."""
    try:
        runner.launch(chunks).result()
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UnsupportedModelError(
            f"--compile-layers: torch cannot compile {type(runner.model.module).__name__} here ({reason}); a C++ "
            "compiler is needed on a CPU, or leave the flag out"
        ) from error


def _keep_out(owner: Any, method: str) -> None:
    setattr(owner, method, torch.compiler.disable(getattr(owner, method)))  # type: ignore[no-untyped-call]
