"""A stand-in for flashinfer 0.5 to 0.7 in plain torch: the two paged wrappers, with the library's own signatures.

Only what `flashinfer_backend` may rely on is there; what the library would refuse or misread is refused. Metadata is
read when `run` is called, from the buffers that a captured graph would read, so that a run after another `plan` sees
that plan.
"""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HEAD_DIMS = (64, 128, 256, 512)


def _lengths(indptr: Tensor, last: Tensor, page_size: int) -> Tensor:
    """As flashinfer's get_seq_lens."""
    return torch.clamp(indptr[1:] - indptr[:-1] - 1, min=0) * page_size + last


class _Wrapper:
    def __init__(self, workspace: Tensor, kv_layout: str, use_cuda_graph: bool, backend: str) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "NHD"
        assert backend == "fa2", "other kernels have their own limits"
        self.fixed = use_cuda_graph
        self.plans = 0
        self.runs: list[Callable[[], Any]] = []
        self.kind: dict[str, Any] = {}
        self.indptr = self.indices = self.last = self.queries = torch.zeros(0, dtype=torch.int32)

    def reset_workspace_buffer(self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor) -> None:
        assert float_workspace_buffer.dtype == int_workspace_buffer.dtype == torch.uint8

    def _plan(self, queries: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, page_size: int,
              **kind: Any) -> None:  # fmt: skip
        assert all(given.dtype == torch.int32 for given in (queries, indptr, indices, last))
        assert len(queries) == len(indptr) == len(last) + 1 > 1
        assert queries[0] == indptr[0] == 0
        assert indptr[-1] == len(indices)
        assert bool((indptr.diff() > 0).all())
        assert bool(((last > 0) & (last <= page_size)).all())
        assert kind["head_dim"] in HEAD_DIMS
        assert kind["heads"] % kind["kv_heads"] == 0
        assert kind["window_left"] >= -1
        assert kind["q_data_type"] == kind["kv_data_type"]
        assert kind["q_data_type"] in (torch.float16, torch.bfloat16)
        self.plans += 1
        self.queries = queries
        if self.fixed:
            assert len(last) == len(self.last), "the batch size is fixed"
            assert len(indices) <= len(self.indices)
            self.indptr.copy_(indptr)
            self.last.copy_(last)
            self.indices[: len(indices)].copy_(indices)
        else:
            self.indptr, self.indices, self.last = indptr, indices, last
        assert not self.kind or not self.fixed or self.kind == kind | {"page_size": page_size}, "a graph's constants"
        self.kind = kind | {"page_size": page_size}

    def _run(self, q: Tensor, caches: tuple[Tensor, Tensor], out: Tensor | None,
             return_lse: bool) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        k, v = caches
        kind = self.kind
        assert q.dtype == k.dtype == v.dtype == kind["q_data_type"]
        assert q.stride(-1) == 1
        assert k.stride() == v.stride()
        assert q.shape == (int(self.queries[-1]), kind["heads"], kind["head_dim"])
        assert k.shape[1:] == (kind["page_size"], kind["kv_heads"], kind["head_dim"])
        out = torch.empty_like(q) if out is None else out
        assert out.shape == q.shape
        assert out.dtype == q.dtype
        assert out.is_contiguous()
        result = torch.empty(q.shape, dtype=torch.float64)
        lse = torch.empty(q.shape[:2], dtype=torch.float32)
        for number, length in enumerate(_lengths(self.indptr, self.last, kind["page_size"]).tolist()):
            rows = slice(int(self.queries[number]), int(self.queries[number + 1]))
            pages = self.indices[int(self.indptr[number]) : int(self.indptr[number + 1])].long()
            group = kind["heads"] // kind["kv_heads"]
            keys, values = (c[pages].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for c in (k, v))
            count = rows.stop - rows.start
            places = torch.arange(length - count, length)[:, None]
            tokens = torch.arange(length)
            hidden = tokens > places if kind["causal"] else torch.zeros(count, length, dtype=torch.bool)
            if kind["window_left"] >= 0:
                hidden = hidden | (tokens < places - kind["window_left"])
            scores = torch.einsum("qhd,jhd->hqj", q[rows].double(), keys) * kind["sm_scale"]
            if kind["logits_soft_cap"]:
                scores = torch.tanh(scores / kind["logits_soft_cap"]) * kind["logits_soft_cap"]
            scores = scores.masked_fill(hidden, -torch.inf)
            result[rows] = torch.einsum("hqj,jhd->qhd", torch.softmax(scores, -1), values)
            lse[rows] = (torch.logsumexp(scores, -1) / math.log(2)).transpose(0, 1).float()
        out.copy_(result)
        return (out, lse) if return_lse else out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    """One query per sequence, no mask but the window."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
                 use_tensor_cores: bool = False, paged_kv_indptr_buffer: Tensor | None = None,
                 paged_kv_indices_buffer: Tensor | None = None, paged_kv_last_page_len_buffer: Tensor | None = None,
                 backend: str = "auto", jit_args: list[Any] | None = None) -> None:  # fmt: skip
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend)
        assert use_tensor_cores, "the other kernel serves some groups only"
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            self.indptr, self.indices = paged_kv_indptr_buffer, paged_kv_indices_buffer
            self.last = paged_kv_last_page_len_buffer

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
             head_dim: int, page_size: int, *, pos_encoding_mode: str = "NONE", window_left: int = -1,
             logits_soft_cap: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
             sm_scale: float | None = None, non_blocking: bool = True) -> None:  # fmt: skip
        queries = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan(
            queries, indptr, indices, last_page_len, page_size, heads=num_qo_heads, kv_heads=num_kv_heads,
            head_dim=head_dim, window_left=window_left, logits_soft_cap=logits_soft_cap, sm_scale=sm_scale,
            q_data_type=q_data_type, kv_data_type=kv_data_type, causal=False,
        )  # fmt: skip

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, out: Tensor | None = None,
            lse: Tensor | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        self.runs.append(lambda: self._run(q, paged_kv_cache, out, return_lse))
        return self.runs[-1]()


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    """Several queries per sequence, the last ones of its tokens."""

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", use_cuda_graph: bool = False,
                 qo_indptr_buf: Tensor | None = None, paged_kv_indptr_buf: Tensor | None = None,
                 paged_kv_indices_buf: Tensor | None = None, paged_kv_last_page_len_buf: Tensor | None = None,
                 custom_mask_buf: Tensor | None = None, mask_indptr_buf: Tensor | None = None, backend: str = "auto",
                 jit_args: list[Any] | None = None, jit_kwargs: dict[str, Any] | None = None) -> None:  # fmt: skip
        assert not use_cuda_graph, "prefills are not captured"
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, backend)

    def plan(self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
             paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, page_size: int,
             head_dim_vo: int | None = None, custom_mask: Tensor | None = None,
             packed_custom_mask: Tensor | None = None, causal: bool = False, pos_encoding_mode: str = "NONE",
             use_fp16_qk_reduction: bool = False, sm_scale: float | None = None, window_left: int = -1,
             logits_soft_cap: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
             q_data_type: Any = "float16", kv_data_type: Any = None,
             non_blocking: bool = True) -> None:  # fmt: skip
        assert custom_mask is None
        assert packed_custom_mask is None
        self._plan(
            qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, heads=num_qo_heads,
            kv_heads=num_kv_heads, head_dim=head_dim_qk, window_left=window_left, logits_soft_cap=logits_soft_cap,
            sm_scale=sm_scale, q_data_type=q_data_type, kv_data_type=kv_data_type, causal=causal,
        )  # fmt: skip

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *args: Any, out: Tensor | None = None,
            lse: Tensor | None = None, return_lse: bool = False) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        self.runs.append(lambda: self._run(q, paged_kv_cache, out, return_lse))
        return self.runs[-1]()


def fake_flashinfer() -> Any:
    """The module, to be put in sys.modules; `made` lists the wrappers that it has handed out."""
    module: Any = ModuleType("flashinfer")
    module.made = []

    def keeping(kind: type[_Wrapper]) -> Callable[..., _Wrapper]:
        def make(*args: Any, **kwargs: Any) -> _Wrapper:
            module.made.append(kind(*args, **kwargs))
            return module.made[-1]

        return make

    for kind in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper):
        setattr(module, kind.__name__, keeping(kind))
    return module
