"""Log-probabilities as the two endpoints show them."""

from loramux.server.api.schemas.common import ResponseModel


class TopLogprob(ResponseModel):
    """A token that was likely. `bytes` are exact also where the token is a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(ResponseModel):
    """A token of the answer, and the likeliest tokens in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """The answer's tokens; never a refusal's, since none is marked as such."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(ResponseModel):
    """A text completion's tokens, by column. `text_offset` counts characters of the choice's text."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
