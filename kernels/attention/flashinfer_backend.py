"""`FlashInferAttentionBackend`: paged attention by flashinfer's wrappers over the engine's caches.

Written for flashinfer-python 0.5 to 0.7 (signatures read at 0.5.0, 0.6.18 and 0.7.2) and held to the reference
through a stand-in with those signatures; it has not been run on a card.

Keys and values are written by `kv_write.py`. Decodes go through BatchDecodeWithPagedKVCacheWrapper on the tensor
cores, the rest through BatchPrefillWithPagedKVCacheWrapper with a causal mask, both on the FA2 kernels: those take
queries of any strides, groups of any size and blocks of any size, and their log-sum-exp has base 2. flashinfer plans
per layer kind, that is per (shape, window, softcap, scaling): once per step, by the first layer of the kind.

    window   flashinfer's window_left counts the tokens before a query's own: window - 1; -1 for none
    sinks    out * sigmoid(lse - sinks), lse the natural log-sum-exp of the visible logits. As a factor behind the
             kernel it needs no variant of its own, at the cost of one more rounding to the output's dtype
    padding  a row of padding reads the first token of block 0 and is zeroed afterwards

Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference Serving", MLSys 2025.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .interface import AttentionBatch, AttentionLimits, AttentionPlan, AttentionShape
from .kv_launch import write_kv
from .triton_plan import Metadata

HEAD_DIMS = (64, 128, 256)  # what FA2 is instantiated for, within the interface's bound
DTYPES = (torch.float16, torch.bfloat16)
RECOMMENDED_WORKSPACE = 128 << 20
PLAN_BYTES = 8 << 20  # of planned metadata, which each wrapper allocates
GRAPH_PLAN_BYTES = 1 << 20  # a decode's is a few bytes per row and per program; the row counts share it

KvWrite = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, slots=True)
class LayerKind:
    """What flashinfer plans for: layers that share it share a plan."""

    shape: AttentionShape
    window: int | None
    softcap: float | None
    scaling: float


@dataclass(frozen=True, slots=True, eq=False)
class Pages:
    """Consecutive sequences as flashinfer counts them. Int32; `indices` lies on the device, the rest on the host.

    Sequence s has the blocks indices[indptr[s] : indptr[s + 1]], and `last[s]` tokens in the last one of them.
    """

    indptr: Tensor
    indices: Tensor
    last: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FlashInferPlan:
    """A step's sequences: `decodes` (padding included) and the rest, whose queries are `queries` [n + 1] offsets.

    `rows` is the number of padded rows of a step that a graph may serve, None for any other step.
    """

    num_tokens: int
    num_decodes: int
    rows: int | None
    decodes: Pages
    rest: Pages
    queries: Tensor


class _Planner:
    """A flashinfer wrapper whose pinned plan memory is not refilled before its last copy to the device has ended.

    flashinfer itself does not wait: with steps prepared ahead, a second plan would overwrite the first on its way.
    """

    def __init__(self, wrapper: Any, device: torch.device) -> None:
        self.wrapper = wrapper
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """The wrapper's `plan`, on the current stream."""
        if self._copied is not None:
            self._copied.synchronize()
        self.wrapper.plan(*args, **kwargs)
        if self._copied is not None:
            self._copied.record()


class FlashInferAttentionBackend:
    """Paged attention by flashinfer; the contract is `interface.AttentionBackend`.

    Serves float16 and bfloat16, head dims 64, 128 and 256 with k_dim == v_dim, any group, block size, window, softcap
    and sinks. A plan is valid until `plan` makes another one, and an outdated one is refused. A decode's bits depend
    on the batch that it is in, since flashinfer cuts contexts by what the whole batch holds.
    """

    def __init__(
        self,
        shapes: Sequence[AttentionShape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        limits: AttentionLimits,
        write: KvWrite | None = None,
    ) -> None:
        """`write` (k, v, key, value, slots) replaces the Triton kernel that fills the caches, and lifts its demand for
        a card; slots below 0 are padding.

        Raises ValueError for a device, dtype or shape that flashinfer does not serve, and where it is not installed.
        """
        if device.type != "cuda" and write is None:
            raise ValueError(f"flashinfer does not run on {device.type}: use --attention-implementation torch")
        if dtype not in DTYPES:
            raise ValueError(
                f"flashinfer serves float16 and bfloat16, not {dtype}: use --attention-implementation triton, or "
                "--dtype bfloat16"
            )
        for shape in shapes:
            if shape.k_dim != shape.v_dim:
                raise ValueError(
                    f"flashinfer's decode needs keys and values of one head dim, not {shape.k_dim} and {shape.v_dim}: "
                    "use --attention-implementation triton"
                )
            if shape.k_dim not in HEAD_DIMS:
                raise ValueError(
                    f"flashinfer serves head dims {', '.join(map(str, HEAD_DIMS))}, not {shape.k_dim}: use "
                    "--attention-implementation triton"
                )
        self._library = _load()
        self.dtype = dtype
        self.device = device
        self.block_size = block_size
        self._shapes = frozenset(shapes)
        self._limits = limits
        self._write: KvWrite = write or write_kv
        padded = replace(limits, max_table_entries=limits.max_table_entries + limits.max_sequences)
        self._metadata = Metadata(padded, block_size, (), device)
        with torch.inference_mode(False):
            self._workspace = torch.zeros(_workspace_bytes(shapes, limits, device), dtype=torch.uint8, device=device)
            self._indptr = torch.zeros(limits.max_sequences + 1, dtype=torch.int32, device=device)
            self._last = torch.zeros(limits.max_sequences, dtype=torch.int32, device=device)
            self._padding = torch.zeros(limits.max_sequences, dtype=torch.bool, device=device)
        self._prefills: dict[LayerKind, _Planner] = {}
        self._decodes: dict[LayerKind, _Planner] = {}
        self._graphs: dict[int, dict[LayerKind, _Planner]] = {}
        self._graph_plans: dict[LayerKind, Tensor] = {}
        self._planned: set[_Planner] = set()
        self._latest: FlashInferPlan | None = None

    @property
    def scratch_bytes(self) -> int:
        """Device bytes held so far: the workspace, the metadata, and what each kind of layer seen plans into."""
        own = (self._workspace, self._indptr, self._last, self._padding, *self._graph_plans.values())
        wrappers = len(self._prefills) + len(self._decodes)
        return self._metadata.nbytes + sum(tensor.nbytes for tensor in own) + wrappers * PLAN_BYTES

    def plan(self, batch: AttentionBatch, *, decode_rows: int | None = None) -> FlashInferPlan:
        """The step's plan, copied on the current stream.

        Kinds of layers that padded steps of `decode_rows` had before are planned here, so that a replayed graph finds
        them; all others when `attend` meets them.
        """
        self._latest = None
        self._planned.clear()
        step = self._metadata.write(batch, decode_rows)
        contexts = np.asarray(batch.contexts, dtype=np.int64)
        widths = -(-contexts // self.block_size)
        entries = int(widths.sum())
        if entries > self._limits.max_table_entries:
            raise ValueError(f"{entries} block table entries exceed {self._limits.max_table_entries}")
        if decode_rows is not None:
            padding = decode_rows - len(contexts)
            self._metadata.tables[entries : entries + padding].zero_()
            torch.lt(self._metadata.slots[:decode_rows], 0, out=self._padding[:decode_rows])
            contexts, widths = (np.append(counts, np.ones(padding, dtype=np.int64)) for counts in (contexts, widths))
        last = contexts - (widths - 1) * self.block_size
        split = step.num_decodes
        first = int(widths[:split].sum())
        tables = self._metadata.tables
        lens = np.asarray(batch.query_lens, dtype=np.int64)[split:]
        self._latest = FlashInferPlan(
            step.num_tokens,
            split,
            decode_rows,
            Pages(_offsets(widths[:split]), tables[:first], _int32(last[:split])),
            Pages(_offsets(widths[split:]), tables[first : int(widths.sum())], _int32(last[split:])),
            _offsets(lens),
        )
        if decode_rows is not None:
            for kind, planner in self._graphs.get(decode_rows, {}).items():
                self._plan_decodes(planner, kind, self._latest)
        return self._latest

    def write(self, k: Tensor, v: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
        """k[slot of t] = key[t], v[slot of t] = value[t]; key and value [tokens, kv_heads, dim] of any strides."""
        current = self._current(plan)
        self._check(key, k, v, current)
        self._write(k, v, key, value, self._metadata.slots[: current.num_tokens])

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scaling: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """q [tokens, heads, dim] -> [tokens, heads, dim]; `out`, when given, is contiguous.

        Raises ValueError for an outdated plan, and for tensors and numbers that do not belong to this backend.
        """
        current = self._current(plan)
        self._check(q, k, v, current)
        shape = AttentionShape(q.shape[1], k.shape[2], q.shape[2], v.shape[3])
        if shape not in self._shapes or k.shape[3] != shape.k_dim or q.dtype != self.dtype:
            raise ValueError(f"{q.dtype} queries {tuple(q.shape)} do not belong to the caches of this backend")
        if window is not None and window < 1:
            raise ValueError(f"window {window} must be positive")
        if q.stride(-1) != 1:
            q = q.contiguous()
        if out is None:
            out = q.new_empty(q.shape)
        elif out.shape != q.shape or not out.is_contiguous():
            raise ValueError(f"out {tuple(out.shape)} must be contiguous and of the queries' shape {tuple(q.shape)}")
        kind = LayerKind(shape, window, softcap, scaling)
        split = current.num_decodes
        if split:
            _run(self._decode_planner(kind, current), q[:split], k, v, sinks, out[:split])
        if split < current.num_tokens:
            _run(self._prefill_planner(kind, current), q[split:], k, v, sinks, out[split:])
        if current.rows is not None:
            out.masked_fill_(self._padding[: current.rows, None, None], 0)
        return out

    def _current(self, plan: AttentionPlan) -> FlashInferPlan:
        if self._latest is None or plan is not self._latest:
            raise ValueError("the plan is outdated: its metadata was overwritten by a later one")
        return self._latest

    def _check(self, rows: Tensor, k: Tensor, v: Tensor, plan: FlashInferPlan) -> None:
        """Both caches must have the same strides, too: flashinfer addresses them alike."""
        for cache in (k, v):
            if cache.dtype != self.dtype or not cache.is_contiguous() or cache.shape[1] != self.block_size:
                raise ValueError(
                    f"a cache is {cache.dtype} {tuple(cache.shape)}; it must be contiguous, {self.dtype} and of "
                    f"blocks of {self.block_size}"
                )
        if k.shape != v.shape:
            raise ValueError(f"caches {tuple(k.shape)} and {tuple(v.shape)} must have one shape")
        if len(rows) != plan.num_tokens:
            raise ValueError(f"{len(rows)} rows were given to a plan of {plan.num_tokens}")

    def _decode_planner(self, kind: LayerKind, plan: FlashInferPlan) -> _Planner:
        """The wrapper of the step's decodes, planned."""
        planners = self._decodes if plan.rows is None else self._graphs.setdefault(plan.rows, {})
        planner = planners.get(kind)
        if planner is None:
            planner = planners[kind] = self._make_decode(kind, plan.rows)
        if planner not in self._planned:
            self._plan_decodes(planner, kind, plan)
        return planner

    def _make_decode(self, kind: LayerKind, rows: int | None) -> _Planner:
        options: dict[str, Any] = {"use_tensor_cores": True, "backend": "fa2"}
        with torch.inference_mode(False):
            if rows is None:
                wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(self._workspace, "NHD", **options)
                return _Planner(wrapper, self.device)
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "NHD",
                use_cuda_graph=True,
                paged_kv_indptr_buffer=self._indptr[: rows + 1],
                paged_kv_indices_buffer=self._metadata.tables,
                paged_kv_last_page_len_buffer=self._last[:rows],
                **options,
            )
            if kind not in self._graph_plans:
                self._graph_plans[kind] = torch.zeros(GRAPH_PLAN_BYTES, dtype=torch.uint8, device=self.device)
            wrapper.reset_workspace_buffer(self._workspace, self._graph_plans[kind])
        return _Planner(wrapper, self.device)

    def _plan_decodes(self, planner: _Planner, kind: LayerKind, plan: FlashInferPlan) -> None:
        pages, shape = plan.decodes, kind.shape
        planner.plan(
            pages.indptr,
            pages.indices,
            pages.last,
            shape.heads,
            shape.kv_heads,
            shape.k_dim,
            self.block_size,
            **self._numbers(kind),
        )
        self._planned.add(planner)

    def _prefill_planner(self, kind: LayerKind, plan: FlashInferPlan) -> _Planner:
        """The wrapper of the step's sequences with several queries, planned."""
        planner = self._prefills.get(kind)
        if planner is None:
            with torch.inference_mode(False):
                wrapper = self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD", backend="fa2")
            planner = self._prefills[kind] = _Planner(wrapper, self.device)
        if planner not in self._planned:
            pages, shape = plan.rest, kind.shape
            planner.plan(
                plan.queries,
                pages.indptr,
                pages.indices,
                pages.last,
                shape.heads,
                shape.kv_heads,
                shape.k_dim,
                self.block_size,
                causal=True,
                **self._numbers(kind),
            )
            self._planned.add(planner)
        return planner

    def _numbers(self, kind: LayerKind) -> dict[str, Any]:
        """The kind as both wrappers' `plan` takes it."""
        return {
            "window_left": -1 if kind.window is None else kind.window - 1,
            "logits_soft_cap": kind.softcap,
            "sm_scale": kind.scaling,
            "q_data_type": self.dtype,
            "kv_data_type": self.dtype,
        }


def _run(planner: _Planner, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor) -> None:
    if sinks is None:
        planner.wrapper.run(q, (k, v), out=out)
        return
    _, lse = planner.wrapper.run(q, (k, v), out=out, return_lse=True)
    out.mul_(torch.sigmoid(lse * math.log(2) - sinks.float()).unsqueeze(-1))


def _load() -> Any:
    """The library, which is no dependency."""
    try:
        return importlib.import_module("flashinfer")
    except ImportError as error:
        raise ValueError(
            f"flashinfer cannot be imported ({error}): pip install 'loramux[flashinfer]', or use "
            "--attention-implementation triton"
        ) from error


def _workspace_bytes(shapes: Sequence[AttentionShape], limits: AttentionLimits, device: torch.device) -> int:
    """Bytes that hold the partial results of any step, or what flashinfer recommends, if that is more.

    FA2's planner cuts contexts into at most 2 * multiprocessors / kv_heads tiles of up to 128 packed queries. A step
    that a graph may serve has at least as many tiles as its rows may need, of 16, 64 or 128 packed queries by the
    group. Each tile holds float32 [heads, queries, dim] and as many sums without dim.
    """
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    needed = RECOMMENDED_WORKSPACE
    for shape in shapes:
        tiles = -(-programs // shape.kv_heads)
        height = next((height for height in (16, 64) if shape.group <= height), 128)
        padded = -(-limits.max_sequences * shape.group // height) + limits.max_sequences
        rows = max(tiles * 128, padded * height)
        needed = max(needed, shape.heads * rows * (shape.v_dim + 1) * 4 + 64)
    return needed


def _int32(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int32))


def _offsets(counts: Any) -> Tensor:
    """[0, counts[0], counts[0] + counts[1], ...]."""
    return _int32(np.concatenate([[0], np.cumsum(counts)]))
