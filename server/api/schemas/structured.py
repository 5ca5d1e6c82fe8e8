"""What an answer's text must match: OpenAI's `response_format`, and the fields that vLLM has for the same.

A request has at most one constraint. Whether it can be followed is found out later, by compiling it: see
`server/api/structured.py`.
"""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from loramux.server.api.schemas.common import Flag, RequestModel, Text, neutral
from loramux.server.api.schemas.prompts import JsonObject
from loramux.server.engine.protocol import Constraint

MAX_CONSTRAINT_CHARS = 1 << 17
MAX_REGEX_CHARS = 1 << 14
MAX_OPTIONS = 4096
NAME_PATTERN = r"^[a-zA-Z0-9_-]{1,64}$"

Named: TypeAlias = tuple[str, Constraint]
"""A constraint and the field that it comes from."""


def _short(schema: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for a schema with more characters in its strings than any that could be compiled."""
    size, left = 0, [schema]
    while left:
        item: Any = left.pop()
        if isinstance(item, dict):
            size += sum(map(len, item))
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
        elif isinstance(item, str):
            size += len(item)
    if size > MAX_CONSTRAINT_CHARS:
        raise ValueError(f"has more than {MAX_CONSTRAINT_CHARS} characters; send a smaller schema")
    return schema


def _schema_of(value: Any) -> Any:
    """A schema that came as text. Raises ValueError for one that is too long or no JSON."""
    if not isinstance(value, str):
        return value
    if len(value) > MAX_CONSTRAINT_CHARS:
        raise ValueError(f"has more than {MAX_CONSTRAINT_CHARS} characters; send a smaller schema")
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("is neither a JSON schema nor the text of one") from None


def _distinct(options: list[str]) -> list[str]:
    """Raises ValueError where an option is empty, or all of them are too long together."""
    if not all(options):
        raise ValueError("has an empty option")
    if sum(map(len, options)) > MAX_CONSTRAINT_CHARS:
        raise ValueError(f"has more than {MAX_CONSTRAINT_CHARS} characters; send fewer or shorter options")
    return list(dict.fromkeys(options))


Schema = Annotated[JsonObject, AfterValidator(_short)]
SchemaOrText = Annotated[Schema, BeforeValidator(_schema_of, json_schema_input_type=dict[str, Any] | str)]
Regex = Annotated[Text, Field(min_length=1, max_length=MAX_REGEX_CHARS)]
Choice = Annotated[list[Text], Field(min_length=1, max_length=MAX_OPTIONS), AfterValidator(_distinct)]
Grammar = Annotated[Text, Field(min_length=1, max_length=MAX_CONSTRAINT_CHARS)]


def of_schema(schema: dict[str, Any]) -> Constraint:
    """JSON that a schema holds for."""
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))


class NamedSchema(RequestModel):
    """A schema as OpenAI's clients send it. It is followed exactly with and without `strict`."""

    name: Text = Field(pattern=NAME_PATTERN)
    description: Text | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: Flag


def _format_type(kind: Any) -> Any:
    """Other types are refused by their name."""
    if kind not in ("text", "json_object", "json_schema"):
        raise PydanticCustomError(
            "unsupported", "{kind} is not supported; send text, json_object or json_schema", {"kind": repr(kind)[:64]}
        )
    return kind


class ResponseFormat(RequestModel):
    """Text as the model likes it, any JSON object, or JSON that a schema holds for."""

    type: Annotated[Literal["text", "json_object", "json_schema"], BeforeValidator(_format_type)]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def _with_schema(self) -> "ResponseFormat":
        """A schema goes with its type, and the type with a schema."""
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("has `json_schema` with the type json_schema, and only then")
        return self

    @property
    def constraint(self) -> Constraint | None:
        """What the answer is held to; any object where a schema is named but not given."""
        if self.json_schema is not None and self.json_schema.schema_ is not None:
            return of_schema(self.json_schema.schema_)
        return None if self.type == "text" else Constraint("json_object")


class TextFormat(RequestModel):
    """`text.format` of the Responses API: what `ResponseFormat` says, the schema's fields beside the type."""

    type: Annotated[Literal["text", "json_object", "json_schema"], BeforeValidator(_format_type)] = "text"
    name: Text | None = Field(None, pattern=NAME_PATTERN)
    description: Text | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: Flag

    @model_validator(mode="after")
    def _with_schema(self) -> "TextFormat":
        """A schema goes with its type, and the type with a named schema."""
        if self.type == "json_schema" and (self.name is None or self.schema_ is None):
            raise ValueError("needs `name` and `schema` with the type json_schema")
        if self.type != "json_schema" and self.schema_ is not None:
            raise ValueError("has a `schema` only with the type json_schema")
        return self

    def as_response_format(self) -> dict[str, Any]:
        """The same for chat completions."""
        if self.type != "json_schema":
            return {"type": self.type}
        named = {"name": self.name, "description": self.description, "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": named}


class StructuredOutputs(RequestModel):
    """vLLM's `structured_outputs`: one of `json`, `regex`, `choice`, `grammar` (Lark or GBNF) and `json_object`."""

    json_: SchemaOrText | None = Field(None, alias="json")
    regex: Regex | None = None
    choice: Choice | None = None
    grammar: Grammar | None = None
    json_object: Flag
    disable_fallback: Flag
    disable_any_whitespace: Annotated[Any, neutral(False)] = None
    disable_additional_properties: Annotated[Any, neutral(False)] = None
    whitespace_pattern: Annotated[Any, neutral()] = None
    structural_tag: Annotated[Any, neutral()] = None

    @model_validator(mode="after")
    def _one(self) -> "StructuredOutputs":
        """Exactly one of them."""
        if len(list(self.constraints())) != 1:
            raise ValueError("needs exactly one of json, regex, choice, grammar and json_object")
        return self

    def constraints(self) -> Iterator[Named]:
        """What is given, each with its field."""
        yield from _given(self.json_, self.regex, self.choice, self.grammar, "structured_outputs.{}")
        if self.json_object:
            yield "structured_outputs.json_object", Constraint("json_object")


def _given(
    schema: dict[str, Any] | None, regex: str | None, choice: list[str] | None, grammar: str | None, names: str
) -> Iterator[Named]:
    """The constraints among vLLM's four fields, which `names` makes out of json, regex, choice and grammar."""
    if schema is not None:
        yield names.format("json"), of_schema(schema)
    if regex is not None:
        yield names.format("regex"), Constraint("regex", regex)
    if choice is not None:
        yield names.format("choice"), Constraint("choice", json.dumps(choice))
    if grammar is not None:
        yield names.format("grammar"), Constraint("lark", grammar)


class StructuredFields(RequestModel):
    """The fields of a request. `guided_...` are vLLM's older names of what `structured_outputs` has."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Regex | None = None
    guided_choice: Choice | None = None
    guided_grammar: Grammar | None = None

    def constraints(self) -> Iterator[Named]:
        """Everything that the answer is held to, each with its field."""
        if self.response_format is not None and self.response_format.constraint is not None:
            yield "response_format", self.response_format.constraint
        if self.structured_outputs is not None:
            yield from self.structured_outputs.constraints()
        yield from _given(self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar, "guided_{}")
