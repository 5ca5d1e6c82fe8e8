"""`GET /v1/models` and `GET /v1/models/{id}`."""

from typing import Literal

from loramux.server.api.schemas.common import ResponseModel


class ModelCard(ResponseModel):
    """The base, or one adapter: then `parent` is the base's name, `root` the version that the name means now, and
    `owned_by` the tenant it belongs to."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelList(ResponseModel):
    """The base first, then the adapters by name."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
