"""README.md's table: every attack has a test, and every test that it names exists."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
ROWS = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in Path(__file__).with_name("README.md").read_text(encoding="utf-8").splitlines()
    if re.match(r"\| (\d+)? *\|", line) and "::" in line
]
ATTACKS = 15


def test_every_attack_is_tried() -> None:
    assert {int(row[0]) for row in ROWS if row[0]} == set(range(1, ATTACKS + 1))
    assert all(re.search(r"`\w+/\w+\.py::test_\w+`", row[2]) for row in ROWS)


def test_every_test_exists() -> None:
    named = [found for row in ROWS for found in re.findall(r"`(\w+/\w+\.py)(?:::(test_\w+))?`", row[2])]
    assert len(named) > 50
    for file, test in named:
        text = (TESTS / file).read_text(encoding="utf-8")
        assert not test or re.search(rf"^(async )?def {test}\(", text, re.MULTILINE), f"{file}::{test}"
