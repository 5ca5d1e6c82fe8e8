"""Saved scorers: the same scores after a round trip, updates go on, damage is named, versions are whole or absent."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
from support.encoders import clustered_table

from loramux.router.artifacts import Artifact, ArtifactError, load, save, versions
from loramux.router.gallery import Gallery
from loramux.router.gallery.saved import SavedGallery, load_gallery, save_gallery
from loramux.router.interface import BASE, Scorer
from loramux.router.scores.clusters import fit_clusters
from loramux.router.scores.ensemble import Ensemble, aligned, can_grow, growing
from loramux.router.scores.knn import Neighbours
from loramux.router.scores.ridge import Ridge, RidgeStatistics
from loramux.router.scores.routerdc import RouterDC

TABLE = clustered_table(60)
KEYS = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)
PROJECTION = np.random.default_rng(1).normal(size=(5, 12)).astype(np.float32)
GAPS = np.where(np.random.default_rng(2).random(TABLE.scores.shape) < 0.9, np.nan, TABLE.scores)


def scorers() -> dict[str, Scorer]:
    ridge = Ridge.fit(TABLE, 1.0)
    return {
        "ridge": ridge,
        "few rows": Ridge(RidgeStatistics(12).add(TABLE.embeddings, GAPS, TABLE.candidates), 2.0),
        "clustered": Ridge.fit(TABLE, 1.0, fit_clusters(TABLE.embeddings, (4, 8), 1.5, seed=0)),
        "knn": Neighbours(TABLE.embeddings, GAPS, TABLE.candidates, 5, 0.1),
        "head": RouterDC(TABLE.candidates, KEYS, PROJECTION, 0.5),
        "keys only": RouterDC(TABLE.candidates, np.ascontiguousarray(PROJECTION[:4]), None, 1.0),
        "ensemble": Ensemble((ridge, Ensemble((Neighbours.fit(TABLE, 3, 0.1), ridge), (1.0, 2.0))), (0.1, 0.2)),
    }


@pytest.mark.parametrize("kind", list(scorers()))
def test_a_scorer_comes_back_with_the_same_scores(tmp_path: Path, kind: str) -> None:
    scorer = scorers()[kind]
    queries = clustered_table(20, seed=1).embeddings
    number = save(tmp_path / "router", Artifact(scorer, "enc", 12, {"why": "cv", "value": 0.5}))
    found = load(tmp_path / "router")
    assert (found.version, found.encoder, found.dim, found.notes) == (number, "enc", 12, {"why": "cv", "value": 0.5})
    assert found.scorer.candidates == scorer.candidates
    assert (found.scorer.score(queries) == scorer.score(queries)).all()


def test_a_ridge_goes_on_learning_after_a_round_trip(tmp_path: Path) -> None:
    part = TABLE.rows(np.arange(40))
    save(tmp_path, Artifact(Ridge.fit(part, 1.0), "enc", 12))
    loaded = load(tmp_path).scorer
    assert isinstance(loaded, Ridge)
    grown = loaded.update(TABLE.embeddings[40:], TABLE.scores[40:], TABLE.candidates)
    assert grown.score(TABLE.embeddings) == pytest.approx(Ridge.fit(TABLE, 1.0).score(TABLE.embeddings), abs=1e-6)


def test_what_can_grow_grows_after_a_round_trip_and_the_rest_says_so(tmp_path: Path) -> None:
    part, rest = TABLE.rows(np.arange(40)), TABLE.rows(np.arange(40, 60))
    grows = Ensemble((Ridge.fit(part, 1.0), Neighbours.fit(part, 5, 0.1)), (0.1, 0.2))
    save(tmp_path, Artifact(grows, "enc", 12))
    loaded = load(tmp_path).scorer
    assert can_grow(loaded)
    grown = growing(loaded).update(rest.embeddings, rest.scores, rest.candidates)
    whole = Ensemble((Ridge.fit(TABLE, 1.0), Neighbours.fit(TABLE, 5, 0.1)), (0.1, 0.2))
    assert aligned(grown, TABLE.embeddings, TABLE.candidates) == pytest.approx(whole.score(TABLE.embeddings), abs=1e-4)
    assert set(growing(grown).without(["c0"]).candidates) == {"c1", "c2", "c3"}
    head = RouterDC(TABLE.candidates, KEYS, PROJECTION, 1.0)
    for stays in (head, Ensemble((Ridge.fit(TABLE, 1.0), head), (1.0, 1.0))):
        assert not can_grow(stays)
    with pytest.raises(TypeError, match="RouterDC has to be trained again"):
        growing(head)


def test_versions_are_numbered_and_kept(tmp_path: Path) -> None:
    folder = tmp_path / "router"
    assert versions(folder) == []
    for alpha in (1.0, 2.0, 3.0):
        save(folder, Artifact(Ridge.fit(TABLE, alpha), "enc", 12))
    assert versions(folder) == [1, 2, 3]
    for version, alpha in ((None, 3.0), (2, 2.0)):
        scorer = load(folder, version).scorer
        assert isinstance(scorer, Ridge)
        assert scorer.alpha == alpha
    save(folder, Artifact(Ridge.fit(TABLE, 4.0), "enc", 12), keep=2)
    assert versions(folder) == [3, 4]
    with pytest.raises(ArtifactError, match="does not hold version 1 of a scorer; there are 3, 4"):
        load(folder, 1)
    with pytest.raises(ValueError, match="keep"):
        save(folder, Artifact(Ridge.fit(TABLE, 1.0), "enc", 12), keep=0)


def test_what_an_interrupted_save_left_is_no_version_and_goes_in_time(tmp_path: Path) -> None:
    fresh, old = tmp_path / ".new-aaaa", tmp_path / ".new-bbbb"
    for left in (fresh, old):
        left.mkdir()
        (left / "scorer.json").write_text("{")
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    (tmp_path / "notes.txt").write_text("not a version")
    assert versions(tmp_path) == []
    with pytest.raises(ArtifactError, match="does not hold any version"):
        load(tmp_path)
    assert save(tmp_path, Artifact(Ridge.fit(TABLE, 1.0), "enc", 12)) == 1
    assert fresh.exists()
    assert not old.exists()


def test_a_number_taken_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, Artifact(Ridge.fit(TABLE, 1.0), "enc", 12))
    monkeypatch.setattr("loramux.router.versions.Versions.numbers", lambda self: [])
    assert save(tmp_path, Artifact(Ridge.fit(TABLE, 2.0), "enc", 12)) == 2
    assert not list(tmp_path.glob(".new-*"))


def edit(place: Path, **changes: object) -> None:
    value = json.loads((place / "scorer.json").read_text())
    (place / "scorer.json").write_text(json.dumps({**value, **changes}))


@pytest.mark.parametrize("kind", ["ridge", "few rows", "clustered", "knn", "head", "ensemble"])
def test_damage_is_named(tmp_path: Path, kind: str) -> None:
    def broken() -> Path:
        return tmp_path / f"v{save(tmp_path, Artifact(scorers()[kind], 'enc', 12)):06d}"

    def refused(match: str) -> None:
        with pytest.raises(ArtifactError, match=match):
            load(tmp_path)

    place = broken()
    data = (place / "scorer.safetensors").read_bytes()
    (place / "scorer.safetensors").write_bytes(data[:-1])
    refused(r"v000001: scorer\.safetensors is not the file that scorer\.json describes; delete this version")
    place = broken()
    (place / "scorer.safetensors").unlink()
    refused(r"v000002: scorer\.safetensors cannot be read")
    place = broken()
    (place / "scorer.json").write_text('{"format": 1,')
    refused(r"v000003: scorer\.json is not JSON")
    place = broken()
    (place / "scorer.json").write_text("[]")
    refused("does not describe a scorer")
    edit(broken(), format=2)
    refused("format 2 is not known to this version of loramux")
    edit(broken(), scorer={"kind": "forest"})
    refused("parts do not fit together")
    edit(broken(), dim=13)
    refused("parts do not fit together")
    edit(broken(), notes=None)
    refused("parts do not fit together")


def test_a_candidate_less_than_there_are_columns_is_noticed(tmp_path: Path) -> None:
    for scorer in (
        Neighbours.fit(TABLE, 3, 0.1),
        RouterDC(TABLE.candidates, KEYS, PROJECTION, 1.0),
        Ridge.fit(TABLE, 1.0),
    ):
        place = tmp_path / f"v{save(tmp_path, Artifact(scorer, 'enc', 12)):06d}"
        described = json.loads((place / "scorer.json").read_text())["scorer"]
        if "groups" in described:
            described["groups"] = [described["groups"][0][:-1]]
        else:
            described["candidates"] = described["candidates"][:-1]
        edit(place, scorer=described)
        with pytest.raises(ArtifactError, match="delete this version, or train again"):
            load(tmp_path)


def test_another_encoder_is_refused() -> None:
    artifact = Artifact(Ridge.fit(TABLE, 1.0), "enc", 12)
    artifact.check_encoder("enc", 12)
    for name, dim in (("other", 12), ("enc", 13)):
        with pytest.raises(ArtifactError, match=r"trained on embeddings of enc \(12 numbers\).*train again"):
            artifact.check_encoder(name, dim)


def test_only_known_scorers_are_saved(tmp_path: Path) -> None:
    class Other:
        candidates = ("a",)

        def score(self, embeddings: np.ndarray) -> np.ndarray:
            return embeddings

    with pytest.raises(TypeError, match="Other cannot be saved"):
        save(tmp_path, Artifact(Other(), "enc", 12))
    assert list(tmp_path.iterdir()) == []


def gallery() -> Gallery:
    made = Gallery(12)
    made.put_many(
        (name, rows + 0.1, "examples") for name, rows in zip("abc", np.split(TABLE.embeddings, 3), strict=True)
    )
    made.put("described", TABLE.embeddings[:1], "description")
    made.put(BASE, TABLE.embeddings[:30] - 0.2)
    return made


def test_a_gallery_comes_back_with_the_same_scores_and_texts(tmp_path: Path) -> None:
    made = gallery()
    texts = {"a": "1", "b": "2", "c": "3", "described": "4", BASE: "5"}
    assert load_gallery(tmp_path / "none", "enc") is None
    for number in (1, 2, 3):
        assert save_gallery(tmp_path, SavedGallery(made.state(), "enc", texts)) == number
    assert [entry.name for entry in sorted(tmp_path.iterdir())] == ["v000002", "v000003"]
    found = load_gallery(tmp_path, "enc")
    assert found is not None
    assert found.texts == texts
    before, after = made.snapshot(), Gallery.from_state(found.state).snapshot()
    assert after.candidates == before.candidates
    np.testing.assert_array_equal(after.score(TABLE.embeddings), before.score(TABLE.embeddings))
    assert after.calibration.threshold == before.calibration.threshold
    assert after.calibration.describe() == before.calibration.describe()
    assert load_gallery(tmp_path, "another encoder") is None


def test_a_damaged_gallery_is_named(tmp_path: Path) -> None:
    place = tmp_path / f"v{save_gallery(tmp_path, SavedGallery(gallery().state(), 'enc', {})):06d}"
    value = json.loads((place / "gallery.json").read_text())
    for damage in ({"gallery": {}}, {"gallery": {**value["gallery"], "keys": []}}, {"texts": None}, {"format": 9}):
        (place / "gallery.json").write_text(json.dumps({**value, **damage}))
        with pytest.raises(ArtifactError, match=r"v000001: .*let the server make another"):
            load_gallery(tmp_path, "enc")
    (place / "gallery.safetensors").write_bytes(b"")
    (place / "gallery.json").write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match="is not the file"):
        load_gallery(tmp_path, "enc")


def test_the_same_scorer_has_the_same_bytes(tmp_path: Path) -> None:
    for name, scorer in scorers().items():
        for copy in ("one", "two"):
            save(tmp_path / name / copy, Artifact(scorer, "enc", 12, {"seed": 1}))
        one, two = (
            [f.read_bytes() for f in sorted((tmp_path / name / c / "v000001").iterdir())] for c in ("one", "two")
        )
        assert one == two
