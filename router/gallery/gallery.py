"""Centroids of every adapter's example prompts, and how near a query comes to them.

    score(q, adapter) = max over its centroids c of cos_M(q, c)  -  0.7 * base(q)
    base(q) = the mean of the 3 largest cos_M(q, b) over the base's examples b

(no base examples: no second term), where the length of a centroid of few examples is corrected for their number
(`centroid_lengths`). Centroids are kept in one float32 matrix [slots, centroids, dim], so a query over all adapters is
one matrix-vector product. The metric M acts on the query, so that a new metric changes one length per centroid and
nothing else.

One writer at a time (a lock), any number of readers without one: a reader works on a `GallerySnapshot`, which no later
change touches. Slots freed by a change are used again only when no snapshot that knew them is left; where many are
free, what is left moves to another matrix.
"""

import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from loramux.router.gallery.centroids import unit_rows
from loramux.router.gallery.conformal import Calibration, calibrate
from loramux.router.gallery.crossfit import (
    Shape,
    centroid_lengths,
    centroids,
    cross_scores,
    evidence,
    nearest_mean,
)
from loramux.router.gallery.metric import Metric, fit_metric, plain_metric
from loramux.router.gallery.sample import MAX_BASE_EXAMPLES, Fitted, Sample
from loramux.router.gallery.state import GalleryState
from loramux.router.interface import BASE, Floats

Kind = Literal["examples", "description"]

DESCRIPTION_DISCOUNT = 0.05  # off the score of an adapter known by its description alone
_GATHER_SHARE = 8  # with fewer than 1/8 of the slots asked for, their rows are gathered first
_LEAST_SLOTS = 64  # by which the matrix grows at least
_SLACK_SHARE = 0.25  # of slots without a candidate after a change: more, and the matrix is made anew
_BLOCK = 4096  # slots whose lengths are computed at once


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class GallerySnapshot:
    """The gallery at one moment: a `Scorer` over embeddings of the gallery's encoder.

    `rows` float32 [slots, centroids, dim], `inverse` float32 [slots, centroids] (1 / `centroid_lengths`) and `discount`
    float32 [slots] are shared with later snapshots, which write to other slots only.
    """

    slots: Mapping[str, int]
    rows: Floats
    inverse: Floats
    discount: Floats
    metric: Metric
    base_rows: Floats
    base_inverse: Floats
    calibration: Calibration
    epoch: int
    used: int

    @property
    def candidates(self) -> tuple[str, ...]:
        """Every adapter with examples or a description, in no particular order."""
        return tuple(self.slots)

    @property
    def knows_base(self) -> bool:
        """Whether the base has examples of its own."""
        return len(self.base_rows) > 0

    def score(self, embeddings: Floats, keys: Sequence[str] | None = None) -> Floats:
        """float32 [n, len(keys)] of embeddings [n, dim], for all candidates or those named. KeyError for others."""
        asked = self.slots.values() if keys is None else map(self.slots.__getitem__, keys)
        return self.score_at(embeddings, np.fromiter(asked, np.int64, len(self.slots) if keys is None else len(keys)))

    def score_at(self, embeddings: Floats, wanted: npt.NDArray[np.int64]) -> Floats:
        """`score` for the candidates in these slots: float32 [n, len(wanted)]."""
        queries = np.asarray(embeddings, dtype=np.float32)
        weighed = self.metric.weigh(queries)
        gathered = len(wanted) * _GATHER_SHARE < self.used
        rows, inverse = (a[wanted] if gathered else a[: self.used] for a in (self.rows, self.inverse))
        products = (rows.reshape(-1, rows.shape[-1]) @ weighed.T - weighed @ self.metric.mean) * inverse.reshape(-1, 1)
        best = _max_of_middle(products.reshape(*inverse.shape, len(queries)))
        if not gathered:
            best = best[wanted]
        lengths = self.metric.norms(queries)[:, None]
        lengths = np.where(lengths > 0, lengths, 1)
        likeness = np.asarray(best.T / lengths, dtype=np.float32) - self.discount[wanted]
        return evidence(likeness, self._base_products(weighed) / lengths if self.knows_base else None)

    def base_likeness(self, embeddings: Floats) -> Floats | None:
        """Mean of the largest cos_M with the base's examples, float32 [n]; None while there are none."""
        if not self.knows_base:
            return None
        queries = np.asarray(embeddings, dtype=np.float32)
        lengths = self.metric.norms(queries)
        best = self._base_products(self.metric.weigh(queries))[:, 0]
        return np.asarray(best / np.where(lengths > 0, lengths, 1), dtype=np.float32)

    def _base_products(self, weighed: Floats) -> Floats:
        """The mean of the largest <q, b>_M / |b|_M of weighed queries, b the base's examples: float32 [n, 1]."""
        one = len(weighed) == 1  # not by BLAS, whose threads would go on spinning, for tens of milliseconds
        likeness = np.einsum("nd,bd->nb", weighed, self.base_rows) if one else weighed @ self.base_rows.T
        products = (likeness - (weighed @ self.metric.mean)[:, None]) * self.base_inverse
        return nearest_mean(products)[:, None]


@dataclass(slots=True)
class _Matrix:
    """Slots of centroids: what is free, and what will be once nobody looks at it."""

    rows: Floats
    inverse: Floats
    discount: Floats
    examples: Floats  # to a centroid
    used: int = 0
    free: list[int] = field(default_factory=list)
    retired: list[tuple[int, int]] = field(default_factory=list)  # (last epoch that knew the slot, slot)

    def take(self) -> int:
        """A slot that no living snapshot knows; the matrix doubles when there is none."""
        if self.free:
            return self.free.pop()
        if self.used == len(self.rows):
            self.rows, self.inverse, self.discount, self.examples = (
                np.concatenate([a, np.zeros((max(len(a), _LEAST_SLOTS), *a.shape[1:]), np.float32)])
                for a in (self.rows, self.inverse, self.discount, self.examples)
            )
        self.used += 1
        return self.used - 1

    def reclaim(self, oldest: int) -> None:
        """Frees the slots that only snapshots before epoch `oldest` knew."""
        self.free += [slot for epoch, slot in self.retired if epoch < oldest]
        self.retired = [(epoch, slot) for epoch, slot in self.retired if epoch >= oldest]


@dataclass(frozen=True, slots=True)
class _Entry:
    rows: Floats
    kind: Kind


class Gallery:
    """The writer's side. Changes take effect at once; what is fitted across adapters follows when enough has changed.

    A change that fits takes tens of milliseconds (some 50 adapters) to about a second (any number), so an event loop
    should leave changes to a worker thread; readers never wait.

    `alpha` is the share of belonging prompts that the calibrated threshold may turn away, or up to twice that where
    others come close (see `conformal`); it needs 1 / alpha - 1 examples over all adapters that have two or more (19 at
    the default). Centroids are made of all of an adapter's examples, metric and threshold of a bounded number over all
    adapters (see `sample`). Adapters get up to `max_centroids`, one per four examples. The base's own queries go in
    under the key `BASE`: they make the score two-sided and are never a candidate, and with enough of them the threshold
    is two-sided.
    """

    def __init__(self, dim: int, *, alpha: float = 0.05, max_centroids: int = 3) -> None:
        if dim < 1 or max_centroids < 1:
            raise ValueError("dim and max_centroids must be at least 1")
        self._alpha = alpha
        self._shape = Shape(dim, max_centroids)
        self._lock = threading.Lock()
        self._epoch = 0
        self._alive: weakref.WeakSet[GallerySnapshot] = weakref.WeakSet()
        self._sample = Sample({}, Fitted(0, {}))
        self._base = np.zeros((0, dim), np.float32)
        self._matrix = _Matrix(
            np.zeros((0, max_centroids, dim), np.float32),
            np.zeros((0, max_centroids), np.float32),
            np.zeros(0, np.float32),
            np.zeros(0, np.float32),
        )
        empty = np.zeros(0, np.float32)
        self._publish(_Draft({}, self._matrix), plain_metric(dim), self._base, calibrate(alpha, empty, empty, empty))

    @property
    def dim(self) -> int:
        """Columns of the embeddings."""
        return self._shape.dim

    def snapshot(self) -> GallerySnapshot:
        """The gallery as it is now."""
        return self._snapshot

    def put(self, key: str, embeddings: Floats, kind: Kind = "examples") -> None:
        """Adds or replaces a candidate by embeddings [n, dim] of its example prompts, or of its description.

        A description counts as one example, whatever its number of rows, at a discount: it says what the adapter is
        for, not how it is asked. It takes no part in metric and calibration. Raises ValueError for embeddings that are
        no finite [n >= 1, dim] matrix, and for a description of the base.
        """
        self.put_many([(key, embeddings, kind)])

    def put_many(self, entries: Iterable[tuple[str, Floats, Kind]]) -> None:
        """`put` for each in turn, fitting once for all. Nothing changes if any is refused."""
        new = {key: _Entry(self._checked(key, rows, kind), kind) for key, rows, kind in entries}
        with self._lock:
            base = new.pop(BASE, None)
            if base is not None:
                self._base = base.rows[:MAX_BASE_EXAMPLES]
            self._sample.change({key: entry.rows for key, entry in new.items() if entry.kind == "examples"}, new)
            self._change(new, (), base_changed=base is not None)

    def remove(self, *keys: str) -> None:
        """Takes candidates out, or the base's examples; keys that are not there are ignored."""
        with self._lock:
            if BASE in keys:
                self._base = self._base[:0]
            self._sample.change({}, keys)
            self._change({}, keys, base_changed=BASE in keys)

    def state(self) -> GalleryState:
        """A copy of everything the gallery knows, to be stored and given to `from_state`."""
        with self._lock:
            now, order = self._snapshot, list(self._snapshot.slots.values())
            return GalleryState(
                shape=self._shape,
                keys=now.candidates,
                rows=now.rows[order],
                examples=self._matrix.examples[order],
                discount=now.discount[order],
                metric=now.metric,
                base=self._base,
                kept=self._sample.kept,
                fitted=self._sample.fitted,
                calibration=now.calibration,
            )

    @classmethod
    def from_state(cls, state: GalleryState) -> "Gallery":
        """The gallery that `state` was taken of: it scores the same, without fitting anything."""
        shape = state.shape
        gallery = cls(
            shape.dim,
            alpha=state.calibration.alpha,
            max_centroids=shape.most,
        )
        gallery._base = state.base
        gallery._sample = Sample(state.kept, state.fitted)
        n = len(state.keys)
        unmeasured = np.zeros(state.rows.shape[:2], np.float32)
        gallery._matrix = _Matrix(state.rows.copy(), unmeasured, state.discount.copy(), state.examples.copy(), n)
        draft = _Draft(dict(zip(state.keys, range(n), strict=True)), gallery._matrix)
        draft.inverse = _measured(draft.matrix, state.metric)
        gallery._publish(draft, state.metric, state.base, state.calibration)
        return gallery

    # What follows holds the lock.

    def _checked(self, key: str, embeddings: Floats, kind: Kind) -> Floats:
        rows = np.asarray(embeddings, dtype=np.float32)
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != self.dim:
            raise ValueError(f"embeddings of {key!r} must be [n >= 1, {self.dim}], got {list(rows.shape)}")
        if not np.isfinite(rows).all():
            raise ValueError(f"embeddings of {key!r} must be finite")
        if kind == "description":
            if key == BASE:
                raise ValueError("the base is known by its examples, not by a description")
            rows = unit_rows(rows).mean(axis=0, keepdims=True)
        return unit_rows(rows)

    def _change(self, new: Mapping[str, _Entry], gone: Sequence[str], *, base_changed: bool) -> None:
        """Publishes the candidates without those `gone` and with the `new`, fitted anew if it is time.

        All or nothing: what fails, for want of memory, say, leaves the published state and its slots as they were.
        """
        now = self._snapshot
        self._matrix.reclaim(min(s.epoch for s in list(self._alive)))
        draft = _Draft(dict(now.slots), self._matrix)
        try:
            for key in gone:
                draft.leave(key)
            if base_changed or self._sample.is_stale():
                self._fit(draft, new)
            else:
                self._write(draft, new, now.metric)
                draft.compact()
                self._publish(draft, now.metric, now.base_rows, now.calibration)
        except BaseException:
            draft.give_back()
            raise

    def _fit(self, draft: "_Draft", new: Mapping[str, _Entry]) -> None:
        """Publishes the draft with the `new`, metric, centroids and threshold made anew."""
        groups = self._sample.groups()
        metric = fit_metric(groups, self.dim)
        found = cross_scores(groups, self._base, self._shape)
        calibration = calibrate(self._alpha, found.own, found.base, found.outsiders)
        whole = {k: _Entry(share.rows, "examples") for k, share in self._sample.kept.items() if share.whole}
        self._write(draft, {**whole, **new}, metric)
        draft.compact()
        draft.inverse = _measured(draft.matrix, metric)
        self._publish(draft, metric, self._base, calibration)
        self._sample.use()

    def _write(self, draft: "_Draft", entries: Mapping[str, _Entry], metric: Metric) -> None:
        """Puts each candidate's centroids into a slot of its own; unused places repeat the first."""
        matrix = draft.matrix
        for key, entry in entries.items():
            draft.leave(key)
            slot = draft.take(key)
            rows = centroids(entry.rows, metric, self._shape.most)
            matrix.rows[slot] = rows[0]
            matrix.rows[slot, : len(rows)] = rows
            matrix.examples[slot] = len(entry.rows) / len(rows)
            matrix.inverse[slot] = _inverse(centroid_lengths(metric, matrix.rows[slot], matrix.examples[slot]))
            matrix.discount[slot] = DESCRIPTION_DISCOUNT if entry.kind == "description" else 0.0

    def _publish(self, draft: "_Draft", metric: Metric, base_rows: Floats, calibration: Calibration) -> None:
        base = (base_rows, _inverse(metric.norms(base_rows)))
        matrix = draft.matrix
        inverse = matrix.inverse if draft.inverse is None else draft.inverse
        arrays = (matrix.rows, inverse, matrix.discount)
        made = GallerySnapshot(draft.slots, *arrays, metric, *base, calibration, self._epoch + 1, matrix.used)
        self._alive.add(made)
        matrix.inverse = inverse
        matrix.retired += [(self._epoch, slot) for slot in draft.left]
        self._matrix, self._snapshot, self._epoch = matrix, made, made.epoch


@dataclass(slots=True)
class _Draft:
    """The next state's slots while they are filled: what was taken for it and what it leaves, in its `matrix`.

    `inverse` is set where all lengths are measured anew: older snapshots keep theirs.
    """

    slots: dict[str, int]
    matrix: _Matrix
    taken: list[int] = field(default_factory=list)
    left: list[int] = field(default_factory=list)
    inverse: Floats | None = None
    began_with: _Matrix = field(init=False)

    def __post_init__(self) -> None:
        self.began_with = self.matrix

    def leave(self, key: str) -> None:
        """The candidate, if it is there, no longer has its slot."""
        if key in self.slots:
            self.left.append(self.slots.pop(key))

    def take(self, key: str) -> int:
        """A slot for a candidate."""
        slot = self.matrix.take()
        self.taken.append(slot)
        self.slots[key] = slot
        return slot

    def compact(self) -> None:
        """Moves to a matrix of what is left, if much of it is not: every query reads all of it.

        Snapshots keep the old one.
        """
        old, order = self.matrix, list(self.slots.values())
        if old.used - len(order) > _SLACK_SHARE * old.used:
            rows, inverse, discount, examples = (a[order] for a in (old.rows, old.inverse, old.discount, old.examples))
            self.matrix = _Matrix(rows, inverse, discount, examples, used=len(order))
            self.slots.update(zip(self.slots, range(len(order)), strict=True))
            self.left = []

    def give_back(self) -> None:
        """The draft comes to nothing: nobody knows the slots that were taken for it."""
        self.began_with.free += self.taken


def _measured(matrix: _Matrix, metric: Metric) -> Floats:
    """1 / every centroid's length under a metric: float32 [slots, centroids]."""
    inverse = np.zeros_like(matrix.inverse)
    for start in range(0, matrix.used, _BLOCK):
        rows = matrix.rows[start : min(start + _BLOCK, matrix.used)]
        examples = np.repeat(matrix.examples[start : start + len(rows)], rows.shape[1])
        found = centroid_lengths(metric, rows.reshape(-1, rows.shape[-1]), examples)
        inverse[start : start + len(rows)] = _inverse(found).reshape(len(rows), -1)
    return inverse


def _inverse(lengths: Floats) -> Floats:
    return np.asarray(np.where(lengths > 0, 1 / np.where(lengths > 0, lengths, 1), 0), dtype=np.float32)


def _max_of_middle(values: Floats) -> Floats:
    """values.max(axis=1) of a short middle axis, as a few whole-array maxima (some 50 times as fast)."""
    best = np.array(values[:, 0], dtype=np.float32)
    for index in range(1, values.shape[1]):
        np.maximum(best, values[:, index], out=best)
    return best
