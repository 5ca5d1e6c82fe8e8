"""`/v1/route`, `/v1/feedback` and `/v1/router`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from loramux.server.api.schemas.chat import MAX_MESSAGES, Message, query_of
from loramux.server.api.schemas.common import RequestModel, ResponseModel, RouterParams, RouterReport, Text, example_of

MAX_INPUTS = 128

Inputs = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
Conversation = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class RouteRequest(RequestModel):
    """Queries to route: a text, several, or a conversation, of which the last user turn counts."""

    model_config = example_of({"input": "Reverse this: planet"})

    input: Text | Inputs | Conversation
    router: RouterParams | None = None
    cache_salt: Text | None = Field(None, min_length=1, max_length=256)

    @property
    def queries(self) -> list[str]:
        """The texts, one per decision."""
        if isinstance(self.input, str):
            return [self.input]
        texts = [item for item in self.input if isinstance(item, str)]
        return texts or [query_of([item for item in self.input if isinstance(item, Message)])]


class RouteDecision(RouterReport):
    """What `auto` would do with one of the inputs."""

    index: int


class RouteList(ResponseModel):
    """One decision per input, in their order."""

    object: Literal["list"]
    data: list[RouteDecision]


class FeedbackRequest(RequestModel):
    """How well an adapter answered a query: `score` 0 (useless) to 1 (right).

    The query is `input`, or that of a recent request by its id (`request_id`: the answer's `id`, or `x-request-id`).
    `adapter` is a name, or the base's; it may be left out for a request that one adapter, or the base, answered.
    A user's key scores the base and other tenants' adapters only by `request_id`, of an answer that they gave it.
    `group` names a data set: means are means over groups, so that a large one does not outweigh a small one.
    """

    request_id: Text | None = Field(None, min_length=1, max_length=128)
    input: Text | None = Field(None, min_length=1, max_length=65_536)
    adapter: Text | None = Field(None, min_length=1, max_length=512)
    score: float = Field(ge=0, le=1)
    group: Text | None = Field(None, max_length=128)


class FeedbackTaken(ResponseModel):
    """What was recorded; `learnt`: it counts from the next request on, else with the next training."""

    object: Literal["feedback"]
    adapter: str
    score: float
    learnt: bool


class ScoresTaken(ResponseModel):
    """What an upload of scores held; `unknown` names some candidates that are no adapter now."""

    object: Literal["router.scores"]
    queries: int
    scores: int
    unknown: list[str]


class TrainRequest(RequestModel):
    """How to train: everything random follows from `seed`."""

    seed: int = Field(0, ge=0, le=2**32 - 1)


class TrainStarted(ResponseModel):
    """Training has begun; `GET /v1/router` says how it goes."""

    object: Literal["router.training"]
    status: Literal["running"]


class RouterState(ResponseModel):
    """What the router knows: its encoder, the adapters by state, and each rung.

    `encoder` is null until what was known before a restart is known again. `ended` are parts that have failed for good,
    with the reason: `auto` answers by what the others know.
    """

    object: Literal["router"]
    enabled: bool
    encoder: dict[str, Any] | None
    adapters: dict[str, Any]
    rungs: dict[str, Any]
    shadow: bool
    ended: dict[str, str] | None = None
