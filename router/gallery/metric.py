"""A cosine that looks past what differs between prompts of one and the same adapter.

With S the covariance of embeddings within candidates (around their candidate's mean), mu the mean of the candidates'
means and lambda = shrinkage * trace(S) / min(degrees of freedom, dim):

    M = lambda (S + lambda I)^-1 = I - V diag(s / (s + lambda)) V^T,      s, V eigenvalues and -vectors of S
    cos_M(q, c) = <q - mu', c - mu'>_M / (|q - mu'|_M |c - mu'|_M),       mu' = (1 - 1 / candidates) mu

What all adapters' prompts vary in (their arguments, their phrasing) weighs little, what tells adapters apart weighs
much; this is within-class covariance normalisation (Hatch, Kajarekar and Stolcke 2006) with the shrinkage of
regularised discriminant analysis (Friedman 1989). mu' takes out what all embeddings of an encoder share; it is scaled
because the mean of one candidate says nothing about the others. With no candidate of two examples, M = I.

The base is no candidate here: its prompts are of many kinds, and what tells an adapter's from a near miss would count
as spread within one of them. The price: a prompt that asks an adapter's question among the base's looks more like the
base's.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats

SHRINKAGE = 0.1
MAX_DIRECTIONS = 256  # of V: a query costs 2 * dim * MAX_DIRECTIONS multiplications more, whatever was fitted on
_NO_SPREAD = 1e-9  # squared distance from a candidate's mean, of unit rows: rounding


@dataclass(frozen=True, slots=True)
class Metric:
    """mu' float32 [dim], V float32 [directions, dim] (orthonormal rows), s / (s + lambda) float32 [directions]."""

    mean: Floats
    directions: Floats
    damping: Floats

    def weigh(self, rows: Floats) -> Floats:
        """M (x - mu') for every row x: float32 [n, dim]."""
        centred = rows - self.mean
        return _less(centred, self.directions, self.damping)

    def whiten(self, rows: Floats) -> Floats:
        """M^(1/2) (x - mu') for every row x: float32 [n, dim], whose dot products are those of M."""
        centred = rows - self.mean
        return _less(centred, self.directions, 1 - np.sqrt(1 - self.damping))

    def norms(self, rows: Floats) -> Floats:
        """|x - mu'|_M for every row x: float32 [n]."""
        centred = rows - self.mean
        squares = np.einsum("nd,nd->n", centred, centred) - ((centred @ self.directions.T) ** 2) @ self.damping
        return np.asarray(np.sqrt(np.maximum(squares, 0)), dtype=np.float32)


def _less(rows: Floats, directions: Floats, shares: Floats) -> Floats:
    """rows - rows V^T diag(shares) V."""
    return np.asarray(rows - ((rows @ directions.T) * shares) @ directions, dtype=np.float32)


def plain_metric(dim: int) -> Metric:
    """The ordinary cosine: mu' = 0, M = I."""
    return Metric(np.zeros(dim, np.float32), np.zeros((0, dim), np.float32), np.zeros(0, np.float32))


def fit_metric(groups: Sequence[Floats], dim: int, shrinkage: float = SHRINKAGE) -> Metric:
    """The metric of embeddings [n_i, dim] grouped by candidate, empty groups left out. See the module."""
    groups = [g for g in groups if len(g)]
    if not groups:
        return plain_metric(dim)
    means = np.stack([g.mean(axis=0) for g in groups])
    mean = np.asarray(means.mean(axis=0) * (1 - 1 / len(groups)), dtype=np.float32)
    residuals = np.concatenate([g - m for g, m in zip(groups, means, strict=True)]).astype(np.float64)
    degrees = len(residuals) - len(groups)
    spread = float((residuals**2).sum()) / max(degrees, 1)
    if spread < _NO_SPREAD:
        return replace(plain_metric(dim), mean=mean)
    variances, directions = _principal(residuals / np.sqrt(degrees))
    floor = shrinkage * spread / min(degrees, dim)
    damping = variances / (variances + floor)
    return Metric(mean, directions.astype(np.float32), damping.astype(np.float32))


def whitening(rows: Floats, shrinkage: float) -> Metric:
    """The metric of one set of rows [n, dim]: mu' is their mean, S their covariance.

    `Metric.whiten` then gives (S / lambda + I)^(-1/2) (x - mu'), lambda = shrinkage * trace(S) / dim.
    """
    mean = np.asarray(rows.mean(axis=0), dtype=np.float32)
    residuals = (rows - mean).astype(np.float64)
    spread = float((residuals**2).sum()) / len(rows)
    if spread < _NO_SPREAD:
        return replace(plain_metric(rows.shape[1]), mean=mean)
    variances, directions = _principal(residuals / np.sqrt(len(rows)))
    damping = variances / (variances + shrinkage * spread / rows.shape[1])
    return Metric(mean, directions.astype(np.float32), damping.astype(np.float32))


def _principal(rows: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The largest eigenvalues of rows^T rows, and their vectors as rows, by the smaller of the two Gram matrices."""
    n, dim = rows.shape
    values, vectors = np.linalg.eigh(rows @ rows.T if n < dim else rows.T @ rows)
    order = np.argsort(values)[::-1][:MAX_DIRECTIONS]
    order = order[values[order] > 1e-6 * max(values[order[0]], 1e-30)]
    values, vectors = values[order], vectors[:, order]
    directions = (vectors.T @ rows) / np.sqrt(values)[:, None] if n < dim else vectors.T
    return values, directions
