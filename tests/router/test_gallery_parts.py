"""The gallery's parts: clustering, the metric, conformal thresholds, the sample."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux.router.gallery.centroids import cluster_means, number_of_centroids, spherical_kmeans, unit_rows
from loramux.router.gallery.conformal import MOST_COST, calibrate, examples_needed, threshold
from loramux.router.gallery.crossfit import Shape, centroid_lengths, centroids, cosines, cross_scores
from loramux.router.gallery.metric import SHRINKAGE, fit_metric, plain_metric
from loramux.router.gallery.sample import LEAST, MAX_FITTED, MAX_KEPT, Fitted, Sample, Share, sampled, spread
from loramux.router.interface import Floats

NONE = np.zeros(0, np.float32)


def rows(n: int, dim: int = 12, seed: int = 0) -> Floats:
    return unit_rows(np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32))


def around(centre: Floats, n: int, seed: int, noise: float = 0.1) -> Floats:
    spread = np.random.default_rng(seed).standard_normal((n, len(centre))).astype(np.float32)
    return unit_rows(centre + np.float32(noise) * spread)


def test_kmeans_finds_separate_clusters_and_repeats() -> None:
    centres = np.eye(12, dtype=np.float32)[:3]
    data = np.concatenate([around(c, 6, i) for i, c in enumerate(centres)])
    clusters = spherical_kmeans(data, 3)
    assert [len(set(clusters[i : i + 6])) for i in (0, 6, 12)] == [1, 1, 1]
    assert set(clusters) == {0, 1, 2}
    np.testing.assert_array_equal(clusters, spherical_kmeans(data, 3))


@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 100))
def test_kmeans_is_at_rest(n: int, k: int, seed: int) -> None:
    data = rows(n, 4, seed)
    clusters = spherical_kmeans(data, k)
    means = unit_rows(cluster_means(data, clusters))
    assert sorted(set(clusters)) == list(range(len(means)))
    assert len(means) <= min(n, k)
    np.testing.assert_array_equal((data @ means.T).argmax(axis=1), clusters)


def test_equal_rows_are_one_cluster() -> None:
    assert set(spherical_kmeans(np.repeat(rows(1), 8, axis=0), 3)) == {0}


def test_centroids_by_examples() -> None:
    assert [number_of_centroids(n, 3) for n in (1, 4, 7, 8, 11, 12, 100)] == [1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("dim", [6, 40])
def test_the_metric_is_the_regularised_inverse_covariance(dim: int) -> None:
    groups = [rows(5, dim, i) for i in range(4)]
    metric = fit_metric([*groups, rows(0, dim)], dim)
    means = np.stack([g.mean(axis=0) for g in groups])
    residuals = np.concatenate([g - m for g, m in zip(groups, means, strict=True)]).astype(np.float64)
    S = residuals.T @ residuals / 16
    floor = SHRINKAGE * np.trace(S) / min(16, dim)
    M = floor * np.linalg.inv(S + floor * np.eye(dim))
    x = rows(7, dim, 9).astype(np.float64)
    centred = x - means.mean(axis=0) * 3 / 4
    np.testing.assert_allclose(metric.weigh(x.astype(np.float32)), centred @ M, atol=1e-4)
    np.testing.assert_allclose(
        metric.norms(x.astype(np.float32)) ** 2, np.sum(centred @ M * centred, axis=1), atol=1e-4
    )
    white = metric.whiten(x.astype(np.float32))
    np.testing.assert_allclose(white @ white.T, centred @ M @ centred.T, atol=1e-4)


def test_the_metric_is_plain_where_nothing_varies() -> None:
    for groups in ([], [rows(1, 5)], [np.repeat(rows(1, 5), 3, axis=0)]):
        metric = fit_metric(groups, 5)
        np.testing.assert_allclose(metric.weigh(rows(2, 5)), rows(2, 5), atol=1e-6)


def test_cosines_are_cosines() -> None:
    q, c = rows(3, 5, 1), rows(4, 5, 2)
    np.testing.assert_allclose(cosines(plain_metric(5), q, c, np.ones(len(c), np.float32)), q @ c.T, atol=1e-6)
    metric = fit_metric([rows(6, 5, 3), rows(6, 5, 4)], 5)
    np.testing.assert_allclose(np.diag(cosines(metric, q, q, metric.norms(q))), 1, atol=1e-5)


def test_centroids_of_few_examples_are_as_long_as_those_of_many() -> None:
    metric, rng = plain_metric(32), np.random.default_rng(1)

    def drawn(n: int) -> Floats:
        return unit_rows((0.8 + rng.standard_normal((n, 32))).astype(np.float32))

    true = float(np.linalg.norm(drawn(20_000).mean(axis=0)))
    for n in (8, 16, 64):
        means = np.stack([drawn(n).mean(axis=0) for _ in range(2000)])
        found = centroid_lengths(metric, means, n)
        assert found.dtype == np.float32
        assert np.sqrt(np.mean(found**2)) == pytest.approx(true, rel=0.01)
        assert np.sqrt(np.mean(metric.norms(means) ** 2)) > 1.005 * true


def test_a_centroid_is_shortened_by_no_more_than_half_of_its_square_and_never_for_one_example() -> None:
    c = 0.1 * rows(3, 5, 2)
    np.testing.assert_allclose(centroid_lengths(plain_metric(5), c, 4), 0.1 / np.sqrt(2), rtol=1e-5)
    each = np.asarray([1, 0.5, 1], np.float32)
    np.testing.assert_allclose(centroid_lengths(plain_metric(5), c, each), 0.1, rtol=1e-5)


def test_a_lone_centroid_points_along_the_mean_of_its_examples_directions() -> None:
    metric = fit_metric([rows(6, 5, 3), rows(6, 5, 4)], 5)
    data = rows(3, 5, 5)
    white = unit_rows(metric.whiten(data)).mean(axis=0)
    found = metric.whiten(centroids(data, metric, 3))[0]
    np.testing.assert_allclose(found, white, atol=1e-5)


@pytest.mark.parametrize(("alpha", "needed"), [(0.5, 1), (0.1, 9), (0.05, 19), (0.02, 49), (0.01, 99)])
def test_the_least_number_of_examples(alpha: float, needed: int) -> None:
    assert examples_needed(alpha) == needed
    with pytest.raises(ValueError, match=f"needs {needed} held-out examples, there are {needed - 1}"):
        threshold(np.zeros(needed - 1, np.float32), alpha)
    scores = np.arange(needed, dtype=np.float32)
    assert threshold(scores, alpha) == 0  # the least of all, as k = n


def test_the_threshold_is_the_kth_of_the_nonconformities() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(100, dtype=np.float32))
    k = math.ceil(101 * 0.9)
    assert threshold(scores, 0.1) == -sorted(-scores)[k - 1]


def test_the_threshold_turns_away_at_most_alpha() -> None:
    rng = np.random.default_rng(1)
    turned_away = [
        float(rng.standard_normal()) < threshold(rng.standard_normal(30).astype(np.float32), 0.1) for _ in range(4000)
    ]
    assert 0.05 < np.mean(turned_away) < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 4000)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1])
def test_alpha_is_a_share(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha"):
        examples_needed(alpha)


@pytest.mark.parametrize(("n", "m"), [(40, 40), (20, 400), (400, 20)])
def test_two_sides_that_are_apart_cost_hardly_anything(n: int, m: int) -> None:
    own, base = np.linspace(0.5, 1, n, dtype=np.float32), np.linspace(-1, 0.1, m, dtype=np.float32)
    calibration = calibrate(0.05, own, base, NONE)
    assert calibration.threshold is not None
    assert (
        0.5 <= calibration.threshold <= 0.5 + 0.5 / m
    )  # never below those that belong; q of an unseen score is 1/(m+1)
    assert calibration.accepted_of_base == 0.0


def test_two_sides_that_overlap_err_alike() -> None:
    rng = np.random.default_rng(2)
    own, base = (rng.standard_normal(400) + m for m in (1.5, -1.5))
    calibration = calibrate(0.05, own.astype(np.float32), base.astype(np.float32), NONE)
    assert calibration.turned_away == pytest.approx(calibration.accepted_of_base, abs=0.01)
    assert f"{calibration.turned_away:.0%} of them turned away" in calibration.describe()
    assert 0.05 < calibration.turned_away < MOST_COST * 0.05  # more than one side alone would


def test_two_sides_that_overlap_much_cost_no_more_than_may_be_lost() -> None:
    rng = np.random.default_rng(2)
    own, base = (rng.standard_normal(400).astype(np.float32) + np.float32(m) for m in (0.5, -0.5))
    for alpha in (0.05, 0.1):
        calibration = calibrate(alpha, own, base, NONE)
        assert calibration.turned_away == pytest.approx(MOST_COST * alpha, abs=0.005)
        assert calibration.accepted_of_base is not None
        assert calibration.accepted_of_base > calibration.turned_away


def test_few_negatives_do_not_count_and_few_examples_give_no_threshold() -> None:
    own = np.linspace(0, 1, 20, dtype=np.float32)
    assert calibrate(0.05, own, own[:18], own[:18]).threshold == threshold(own, 0.05)
    state = calibrate(0.05, own[:18], own, own)
    assert (state.threshold, state.turned_away, state.accepted_of_base) == (None, None, None)
    assert state.describe() == (
        "uncalibrated: a threshold at level 0.05 needs 19 examples of adapters that have two or more, there are 18"
    )


def test_outsiders_raise_the_threshold_at_a_bounded_cost() -> None:
    """Where prompts of missing adapters lie between the base and those that belong, and where they are the same."""
    rng = np.random.default_rng(3)
    own, between, base = ((rng.standard_normal(400) * 0.5 + m).astype(np.float32) for m in (1, -0.5, -1.5))
    plain, raised = calibrate(0.05, own, base, NONE), calibrate(0.05, own, base, between)
    assert plain.threshold is not None
    assert raised.threshold is not None
    assert raised.threshold > plain.threshold
    assert raised.turned_away == pytest.approx(raised.accepted_of_outsiders, abs=0.01)
    assert "accepted if their adapter were not there" in raised.describe()
    twins = calibrate(0.05, own, base, own)
    assert twins.turned_away == pytest.approx(MOST_COST * 0.05, abs=0.01)
    far = calibrate(0.05, own, base, base - 1)
    assert far.threshold == plain.threshold
    alone = calibrate(0.05, own, NONE, between)
    assert alone.threshold == raised.threshold
    assert alone.accepted_of_base is None


def test_held_out_scores_are_of_what_took_no_part() -> None:
    """Random labels: examples score no better for their own adapter than noise does, whitening or not."""
    groups = [rows(8, 64, i) for i in range(10)]
    found = cross_scores(groups, rows(16, 64, 99), Shape(64, 3))
    assert (len(found.own), len(found.outsiders), len(found.base)) == (80, 80, 16)
    alone = cross_scores(groups, rows(0, 64), Shape(64, 3))  # nothing is taken off for the base
    plain = [float(g.mean(axis=0) @ q) for g, q in zip(groups, rows(10, 64, 7), strict=True)]
    assert abs(alone.own.mean() - np.mean(plain)) < 0.1
    assert found.outsiders.mean() > found.own.mean()  # the best of nine, where none belongs


def test_adapters_of_one_example_give_no_held_out_score() -> None:
    found = cross_scores([rows(1, 8, 0), rows(3, 8, 1)], rows(0, 8), Shape(8, 3))
    assert (len(found.own), len(found.outsiders), len(found.base)) == (3, 3, 0)
    alone = cross_scores([rows(3, 8, 1)], rows(4, 8), Shape(8, 3))
    assert (len(alone.own), len(alone.outsiders), len(alone.base)) == (3, 0, 4)
    none = cross_scores([], rows(4, 8), Shape(8, 3))
    assert [len(none.own), len(none.outsiders), len(none.base)] == [0, 0, 0]


def shares(sizes: dict[str, int]) -> dict[str, Share]:
    """Share i's example j is the row (i, j)."""
    return {
        key: Share(np.stack([np.full(n, i), np.arange(n)], axis=1).astype(np.float32), n)
        for i, (key, n) in enumerate(sizes.items())
    }


def sizes(kept: dict[str, Share]) -> dict[str, int]:
    return {key: len(share.rows) for key, share in kept.items()}


def as_lists(kept: dict[str, Share]) -> dict[str, list[list[float]]]:
    return {key: share.rows.tolist() for key, share in kept.items()}


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 150), st.integers(0, 40), st.randoms())
def test_the_sample_does_not_depend_on_the_order(counts: list[int], most: int, more: int, random: Random) -> None:
    every = shares({str(i): n for i, n in enumerate(counts)})
    at_once = sampled(every, most)
    assert sum(sizes(at_once).values()) == min(most, sum(counts))
    kept: dict[str, Share] = {}
    order = list(every)
    random.shuffle(order)
    for key in order:
        kept = sampled({**kept, key: every[key]}, most + more)
    assert as_lists(sampled(kept, most)) == as_lists(at_once)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 150))
def test_no_adapter_loses_examples_to_one_that_has_more(counts: list[int], most: int) -> None:
    every = shares({str(i): n for i, n in enumerate(counts)})
    kept = {**dict.fromkeys(every, 0), **sizes(sampled(every, most))}
    if any(kept[key] < min(LEAST, len(share.rows)) for key, share in every.items()):
        assert max(kept.values()) <= LEAST
        return
    cut = [kept[key] for key, share in every.items() if kept[key] < len(share.rows)]
    assert all(k >= max(kept.values()) - 1 for k in cut)


def test_what_fits_stays_whole_and_as_it_was() -> None:
    every = shares({str(i): 64 for i in range(8)})
    kept = sampled(every, 512)
    assert {key: share is every[key] for key, share in kept.items()} == dict.fromkeys(every, True)


@pytest.mark.parametrize("n", [7, 64, 100, 256])
def test_few_examples_are_as_varied_as_all(n: int) -> None:
    assert sorted(spread(n)) == list(range(n))
    whole = shares({"a": n})["a"]
    for k in range(2, n):
        found = whole.first(k).rows[:, 1]
        assert len(found) == k
        assert not whole.first(k).whole
        gaps = np.diff([0.0, *found, n])
        assert (gaps[1:] > 0).all()  # in the order that they had
        assert gaps.max() <= 3 * n / k
        np.testing.assert_array_equal(whole.first(min(k + 5, n)).first(k).rows, whole.first(k).rows)
    for period in range(2, 9):
        found = whole.first(4 * period).rows[:, 1].astype(int)
        assert len(set(found % period)) == min(period, n)


def test_what_is_kept_is_bounded_and_refills() -> None:
    sample = Sample({}, Fitted(0, {}))
    for i in range(0, 1000, 50):
        sample.change({str(j): rows(20, 4, j) for j in range(i, i + 50)}, ())
        assert sum(len(share.rows) for share in sample.kept.values()) <= MAX_KEPT
        assert all(share.rows.base is None for share in sample.kept.values())  # no larger array is held by a part of it
    assert [len(found) for found in sample.groups()] == [LEAST] * (MAX_FITTED // LEAST)
    assert len(sample.kept) == MAX_KEPT // LEAST
    for _ in range(5):
        sample.use()
        first = list(sample.kept)[: MAX_FITTED // LEAST]
        sample.change({}, first)
        assert not sample.kept.keys() & set(first)
        assert sample.is_stale()
        assert sum(map(len, sample.groups())) == MAX_FITTED


def test_only_what_is_new_makes_a_sample_stale() -> None:
    every = {str(i): rows(64, 4, i) for i in range(8)}
    sample = Sample({}, Fitted(0, {}))
    sample.change(every, ())
    assert sample.is_stale()
    sample.use()
    sample.change({"0": rows(64, 4, 100)}, ())
    assert not sample.is_stale()  # an eighth is
    sample.change({}, ("0",))
    sample.change({"0": rows(64, 4, 101), "7": rows(64, 4, 102)}, ())
    assert sample.is_stale()
    sample.use()
    sample.change({"8": rows(64, 4, 8)}, ())  # takes a ninth from the others
    assert not sample.is_stale()
    assert sample.fitted == Fitted(512, dict.fromkeys(every, 64))
