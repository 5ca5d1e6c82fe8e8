"""`--deterministic`: a prepared model whose logits have the same bits in any batch, or an error that says why not.

What a model computes between its projections and its attention is observed operation by operation in one probing pass,
not known by architecture. An operation is one of these, or the model is refused:

- it moves numbers, or rounds each element once (sums, products, roots, comparisons): its bits depend on nothing else;
- it computes elements one by one through a vector library, alike at every position (exp, tanh, sine);
- it reduces rows one by one along their last dimension, alike for any number of rows (a mean; layer norm);
- it has a twin here that does one of the above. torch's activations on the CPU are no such thing: the elements that
  do not fill a vector go through other code, and which ones those are depends on the batch. On a card the mean is the
  one: how many threads share a row depends on the number of rows. The modules that call them run under `Twins`.

Projections become products of one order of summation (`kernels.dense`); attention and adapters have theirs, chosen
where they are made.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from loramux.kernels.dense.torch_tiles import TiledProducts
from loramux.server.engine.linears import SiteProjection
from loramux.server.engine.loading import PROBE_ROWS, PROBE_TOKENS, LoadedModel, UnsupportedModelError

HEAD_ROWS = 64
"""Most logit rows of one product; the largest weights of a model are seldom given more."""

MOVES = frozenset(
    "_to_copy alias arange as_strided cat chunk clone contiguous copy_ detach dropout embedding empty_like expand "
    "expand_as fill_ flatten full full_like index index_select item lift_fresh lift_fresh_copy movedim narrow "
    "new_empty new_full new_ones new_zeros ones ones_like permute repeat repeat_interleave reshape roll select slice "
    "split split_with_sizes squeeze stack t to transpose type_as unbind unflatten unfold unsqueeze view view_as "
    "zeros zeros_like".split()
)
ROUNDED_ONCE = frozenset(
    "abs add add_ all amax amin any bitwise_and bitwise_not bitwise_or ceil clamp clamp_ clamp_max clamp_min div div_ "
    "eq floor floor_divide ge gt isinf isnan le logical_and logical_not logical_or lt masked_fill masked_fill_ max "
    "maximum min minimum mul mul_ ne neg reciprocal relu relu_ remainder round rsub sign sqrt square sub sub_ tril "
    "triu where".split()
)
ELEMENTWISE = frozenset("cos erf exp exp_ log sin tanh tanh_".split())
ROWS = frozenset("_fused_rms_norm layer_norm mean native_layer_norm rms_norm".split())
PRODUCTS = frozenset("addmm baddbmm bmm einsum linear matmul mm".split())
ROUTING = frozenset(
    "_grouped_mm histc index_add index_add_ index_put index_put_ nonzero one_hot scatter scatter_ scatter_add "
    "scatter_add_ sort topk".split()
)
EXACT_POWERS = (2, 3)


def _computed_wide(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`formula` in float32 or wider, rounded to the input's dtype once."""

    def twin(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return formula(x.to(torch.promote_types(x.dtype, torch.float32)), *args, **kwargs).to(x.dtype)

    return twin


@_computed_wide
def _sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


@_computed_wide
def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


@_computed_wide
def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (1 + torch.tanh(inner))
    return 0.5 * x * (1 + torch.erf(x * 0.7071067811865476))


@_computed_wide
def _rsqrt(x: Tensor) -> Tensor:
    return 1 / torch.sqrt(x)


def _mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    from loramux.kernels.dense.triton_product import triton_row_mean  # a CPU needs no triton

    means = triton_row_mean(x if dtype is None else x.to(dtype))
    return means.unsqueeze(-1) if keepdim else means


Twin = Callable[..., Tensor]
CPU_TWINS: Mapping[str, Twin] = {"sigmoid": _sigmoid, "silu": _silu, "gelu": _gelu, "rsqrt": _rsqrt}
CUDA_TWINS: Mapping[str, Twin] = {"mean": _mean}
CUDA_ELEMENTWISE = ELEMENTWISE | {"gelu", "rsqrt", "sigmoid", "silu"}


class Twins(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, operations that have a twin are computed by it."""

    def __init__(self, twins: Mapping[str, Twin]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins = twins

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The twin's result, or the operation's own."""
        return self._twins.get(func.overloadpacket.__name__, func)(*args, **(kwargs or {}))


class _UnderTwins:
    """A module's forward with `Twins` entered."""

    def __init__(self, forward: Callable[..., Any], twins: Mapping[str, Twin]) -> None:
        self._forward = forward
        self._mode = Twins(twins)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode:
            return self._forward(*args, **kwargs)


class _Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the modules that need twins, and why the model is refused; routing explains the rest, so it is first."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._twins = CUDA_TWINS if device.type == "cuda" else CPU_TWINS
        self._elementwise = CUDA_ELEMENTWISE if device.type == "cuda" else ELEMENTWISE
        self._inside: list[nn.Module] = []
        self._handles: list[Any] = []
        self.wrapped: list[nn.Module] = []
        self.refusals: list[str] = []

    def attach(self, model: LoadedModel) -> None:
        """Follows which module is computing. A packed projection is nobody's submodule."""
        for module in dict.fromkeys([*model.module.modules(), *model.projections]):
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave))

    def detach(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._inside.append(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Judges the operation and computes it."""
        module = self._inside[-1] if self._inside else None
        name = func.overloadpacket.__name__
        if not isinstance(module, SiteProjection):
            self._judge(name, args, kwargs or {}, module)
        return func(*args, **(kwargs or {}))

    def _judge(self, name: str, args: Any, kwargs: Any, module: nn.Module | None) -> None:
        where = "" if module is None else f" in {type(module).__name__}"
        if name in ROUTING:
            self.refusals.insert(
                0, f"it routes tokens to experts (aten.{name}{where}), whose products depend on the batch"
            )
        elif name in PRODUCTS:
            if args[0].shape[-1] != 1 or name == "einsum":
                self.refusals.append(f"aten.{name}{where} is a product outside its projections")
        elif name in self._twins:
            if name == "mean" and not _along_rows(args, kwargs):
                self.refusals.append(f"aten.mean{where} is not along the last dimension")
            elif name == "rsqrt" and args[0].dtype in (torch.float32, torch.float64):
                return  # one division of one root
            elif module is None:
                self.refusals.append(f"aten.{name} is called outside its modules")
            elif module not in self.wrapped:
                self.wrapped.append(module)
        elif name == "mean":
            if not _along_rows(args, kwargs):
                self.refusals.append(f"aten.mean{where} is not along the last dimension")
        elif name == "pow":
            if args[1] not in EXACT_POWERS:
                self.refusals.append(f"aten.pow{where} has exponent {args[1]}; {EXACT_POWERS} are exact")
        elif name not in MOVES | ROUNDED_ONCE | self._elementwise | ROWS:
            self.refusals.append(f"aten.{name}{where} is not known to have the same bits in any batch")


def _along_rows(args: Any, kwargs: Any) -> bool:
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    dims = [dims] if isinstance(dims, int) else dims
    return dims is not None and [d % args[0].dim() for d in dims] == [args[0].dim() - 1]


class _TorchProduct:
    """A projection's product on the CPU."""

    def __init__(self, products: TiledProducts, projection: SiteProjection) -> None:
        largest = {"max_size": HEAD_ROWS} if projection.is_head else {}
        self._product = products.of(projection.weight, projection.bias, **largest)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


def _cuda_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from loramux.kernels.dense.triton_product import triton_product

    return triton_product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)


@torch.inference_mode()
def make_invariant(model: LoadedModel) -> None:
    """Switches the model's projections, norms and activations to forms whose bits do not depend on the batch.

    Call it before the first step, on the threads' final number. Raises UnsupportedModelError naming the model and the
    operation for which there is no such form.
    """
    module, device = model.module, model.device
    observer = _Observer(device)
    observer.attach(model)
    try:
        with observer:
            module(
                input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device),
                position_ids=torch.arange(PROBE_TOKENS, device=device).unsqueeze(0),
                use_cache=False, logits_to_keep=torch.arange(PROBE_ROWS, device=device), return_dict=True,
            )  # fmt: skip
    finally:
        observer.detach()
    if observer.refusals:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be served with --deterministic: {observer.refusals[0]}; "
            "leave the flag out, or serve a dense model"
        )
    twins = CUDA_TWINS if device.type == "cuda" else CPU_TWINS
    for part in observer.wrapped:
        part.forward = _UnderTwins(part.forward, twins)
    products = TiledProducts()
    for projection in model.projections:
        projection.product = _cuda_product if device.type == "cuda" else _TorchProduct(products, projection)
