"""Scored queries: what a line may hold, the table and its metric."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from loramux.router.scores.dataset import (
    DatasetError,
    ScoredQuery,
    ScoreTable,
    build_table,
    merge,
    newest,
    read_scores,
)


def test_a_line_and_back() -> None:
    row = ScoredQuery("What is 2+2? 数", {"": 0.0, "maths": 1}, "g")
    assert (
        ScoredQuery.from_json(json.dumps({"query": row.query, "scores": row.scores, "group": row.group}).encode())
        == row
    )
    assert ScoredQuery.from_json(b'{"query": "q", "scores": {"a": 0.5}}') == ScoredQuery("q", {"a": 0.5})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[]", "must be an object"),
        ('{"query": "q"}', "must be an object"),
        ('{"query": "q", "scores": {"a": 1}, "more": 1}', "must be an object"),
        ('{"query": " ", "scores": {"a": 1}}', "query"),
        ('{"query": 3, "scores": {"a": 1}}', "query"),
        ('{"query": "q", "scores": {}}', "at least one candidate"),
        ('{"query": "q", "scores": [1]}', "at least one candidate"),
        ('{"query": "q", "scores": {"a": 1.01}}', 'score of "a"'),
        ('{"query": "q", "scores": {"a": -1}}', 'score of "a"'),
        ('{"query": "q", "scores": {"a": true}}', 'score of "a"'),
        ('{"query": "q", "scores": {"a": null}}', 'score of "a"'),
        ('{"query": "q", "scores": {"a": NaN}}', "NaN"),
        ('{"query": "q", "scores": {"a": 1, "a": 0}}', "twice"),
        ('{"query": "q", "scores": {"a": 1}, "group": 3}', "group"),
        ("{", "not JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "scores.jsonl"
    path.write_text('{"query": "q", "scores": {"a": 1}}\n\n' + line + "\n")
    with pytest.raises(DatasetError, match=rf"scores\.jsonl, line 3: .*{message}"):
        read_scores(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"none\.jsonl cannot be read"):
        read_scores(tmp_path / "none.jsonl")
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"query": "q" * (1 << 20), "scores": {"a": 1}}))
    with pytest.raises(DatasetError, match="longer than"):
        read_scores(long)


def test_repeated_scores_are_averaged() -> None:
    rows = [
        ScoredQuery("q", {"a": 1.0, "b": 0.0}), ScoredQuery("r", {"a": 0.2}), ScoredQuery("q", {"a": 0.0}),
        ScoredQuery("q", {"a": 0.5}, "other"),
    ]  # fmt: skip
    assert merge(rows) == [
        ScoredQuery("q", {"a": 0.5, "b": 0.0}), ScoredQuery("r", {"a": 0.2}), ScoredQuery("q", {"a": 0.5}, "other"),
    ]  # fmt: skip


def test_the_table_has_a_column_per_candidate() -> None:
    rows = [ScoredQuery("q", {"b": 1.0}), ScoredQuery("r", {"z": 0.5}), ScoredQuery("s", {"a": 0.5, "b": 0.25}, "g")]
    embeddings = np.eye(3, dtype=np.float32)
    table = build_table(rows, embeddings)
    assert table.candidates == ("a", "b", "z")
    assert np.array_equal(
        table.scores, [[np.nan, 1, np.nan], [np.nan, np.nan, 0.5], [0.5, 0.25, np.nan]], equal_nan=True
    )
    assert table.groups.tolist() == [0, 0, 1]
    picked = build_table(rows, embeddings, ["b", "new"])
    assert picked.scores[:, 0].tolist() == [1.0, 0.25]
    assert (picked.embeddings == embeddings[[0, 2]]).all()
    assert table.columns(["z", "a"]).scores[2].tolist()[1] == 0.5
    with pytest.raises(DatasetError, match="no query has a score"):
        build_table(rows, embeddings, ["new"])
    with pytest.raises(DatasetError, match="there are no scored queries"):
        build_table([], embeddings[:0])
    with pytest.raises(DatasetError, match="3 queries and 2"):
        build_table(rows, embeddings[:2])


def test_the_metric_is_the_mean_over_groups_of_the_chosen_score() -> None:
    nan = math.nan
    scores = np.array([[0.0, 1.0], [0.4, 0.0], [0.0, 0.2], [nan, 1.0], [0.6, 0.8]])
    table = ScoreTable(np.zeros((5, 2), np.float32), scores, ("a", "b"), np.array([0, 0, 0, 0, 2]))
    predicted = np.array([[0, 1], [1, 0], [1, 0], [9, 0], [1, 0]], np.float32)
    values = table.chosen(predicted)
    assert np.array_equal(values, [1.0, 0.4, 0.0, nan, 0.6], equal_nan=True)
    assert table.group_means(values) == pytest.approx([1.4 / 3, 0.6])
    assert table.mean(values) == pytest.approx((1.4 / 3 + 0.6) / 2)
    assert math.isnan(table.mean(np.full(5, nan)))
    unknown = ScoreTable(table.embeddings, np.array([[nan, 0.3, 0.9]] * 5), ("a", "b", "c"), table.groups)
    assert (unknown.chosen(np.array([[9, 2, 1]] * 5, np.float32)) == 0.3).all()


def test_the_newest_that_fit() -> None:
    rows = [ScoredQuery(f"q{i}", {"a": 1, "": 0} if i else {"a": 0, "b": 1}) for i in range(10)]
    assert newest(rows, 2, 5 * 10) == rows
    assert newest(rows, 2, 5 * 10 - 1) == rows[1:]
    assert newest(rows, 2, 0) == rows[-1:]
    assert newest([], 2, 10) == []
