"""Chat templates: Jinja in a sandbox, with a limit on the processor time that one prompt may take.

The sandbox is the one that transformers renders templates in (immutable, no underscore attributes), so that a prompt
here is the prompt that the model was trained on. A client cannot send a template; what it can send (messages,
documents, tools, keyword arguments) reaches the template as plain JSON values.
"""

import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils.chat_template_utils import _compile_jinja_template

from loramux.server.api.errors import APIError, bad_request

TEMPLATE_SECONDS = 2.0
CUT_MARK = "LORAMUX_CONTINUES_HERE "
PROBES = ("7d1f3a", "b84c02")
RESERVED_NAMES = frozenset(
    "messages conversation tools documents chat_template tokenize tokenizer add_generation_prompt "
    "continue_final_message return_dict return_tensors padding truncation max_length self".split()
)
"""What `chat_template_kwargs` may not say: each is set by the server or has a field of its own."""

Turn = Mapping[str, Any]

_deadline: ContextVar[float] = ContextVar("loramux_template_deadline")


class _TooSlowError(Exception):
    """The template has used up its time."""


class _TimedEnvironment(ImmutableSandboxedEnvironment):
    """Looks at the clock wherever a template reads a value or calls something, which no loop does without."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        """See `jinja2.Environment.getattr`."""
        check_time()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """See `jinja2.Environment.getitem`."""
        check_time()
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805  # as jinja2 names them
        """See `jinja2.sandbox.SandboxedEnvironment.call`."""
        check_time()
        return super().call(__context, __obj, *args, **kwargs)


def check_time() -> None:
    """Raises `_TooSlowError` once this thread has computed beyond the limit of the template that it renders."""
    if time.thread_time() > _deadline.get():
        raise _TooSlowError


def make_environment() -> ImmutableSandboxedEnvironment:
    """transformers' environment for chat templates (its extensions, filters and globals), with a clock."""
    theirs = _compile_jinja_template("").environment
    ours = _TimedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[type(item) for item in theirs.extensions.values()]
    )
    ours.filters.update(theirs.filters)
    ours.globals.update(theirs.globals)
    return ours


@dataclass(frozen=True, slots=True)
class TemplateOptions:
    """What a request says of its prompt besides the messages.

    `add_generation_prompt` ends the prompt where the assistant speaks, `continue_final_message` inside the last
    message instead. `variables` are the client's own names for the template.
    """

    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents: Sequence[Mapping[str, Any]] | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_special_tokens: bool = False


class ChatTemplate:
    """A model's templates, compiled once: `default`, and those it has for `tool_use` and `rag`.

    `takes_parts`: content arrays reach the template as such, because it renders them; otherwise texts are joined by
    newlines. `needs_parts`: it renders nothing else, so that a string is given as one part. `source` is the template
    that knows most of how answers are written: the one for tools, where there is one. Methods are safe from several
    threads. Raises `jinja2.TemplateSyntaxError` for text that is no template.
    """

    def __init__(
        self,
        templates: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        seconds: float = TEMPLATE_SECONDS,
    ) -> None:
        environment = make_environment()
        sources = {"default": templates} if isinstance(templates, str) else dict(templates)
        self.source = sources.get("tool_use", sources.get("default", ""))
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self._names = {
            name: frozenset(meta.find_undeclared_variables(environment.parse(source)))
            for name, source in sources.items()
        }
        self._takes_calls = {name: "tool_calls" in source for name, source in sources.items()}
        self._special_tokens = dict(special_tokens or {})
        self._reserved = RESERVED_NAMES | environment.globals.keys() | self._special_tokens.keys()
        self._seconds = seconds
        self.takes_parts, self.needs_parts = True, False  # while it is tried out
        self.takes_parts = self._shows([{"type": "text", "text": text} for text in PROBES])
        self.needs_parts = self.takes_parts and not self._shows(" ".join(PROBES))

    @property
    def generation_prompt(self) -> str:
        """What a prompt ends with so that the assistant speaks; nothing where the template has no such thing."""
        try:
            asked, silent = (
                self.render([{"role": "user", "content": PROBES[0]}], TemplateOptions(add_generation_prompt=speaks))
                for speaks in (True, False)
            )
        except APIError:
            return ""
        return asked.removeprefix(silent) if asked.startswith(silent) else ""

    def _shows(self, content: Any) -> bool:
        """Whether the template renders such content as text, and not as Python writes a list."""
        try:
            text = self.render([{"role": "user", "content": content}], TemplateOptions())
        except APIError:
            return False
        return all(probe in text for probe in PROBES) and not any(f"{quote}text{quote}" in text for quote in "'\"")

    def _pick(self, options: TemplateOptions) -> str:
        """Which template such a request is rendered by."""
        for name, wanted in (("tool_use", options.tools), ("rag", options.documents)):
            if wanted and name in self._templates:
                return name
        return "default"

    def check(self, options: TemplateOptions) -> None:
        """Raises a 400 naming the option that the template cannot honour."""
        for name in options.variables:
            if name in self._reserved:
                raise bad_request(
                    f"chat_template_kwargs cannot set {name!r}: it is the server's, or has a field of its own.",
                    f"chat_template_kwargs.{name}",
                )
        picked = self._pick(options)
        if options.documents and "documents" not in self._names[picked]:
            raise bad_request(
                "This model's chat template takes no documents: put their text into a message, or start the server "
                "with a --chat-template that renders them.", "documents", "unsupported_parameter",
            )  # fmt: skip
        if options.tools and "tools" not in self._names[picked]:
            raise bad_request(
                "This model's chat template takes no tools: start the server with a --chat-template that renders "
                "them.", "tools", "unsupported_parameter",
            )  # fmt: skip

    def render(self, messages: Sequence[Turn], options: TemplateOptions) -> str:
        """The prompt's text. Blocks. Raises a 400 with the template's own complaint, or when it takes too long."""
        self.check(options)
        if not self._takes_calls[self._pick(options)] and any(turn.get("tool_calls") for turn in messages):
            raise bad_request(
                "This model's chat template does not show earlier calls of tools: leave out `tool_calls`, or start the "
                "server with a --chat-template that renders them.", "messages", "unsupported_parameter",
            )  # fmt: skip
        turns = [self._turn(message) for message in messages]
        if options.continue_final_message:
            turns[-1] = _marked(turns[-1])
        variables = {
            **self._special_tokens,
            **options.variables,
            "messages": turns,
            "tools": options.tools,
            "documents": options.documents,
            "add_generation_prompt": options.add_generation_prompt,
        }
        _deadline.set(time.thread_time() + self._seconds)
        pieces = []
        try:
            for piece in self._templates[self._pick(options)].generate(**variables):
                check_time()
                pieces.append(piece)
        except _TooSlowError:
            raise bad_request(
                f"The chat template took more than {self._seconds:g} s of processor time for these messages: send "
                "fewer.", "messages", "template_timeout",
            ) from None  # fmt: skip
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
            raise _refused(error) from None
        except RecursionError:
            raise _refused("nested too deeply") from None
        text = "".join(pieces)
        return _cut(text) if options.continue_final_message else text

    def _turn(self, message: Turn) -> dict[str, Any]:
        """A message with its content as the template takes it."""
        content = message.get("content")
        if isinstance(content, list) and not self.takes_parts:
            content = "\n".join(part["text"] for part in content)
        elif isinstance(content, str) and self.needs_parts:
            content = [{"type": "text", "text": content}]
        return {**message, "content": content}


def _refused(why: object) -> APIError:
    return bad_request(f"The chat template refused the messages: {why}", "messages", "invalid_messages")


def _marked(turn: Mapping[str, Any]) -> dict[str, Any]:
    """The turn with a mark where its text ends. Raises a 400 for one without text."""
    content = turn["content"]
    if isinstance(content, list) and content:
        *rest, last = content
        return {**turn, "content": [*rest, {**last, "text": last["text"] + CUT_MARK}]}
    if isinstance(content, str):
        return {**turn, "content": content + CUT_MARK}
    raise bad_request("The last message has no text to continue.", "continue_final_message", "invalid_value")


def _cut(text: str) -> str:
    """The prompt up to the mark; white space before it goes where the template trims messages. Raises a 400."""
    at = text.rfind(CUT_MARK.rstrip())
    if at < 0:
        raise bad_request(
            "This model's chat template does not render the last message, so it cannot be continued.",
            "continue_final_message", "invalid_value",
        )  # fmt: skip
    kept = text[:at]
    return kept if text.startswith(CUT_MARK, at) else kept.rstrip()
