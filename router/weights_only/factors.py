"""What is kept of an adapter's matrices for routing: small factors of s B A = U S V^T, computed once."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from loramux.kernels.lora.interface import ModuleWeights
from loramux.router.interface import Floats

Method = Literal["balanced", "norm", "arrow"]


def norm_factor(pair: ModuleWeights, rank: int | None = None) -> Floats:
    """S V^T float32 [min(rank, r, in, out), in] of s B A = U S V^T, so that |S V^T x| = |s B A x| for every x.

    Through the factors' QR: B = Q_B R_B, A^T = Q_A R_A; then s B A = Q_B (s R_B R_A^T) Q_A^T, whose middle is r x r,
    and multiplying by Q_B changes no norm (SpectR, arXiv 2504.03454; by QR, without forming B A, as SEQR). Rows come
    in descending order of singular value, so a smaller `rank` keeps the best approximation of that rank: its norm is
    at most the exact one.
    """
    a, b = pair.A.to("cpu", torch.float64), pair.B.to("cpu", torch.float64)
    r_b = torch.linalg.qr(b, mode="r")[1]
    q_a, r_a = torch.linalg.qr(a.T)
    _, singular, rotation = torch.linalg.svd(pair.scale * (r_b @ r_a.T), full_matrices=False)
    rows = singular[:rank, None] * (rotation[:rank] @ q_a.T)
    return np.ascontiguousarray(rows.to(torch.float32).numpy())


def balanced_factor(pair: ModuleWeights, rank: int | None = None) -> Floats:
    """S^(1/2) V^T float32 [min(rank, r, in, out), in]: what A would be if A and B had equal shares of the product.

    Between the norm, where one strong direction drowns the others, and the plain subspace V^T, where noise counts as
    much as what was learnt. Zero rows stay zero.
    """
    rows = norm_factor(pair, rank)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.sqrt(np.where(lengths > 0, lengths, 1)), dtype=np.float32)


def arrow_factor(pair: ModuleWeights) -> Floats:
    """v^T float32 [1, in], v the top right singular vector of B A: |v^T x| = |<x, v>| (Arrow, arXiv 2405.11157).

    The zero row where B A is zero: such an adapter has no direction.
    """
    top = norm_factor(pair, rank=1)
    length = np.linalg.norm(top)
    return np.asarray(top / length if length > 0 else top, dtype=np.float32)


def factor(pair: ModuleWeights, method: Method, rank: int | None) -> Floats:
    """The factor of a method, of at most `rank` rows (None: all)."""
    if method == "arrow":
        return arrow_factor(pair)
    return norm_factor(pair, rank) if method == "norm" else balanced_factor(pair, rank)


def exact_norms(pair: ModuleWeights, x: Tensor) -> Tensor:
    """|s B (A x)| per token, [tokens] of x [tokens, in]: the plain twin of `norm_factor`."""
    a, b = pair.A.to(x.dtype), pair.B.to(x.dtype)
    return ((pair.scale * ((x @ a.T) @ b.T)) ** 2).sum(-1).sqrt()
