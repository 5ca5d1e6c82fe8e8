"""`loramux chat`: a conversation in the terminal, or one answer for a script."""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from loramux.server.bench.http_client import ServingError
from loramux.server.bench.openai_stream import EventParser
from loramux.server.cli_client import STATUSES, USAGE, Api, CommandError
from loramux.server.cli_output import output, plain, print_json

CHAT_PATH = "/v1/chat/completions"
AUTO = "auto"
NUMBERS: dict[str, type[int] | type[float]] = {
    "temperature": float, "top_p": float, "top_k": int, "min_p": float, "max_tokens": int, "seed": int,
    "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip
DESCRIPTION = """\
Without a PROMPT, and with a terminal to type in, a conversation: /help lists its commands, Ctrl-C stops an answer,
Ctrl-D ends. With a PROMPT, or with text on standard input, one answer: its text alone goes to standard output. With
both, the prompt comes before the text. Any OpenAI-compatible server will do; fusion and `auto` are loramux's.
"""
EXAMPLES = f"""\
examples:
  loramux chat                                        talk to the base; /model NAME switches
  loramux chat -m reverse "Reverse this: planet"
  loramux chat -m auto --stats "Write 14 in Roman numerals."
  loramux chat -a reverse=0.7 -a double-letters=0.3 "Reverse this: planet"
  git diff | loramux chat -m reviewer "Review this change:" > review.txt
  loramux chat -m roman --json "Write 14 in Roman numerals." | jq -r '.choices[0].message.content'
  OPENAI_BASE_URL=https://llm.example.org/v1 loramux chat -m some-model "Hello"

{STATUSES}
"""


def weighted(text: str) -> dict[str, Any]:
    """`NAME` or `NAME=WEIGHT` as an entry of a request's `adapters`. Raises ValueError."""
    name, separator, weight = text.partition("=")
    if not name or (separator and not weight):
        raise ValueError(f"{text!r} is not NAME or NAME=WEIGHT")
    return {"name": name, "weight": float(weight) if separator else 1.0}


def _weighted(text: str) -> dict[str, Any]:
    try:
        return weighted(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: write it as reverse=0.7") from None


def add_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", common: argparse.ArgumentParser
) -> None:
    """Adds `chat`; `common` are the flags of commands that talk to a server."""
    parser = commands.add_parser(
        "chat", parents=[common], help="talk to a model or an adapter", allow_abbrev=False, description=DESCRIPTION,
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="ask this and end")
    parser.add_argument("-m", "--model", help="the base, an adapter, NAME@VERSION or auto (default: the base)")
    parser.add_argument(
        "-a", "--adapter", action="append", type=_weighted, default=[], metavar="NAME=WEIGHT",
        help="fuse adapters over the base, weighted (repeatable)",
    )  # fmt: skip
    parser.add_argument("-s", "--system", help="the system prompt")
    parser.add_argument("--stop", action="append", metavar="TEXT", help="end the answer here (repeatable)")
    for name, kind in NUMBERS.items():
        parser.add_argument("--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X")
    parser.add_argument("--no-stream", action="store_true", help="show the answer when it is whole")
    parser.add_argument("--stats", action="store_true", help="say on standard error what served, tokens and times")
    parser.set_defaults(run=chat)


@dataclass(slots=True)
class Conversation:
    """Who answers, how, and what has been said."""

    model: str
    base: str
    adapters: list[dict[str, Any]] = field(default_factory=list)
    system: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    messages: list[dict[str, str]] = field(default_factory=list)

    def body(self, prompt: str) -> dict[str, Any]:
        """The request that asks `prompt` next."""
        opening = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*opening, *self.messages, {"role": "user", "content": prompt}]
        body: dict[str, Any] = {"model": self.model, "messages": messages, **self.options}
        if self.adapters:
            body |= {"model": self.base, "adapters": self.adapters}
        elif self.model == AUTO:
            body["router"] = {"explain": True}
        return body

    def said(self, prompt: str, answer: str) -> None:
        """A turn is over."""
        self.messages += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    @property
    def label(self) -> str:
        """Who answers, in a word."""
        return "+".join(f"{a['name']}={a['weight']:g}" for a in self.adapters) or self.model


@dataclass(slots=True)
class Reply:
    """What came of a request; times are seconds since it was sent."""

    text: str = ""
    usage: dict[str, Any] | None = None
    served: dict[str, Any] | None = None
    finish_reason: str | None = None
    first: float | None = None
    last: float | None = None

    def facts(self) -> list[str]:
        """What served, how much and how fast, as far as the server says."""
        found = []
        router = (self.served or {}).get("router") or {}
        if self.served is not None:
            members = self.served["adapters"]
            alone = len(members) == 1 and members[0]["weight"] == 1
            names = [f"{a['name']}@{a['version']}" + ("" if alone else f" x {a['weight']:.3g}") for a in members]
            found.append(", ".join(names) or "the base")
        if router.get("rung"):
            found.append(f"routed by {router['rung']} in {router.get('milliseconds') or 0:.1f} ms")
        tokens = (self.usage or {}).get("completion_tokens")
        if tokens is not None:
            found.append(f"{tokens} token{'' if tokens == 1 else 's'}")
        if self.first is not None:
            found.append(f"first after {self.first * 1000:.0f} ms")
        if tokens and tokens > 1 and self.first is not None and self.last is not None and self.last > self.first:
            found.append(f"{(tokens - 1) / (self.last - self.first):.1f} tok/s")
        if self.finish_reason not in (None, "stop"):
            found.append(f"ended by {self.finish_reason}")
        return found

    def take(self, event: bytes, seconds: float) -> str:
        """One event of the stream; the text in it. Raises `CommandError` for an error, and for what is no chunk."""
        try:
            chunk = json.loads(event)
            if error := chunk.get("error"):
                raise CommandError(str(error.get("message") if isinstance(error, dict) else error))
            self.usage = chunk.get("usage") or self.usage
            self.served = chunk.get("loramux") or self.served
            text = ""
            for choice in chunk.get("choices") or ():
                text += (choice.get("delta") or {}).get("content") or ""
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        except (ValueError, TypeError, AttributeError):
            raise CommandError(f"the server sent no chunk of a chat: {event[:200]!r}") from None
        if text:
            self.first = seconds if self.first is None else self.first
            self.last = seconds
            self.text += text
        return text


def stream(api: Api, body: dict[str, Any], reply: Reply, show: Callable[[str], None]) -> None:
    """Asks, and shows the text as it comes. Raises `CommandError`; `reply` has what there was until then."""
    parser = EventParser()
    start = time.perf_counter()
    with api.stream(CHAT_PATH, {**body, "stream": True, "stream_options": {"include_usage": True}}) as pieces:
        for event in _events(pieces, parser):
            if event.strip() == b"[DONE]":
                return
            if text := reply.take(event, time.perf_counter() - start):
                show(text)
    if reply.finish_reason is None:
        raise CommandError("the answer was cut off: the stream ended before the answer did")


def _events(pieces: Iterator[bytes], parser: EventParser) -> Iterator[bytes]:
    for piece in pieces:
        try:
            yield from parser.feed(piece)
        except ServingError as error:
            raise CommandError(str(error)) from None


def base_of(models: Sequence[dict[str, Any]]) -> str:
    """The base's name in a server's list: the first model without a parent. Raises `CommandError`."""
    for model in models:
        if model.get("parent") is None:
            return str(model["id"])
    raise CommandError("the server lists no base model: name one by --model")


def chat(api: Api, args: argparse.Namespace, console: Console) -> None:
    """Starts a conversation, or asks once."""
    given = "" if sys.stdin.isatty() else sys.stdin.read()
    prompt = "\n\n".join(part for part in (args.prompt or "", given) if part.strip())
    talk = not prompt and sys.stdin.isatty()
    if not prompt and not talk:
        raise CommandError("there is no prompt: give one as an argument or on standard input", USAGE)
    if talk and args.json:
        raise CommandError("--json goes with a prompt", USAGE)
    if args.adapter and args.model:
        raise CommandError("give --model or --adapter, not both: a fusion is over the base", USAGE)
    base = base_of(api.models()) if talk or args.adapter or not args.model else args.model
    options = {name: getattr(args, name) for name in NUMBERS if getattr(args, name) is not None}
    if args.stop:
        options["stop"] = args.stop
    conversation = Conversation(args.model or base, base, args.adapter, args.system, options)
    if talk:
        from loramux.server.cli_repl import Repl  # readline changes the terminal: for conversations only

        Repl(api, conversation, console, streaming=not args.no_stream).run()
        return
    _once(api, conversation, prompt, args, console)


def _once(api: Api, conversation: Conversation, prompt: str, args: argparse.Namespace, console: Console) -> None:
    """One answer: its text (or, with --json, the server's whole answer) to standard output."""
    if args.json:
        print_json(api.call("POST", CHAT_PATH, json=conversation.body(prompt)))
        return
    reply = ask(api, conversation.body(prompt), console, streaming=not args.no_stream)
    if args.stats:
        output(stderr=True).print(" · ".join(reply.facts()), style="dim", markup=False)


def ask(
    api: Api, body: dict[str, Any], console: Console, *, streaming: bool = True, reply: Reply | None = None
) -> Reply:
    """Shows the answer and ends its line; control characters are shown as escapes on a terminal, and kept in a pipe.

    `reply` is filled as the answer comes, also when this is interrupted.
    """
    reply = Reply() if reply is None else reply

    def show(text: str) -> None:
        sys.stdout.write(plain(text) if console.is_terminal else text)
        sys.stdout.flush()

    try:
        if streaming:
            stream(api, body, reply, show)
        else:
            answer = api.call("POST", CHAT_PATH, json=body)
            choice = answer["choices"][0]
            reply.text, reply.finish_reason = choice["message"]["content"] or "", choice["finish_reason"]
            reply.usage, reply.served = answer.get("usage"), answer.get("loramux")
            show(reply.text)
    finally:
        if reply.text and not reply.text.endswith("\n"):
            show("\n")
    return reply
