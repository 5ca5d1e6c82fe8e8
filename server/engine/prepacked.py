"""On a CPU, float32 weights once more in the order in which oneDNN's kernels read them.

torch hands oneDNN a plain [out, in] matrix at every call, from which it copies blocks before it multiplies. With 4 to
64 rows, a decode step's usual number, that copy is a third to two thirds of the product's time; a second copy of the
weights, blocked once at load, saves it. A single row is quicker from the plain matrix, small matrices are, and
bfloat16 gains nothing: those keep the plain product, of which this is the quicker twin (it may round otherwise).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from loramux.server.engine.host_memory import host_bytes_left
from loramux.server.engine.loading import LoadedModel, UnsupportedModelError

MIN_ROWS = 4
MIN_WEIGHTS = 1 << 18
TYPICAL_ROWS = 16
AUTO_SHARE = 4
"""Of what memory is left, the copy may take one part in so many where nobody asked for it."""


class PrepackedProduct:
    """x W^T + b for x [..., in] float32; W [out, in] is held a second time, blocked."""

    def __init__(self, weight: Tensor) -> None:
        self._blocked: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), TYPICAL_ROWS)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """[..., in] -> [..., out]; `weight` is the plain matrix, for few rows."""
        if x.numel() < MIN_ROWS * x.shape[-1]:
            return F.linear(x, weight, bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._blocked, bias, "none", [], "")
        return product


def prepack(model: LoadedModel, wanted: bool | None) -> None:
    """Gives the model's large projections blocked weights.

    `wanted` None does so where it can be done and the copies take at most a quarter of the memory that is left.
    UnsupportedModelError when it is True and this torch, device or type has no such kernels.
    """
    if wanted is False:
        return
    if model.device.type != "cpu" or model.dtype != torch.float32 or not _has_kernels():
        if wanted:
            raise UnsupportedModelError(
                "--prepacked-weights on needs a CPU, --dtype float32 and a torch with oneDNN; leave it at auto"
            )
        return
    large = [p for p in model.projections if p.weight.numel() >= MIN_WEIGHTS]
    if wanted is None and AUTO_SHARE * sum(p.weight.nbytes for p in large) > host_bytes_left():
        return
    for projection in large:
        projection.product = PrepackedProduct(projection.weight)


def _has_kernels() -> bool:
    return (
        torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
