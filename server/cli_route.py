"""`loramux route`: what a server would choose for a text, how good its choices are, and training a scorer offline."""

import argparse
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from loramux.adapters_store import strict_json
from loramux.server.cli_client import USAGE, Api, CommandError
from loramux.server.settings import add_arguments, load_settings

ROUTE, TRAIN, EVAL = "route", "route train", "route eval"
BASE_WORD = "base"
AT_ONCE = 64  # queries of one request
SHOWN_MEANS = 3
TRAIN_SETTINGS = frozenset(
    "model revision served_model_name chat_template dtype device threads max_model_len kv_cache_bytes "
    "gpu_memory_utilization attention_implementation deterministic store_dir router router_encoder router_layer "
    "router_max_tokens".split()
)


def joined(argv: Sequence[str]) -> list[str]:
    """`route train ...` is a command of its own, `route TEXT` another: the two words become one."""
    if len(argv) > 1 and f"{argv[0]} {argv[1]}" in (TRAIN, EVAL):
        return [f"{argv[0]} {argv[1]}", *argv[2:]]
    return list(argv)


def add_commands(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds the three commands; `common` are the flags of commands that talk to a server."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--policy", help="the rung that decides: auto, scores, examples or weights")
    options.add_argument("--top-k", type=int, metavar="K", help="choose the K best")
    options.add_argument("--top-p", type=float, metavar="P", help="choose the fewest that reach this probability")
    options.add_argument("--threshold", type=float, metavar="SCORE", help="least score of a choice")
    options.add_argument("--temperature", type=float, metavar="T", help="divides the scores where several are chosen")
    options.add_argument("--candidate", action="append", metavar="NAME", help="choose among these (repeatable)")

    one = commands.add_parser(
        ROUTE, parents=[common, options], help="show which adapters would answer a text", allow_abbrev=False
    )
    one.add_argument("text", metavar="TEXT", help="the query (a text that is `train` or `eval`: put -- before it)")
    one.set_defaults(run=show)

    evaluation = commands.add_parser(
        EVAL, parents=[common, options], help="route a file of queries and compare with what was right",
        allow_abbrev=False,
        description='One JSON object per line: {"query": text, "adapter": name} ("base", or its model name, for the '
        'base), or {"query": text, "scores": {name: 0 to 1}}.',
    )  # fmt: skip
    evaluation.add_argument("file", metavar="FILE.jsonl", type=Path)
    evaluation.set_defaults(run=evaluate)

    training = commands.add_parser(
        TRAIN, help="train the scorer on a file of scores, without a server", allow_abbrev=False,
        description="Trains what routes by scores, from lines of "
        '{"query": text, "scores": {name: 0 to 1}, "group": text or absent}, and saves it as the next version in the '
        "store, where a server with the same settings takes it up, within seconds if it is running. The flags are the "
        "server's own.",
    )  # fmt: skip
    training.add_argument("file", metavar="FILE.jsonl", type=Path)
    training.add_argument("--seed", type=int, default=0, help="everything random follows from it (default: 0)")
    training.add_argument("--out", type=Path, metavar="DIR", help="folder of versions (default: in the store)")
    training.add_argument(
        "--fine-tune", type=Path, metavar="FOLDER",
        help="train the sentence encoder of --router-encoder itself and write it here, for servers to be given as "
        "their --router-encoder; the scorer is RouterDC's for it",
    )  # fmt: skip
    training.add_argument("--json", action="store_true", help="print JSON")
    add_arguments(training, TRAIN_SETTINGS)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The `router` field of a request."""
    given = {name: getattr(args, name) for name in ("policy", "top_k", "top_p", "threshold", "temperature")}
    given["candidates"] = args.candidate
    return {name: value for name, value in given.items() if value is not None}


def show(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Routes one text."""
    body = {"input": args.text, "router": options_of(args)}
    (decision,) = api.call("POST", "/v1/route", json=body)["data"]
    if args.json:
        console.print_json(data=decision)
        return
    chosen = {member["name"]: member["weight"] for member in decision["chosen"]}
    if decision["scores"]:
        table = Table("adapter", "score", "weight", box=None, pad_edge=False)
        for entry in decision["scores"]:
            weight = chosen.get(entry["name"])
            table.add_row(entry["name"], f"{entry['score']:.4f}", "" if weight is None else f"{weight:g}")
        console.print(table)
    verdict = ", ".join(f"{name} ({weight:g})" for name, weight in chosen.items()) or "the base"
    lines = f"\n{verdict}\nrung {decision['rung']}, {decision['milliseconds']:.1f} ms: {decision['reason']}"
    console.print(lines, markup=False, highlight=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One query of an evaluation: the adapter that is right ("" for the base), or scores of several, or both."""

    query: str
    adapter: str | None
    scores: dict[str, float]


@dataclass(slots=True)
class Tally:
    """Counts of one group of queries."""

    queries: int = 0
    right: int = 0
    abstained: int = 0

    def add(self, *, right: bool, abstained: bool) -> None:
        """One more query."""
        self.queries += 1
        self.right += right
        self.abstained += abstained


@dataclass(slots=True)
class Evaluation:
    """What came of it: by expected adapter where one was named; `reached` of `best` score where there were scores.

    A choice without a score reaches 0: nobody has said that it is any good.
    """

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    queries: int = 0
    abstained: int = 0
    scored: int = 0
    unscored: int = 0
    reached: float = 0.0
    best: float = 0.0

    def add(self, row: Row, decision: dict[str, Any]) -> None:
        """One decision; of a set the heaviest member counts."""
        chosen = decision["chosen"][0]["name"] if decision["chosen"] else ""
        self.queries += 1
        self.abstained += not chosen
        if row.adapter is not None:
            self.tallies[row.adapter or BASE_WORD].add(right=chosen == row.adapter, abstained=not chosen)
        if row.scores:
            self.scored += chosen in row.scores
            self.unscored += chosen not in row.scores
            self.reached += row.scores.get(chosen, 0.0)
            self.best += max(row.scores.values())

    def summary(self) -> dict[str, Any]:
        """Shares and counts; None where there was nothing to count."""
        named = sum(tally.queries for tally in self.tallies.values())
        right = sum(tally.right for tally in self.tallies.values())
        with_scores = self.scored + self.unscored
        return {
            "queries": self.queries,
            "abstained": self.abstained,
            "accuracy": right / named if named else None,
            "scored": self.scored,
            "without_score": self.unscored,
            "mean_score": self.reached / with_scores if with_scores else None,
            "share_of_oracle": self.reached / self.best if self.best else None,
            "by_adapter": {
                name: {"queries": t.queries, "accuracy": t.right / t.queries, "abstained": t.abstained}
                for name, t in sorted(self.tallies.items())
            },
        }


def read_rows(path: Path, bases: Collection[str]) -> Iterator[Row]:
    """The queries of a file that calls the base any of `bases`. Raises `CommandError` naming file and line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield _row(line, f"{path}, line {number}", bases)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}", USAGE) from None


def _row(line: bytes, where: str, bases: Collection[str]) -> Row:
    try:
        value = strict_json.loads(line)
    except ValueError as error:
        raise CommandError(f"{where}: {error}", USAGE) from None
    if not isinstance(value, dict) or not isinstance(value.get("query"), str):
        raise CommandError(f'{where}: must be an object with a text "query"', USAGE)
    adapter, scores = value.get("adapter"), value.get("scores")
    named = adapter is None or isinstance(adapter, str)
    numbers = scores is None or (
        isinstance(scores, dict) and all(isinstance(s, int | float) and s >= 0 for s in scores.values())
    )
    if (adapter is None and not scores) or not named or not numbers:
        raise CommandError(f'{where}: needs the right "adapter" (a name), or "scores" ({{name: number}})', USAGE)
    plain = {"" if name in bases else name: float(score) for name, score in (scores or {}).items()}
    return Row(value["query"], "" if adapter in bases else adapter, plain)


def evaluate(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Routes a file's queries, with a progress bar."""
    models = api.call("GET", "/v1/models")["data"]
    bases = {BASE_WORD, *(model["id"] for model in models if model["parent"] is None)}
    rows = list(read_rows(args.file, bases))
    if not rows:
        raise CommandError(f"{args.file} has no query in it", USAGE)
    found = Evaluation()
    router = {**options_of(args), "explain": False}
    errors = Console(stderr=True)
    starts = range(0, len(rows), AT_ONCE)
    for start in track(starts, "routing", console=errors, transient=True, disable=not errors.is_terminal):
        part = rows[start : start + AT_ONCE]
        answer = api.call("POST", "/v1/route", json={"input": [row.query for row in part], "router": router})
        for row, decision in zip(part, answer["data"], strict=True):
            found.add(row, decision)
    summary = found.summary()
    if args.json:
        console.print_json(data=summary)
        return
    if summary["by_adapter"]:
        table = Table("expected", "queries", "right", "abstained", box=None, pad_edge=False)
        for name, line in summary["by_adapter"].items():
            table.add_row(name, str(line["queries"]), f"{line['accuracy']:.1%}", str(line["abstained"]))
        console.print(table)
    lines = [f"{summary['queries']} queries, {summary['abstained']} left to the base"]
    if summary["accuracy"] is not None:
        lines.append(f"accuracy {summary['accuracy']:.1%}")
    if summary["share_of_oracle"] is not None:
        lines.append(
            f"mean score {summary['mean_score']:.4f}, {summary['share_of_oracle']:.1%} of the oracle "
            f"({summary['without_score']} of {summary['scored'] + summary['without_score']} choices have no score and "
            "count as 0)"
        )
    console.print("\n".join(lines), highlight=False)


def train(args: argparse.Namespace, console: Console) -> None:
    """Trains a scorer in this process, with progress bars."""
    own = {"command", "file", "seed", "out", "fine_tune", "json"}
    settings = load_settings({key: value for key, value in vars(args).items() if key not in own})
    from loramux.server.api.auto.offline import OfflineError, train_file  # torch takes seconds: not for other commands

    try:
        made = train_file(settings, args.file, args.out, args.seed, args.fine_tune)
    except OfflineError as error:
        raise CommandError(str(error)) from error
    if args.json:
        console.print_json(data=made)
        return
    table = Table("scorer", made["criterion"], "setting", box=None, pad_edge=False)
    for entry in _shown(made["compared"], made["chosen"]):
        failed = entry.get("failed")
        table.add_row(entry["name"], "" if failed else f"{entry['estimate']:.4f}", failed or entry["setting"])
    console.print(table)
    console.print(
        f"\n{made['chosen']} ({made['setting']}) on {made['rows']} queries is version {made['version']} in "
        f"{made['folder']}", highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip
    if args.fine_tune is not None:
        console.print(f"serve with --router-encoder {args.fine_tune}", highlight=False, markup=False, soft_wrap=True)


def _shown(compared: Sequence[dict[str, Any]], chosen: str) -> list[dict[str, Any]]:
    """The families, then the best means of several, and the one chosen; JSON has all."""
    single = [entry for entry in compared if "; " not in entry.get("setting", "")]
    means = [entry for entry in compared if "; " in entry.get("setting", "")]
    best = sorted(means, key=lambda entry: -entry["estimate"])[:SHOWN_MEANS]
    return [*single, *(entry for entry in means if entry in best or entry["name"] == chosen)]
