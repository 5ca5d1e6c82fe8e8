"""The conversation of `loramux chat`: lines that are typed, answers as they come, and commands that begin with /."""

import json
import readline
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from loramux.server.cli_chat import AUTO, NUMBERS, Conversation, Reply, ask, weighted
from loramux.server.cli_client import Api, CommandError
from loramux.server.cli_output import cell, plain, table

MORE = "\\"
LISTED = 40
Handler = Callable[["Repl", list[str]], None]


class Repl:
    """Reads, asks and shows until the end. `read(prompt)` gives a line; it raises EOFError at the end."""

    def __init__(
        self,
        api: Api,
        conversation: Conversation,
        console: Console,
        *,
        streaming: bool = True,
        read: Callable[[str], str] = input,
    ) -> None:
        self._api = api
        self._talk = conversation
        self._console = console
        self._streaming = streaming
        self._read = read
        self._last: str | None = None
        self._names: list[str] = []

    def run(self) -> None:
        """The loop. Ctrl-C at the prompt clears the line, during an answer it stops the answer."""
        readline.set_completer(self._complete)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        self._console.print(f"{self._talk.label}: /help lists commands, Ctrl-D ends", style="dim", markup=False)
        while True:
            try:
                self.take(self._line())
            except EOFError:
                self._console.print()
                return
            except KeyboardInterrupt:
                self._console.print()

    def _line(self) -> str:
        """What is typed; a line that ends with a backslash goes on in the next."""
        text = self._read(f"{self._talk.label}> ")
        while text.endswith(MORE):
            text = text[: -len(MORE)] + "\n" + self._read("... ")
        return text

    def take(self, line: str) -> None:
        """One line: a command, or something to ask. Failures are shown, and the conversation goes on."""
        try:
            if line.startswith("/"):
                self._command(line)
            elif line.strip():
                self._ask(line)
        except CommandError as error:
            self._console.print(f"error: {plain(str(error))}", style="red", markup=False)
        except ValueError as error:
            self._console.print(f"{error}; /help says how it is written", style="red", markup=False)

    def _command(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"there is no /{plain(name)}")
        words = [rest.strip()] if name in WHOLE_LINE else shlex.split(rest)
        COMMANDS[name][0](self, [word for word in words if word])

    def _ask(self, prompt: str) -> None:
        self._last = prompt
        reply = Reply()
        try:
            ask(self._api, self._talk.body(prompt), self._console, streaming=self._streaming, reply=reply)
        except KeyboardInterrupt:
            self._console.print("stopped", style="dim")
        if reply.text:
            self._talk.said(prompt, reply.text)
        if facts := reply.facts():
            self._console.print(" · ".join(facts), style="dim", markup=False)

    def _complete(self, text: str, state: int) -> str | None:
        """Names after /model and /fuse, commands elsewhere."""
        line = readline.get_line_buffer()
        if " " not in line:
            choices = [f"/{name}" for name in COMMANDS]
        elif line.startswith(("/model ", "/fuse ")):
            choices = self._known()
        else:
            return None
        found = [choice for choice in choices if choice.startswith(text)]
        return found[state] if state < len(found) else None

    def _known(self) -> list[str]:
        if not self._names:
            self._names = [str(model["id"]) for model in self._api.models()]
        return [*self._names, AUTO]

    def help(self, words: list[str]) -> None:
        """Lists the commands."""
        made = table("command", "what it does")
        made.show_header = False
        for _, usage, text in COMMANDS.values():
            made.add_row(usage, text)
        self._console.print(made)
        self._console.print("A line that ends with \\ goes on in the next.", style="dim", markup=False)

    def model(self, words: list[str]) -> None:
        """Switches who answers; the conversation stays."""
        if len(words) != 1:
            raise ValueError("/model takes one name")
        self._talk.model, self._talk.adapters = words[0], []

    def models(self, words: list[str]) -> None:
        """Lists models and adapters."""
        wanted = " ".join(words).lower()
        found = [model for model in self._api.models() if wanted in str(model["id"]).lower()]
        made = table("name", "parent")
        made.show_header = False
        for model in found[:LISTED]:
            made.add_row(cell(str(model["id"])), cell(f"over {model['parent']}" if model.get("parent") else ""))
        self._console.print(made)
        if len(found) > LISTED:
            self._console.print(f"{len(found) - LISTED} more: /models TEXT lists those with TEXT in them", style="dim")

    def fuse(self, words: list[str]) -> None:
        """Answers by several adapters, weighted."""
        if not words:
            raise ValueError("/fuse takes names with weights, as /fuse reverse=0.7 roman=0.3")
        self._talk.adapters = [weighted(word) for word in words]

    def system(self, words: list[str]) -> None:
        """Sets the system prompt, or takes it away."""
        self._talk.system = words[0] if words else None

    def set(self, words: list[str]) -> None:
        """Changes a sampling setting, or shows them all."""
        if not words:
            made = table("setting", "value")
            made.show_header = False
            for name in NUMBERS:
                made.add_row(name, str(self._talk.options.get(name, "default")))
            self._console.print(made)
            return
        name, value = words if len(words) == 2 else (words[0], None)
        if len(words) > 2 or name not in NUMBERS:
            raise ValueError(f"/set takes one of {', '.join(NUMBERS)}, and a number")
        if value in (None, "default"):
            self._talk.options.pop(name, None)
        else:
            self._talk.options[name] = NUMBERS[name](value)

    def retry(self, words: list[str]) -> None:
        """Asks the last prompt again, without its answer."""
        if self._last is None:
            raise ValueError("nothing has been asked yet")
        self.undo(words)
        self._ask(self._last)

    def undo(self, words: list[str]) -> None:
        """Forgets the last turn."""
        del self._talk.messages[-2:]

    def clear(self, words: list[str]) -> None:
        """Forgets what was said."""
        self._talk.messages.clear()

    def save(self, words: list[str]) -> None:
        """Writes the conversation as JSON."""
        if len(words) != 1:
            raise ValueError("/save takes a file's name")
        body: dict[str, Any] = self._talk.body("")
        body["messages"].pop()
        try:
            Path(words[0]).expanduser().write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            raise CommandError(f"{words[0]}: {error.strerror}") from None
        self._console.print(f"saved to {words[0]}", style="dim", markup=False)

    def quit(self, words: list[str]) -> None:
        """Ends, as the end of the input does."""
        raise EOFError


WHOLE_LINE = frozenset({"system", "models"})
COMMANDS: dict[str, tuple[Handler, str, str]] = {
    "help": (Repl.help, "/help", "this list"),
    "model": (Repl.model, "/model NAME", "who answers: the base, an adapter, NAME@VERSION or auto"),
    "models": (Repl.models, "/models [TEXT]", "what there is"),
    "fuse": (Repl.fuse, "/fuse A=0.7 B=0.3", "several adapters over the base"),
    "system": (Repl.system, "/system [TEXT]", "set the system prompt, or take it away"),
    "set": (Repl.set, "/set [NAME VALUE]", "sampling, as /set temperature 0.2; 'default' takes it back"),
    "retry": (Repl.retry, "/retry", "ask the last prompt again"),
    "undo": (Repl.undo, "/undo", "forget the last turn"),
    "clear": (Repl.clear, "/clear", "forget the conversation"),
    "save": (Repl.save, "/save FILE", "write the conversation as JSON"),
    "quit": (Repl.quit, "/quit", "end"),
}
