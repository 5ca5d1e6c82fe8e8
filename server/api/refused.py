"""Endpoints of OpenAI's and vLLM's that this server does not have: each is refused by name, with what to use instead.

404, as for any path that is not there, so that clients raise at once and do not repeat the request (they repeat a 501).
"""

from collections.abc import Awaitable, Callable, Mapping

from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.errors import APIError

router = APIRouter()

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE"]
SCORES = "Compare the vectors of POST /v1/embeddings: their product is the cosine."
MEDIA = "The model reads and writes text: use POST /v1/chat/completions."
ONE_BY_ONE = "Send the requests one by one, at the same time if you like: they are computed in one batch."
STORED = "Responses are not stored: send the whole conversation as `input` of POST /v1/responses."
REFUSED: Mapping[str, str] = {
    "/v1/score": SCORES, "/score": SCORES, "/v1/rerank": SCORES, "/v2/rerank": SCORES, "/rerank": SCORES,
    "/pooling": "Use POST /v1/embeddings, which averages the final hidden states.",
    "/classify": "Use POST /v1/chat/completions with a small `max_tokens`.",
    "/v1/audio/{rest:path}": MEDIA, "/v1/images/{rest:path}": MEDIA, "/v1/videos/{rest:path}": MEDIA,
    "/v1/realtime/{rest:path}": MEDIA,
    "/v1/moderations": "No moderation model is served: ask a model by POST /v1/chat/completions.",
    "/v1/batches": ONE_BY_ONE, "/v1/batches/{rest:path}": ONE_BY_ONE,
    "/v1/files": ONE_BY_ONE, "/v1/files/{rest:path}": ONE_BY_ONE,
    "/v1/uploads": ONE_BY_ONE, "/v1/uploads/{rest:path}": ONE_BY_ONE,
    "/v1/fine_tuning/{rest:path}": "Train with PEFT and send the adapter to POST /v1/adapters.",
    "/v1/assistants": STORED, "/v1/assistants/{rest:path}": STORED, "/v1/threads": STORED,
    "/v1/threads/{rest:path}": STORED, "/v1/conversations": STORED, "/v1/conversations/{rest:path}": STORED,
    "/v1/vector_stores": SCORES, "/v1/vector_stores/{rest:path}": SCORES,
    "/v1/responses/{rest:path}": STORED,
}  # fmt: skip
"""By path: what to use instead."""


def _refuse(path: str, remedy: str) -> Callable[[Request], Awaitable[Response]]:
    """The route's function."""
    shown = path.removesuffix("/{rest:path}")

    async def refuse(request: Request) -> Response:
        raise APIError(
            404, f"This server has no {shown}. {remedy}", code="endpoint_not_supported",
            headers={"x-should-retry": "false"},
        )  # fmt: skip

    return refuse


for _path, _remedy in REFUSED.items():
    router.add_api_route(_path, _refuse(_path, _remedy), methods=METHODS, include_in_schema=False)
