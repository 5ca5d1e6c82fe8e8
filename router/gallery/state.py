"""A gallery as arrays and plain values, so that a start needs no example encoded and nothing fitted again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from loramux.router.gallery.conformal import Calibration, calibrate
from loramux.router.gallery.crossfit import Shape
from loramux.router.gallery.metric import Metric
from loramux.router.gallery.sample import Fitted, Share
from loramux.router.interface import Floats

VERSION = 4


@dataclass(frozen=True, slots=True)
class GalleryState:
    """Everything a gallery knows: candidates' centroids in the order of `keys`, what was fitted, and on what.

    `rows` float32 [candidates, centroids, dim], `examples` float32 [candidates] the number of rows to a centroid,
    `discount` float32 [candidates], `base` float32 [n, dim] the base's examples, `kept` what is kept of the adapters',
    `fitted` what metric and calibration were made on.
    """

    shape: Shape
    keys: tuple[str, ...]
    rows: Floats
    examples: Floats
    discount: Floats
    metric: Metric
    base: Floats
    kept: Mapping[str, Share]
    fitted: Fitted
    calibration: Calibration

    def pack(self) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
        """(float32 arrays by name, values that JSON can hold)."""
        empty = np.zeros((0, self.shape.dim), np.float32)
        arrays: dict[str, npt.NDArray[Any]] = {
            "rows": self.rows,
            "examples": self.examples,
            "discount": self.discount,
            "metric.mean": self.metric.mean,
            "metric.directions": self.metric.directions,
            "metric.damping": self.metric.damping,
            "base": self.base,
            "sample": np.concatenate([empty, *(share.rows for share in self.kept.values())]),
            "calibration.held_out": self.calibration.held_out,
            "calibration.negatives": self.calibration.negatives,
            "calibration.outsiders": self.calibration.outsiders,
        }
        info = {
            "version": VERSION,
            "dim": self.shape.dim,
            "max_centroids": self.shape.most,
            "alpha": self.calibration.alpha,
            "keys": list(self.keys),
            "sample": [[key, len(share.rows), share.of] for key, share in self.kept.items()],
            "fitted": {"size": self.fitted.size, "shares": dict(self.fitted.shares)},
        }
        return arrays, info

    @classmethod
    def unpack(cls, arrays: Mapping[str, npt.NDArray[Any]], info: Mapping[str, Any]) -> "GalleryState":
        """The inverse of `pack`. Raises ValueError for another version, and for arrays that contradict `info`."""
        if info.get("version") != VERSION:
            raise ValueError(f"the gallery's state has version {info.get('version')!r}, this is version {VERSION}")
        try:
            shape = Shape(int(info["dim"]), int(info["max_centroids"]))
            keys = tuple(str(key) for key in info["keys"])
            sizes = {str(key): (int(size), int(of)) for key, size, of in info["sample"]}
            fitted = info["fitted"]
            fitted = Fitted(int(fitted["size"]), {str(key): int(k) for key, k in fitted["shares"].items()})
            alpha = float(info["alpha"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError("the gallery's state has damaged values") from error
        if any(not 1 <= size <= of for size, of in sizes.values()):
            raise ValueError("the gallery's state has damaged values")
        n, k, dim = len(keys), len(arrays.get("metric.damping", ())), shape.dim
        free = (None,)
        expected: dict[str, tuple[int | None, ...]] = {
            "rows": (n, shape.most, dim),
            "examples": (n,),
            "discount": (n,),
            "metric.mean": (dim,),
            "metric.directions": (k, dim),
            "metric.damping": (k,),
            "base": (None, dim),
            "sample": (sum(size for size, _ in sizes.values()), dim),
            "calibration.held_out": free,
            "calibration.negatives": free,
            "calibration.outsiders": free,
        }
        for name, wanted in expected.items():
            found = arrays.get(name)
            fits = found is not None and found.dtype == np.float32 and len(found.shape) == len(wanted)
            if not fits or any(w not in (None, f) for w, f in zip(wanted, arrays[name].shape, strict=True)):
                raise ValueError(f"the gallery's state has no float32 array {name!r} of the right shape")
        ends = np.cumsum([size for size, _ in sizes.values()])
        parts = np.split(arrays["sample"], ends[:-1]) if sizes else []
        kept = {key: Share(rows.copy(), of) for (key, (_, of)), rows in zip(sizes.items(), parts, strict=True)}
        return cls(
            shape,
            keys,
            arrays["rows"],
            arrays["examples"],
            arrays["discount"],
            Metric(arrays["metric.mean"], arrays["metric.directions"], arrays["metric.damping"]),
            arrays["base"],
            kept,
            fitted,
            calibrate(alpha, *(arrays[f"calibration.{part}"] for part in ("held_out", "negatives", "outsiders"))),
        )
