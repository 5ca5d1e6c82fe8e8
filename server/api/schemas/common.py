"""Fields that chat and text completions share: sampling, adapters, bookkeeping, and what is not supported yet.

A field is either honoured, or accepted because it cannot change the answer (bookkeeping), or declared here as not
supported: then only its neutral values pass. A field that nobody declared is refused by name, so that a misspelt
parameter is never silently ignored. `null` always means "not given".
"""

import json
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

INT64_MAX = (1 << 63) - 1
MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_STOP_TOKEN_IDS = 128
MAX_WEIGHT = 1000.0
MAX_PARTS = 1024
MAX_CANDIDATES = 10_000
MAX_BIASES = 1024
MAX_METADATA = 1024
MAX_ID_DIGITS = 10
MAX_REPETITION = 100.0
MAX_CHOICES = 128
MAX_UNKNOWN_NULLS = 64
MAX_SHOWN_NAME = 80


def valid_unicode(value: str) -> str:
    """Raises ValueError for lone surrogates (`"\\ud800"` in JSON), which nothing behind the edge can encode."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode text") from None
    return value


Text = Annotated[str, AfterValidator(valid_unicode)]
Flag = Annotated[bool | None, Field(default=None)]
Bias = Annotated[float, Field(ge=-100, le=100)]


@dataclass(frozen=True)
class AtMost(BeforeValidator):
    """A check of an object's number of entries."""

    limit: int = 0

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {**handler(schema), "maxProperties": self.limit}


def at_most(limit: int) -> AtMost:
    """Counts an object's entries before they are looked at: pydantic would make an error of each of a million."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise ValueError(f"has {len(value)} entries; at most {limit} are allowed")
        return value

    return AtMost(check, limit=limit)


def _by_token_id(value: dict[str, float] | None) -> dict[str, float] | None:
    """Raises ValueError for keys that are no token ids, which are decimal numbers in their one spelling."""
    for key in value or ():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_ID_DIGITS and str(int(key)) == key):
            raise ValueError('has a key that is no token id; write {"token id": bias}')
    return value


@dataclass(frozen=True)
class Neutral(BeforeValidator):
    """A check that lets `values` through, which the OpenAPI document shows as all there is."""

    values: tuple[Any, ...] = ()

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values]}


def neutral(*values: Any) -> "Neutral":
    """For a field that would change the answer and is not supported yet: null and `values` pass, others are a 400."""

    def check(value: Any) -> Any:
        for allowed in (None, *values):
            if value is allowed or (isinstance(value, bool) == isinstance(allowed, bool) and value == allowed):
                return value
        remedy = " or send ".join(["leave it out", *(json.dumps(item) for item in values[:1])])
        raise PydanticCustomError("unsupported", "this value is not supported yet; {remedy}", {"remedy": remedy})

    return Neutral(check, values=values)


def example_of(request: dict[str, Any]) -> ConfigDict:
    """The model's configuration that shows this request in the document."""
    return ConfigDict(json_schema_extra={"examples": [request]})


class RequestModel(BaseModel):
    """Strict: no coercion between types, no unknown fields, no NaN or infinity."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        """Stops at the first unknown field: pydantic would build one error for each of a million. Null is no value."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        unknown = list(islice((k for k in value if k not in known), MAX_UNKNOWN_NULLS + 1))
        for key in unknown:
            if value[key] is not None or len(unknown) > MAX_UNKNOWN_NULLS:
                raise PydanticCustomError("unknown_field", "unknown", {"name": str(key)[:MAX_SHOWN_NAME]})
        return {k: v for k, v in value.items() if k in known} if unknown else value


class StreamOptions(RequestModel):
    """What a stream carries besides text."""

    include_usage: Flag
    continuous_usage_stats: Flag
    include_obfuscation: Annotated[Any, neutral(False)] = None


class AdapterWeight(RequestModel):
    """One adapter of an explicit fusion: `name` or `name@version`, and its factor in the sum."""

    name: Text = Field(max_length=128)
    weight: float | None = Field(None, ge=-MAX_WEIGHT, le=MAX_WEIGHT)


class RouterParams(RequestModel):
    """How `model: "auto"` chooses; what each option means is `router.options.RouteOptions`, which checks the values.

    `explain` adds the reason to the answer.
    """

    policy: Text | None = Field(None, max_length=32)
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    candidates: list[Annotated[Text, Field(max_length=128)]] | None = Field(None, max_length=MAX_CANDIDATES)
    temperature: float | None = None
    explain: Flag


class Bookkeeping(RequestModel):
    """Accepted and ignored: none of these can change an answer."""

    user: str | None = None
    metadata: Annotated[dict[str, Any] | None, at_most(MAX_METADATA)] = None
    store: Flag
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None


class Unsupported(RequestModel):
    """Declared so that the answer is a refusal by name and not a different text than was asked for."""

    best_of: Annotated[Any, neutral(1)] = None
    prompt_logprobs: Annotated[Any, neutral()] = None
    use_beam_search: Annotated[Any, neutral(False)] = None
    length_penalty: Annotated[Any, neutral(1)] = None
    bad_words: Annotated[Any, neutral([])] = None
    allowed_token_ids: Annotated[Any, neutral()] = None
    logits_processors: Annotated[Any, neutral([])] = None
    truncate_prompt_tokens: Annotated[Any, neutral()] = None
    spaces_between_special_tokens: Annotated[Any, neutral(True)] = None


class GenerationRequest(Bookkeeping, Unsupported):
    """What chat and text completions have in common.

    `temperature`, `top_p` and `top_k` default to the model's own generation settings. `top_k` -1 and 0 both mean
    "all tokens". `adapters` fuses several adapters over the base and goes with the base's name in `model`, `router`
    goes with `auto`. `logit_bias` is by token id.
    """

    model: Text = Field(min_length=1, max_length=512)
    adapters: list[AdapterWeight] | None = Field(None, max_length=64)
    router: RouterParams | None = None

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=1 / MAX_REPETITION, le=MAX_REPETITION)
    logit_bias: Annotated[dict[str, Bias] | None, at_most(MAX_BIASES), AfterValidator(_by_token_id)] = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)

    max_tokens: int | None = Field(None, ge=1, le=INT64_MAX)
    min_tokens: int | None = Field(None, ge=0, le=INT64_MAX)
    stop: Text | Annotated[list[Text], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[Annotated[int, Field(ge=0)]] | None = Field(None, max_length=MAX_STOP_TOKEN_IDS)
    include_stop_str_in_output: Flag
    ignore_eos: Flag
    skip_special_tokens: Flag

    stream: Flag
    stream_options: StreamOptions | None = None
    return_token_ids: Flag
    cache_salt: Text | None = Field(None, min_length=1, max_length=256)

    @property
    def biases(self) -> dict[int, float]:
        """What is added to tokens' logits."""
        return {int(token): bias for token, bias in (self.logit_bias or {}).items()}

    @property
    def wanted_logprobs(self) -> int | None:
        """Of how many tokens, besides the chosen one, the log-probabilities are wanted; None for none at all."""
        return None

    @property
    def wanted_prompt_logprobs(self) -> int | None:
        """The same of the prompt's tokens."""
        return None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class ResponseModel(BaseModel):
    """Answers: only fields that were set appear, so an explicit None is a `null` and an untouched field is absent."""

    model_config = ConfigDict(protected_namespaces=())

    def json_text(self) -> str:
        """The wire form."""
        return self.model_dump_json(exclude_unset=True)


class PromptTokensDetails(ResponseModel):
    """`cached_tokens` were taken from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(ResponseModel):
    """`reasoning_tokens` were not content, but what came before it."""

    reasoning_tokens: int


class Usage(ResponseModel):
    """Tokens in and out, over all choices. The details of the completion are there where the model's format has any."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int) -> "Usage":
        """The usage of `prompt` tokens in (`cached` of them reused) and `completion` tokens out."""
        details = PromptTokensDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )


class ServedAdapter(ResponseModel):
    """One adapter that took part in an answer."""

    name: str
    version: int
    weight: float


class Chosen(ResponseModel):
    """One member of the set that the router chose."""

    name: str
    weight: float


class CandidateScore(ResponseModel):
    """How a candidate scored, in the units of the rung that decided."""

    name: str
    score: float


class ShadowReport(ResponseModel):
    """What the router would have chosen for a request that named its model.

    `pending` while the decision is not there when the answer is, `dropped` when too many others were waiting, `failed`
    when there was none to be had; only `decided` has the other fields, and `reason` only with `explain`.
    """

    status: Literal["decided", "pending", "dropped", "failed"]
    agrees: bool | None = None
    chosen: list[Chosen] | None = None
    rung: str | None = None
    milliseconds: float | None = None
    reason: str | None = None


class RouterReport(ResponseModel):
    """What the router decided, and why. `reason` comes with `explain`, `shadow` with a named model.

    No `chosen` adapter is the base; `abstained` says that candidates were scored and none reached the `threshold`.
    """

    chosen: list[Chosen] | None = None
    rung: str | None = None
    threshold: float | None = None
    abstained: bool | None = None
    milliseconds: float | None = None
    scores: list[CandidateScore] | None = None
    reason: str | None = None
    shadow: ShadowReport | None = None


class ServedBy(ResponseModel):
    """What answered: no adapters means the base alone."""

    adapters: list[ServedAdapter]
    router: RouterReport | None = None
