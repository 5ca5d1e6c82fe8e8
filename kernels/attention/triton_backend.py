"""`TritonAttentionBackend`: paged attention as Triton kernels over the engine's caches.

A step launches, per layer, `kv_write.py`, then `decode.py` (splits and their reduction) for its decodes and
`prefill.py` for the rest. A token's result follows from its own sequence and the layer's constants alone.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from .decode import decode_kernel, reduce_kernel
from .interface import AttentionBatch, AttentionLimits, AttentionPlan, AttentionShape
from .kv_launch import write_kv
from .launch import MIN_SPLIT, SPLITS_AT_ONCE, ShapeConfig, exponents, shape_config, split_bound
from .prefill import prefill_kernel
from .triton_plan import Metadata, Tiling, TritonAttentionPlan


class TritonAttentionBackend:
    """Paged attention as Triton kernels; the contract is `interface.AttentionBackend`.

    A plan's metadata lives in one static buffer: a plan is valid until `plan` makes another one, and `write` and
    `attend` refuse an outdated one. q and the caches have the backend's dtype; all sums are float32.
    """

    def __init__(
        self,
        shapes: Sequence[AttentionShape],
        *,
        dtype: torch.dtype,
        device: torch.device,
        block_size: int,
        limits: AttentionLimits,
        tiles_only: bool = False,
    ) -> None:
        """`tiles_only` is as in `make_backend`. Raises ValueError for a dtype or device the kernels do not serve."""
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"dtype {dtype} is not served; use float32, bfloat16 or float16")
        if device.type != "cuda" and isinstance(decode_kernel, JITFunction):
            raise ValueError(f"Triton kernels do not run on {device}")
        self.dtype = dtype
        self.device = device
        self.block_size = block_size
        major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
        self._configs = {shape: shape_config(shape, dtype, major * 10 + minor) for shape in shapes}
        tilings = [Tiling(shape.group, config.prefill.block_m) for shape, config in self._configs.items()]
        self._metadata = Metadata(limits, block_size, tilings, device, tiles_only=tiles_only)
        places = [(shape.heads * config.max_splits, shape.v_dim) for shape, config in self._configs.items()]
        parts = limits.max_sequences * max(place * v_dim for place, v_dim in places)
        stats = limits.max_sequences * max(place for place, _ in places) * 2
        with torch.inference_mode(False):
            self._parts = torch.empty(parts, dtype=torch.float32, device=device)
            self._stats = torch.empty(stats, dtype=torch.float32, device=device)
        self._latest: TritonAttentionPlan | None = None

    @property
    def scratch_bytes(self) -> int:
        """Device bytes of the metadata and of the decode splits' partial sums."""
        return self._metadata.nbytes + self._parts.nbytes + self._stats.nbytes

    def plan(self, batch: AttentionBatch, *, decode_rows: int | None = None) -> TritonAttentionPlan:
        """The step's plan; its metadata is copied on the current stream, without waiting for the device."""
        self._latest = None
        self._latest = self._metadata.write(batch, decode_rows)
        return self._latest

    def _current(self, plan: AttentionPlan) -> TritonAttentionPlan:
        if self._latest is None or plan is not self._latest:
            raise ValueError("the plan is outdated: its metadata was overwritten by a later one")
        return self._latest

    def _check(self, rows: Tensor, k: Tensor, v: Tensor, plan: TritonAttentionPlan) -> None:
        if k.dtype != self.dtype or v.dtype != self.dtype or not (k.is_contiguous() and v.is_contiguous()):
            raise ValueError(f"the caches must be contiguous and {self.dtype}")
        if k.shape[1] != self.block_size or v.shape[:3] != k.shape[:3]:
            raise ValueError(f"caches {tuple(k.shape)} and {tuple(v.shape)} do not have blocks of {self.block_size}")
        if rows.shape[0] != plan.num_tokens:
            raise ValueError(f"{rows.shape[0]} rows were given to a plan of {plan.num_tokens}")

    def write(self, k: Tensor, v: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
        """k[slot of t] = key[t], v[slot of t] = value[t]; key and value [tokens, kv_heads, dim] of any strides."""
        current = self._current(plan)
        self._check(key, k, v, current)
        write_kv(k, v, key, value, self._metadata.slots)

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
        """q [tokens, heads, k_dim] -> [tokens, heads, v_dim]; `out`, when given, has unit stride in its last dimension.

        Raises ValueError for an outdated plan, and for tensors and numbers the kernels do not serve.
        """
        current = self._current(plan)
        self._check(q, k, v, current)
        shape = AttentionShape(q.shape[1], k.shape[2], q.shape[2], v.shape[3])
        config = self._configs.get(shape)
        if config is None or k.shape[3] != shape.k_dim or q.dtype != self.dtype:
            raise ValueError(f"{q.dtype} queries {tuple(q.shape)} do not belong to the caches of this backend")
        if window is not None and window < 1:
            raise ValueError(f"window {window} must be positive")
        q = _unit_stride(q)
        if out is None:
            out = q.new_empty(q.shape[0], shape.heads, shape.v_dim)
        if current.padded and not current.num_decodes:
            out.zero_()  # a tile without queries writes nothing
        inner, coefficient = exponents(scaling, softcap)
        numbers = (0 if window is None else window, inner, coefficient)
        constants: dict[str, Any] = {
            "GROUP": shape.group,
            "K_DIM": shape.k_dim,
            "V_DIM": shape.v_dim,
            "KV_HEADS": shape.kv_heads,
            "BLOCK_SIZE": self.block_size,
            "HAS_WINDOW": window is not None,
            "HAS_SOFTCAP": softcap is not None,
            "BLOCK_D": config.block_d,
            "BLOCK_V": config.block_v,
        }
        if current.num_decodes:
            self._decode(q, k, v, out, sinks, current, shape, config, numbers, constants)
        tiling = Tiling(shape.group, config.prefill.block_m)
        if current.tiles.get(tiling):
            prefill_kernel[(current.tiles[tiling], shape.kv_heads)](
                out,
                q,
                k,
                v,
                q if sinks is None else sinks,
                self._metadata.tables,
                self._metadata.tiles[tiling],
                q.stride(0),
                q.stride(1),
                out.stride(0),
                out.stride(1),
                *numbers,
                **constants,
                HAS_SINKS=sinks is not None,
                BLOCK_M=config.prefill.block_m,
                BLOCK_N=config.prefill.block_n,
                num_warps=config.prefill.num_warps,
                num_stages=config.prefill.num_stages,
            )
        return out

    def _decode(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sinks: Tensor | None, plan: TritonAttentionPlan,
                shape: AttentionShape, config: ShapeConfig, numbers: tuple[int, float, float],
                constants: dict[str, Any]) -> None:  # fmt: skip
        window = numbers[0] if constants["HAS_WINDOW"] else None
        splits = config.max_splits if plan.longest is None else split_bound(config, plan.longest, window)
        decode_kernel[(plan.num_decodes, shape.kv_heads * config.head_tiles, splits)](
            self._parts,
            self._stats,
            q,
            k,
            v,
            self._metadata.tables,
            self._metadata.contexts,
            self._metadata.first_entries,
            q.stride(0),
            q.stride(1),
            *numbers,
            **constants,
            MIN_SPLIT=MIN_SPLIT,
            MAX_SPLITS=config.max_splits,
            HEAD_TILES=config.head_tiles,
            BLOCK_M=config.decode.block_m,
            BLOCK_N=config.decode.block_n,
            num_warps=config.decode.num_warps,
            num_stages=config.decode.num_stages,
        )
        reduce_kernel[(plan.num_decodes, shape.heads)](
            out,
            self._parts,
            self._stats,
            q if sinks is None else sinks,
            self._metadata.contexts,
            out.stride(0),
            out.stride(1),
            numbers[0],
            V_DIM=shape.v_dim,
            HAS_WINDOW=constants["HAS_WINDOW"],
            HAS_SINKS=sinks is not None,
            MIN_SPLIT=MIN_SPLIT,
            MAX_SPLITS=config.max_splits,
            SPLITS_AT_ONCE=SPLITS_AT_ONCE,
            BLOCK_N=config.decode.block_n,
            BLOCK_V=config.block_v,
            num_warps=4,
        )


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(-1) == 1 else rows.contiguous()
