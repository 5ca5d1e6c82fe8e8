"""Messages to a prompt, prompts to token ids, and what the model's own files say about sampling.

Chat templates run in a thread, in a sandbox with a time limit (`templates`). The tokenizer is the `tokenizers`
library's; its batch call leaves the interpreter free while it works, so a long prompt in a thread does not stop the
event loop.
"""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from loramux.server.api.detokenize import Detokenizer
from loramux.server.api.errors import bad_request
from loramux.server.api.parsing import AnswerFormat
from loramux.server.api.templates import ChatTemplate, TemplateOptions, Turn
from loramux.server.api.token_bytes import TokenBytes

T = TypeVar("T")

INLINE_CHARS = 8192
PLAIN = TemplateOptions()


class TokenizerError(Exception):
    """The model's tokenizer cannot be used; the message says why."""


class PromptTooLongError(ValueError):
    """A prompt has more tokens than were asked for at most."""

    def __init__(self, tokens: int) -> None:
        super().__init__(f"{tokens} tokens")
        self.tokens = tokens


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request gets that says nothing: the model's own settings, or the neutral values."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any]) -> "SamplingDefaults":
        """Reads `generation_config.json`. A file that says `do_sample: false` makes greedy the default.

        A value outside the API's own bounds is ignored.
        """

        def number(key: str, low: float, high: float, default: float) -> float:
            value = config.get(key)
            usable = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
            return float(value) if usable and value is not None else default

        greedy = config.get("do_sample") is False
        neutral = cls()
        return cls(
            temperature=0.0 if greedy else number("temperature", 0, 2, neutral.temperature),
            top_p=number("top_p", 0, 1, neutral.top_p),
            top_k=int(number("top_k", 0, 1 << 31, neutral.top_k)),
            min_p=number("min_p", 0, 1, neutral.min_p),
            repetition_penalty=number("repetition_penalty", 0.01, 100, neutral.repetition_penalty),
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as tokens, and what of the answer they have already: see `AnswerFormat.begun`."""

    token_ids: list[int]
    begun: str


class Renderer:
    """The tokenizer and the chat template of one model. Methods are safe from several threads at once.

    `definition` is the tokenizer as its `tokenizer.json` would have it. `format` is how the model's answers are read:
    by a `response_template`, or as its chat template implies; None where there is nothing but text in them. `marks` are
    the added tokens that the format looks for and that llguidance never takes for text: special ones, and `<...>`.
    Raises `TokenizerError` for a chat template or a response template that is none.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        chat_template: str | Mapping[str, str] | None = None,
        response_template: Mapping[str, Any] | None = None,
        special_tokens: Mapping[str, str] | None = None,
        defaults: SamplingDefaults | None = None,
        executor: Executor | None = None,
    ) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.definition: bytes = tokenizer.to_str().encode()
        try:
            self._template = None if chat_template is None else ChatTemplate(chat_template, special_tokens)
        except TemplateSyntaxError as error:
            raise TokenizerError(f"the chat template is wrong in line {error.lineno}: {error.message}") from None
        self.format = self._format(response_template)
        added = {token.content: (i, token.special) for i, token in tokenizer.get_added_tokens_decoder().items()}
        self.marks = {
            token: i for token, (i, special) in added.items()
            if self.format and self.format.mentions(token) and (special or re.fullmatch(r"<.+>", token))
        }  # fmt: skip
        self._hidden = {
            offered: frozenset(
                i for token, (i, special) in added.items()
                if special and not (self.format and self.format.mentions(token, calls=offered))
            )
            for offered in (False, True)
        }  # fmt: skip
        self._executor = executor
        self.defaults = defaults or SamplingDefaults()
        self.token_bytes = TokenBytes(tokenizer)
        self.vocab_size: int = tokenizer.get_vocab_size(with_added_tokens=True)

    def _format(self, response_template: Mapping[str, Any] | None) -> AnswerFormat | None:
        """How answers are read."""
        template = self._template
        source, prompt = ("", "") if template is None else (template.source, template.generation_prompt)
        try:
            return AnswerFormat.find(source, prompt, response_template)
        except (ValueError, TypeError, AttributeError) as error:
            raise TokenizerError(
                f"the response template is wrong: {error} (--response-template FILE replaces the model's own)"
            ) from None

    @classmethod
    def load(
        cls,
        model_path: Path,
        *,
        chat_template: Path | None = None,
        response_template: Path | None = None,
        executor: Executor | None = None,
    ) -> "Renderer":
        """The renderer of a directory in Hugging Face layout; no code of the model's is run.

        Raises `TokenizerError` when there is no tokenizer, or none that decodes step by step.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a missing or broken tokenizer
            raise TokenizerError(f"cannot load the tokenizer of {model_path}: {error}") from error
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if not isinstance(backend, Tokenizer):
            raise TokenizerError(f"{model_path} has no fast tokenizer (tokenizer.json); convert it with transformers")
        template = chat_template.read_text(encoding="utf-8") if chat_template else tokenizer.chat_template
        if isinstance(template, dict) and "default" not in template:
            template = None
        reads = getattr(tokenizer, "response_template", None)
        if response_template is not None:
            try:
                reads = json.loads(response_template.read_text(encoding="utf-8"))
            except ValueError as error:
                raise TokenizerError(f"{response_template} is no JSON: {error}") from None
        config = model_path / "generation_config.json"
        generation = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return cls(
            Tokenizer.from_str(backend.to_str()),
            chat_template=template,
            response_template=reads,
            special_tokens={k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)},
            defaults=SamplingDefaults.from_generation_config(generation),
            executor=executor,
        )

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def render(self, messages: Sequence[Turn], options: TemplateOptions = PLAIN) -> str:
        """The prompt's text. Blocks. Raises a 400 with the template's own complaint."""
        if self._template is None:
            raise bad_request(
                "This model has no chat template: use /v1/completions, or start the server with --chat-template FILE.",
                "messages", "no_chat_template",
            )  # fmt: skip
        return self._template.render(messages, options)

    def encode(self, text: str, *, add_special_tokens: bool, most: int | None = None) -> list[int]:
        """Token ids. `add_special_tokens` as the tokenizer does it (usually a leading begin mark).

        Raises `PromptTooLongError` for more than `most`: nothing else runs while a list of millions is made.
        """
        return self._encode_all([text], add_special_tokens, most)[0]

    def _encode_all(self, texts: Sequence[str], add_special_tokens: bool, most: int | None) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        if most is not None and (longest := max(map(len, encodings), default=0)) > most:
            raise PromptTooLongError(longest)
        return [encoding.ids for encoding in encodings]

    async def in_thread(self, work: Callable[[], T]) -> T:
        """Runs work on texts and tokens in a thread of the renderer's."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    def prompt(self, messages: Sequence[Turn], options: TemplateOptions = PLAIN, *, most: int | None = None) -> Prompt:
        """The prompt of a conversation. Blocks, for as long as the template likes: to be called in a thread.

        Raises as `encode` does.
        """
        text = self.render(messages, options)
        token_ids = self.encode(text, add_special_tokens=options.add_special_tokens, most=most)
        return Prompt(token_ids, self.format.begun(text) if self.format else "")

    async def text_tokens(
        self, texts: Sequence[str], *, add_special_tokens: bool = True, most: int | None = None
    ) -> list[list[int]]:
        """The token ids of each text; where they are long together, made in a thread. Raises as `encode` does."""

        def encode() -> list[list[int]]:
            return self._encode_all(texts, add_special_tokens, most)

        return encode() if sum(map(len, texts)) <= INLINE_CHARS else await self.in_thread(encode)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a prompt's tokens."""
        texts: list[str] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def token_strings(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own writing of each token; empty for an id that only the model has."""
        return [self._tokenizer.id_to_token(token) or "" for token in token_ids]

    def hidden_tokens(self, *, offered: bool) -> Set[int] | None:
        """The special tokens that are no marks, where answers have marks: of calls only if tools are `offered`."""
        return None if self.format is None else self._hidden[offered]

    def detokenizer(
        self, prompt: Sequence[int], *, skip_special_tokens: bool = True, hidden: Set[int] | None = None
    ) -> Detokenizer:
        """The way back, for an answer to `prompt`; `hidden` are the tokens without text, if not all special ones."""
        return Detokenizer(self._tokenizer, prompt, skip_special_tokens=skip_special_tokens, hidden=hidden)
