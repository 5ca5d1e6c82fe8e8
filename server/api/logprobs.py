"""Log-probabilities on their way out: from the engine's numbers to tokens with their place in the text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from loramux.server.api.detokenize import Detokenizer
from loramux.server.api.rendering import Renderer
from loramux.server.api.schemas.logprobs import ChatLogprobs, TextLogprobs, TokenLogprob, TopLogprob
from loramux.server.api.token_bytes import TokenBytes

LEAST = -9999.0  # stands for minus infinity, which JSON does not have
PART_SCORES = 64
"""Scores that are written at once: with 20 likeliest tokens each they take some milliseconds."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token, its log-probability (None for a prompt's first), the likeliest tokens, and where its text begins.

    `likeliest` float64 [2 k] has each token's id and log-probability as the engine sends them: an answer is kept until
    it is written, and as Python's numbers they would take seven times as much.
    """

    token_id: int
    logprob: float | None
    likeliest: bytes = b""
    offset: int = 0

    @property
    def top(self) -> list[tuple[int, float]]:
        """The likeliest tokens, each with its log-probability."""
        values = np.maximum(np.frombuffer(self.likeliest), LEAST).tolist()
        return [(int(token), value) for token, value in zip(values[::2], values[1::2], strict=True)]


def read_scores(token_ids: Sequence[int], raw: bytes) -> list[TokenScore]:
    """The scores of tokens from the bytes of an `EngineOutput`; their offsets are not known yet."""
    table = np.frombuffer(raw).reshape(len(token_ids), -1)
    own = np.maximum(table[:, 0], LEAST).tolist()
    return [
        TokenScore(token, logprob, row[1:].tobytes()) for token, logprob, row in zip(token_ids, own, table, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text, and what the model makes of its tokens where that is wanted."""

    text: str = ""
    scores: tuple[TokenScore, ...] = ()


def read_echo(renderer: Renderer, prompt: Sequence[int], raw: bytes | None, *, skip_special_tokens: bool) -> Echo:
    """The prompt as the model read it. Takes time in proportion to its length: not for the event loop."""
    tokens: Detokenizer = renderer.detokenizer((), skip_special_tokens=skip_special_tokens)
    pieces: list[str] = []
    offsets, length = [], 0
    for token in prompt:
        offsets.append(length)
        pieces.append(tokens.feed(token))
        length += len(pieces[-1])
    text = "".join(pieces) + tokens.flush()
    if raw is None:
        return Echo(text)
    scores = [TokenScore(prompt[0], None), *read_scores(prompt[1:], raw)]
    placed = [replace(score, offset=offset) for score, offset in zip(scores, offsets, strict=True)]
    return Echo(text, tuple(placed))


def _readable(data: bytes) -> str:
    """A token's text; one that is no text by its bytes, as OpenAI writes it, so that no two are the same."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_logprobs(scores: Sequence[TokenScore], words: TokenBytes) -> TextLogprobs:
    """What a text completion shows. `top_logprobs` has the token itself, too, however unlikely it was."""

    def likeliest(score: TokenScore) -> dict[str, float] | None:
        if score.logprob is None:
            return None
        return {_readable(words.of(token)): value for token, value in [(score.token_id, score.logprob), *score.top]}

    return TextLogprobs(
        tokens=[_readable(words.of(score.token_id)) for score in scores],
        token_logprobs=[score.logprob for score in scores],
        top_logprobs=[likeliest(score) for score in scores],
        text_offset=[score.offset for score in scores],
    )


class ScoredTokens(Sequence[TokenLogprob]):
    """Tokens as a chat completion shows them; `bytes` are exact where `token` cannot be.

    Each is made when it is looked at: a long answer's, with the likeliest tokens, would be a million objects at once,
    whose number is what the garbage collector's pauses grow with.
    """

    def __init__(self, scores: Sequence[TokenScore], words: TokenBytes) -> None:
        self._scores = scores
        self._words = words

    def __len__(self) -> int:
        return len(self._scores)

    @overload
    def __getitem__(self, index: int) -> TokenLogprob: ...
    @overload
    def __getitem__(self, index: slice) -> "ScoredTokens": ...
    def __getitem__(self, index: int | slice) -> "TokenLogprob | ScoredTokens":
        if isinstance(index, slice):
            return ScoredTokens(self._scores[index], self._words)
        score = self._scores[index]
        first = self._one(score.token_id, LEAST if score.logprob is None else score.logprob)
        top = [self._one(token, value) for token, value in score.top]
        return TokenLogprob(token=first.token, logprob=first.logprob, bytes=first.bytes, top_logprobs=top)

    def _one(self, token: int, value: float) -> TopLogprob:
        data = self._words.of(token)
        return TopLogprob(token=data.decode(errors="replace"), logprob=value, bytes=list(data))


def chat_logprobs(scores: Sequence[TokenScore], words: TokenBytes) -> ChatLogprobs:
    """What a chat completion shows. The content of many scores is made as it is written (`wire.json_pieces`)."""
    tokens = ScoredTokens(scores, words)
    if len(scores) <= PART_SCORES:
        return ChatLogprobs(content=list(tokens), refusal=None)
    return ChatLogprobs.model_construct(content=tokens, refusal=None)
