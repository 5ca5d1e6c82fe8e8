"""RouterDC: both losses against the paper's formulas written out, training that generalises and repeats."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.encoders import clustered_table, save_encoder

from loramux.router.encoders.huggingface import HuggingFaceEncoder
from loramux.router.scores.dataset import ScoreTable
from loramux.router.scores.routerdc import (
    RouterDC,
    RouterDCOptions,
    fine_tune_encoder,
    fit_head,
    sample_llm_loss,
    sample_sample_loss,
)

QUICK = RouterDCOptions(projection=8, clusters=4, steps=200, batch=32, learning_rate=1e-2)


def llm_by_hand(s: list[float], y: list[float], positives: int, negatives: int) -> float:
    """-log(e^{s_i} / (e^{s_i} + sum e^{s_j})), summed over the best i; one query."""
    known = [t for t in range(len(y)) if not math.isnan(y[t])]
    best = sorted(known, key=lambda t: -y[t])[:positives]
    worst = sorted(known, key=lambda t: y[t])[:negatives]
    total = 0.0
    for i in best:
        if y[i] <= 0:
            continue
        below = math.exp(s[i]) + sum(math.exp(s[j]) for j in worst if y[j] <= 0.5 and j != i)
        total -= math.log(math.exp(s[i]) / below)
    return total


@pytest.mark.parametrize(("positives", "negatives"), [(3, 3), (1, 2), (5, 9)])
def test_sample_llm_loss(positives: int, negatives: int) -> None:
    generator = np.random.default_rng(0)
    s = generator.uniform(-1, 1, (40, 7))
    y = generator.permuted(np.tile([0.0, 0.05, 0.3, 0.45, 0.55, 0.8, 1.0], (40, 1)), axis=1)
    y[0] = [0, -0.0, 0, 0, 0, 0, 0]  # nobody can answer: nothing to learn
    y[1] = [0.9, 0.8, 0.7, 0.6, 0.95, 0.85, 0.75]  # everybody can: no negative is left
    y[2, 2:] = math.nan
    y[3] = math.nan
    got = sample_llm_loss(torch.tensor(s), torch.tensor(y), positives, negatives)
    rows = [llm_by_hand(s[i].tolist(), y[i].tolist(), positives, negatives) for i in range(40)]
    assert rows[0] == rows[1] == rows[3] == 0
    assert got.item() == pytest.approx(sum(rows) / 40, rel=1e-6)


def test_sample_sample_loss_with_every_draw_determined() -> None:
    """Clusters of two and as many negatives as there are leave nothing to chance, so the formula can be written out."""
    rows = torch.randn(6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clusters = torch.tensor([0, 1, 0, 1, 2, 2])
    unit = rows / rows.norm(dim=1, keepdim=True)
    total = 0.0
    for i in range(6):
        partner = next(j for j in range(6) if j != i and clusters[j] == clusters[i])
        near = math.exp(unit[i] @ unit[partner])
        far = sum(math.exp(unit[i] @ unit[j]) for j in range(6) if clusters[j] != clusters[i])
        total -= math.log(near / (near + far))
    for negatives in (4, 9):
        got = sample_sample_loss(rows, clusters, negatives, torch.Generator().manual_seed(1))
        assert got.item() == pytest.approx(total / 6, rel=1e-9)


def test_sample_sample_loss_draws_from_the_right_rows() -> None:
    """Rows of one cluster are equal and of two clusters orthogonal, so every draw gives the same loss."""
    rows = torch.eye(3)[torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])]
    clusters = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
    for seed in range(20):
        got = sample_sample_loss(rows, clusters, 3, torch.Generator().manual_seed(seed))
        assert got.item() == pytest.approx(math.log(1 + 3 / math.e), rel=1e-5)


@pytest.mark.parametrize("clusters", [[0, 1, 2, 3], [0, 0, 0, 0]])
def test_rows_without_a_pair_add_nothing(clusters: list[int]) -> None:
    rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert sample_sample_loss(rows, torch.tensor(clusters), 3, torch.Generator().manual_seed(0)).item() == 0


def test_the_head_learns_and_repeats_by_seed() -> None:
    train, test = clustered_table(300), clustered_table(200, seed=1)
    steps: list[tuple[str, int, int]] = []
    scorer = fit_head(train, QUICK, seed=3, progress=lambda *step: steps.append(step))
    assert (scorer.score(test.embeddings).argmax(1) == test.scores.argmax(1)).mean() > 0.9
    assert steps[0] == ("RouterDC", 1, 200)
    before = torch.random.get_rng_state()
    again = fit_head(train, QUICK, seed=3)
    assert (torch.random.get_rng_state() == before).all(), "training drew from the global generator"
    assert (again.keys == scorer.keys).all()
    assert not (fit_head(train, QUICK, seed=4).keys == scorer.keys).all()


def test_training_stops_when_held_out_queries_gain_no_more() -> None:
    steps: list[int] = []
    options = replace(QUICK, steps=5000, check_every=10, patience=2)
    fit_head(clustered_table(300), options, seed=0, progress=lambda _, step, __: steps.append(step))
    assert max(steps) < 1000


def test_the_state_of_the_best_check_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    table = clustered_table(300)
    short = fit_head(table, replace(QUICK, steps=50, check_every=50), seed=0)
    values = iter([0.0, 0.9, 0.5, 0.6])  # one call asks whether there is anything to compare
    monkeypatch.setattr(ScoreTable, "mean", lambda *_: next(values))
    kept = fit_head(table, replace(QUICK, steps=150, check_every=50), seed=0)
    assert next(values, None) is None
    assert (kept.keys == short.keys).all()


@pytest.mark.parametrize("projection", [0, 8])
def test_candidates_that_were_not_tried_take_no_part(projection: int) -> None:
    table = clustered_table(300)
    table.scores[np.random.default_rng(0).random(table.scores.shape) < 0.4] = np.nan
    scorer = fit_head(table, replace(QUICK, projection=projection), seed=0)
    assert (scorer.projection is None) == (projection == 0)
    test = clustered_table(200, seed=1)
    assert (scorer.score(test.embeddings).argmax(1) == test.scores.argmax(1)).mean() > 0.8


def test_scores_are_cosines_over_the_temperature() -> None:
    keys, projection = np.array([[3.0, 0], [0, 2]], np.float32), np.array([[0, 1.0], [1, 0]], np.float32)
    scorer = RouterDC(("a", "b"), keys, projection, 0.5)
    assert scorer.score(np.array([[0, 7.0]], np.float32))[0] == pytest.approx([2.0, 0.0])


def test_an_encoder_is_trained_itself(tmp_path: Path) -> None:
    encoder = HuggingFaceEncoder(save_encoder(tmp_path), pooling="cls", truncation="left")
    generator = np.random.default_rng(0)
    texts = [" ".join(f"w{w}" for w in generator.integers(20 * (i % 2), 20 * (i % 2) + 20, 6)) for i in range(120)]
    scores = np.array([[0.9, 0.0] if i % 2 else [0.0, 0.9] for i in range(120)])
    table = ScoreTable(encoder.encode(texts), scores, ("a", "b"), np.zeros(120, np.int64))
    before = encoder.name
    options = RouterDCOptions(
        projection=0, dropout=0.0, clusters=2, steps=60, batch=16, check_every=20, learning_rate=2e-3
    )
    scorer, value = fine_tune_encoder(encoder, texts, table, options, seed=0)
    assert value > 0.85  # of 0.9, the oracle's
    assert encoder.name != before
    assert not encoder.model.training
    assert (scorer.score(encoder.encode(texts)).argmax(1) == scores.argmax(1)).mean() > 0.95
    twin = HuggingFaceEncoder(tmp_path, pooling="cls", truncation="left")
    fine_tune_encoder(twin, texts, table, options, seed=0)
    assert twin.name == encoder.name, "training does not repeat by seed"


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    table = clustered_table(30)
    alone = np.where(np.eye(4)[np.arange(30) % 4] > 0, table.scores, np.nan)
    with pytest.raises(ValueError, match="at least two candidates"):
        fit_head(ScoreTable(table.embeddings, alone, table.candidates, table.groups), QUICK, seed=0)
    with pytest.raises(ValueError, match="too few"):
        fit_head(table.rows(np.arange(2)), QUICK, seed=0)
    encoder = HuggingFaceEncoder(save_encoder(tmp_path))
    with pytest.raises(ValueError, match="projection and dropout must be 0"):
        fine_tune_encoder(encoder, ["w1"] * 30, table, QUICK, seed=0)
    with pytest.raises(ValueError, match="1 texts and 30 rows"):
        fine_tune_encoder(encoder, ["w1"], table, seed=0)
    for field, value in {
        "steps": 0,
        "batch": 1,
        "temperature": 0.0,
        "balance": -1.0,
        "dropout": 1.0,
        "held_out": 0.0,
    }.items():
        with pytest.raises(ValueError, match=field):
            replace(QUICK, **{field: value})
