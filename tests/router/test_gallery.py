"""The gallery: scores against the formula, changes at once, snapshots that nothing touches."""

import gc
import json
import threading

import numpy as np
import pytest

from loramux.router.gallery import Gallery, GallerySnapshot, GalleryState
from loramux.router.gallery.centroids import unit_rows
from loramux.router.gallery.crossfit import Shape, centroids, cross_scores
from loramux.router.gallery.gallery import DESCRIPTION_DISCOUNT
from loramux.router.gallery.metric import fit_metric
from loramux.router.gallery.sample import LEAST, MAX_FITTED
from loramux.router.interface import BASE, Floats

DIM = 16


def prompts(seed: int, n: int = 8, dim: int = DIM) -> Floats:
    """Embeddings around a direction of their own."""
    rng = np.random.default_rng(seed)
    return unit_rows((rng.standard_normal(dim) + 0.4 * rng.standard_normal((n, dim))).astype(np.float32))


def filled(keys: int = 6, **settings: float) -> Gallery:
    gallery = Gallery(DIM, **settings)  # type: ignore[arg-type]
    gallery.put_many([(f"a{i}", prompts(i), "examples") for i in range(keys)])
    return gallery


def by_formula(snapshot: GallerySnapshot, queries: Floats, key: str, examples: int, base: Floats) -> np.ndarray:
    """score(q, adapter) of the module's docstring, in float64."""
    metric = snapshot.metric
    V, damping = metric.directions.astype(np.float64), metric.damping.astype(np.float64)
    M = np.eye(DIM) - V.T @ np.diag(damping) @ V
    q = queries.astype(np.float64) - metric.mean

    def cosines(rows: Floats, examples: float) -> np.ndarray:
        c = rows.astype(np.float64) - metric.mean
        squares = np.sum(c @ M * c, 1)
        true = np.maximum((examples * squares - 1) / (examples - 1), squares / 2) if examples > 1 else squares
        return np.asarray(q @ M @ c.T / np.sqrt(np.sum(q @ M * q, 1))[:, None] / np.sqrt(true))

    rows = np.unique(snapshot.rows[snapshot.slots[key]], axis=0)
    own = np.asarray(cosines(rows, examples / len(rows)).max(axis=1))
    return own - 0.7 * np.sort(cosines(base, 1), axis=1)[:, -3:].mean(axis=1) if len(base) else own


@pytest.mark.parametrize("with_base", [False, True])
def test_scores_are_the_formula(with_base: bool) -> None:
    gallery = filled()
    base = np.concatenate([prompts(50), prompts(51)]) if with_base else np.zeros((0, DIM), np.float32)
    if with_base:
        gallery.put(BASE, base)
    snapshot, queries = gallery.snapshot(), prompts(3, 5)
    scores = snapshot.score(queries)
    assert scores.shape == (5, 6)
    assert scores.dtype == np.float32
    for i, key in enumerate(snapshot.candidates):
        wanted = by_formula(snapshot, queries, key, len(prompts(0)), base)
        np.testing.assert_allclose(scores[:, i], wanted, atol=1e-4)
    assert (snapshot.base_likeness(queries) is not None) == with_base


def test_own_prompts_find_their_adapter() -> None:
    gallery = filled(40)
    snapshot = gallery.snapshot()
    for i in range(40):
        fresh = prompts(i, 20)[8:]
        assert {snapshot.candidates[j] for j in snapshot.score(fresh).argmax(axis=1)} == {f"a{i}"}


def test_named_candidates_score_as_among_all() -> None:
    snapshot, queries = filled(40).snapshot(), prompts(7, 3)
    whole = dict(zip(snapshot.candidates, snapshot.score(queries).T, strict=True))
    for keys in (["a3"], ["a39", "a0", "a7"], [f"a{i}" for i in reversed(range(40))]):
        np.testing.assert_allclose(snapshot.score(queries, keys), np.stack([whole[k] for k in keys], 1), atol=1e-5)
    assert snapshot.score(queries, []).shape == (3, 0)
    with pytest.raises(KeyError):
        snapshot.score(queries, ["unknown"])


def test_changes_count_at_once_and_older_snapshots_stay() -> None:
    gallery = filled(4)
    before = gallery.snapshot()
    query = prompts(100, 1)
    scores = before.score(query).copy()
    gallery.put("new", prompts(100))
    after = gallery.snapshot()
    assert after.candidates[int(after.score(query).argmax())] == "new"
    gallery.remove("new")
    gallery.remove("a0")
    gallery.put("a1", prompts(101))
    assert set(gallery.snapshot().candidates) == {"a1", "a2", "a3"}
    assert set(before.candidates) == {"a0", "a1", "a2", "a3"}
    np.testing.assert_array_equal(before.score(query), scores)


def test_slots_are_used_again_only_when_nobody_looks() -> None:
    gallery = filled(300)  # beyond the size at which each change refits
    held = gallery.snapshot()
    expected = held.score(prompts(5, 2)).copy()
    for i in range(200):
        gallery.put("a5", prompts(1000 + i))
    np.testing.assert_array_equal(held.score(prompts(5, 2)), expected)
    grown = gallery.snapshot().used
    del held
    gc.collect()
    for i in range(200):
        gallery.put("a5", prompts(2000 + i))
    assert gallery.snapshot().used == grown


def test_a_fit_leaves_few_slots_that_nobody_has_and_harms_no_older_snapshot() -> None:
    gallery = filled(60)
    held = gallery.snapshot()
    queries = prompts(5, 2)
    expected = held.score(queries).copy()
    for i in range(6):
        gallery.put(BASE, prompts(70 + i, 20), "examples")  # fits anew, while somebody looks at every slot
    after = gallery.snapshot()
    assert len(after.candidates) == 60
    assert 60 <= after.used <= 80
    assert len(after.rows) < len(held.rows) * 2
    np.testing.assert_array_equal(held.score(queries), expected)
    every, one = after.score(queries), after.score(queries, ["a7"])
    np.testing.assert_allclose(one[:, 0], every[:, after.candidates.index("a7")], atol=1e-6)


def test_a_change_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails, for want of memory, say: no slot is lost, or someone else's."""
    gallery = filled(12)
    for i in range(12):
        gallery.put(f"d{i}", prompts(200 + i, 1), "description")
    keys, queries = [*(f"a{i}" for i in range(12)), *(f"d{i}" for i in range(12))], prompts(3, 4)

    def fail(*_: object) -> None:
        raise MemoryError

    for step in ("cross_scores", "centroids", "_measured", "GallerySnapshot"):
        before = gallery.snapshot()
        expected = before.score(queries, keys).copy()
        for attempt in range(3):
            with monkeypatch.context() as broken:
                broken.setattr(f"loramux.router.gallery.gallery.{step}", fail)
                with pytest.raises(MemoryError):
                    gallery.put(BASE, prompts(70 + attempt, 20))
            assert gallery.snapshot() is before
        np.testing.assert_array_equal(gallery.snapshot().score(queries, keys), expected)
        del before
        gallery.put(BASE, prompts(80, 20))
        gallery.put("a3", prompts(3))
        found = gallery.snapshot()
        assert len(set(found.slots.values())) == len(found.slots) == 24
        for i in range(12):
            assert found.candidates[int(found.score(prompts(200 + i, 1)).argmax())] == f"d{i}"
        assert found.used <= 80


def test_much_that_is_removed_is_read_no_longer() -> None:
    gallery = filled(4)
    gallery.put_many([(f"d{i}", prompts(200 + i, 1), "description") for i in range(400)])
    held = gallery.snapshot()
    expected = held.score(prompts(5, 2)).copy()
    gallery.remove(*(f"d{i}" for i in range(390)))
    gallery.put("d400", prompts(600, 1), "description")
    after = gallery.snapshot()
    assert len(after.candidates) == 15
    assert after.used <= 20
    np.testing.assert_array_equal(held.score(prompts(5, 2)), expected)
    assert after.candidates[int(after.score(prompts(600, 1)).argmax())] == "d400"


def test_one_by_one_in_any_order_is_as_all_at_once() -> None:
    entries = [(f"a{i}", prompts(i), "examples") for i in range(12)] + [(BASE, prompts(70, 20), "examples")]
    at_once, single = Gallery(DIM), Gallery(DIM)
    at_once.put_many(entries)  # type: ignore[arg-type]
    for key, rows, _ in reversed(entries):
        single.put(key, rows)
    keys, queries = [f"a{i}" for i in range(12)], prompts(3, 4)
    one, other = at_once.snapshot(), single.snapshot()
    np.testing.assert_allclose(one.score(queries, keys), other.score(queries, keys), atol=1e-4)
    assert one.calibration.threshold == pytest.approx(other.calibration.threshold, abs=1e-4)


def test_large_galleries_refit_when_enough_is_new() -> None:
    gallery = filled(60)
    fitted = gallery.snapshot().metric
    gallery.put("one more", prompts(500))
    assert gallery.snapshot().metric is fitted
    assert "one more" in gallery.snapshot().candidates
    gallery.put_many([(f"b{i}", prompts(600 + i), "examples") for i in range(60)])
    assert gallery.snapshot().metric is not fitted


def test_an_adapter_without_examples_in_the_sample_changes_no_fit() -> None:
    gallery = filled(3)
    fitted = gallery.snapshot().metric
    gallery.put("described", prompts(9, 1), "description")
    gallery.remove("described")
    gallery.remove("never there")
    assert gallery.snapshot().metric is fitted


def test_a_description_is_one_example_at_a_discount() -> None:
    gallery = filled(3)
    gallery.put("example", prompts(9, 1))
    gallery.put("described", prompts(9, 1), "description")
    example, described = gallery.snapshot().score(prompts(9, 1), ["example", "described"])[0]
    assert described == pytest.approx(example - DESCRIPTION_DISCOUNT, abs=1e-5)
    assert len(gallery.snapshot().calibration.held_out) == 24  # neither has a second example


def test_calibration_is_pooled_and_says_what_is_missing() -> None:
    gallery = Gallery(DIM, alpha=0.05)
    gallery.put("a0", prompts(0))
    state = gallery.snapshot().calibration
    assert (state.threshold, state.needed, len(state.held_out)) == (None, 19, 8)
    gallery.put_many([("a1", prompts(1), "examples"), ("a2", prompts(2), "examples")])
    state = gallery.snapshot().calibration
    assert len(state.held_out) == 24
    assert state.threshold == pytest.approx(float(np.sort(state.held_out)[0]))
    gallery.put(BASE, prompts(80, 20))
    state = gallery.snapshot().calibration
    assert len(state.negatives) == 20
    assert state.accepted_of_base is not None
    gallery.remove(BASE)
    assert not len(gallery.snapshot().calibration.negatives)


def test_bad_embeddings_change_nothing() -> None:
    gallery = filled(2)
    before = gallery.snapshot()
    for rows in (np.zeros((0, DIM)), np.zeros((2, DIM + 1)), np.zeros(DIM), np.full((1, DIM), np.nan)):
        with pytest.raises(ValueError, match="embeddings of 'x'"):
            gallery.put_many([("y", prompts(0), "examples"), ("x", rows.astype(np.float32), "examples")])
    with pytest.raises(ValueError, match="not by a description"):
        gallery.put(BASE, prompts(0), "description")
    assert gallery.snapshot() is before


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="alpha"):
        Gallery(DIM, alpha=0)
    with pytest.raises(ValueError, match="max_centroids"):
        Gallery(DIM, max_centroids=0)


def test_degenerate_embeddings_score_finite_numbers() -> None:
    gallery = Gallery(DIM)
    assert gallery.snapshot().score(prompts(0, 2)).shape == (2, 0)
    zero = np.zeros((3, DIM), np.float32)
    gallery.put("zero", zero)
    gallery.put("same", np.repeat(prompts(0, 1), 9, axis=0))
    assert np.isfinite(gallery.snapshot().score(np.concatenate([zero, prompts(0)]))).all()


def test_readers_meet_whole_states_while_the_gallery_changes() -> None:
    gallery = filled(5)
    query, failures = prompts(3, 1), []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            snapshot = gallery.snapshot()
            best = snapshot.candidates[int(snapshot.score(query).argmax())]
            if best != "a3" or not np.isfinite(snapshot.score(query)).all():
                failures.append(best)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for i in range(60):
        gallery.put(f"other{i % 4}", prompts(200 + i))
        gallery.remove(f"other{(i + 2) % 4}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_eight_adapters_of_64_are_fitted_on_whole() -> None:
    gallery = Gallery(DIM)
    every = {f"a{i}": prompts(i, 64) for i in range(8)}
    for key, rows in every.items():
        gallery.put(key, rows)
    gallery.put(BASE, prompts(70, 20))
    kept = gallery.state().kept
    for key, rows in every.items():
        np.testing.assert_array_equal(kept[key].rows, unit_rows(rows))
    groups = [share.rows for share in kept.values()]
    metric, found = fit_metric(groups, DIM), cross_scores(groups, unit_rows(prompts(70, 20)), Shape(DIM, 3))
    snapshot = gallery.snapshot()
    np.testing.assert_array_equal(snapshot.metric.directions, metric.directions)
    np.testing.assert_array_equal(snapshot.calibration.held_out, found.own)
    assert len(found.own) == 512


def test_what_is_removed_is_made_up_for_by_adapters_that_are_there() -> None:
    gallery = Gallery(DIM)
    gallery.put_many([(f"a{i}", prompts(i, 16), "examples") for i in range(300)])
    for left in range(300, 20, -40):
        now = gallery.snapshot()
        assert len(now.candidates) == left
        assert now.calibration.threshold is not None
        assert len(now.calibration.held_out) == min(16 * left, MAX_FITTED)
        assert len(now.metric.directions)
        gallery.remove(*list(gallery.state().kept)[:40])  # all that was fitted on, and more


def test_a_pair_with_many_examples_counts_no_more_than_others() -> None:
    """The pair's names come first, and its examples have nothing in common."""
    names = list(filled(102).state().kept)
    rest = [(key, prompts(i), "examples") for i, key in enumerate(names[2:])]
    noise = unit_rows(np.random.default_rng(0).standard_normal((512, DIM)).astype(np.float32))
    pair = [(key, rows, "examples") for key, rows in zip(names[:2], np.split(noise, 2), strict=True)]
    without, with_it = Gallery(DIM), Gallery(DIM)
    without.put_many(rest)  # type: ignore[arg-type]
    with_it.put_many([*pair, *rest])  # type: ignore[arg-type]
    one, other = without.snapshot(), with_it.snapshot()
    assert other.calibration.threshold == pytest.approx(one.calibration.threshold, abs=0.1)
    assert with_it.state().fitted.shares == {**dict.fromkeys(names[:2], LEAST), **dict.fromkeys(names[2:62], 8)}


def test_centroids_are_of_all_examples_whatever_the_fit_is_made_on() -> None:
    gallery = Gallery(DIM)
    every = {f"a{i}": prompts(i, 16) for i in range(60)}
    gallery.put_many([(key, rows, "examples") for key, rows in list(every.items())[:20]])
    gallery.put_many([(key, rows, "examples") for key, rows in every.items()])
    snapshot = gallery.snapshot()
    assert sum(gallery.state().fitted.shares.values()) == 512
    for key, rows in every.items():
        expected = centroids(unit_rows(rows), snapshot.metric, 3)
        np.testing.assert_allclose(snapshot.rows[snapshot.slots[key]][: len(expected)], expected, atol=1e-5)
    gallery.put_many([(f"b{i}", prompts(100 + i, 200), "examples") for i in range(40)])
    gallery.put(BASE, prompts(70))  # fits anew
    state = gallery.state()
    assert not any(share.whole for key, share in state.kept.items() if key.startswith("b"))
    for key, examples, rows in zip(state.keys, state.examples, state.rows, strict=True):
        assert examples * len(np.unique(rows, axis=0)) == pytest.approx(16 if key in every else 200)


def test_a_start_forgets_nothing_of_what_has_changed_since_the_fit() -> None:
    gallery = filled(60)
    fitted = gallery.snapshot().metric
    for stored in range(4):
        gallery.put_many([(f"a{i}", prompts(500 + i), "examples") for i in range(4 * stored, 4 * stored + 4)])
        gallery = Gallery.from_state(restored(gallery))
        same = np.array_equal(gallery.snapshot().metric.mean, fitted.mean)
        assert same == (stored < 3)  # 16 of 60 are a quarter


def restored(gallery: Gallery) -> GalleryState:
    """A gallery's state as it comes back from a file."""
    arrays, info = gallery.state().pack()
    return GalleryState.unpack(arrays, json.loads(json.dumps(info)))


@pytest.mark.parametrize("keys", [0, 6, 40, 1100])
def test_a_stored_gallery_scores_and_goes_on_as_before(keys: int) -> None:
    gallery = filled(keys, alpha=0.1, max_centroids=2)
    gallery.put("described", prompts(90, 1), "description")
    gallery.remove("a1")
    if keys:
        gallery.put(BASE, prompts(80, 20))
    again = Gallery.from_state(restored(gallery))
    for change in (lambda g: None, lambda g: g.put("new", prompts(91)), lambda g: g.remove("a2")):
        change(gallery)
        change(again)
        before, after, queries = gallery.snapshot(), again.snapshot(), prompts(3, 5)
        assert again.state().fitted == gallery.state().fitted
        kept = gallery.state().kept
        for key, share in again.state().kept.items():
            assert share.of == kept[key].of
            np.testing.assert_array_equal(share.rows, kept[key].rows)
        assert set(after.candidates) == set(before.candidates)
        np.testing.assert_allclose(after.score(queries, before.candidates), before.score(queries), rtol=1e-4, atol=1e-4)
        assert after.calibration.describe() == before.calibration.describe()


def test_a_damaged_state_is_refused() -> None:
    arrays, info = filled(3).state().pack()
    with pytest.raises(ValueError, match="version 7"):
        GalleryState.unpack(arrays, {**info, "version": 7})
    for damage in ({"sample": 3}, {"sample": [["a0", 8]]}, {"sample": [["a0", 8, 7]]}, {"fitted": 3}, {"fitted": {}}):
        with pytest.raises(ValueError, match="damaged values"):
            GalleryState.unpack(arrays, {**info, **damage})
    for name in arrays:
        with pytest.raises(ValueError, match="no float32 array"):
            GalleryState.unpack({k: a for k, a in arrays.items() if k != name}, info)
        with pytest.raises(ValueError, match="no float32 array"):
            GalleryState.unpack({**arrays, name: arrays[name].astype(np.float64)}, info)
    with pytest.raises(ValueError, match="no float32 array 'rows'"):
        GalleryState.unpack(arrays, {**info, "keys": ["a0"]})
