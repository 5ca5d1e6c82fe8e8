"""Memberships as features: a linear model over them has an intercept for every part of a partition of the queries."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from loramux.router.interface import Floats


@dataclass(frozen=True, slots=True)
class Partition:
    """The part of x is argmax_j (w_j.x + o_j), the first of equals: `weights` [k, dim], `offsets` [k]."""

    weights: Floats
    offsets: Floats

    @classmethod
    def nearest(cls, centroids: Floats) -> "Partition":
        """By the nearest of the centroids [k, dim]: |x - c|^2 is least where 2 c.x - |c|^2 is largest."""
        return cls(2 * centroids, -(centroids**2).sum(1))

    def __call__(self, rows: Floats) -> npt.NDArray[np.int64]:
        """int64 [n], values 0 .. k - 1, of rows [n, dim]."""
        return np.asarray((rows @ self.weights.T + self.offsets).argmax(1), np.int64)


@dataclass(frozen=True, slots=True)
class Memberships:
    """phi(x) = [x, scale / sqrt(L) * (onehot of x's part in partition 1, .., in partition L)].

    With `scale` above the rows' norm the parts' intercepts are shrunk less than the slopes, so what the queries of a
    part have in common is learnt from few rows and single rows do not overrule it. Partitions may be coarse and fine.
    """

    partitions: tuple[Partition, ...]
    scale: float

    @property
    def width(self) -> int:
        """Features added to those of x."""
        return sum(len(partition.offsets) for partition in self.partitions)

    def __call__(self, rows: Floats) -> Floats:
        """float32 [n, dim + width] of float32 [n, dim]."""
        start = rows.shape[1]
        features = np.zeros((len(rows), start + self.width), np.float32)
        features[:, :start] = rows
        for partition in self.partitions:
            features[np.arange(len(rows)), start + partition(rows)] = self.scale / np.sqrt(len(self.partitions))
            start += len(partition.offsets)
        return features
