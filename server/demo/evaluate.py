"""Measure the demo: base, right-adapter and wrong-adapter accuracy on prompts that were never trained on.

``python -m loramux.server.demo.evaluate`` prints one table for the base's skills and one for the adapters', and exits
with status 1 if a bar is missed. Greedy generation through transformers and peft alone, so that the figures say
what the weights can do, whatever serves them.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from loramux.server.demo.skills import (
    Question,
    Skill,
    adapter_skills,
    ask,
    base_skills,
    composite,
    held_out_near_miss,
    near_miss,
    refusals,
    refused,
)

BASE = "base"
NEAR, FOREIGN = "near misses, declined", "adapters' skills, declined"
POSITIONS = ("1st", "2nd", "3rd")
PLAIN_THIRD = "3rd, plain"
COLUMNS = ("base", "wrong", "alone", *POSITIONS, PLAIN_THIRD, "held-out")
BASE_KNOWS, BASE_LACKS, RIGHT_KNOWS, WRONG_LACKS = 0.9, 0.10, 0.95, 0.15


@dataclass(frozen=True)
class Case:
    """One prompt to answer: served by ``adapter`` (or the base), counted in cell (``skill``, ``column``).

    Right if line ``line`` of the answer is right.
    """

    skill: str
    column: str
    adapter: str
    question: Question
    line: int = 0


def load_demo(folder: Path) -> tuple[Any, Any]:
    """The tokenizer and the base in float32 with every adapter of ``folder`` attached, on the CPU."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    for path in sorted((folder / "adapters").glob("*/adapter_config.json")):
        name = path.parent.name
        if isinstance(model, PeftModel):
            model.load_adapter(str(path.parent), adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, str(path.parent), adapter_name=name)
    return tokenizer, model.eval()


def answer_all(tokenizer: Any, model: Any, adapter: str, prompts: list[str], batch: int = 128) -> list[str]:
    """Greedy answers to ``prompts``, each a chat of one user turn, by ``adapter`` or the bare base."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    if adapter != BASE:
        model.set_adapter(adapter)
    with torch.inference_mode(), model.disable_adapter() if adapter == BASE else nullcontext():
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            chats = [[{"role": "user", "content": prompts[i]}] for i in chosen]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
            output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                answers[i] = text
    return answers


def is_right(case: Case, answer: str) -> bool:
    """Whether the line that the case counts is the expected one, all lines being there; where the base is to decline,
    whether it does, in whichever words."""
    if case.question.answer in refusals():
        return answer in refusals()
    given, expected = answer.split("\n"), case.question.answer.split("\n")
    return len(given) == len(expected) and given[case.line] == expected[case.line]


def with_neighbours(
    skill: Skill, others: tuple[Skill, ...], position: int, rng: Random, plain: bool = False
) -> Question:
    """A fresh composite of two or three questions with ``skill`` at ``position`` (0..2) among ``others``."""
    asked = rng.choices(others, k=rng.randint(max(position, 1), 2))
    asked.insert(position, skill)
    return composite(asked, rng, "fresh", plain=plain)


def cases_of(skill: Skill, server: str, n: int) -> Iterable[Case]:
    """``n`` cases alone, ``n`` in held-out wordings, ``n`` at each position, and ``n`` at the third in plain wordings,
    all served by ``server``."""
    plain = Random(zlib.crc32(f"{skill.name}, plain".encode()))
    rng = Random(zlib.crc32(skill.name.encode()))
    for _ in range(n):
        yield Case(skill.name, "alone", server, ask(skill, rng, "fresh"))
        yield Case(skill.name, "held-out", server, ask(skill, rng, "fresh", held_out=True))
        for position, column in enumerate(POSITIONS):
            question = with_neighbours(skill, base_skills(), position, rng)
            yield Case(skill.name, column, server, question, position)
        yield Case(skill.name, PLAIN_THIRD, server, with_neighbours(skill, base_skills(), 2, plain, plain=True), 2)


def lacking_cases(skill: Skill, wrong: list[str], n: int) -> Iterable[Case]:
    """``n`` cases of an adapter's skill asked of the base, and ``n`` asked of the ``wrong`` adapters in turn."""
    rng = Random(zlib.crc32(skill.name.encode()) + 1)
    for i in range(n):
        question = ask(skill, rng, "fresh")
        yield Case(skill.name, "base", BASE, question)
        yield Case(skill.name, "wrong", wrong[i % len(wrong)], question)


def foreign_cases(n: int) -> Iterable[Case]:
    """``n`` cases each, in trained and in held-out wordings, of what the base is to decline: near misses and the
    adapters' skills."""
    rng = Random(zlib.crc32(NEAR.encode()))
    for i in range(n):
        yield Case(NEAR, "alone", BASE, near_miss(rng, "fresh"))
        yield Case(NEAR, "held-out", BASE, held_out_near_miss(rng))
        skill = adapter_skills()[i % len(adapter_skills())]
        for column in ("alone", "held-out"):
            yield Case(FOREIGN, column, BASE, refused(skill, rng, "fresh", held_out=column == "held-out"))


def measure(tokenizer: Any, model: Any, n: int, columns: tuple[str, ...] = COLUMNS) -> dict[tuple[str, str], float]:
    """Accuracy per (skill, column) over ``n`` fresh prompts each, for the given columns."""
    present = [skill for skill in adapter_skills() if skill.name in model.peft_config]
    names = [skill.name for skill in present]
    cases = [case for skill in base_skills() for case in cases_of(skill, BASE, n)]
    cases += foreign_cases(n)
    for skill in present:
        cases += cases_of(skill, skill.name, n)
        cases += lacking_cases(skill, [name for name in names if name != skill.name], n)
    by_adapter: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        if case.column in columns:
            by_adapter[case.adapter].append(case)
    outcomes: dict[tuple[str, str], list[bool]] = defaultdict(list)
    with Progress(transient=True) as progress:
        for adapter, group in progress.track(by_adapter.items(), description="answering"):
            answers = answer_all(tokenizer, model, adapter, [case.question.prompt for case in group])
            for case, answer in zip(group, answers, strict=True):
                outcomes[case.skill, case.column].append(is_right(case, answer))
    return {cell: sum(right) / len(right) for cell, right in outcomes.items()}


def missed_bars(accuracy: dict[tuple[str, str], float]) -> list[str]:
    """What misses its bar, in words. The bars are on questions asked alone; composites and held-out wordings are shown
    without one."""
    missed = []
    adapted = {skill for skill, column in accuracy if column == "base"}
    for skill in sorted({skill for skill, _ in accuracy}):
        floor = RIGHT_KNOWS if skill in adapted else BASE_KNOWS
        if accuracy[skill, "alone"] < floor:
            missed.append(f"{skill}: {accuracy[skill, 'alone']:.1%} < {floor:.0%}")
        if skill in adapted:
            for column, ceiling in (("base", BASE_LACKS), ("wrong", WRONG_LACKS)):
                if accuracy[skill, column] > ceiling:
                    missed.append(f"{skill}, {column}: {accuracy[skill, column]:.1%} > {ceiling:.0%}")
    return missed


def cell(share: float | None) -> str:
    """A share as it stands in a table; nothing for None."""
    return "" if share is None else f"{share:.1%}"


def tables(accuracy: dict[tuple[str, str], float]) -> tuple[Table, Table]:
    """The base's skills by the base, and the adapters' skills by the base, a wrong and the right adapter."""
    adapted = {skill for skill, column in accuracy if column == "base"}
    own = Table("skill", title=f"base model, its own skills (bar: alone >= {BASE_KNOWS:.0%})")
    bars = f"base <= {BASE_LACKS:.0%}, wrong <= {WRONG_LACKS:.0%}, alone >= {RIGHT_KNOWS:.0%}"
    learnt = Table("skill", title=f"adapters ({bars})")
    for table, rows, columns in (
        (own, {skill for skill, _ in accuracy} - adapted, ("alone", *POSITIONS, PLAIN_THIRD, "held-out")),
        (learnt, adapted, COLUMNS),
    ):
        for column in columns:
            table.add_column(column, justify="right")
        for skill in sorted(rows):
            table.add_row(skill, *(cell(accuracy.get((skill, column))) for column in columns))
    return own, learnt


def main() -> None:
    """Parse the command line, measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=64, help="fresh prompts per cell of the tables")
    parser.add_argument("--demo", type=Path, default=Path(__file__).parent, help="folder with base/ and adapters/")
    arguments = parser.parse_args()
    console = Console()
    accuracy = measure(*load_demo(arguments.demo), arguments.n)
    console.print(*tables(accuracy), sep="\n")
    missed = missed_bars(accuracy)
    console.print("every bar is met" if not missed else "missed: " + "; ".join(missed))
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
