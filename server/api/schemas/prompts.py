"""What a request with messages may say of the prompt that is made of them; bounded JSON values."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from loramux.server.api.schemas.common import Flag, RequestModel, valid_unicode
from loramux.server.api.templates import TemplateOptions

MAX_VARIABLES = 64
MAX_DOCUMENTS = 1024
MAX_JSON_VALUES = 20_000
MAX_JSON_DEPTH = 32


def bounded_json(value: Any) -> Any:
    """The value, if it has at most `MAX_JSON_VALUES` values inside each other to `MAX_JSON_DEPTH`.

    Raises ValueError for more, for numbers that are none and for text that is not Unicode.
    """
    count, level = 0, [value]
    for _ in range(MAX_JSON_DEPTH):
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                deeper.extend(valid_unicode(key) for key in item)
                deeper.extend(item.values())
            elif isinstance(item, list):
                deeper.extend(item)
            elif isinstance(item, str):
                valid_unicode(item)
            elif isinstance(item, float) and not math.isfinite(item):
                raise ValueError("has a number that is not finite")
        count += len(deeper)
        if count > MAX_JSON_VALUES:
            raise ValueError(f"has more than {MAX_JSON_VALUES} values")
        if not deeper:
            return value
        level = deeper
    raise ValueError(f"is nested more than {MAX_JSON_DEPTH} levels deep")


Json = Annotated[Any, AfterValidator(bounded_json)]
JsonObject = Annotated[dict[str, Any], BeforeValidator(bounded_json)]


def never(reason: str, *allowed: Any) -> BeforeValidator:
    """For a field that is refused for good: only null and `allowed` pass; `reason` says what to do instead."""

    def check(value: Any) -> Any:
        if not any(type(value) is type(item) and value == item for item in (None, *allowed)):
            raise PydanticCustomError("unsupported", "{reason}", {"reason": reason})
        return value

    return BeforeValidator(check)


class TemplateFields(RequestModel):
    """How messages become a prompt. The template itself is the server's: none is taken from a request.

    Names in `chat_template_kwargs` that the template does not read change nothing, as in any template.
    """

    chat_template: Annotated[None, never("is not taken from requests; the server starts with --chat-template")] = None
    chat_template_kwargs: Annotated[JsonObject | None, Field(max_length=MAX_VARIABLES)] = None
    documents: Annotated[list[JsonObject] | None, Field(max_length=MAX_DOCUMENTS)] = None
    add_generation_prompt: Flag
    continue_final_message: Flag
    add_special_tokens: Flag

    @field_validator("continue_final_message")
    @classmethod
    def _one_end(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        """A prompt ends in the last message or after it."""
        if value and info.data.get("add_generation_prompt"):
            raise ValueError("goes with `add_generation_prompt: false`: a prompt ends in the last message or after it")
        return value

    @property
    def template_options(self) -> TemplateOptions:
        """The fields as the renderer takes them."""
        continues = bool(self.continue_final_message)
        return TemplateOptions(
            add_generation_prompt=not continues if self.add_generation_prompt is None else self.add_generation_prompt,
            continue_final_message=continues,
            documents=self.documents or None,
            variables=self.chat_template_kwargs or {},
            add_special_tokens=bool(self.add_special_tokens),
        )
