"""`POST /v1/embeddings`: texts as vectors, by the base or by an adapter.

e = m / |m| with m = (1/T) sum_t h_t, where h_t is the model's final hidden state (after its last norm, before the head)
at token t of T, special tokens included, in float32. Vectors have length 1, as OpenAI's do. Vectors of different
adapters lie in different spaces: `auto`, which would mix them, is refused.
"""

import asyncio
import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from loramux.server.api.auto.probing import pooled
from loramux.server.api.bodies import BodyRoute
from loramux.server.api.caller import From
from loramux.server.api.completions import prompt_tokens
from loramux.server.api.context import arrival, request_id
from loramux.server.api.errors import bad_request
from loramux.server.api.generation import too_long
from loramux.server.api.lanes import in_charged_lanes
from loramux.server.api.metrics import RequestTimes, Status
from loramux.server.api.resolve import AUTO, Query, Selection, select
from loramux.server.api.schemas.embeddings import EmbeddingList, EmbeddingRequest, EmbeddingUsage
from loramux.server.api.state import ServerState, State
from loramux.server.api.streaming import unless_disconnected
from loramux.server.api.wire import JSONAnswer
from loramux.server.engine.protocol import PoolingParams, QueueFullError

router = APIRouter(route_class=BodyRoute)


@router.post("/v1/embeddings", response_model=EmbeddingList)
async def create_embeddings(request: Request, body: EmbeddingRequest, state: State, caller: From) -> Response:
    """The vectors of one text or of several, or of token ids."""
    if body.model == AUTO:
        raise bad_request("Vectors of different adapters cannot be compared: name a model or an adapter.", "model")
    query = Query(request_id(request), None, None, "", caller)
    async with select(state, body.model, body.adapters, query) as selection:
        info = state.require_engine()
        if body.dimensions not in (None, info.hidden_size):
            raise bad_request(
                f"This model's vectors have {info.hidden_size} dimensions and cannot be cut: leave `dimensions` out.",
                "dimensions", "unsupported_parameter",
            )  # fmt: skip
        special = body.add_special_tokens is not False
        prompts = await prompt_tokens(state, body.input, add_special_tokens=special, field_name="input")
        longest = max(len(prompt) for prompt in prompts)
        if longest > info.max_model_len:
            raise too_long(longest, info.max_model_len, "input")
        embedding = Embedder(state, selection, f"embd-{request_id(request)}", prompts, arrival(request))
        vectors = await unless_disconnected(request, embedding.run())
        text = await asyncio.to_thread(_answer, vectors, selection, prompts, base64_wanted(body))
        return JSONAnswer(text, headers=selection.headers)


def base64_wanted(body: EmbeddingRequest) -> bool:
    """Whether vectors go out as bytes. Numbers are the API's default; OpenAI's own clients ask for bytes."""
    return body.encoding_format == "base64"


@dataclass(slots=True)
class Embedder:
    """The inputs of one request on their way through the engine, some at a time."""

    state: ServerState
    selection: Selection
    id: str
    prompts: Sequence[Sequence[int]]
    start: float

    async def run(self) -> list[np.ndarray]:
        """The unit vectors, float32 [hidden] each. Raises `EngineError`; cancelling it aborts what still runs."""
        tokens = [len(prompt) for prompt in self.prompts]
        return await in_charged_lanes(self.selection.admission, self.prompts, tokens, self._one)

    async def _one(self, prompt: Sequence[int]) -> np.ndarray:
        """One input's vector. Whatever way it ends, it is counted once."""
        times = RequestTimes(self.start)
        status: Status = "abort"
        try:
            name = f"{self.id}-{next(self.state.sequence_numbers)}"
            data = await pooled(
                self.state.engine, name, tuple(prompt), PoolingParams(), self.selection.salt, self.selection.refs,
                self.selection.tenant,
            )  # fmt: skip
            self.state.metrics.arrived(times)
            status = "stop"
        except QueueFullError:
            status = "rejected"
            raise
        except Exception:
            status = "error"
            raise
        finally:
            self._count(status, times, len(prompt))
        return unit(np.frombuffer(data, dtype=np.float32))

    def _count(self, status: Status, times: RequestTimes, tokens: int) -> None:
        self.state.metrics.finished(
            self.selection.labels(self.state.settings.base_name), status, times, prompt_tokens=tokens,
            generated_tokens=0, model=self.selection.model,
        )  # fmt: skip


def unit(vector: np.ndarray) -> np.ndarray:
    """v / |v|, float32 [hidden]; zero stays zero."""
    length = float(np.linalg.norm(vector.astype(np.float64)))
    return vector if length == 0 else (vector / length).astype(np.float32)


def _answer(
    vectors: Sequence[np.ndarray], selection: Selection, prompts: Sequence[Sequence[int]], as_bytes: bool
) -> bytes:
    """The body, `EmbeddingList` as JSON. Written vector by vector: one call for all would hold the interpreter."""
    tokens = sum(len(prompt) for prompt in prompts)
    rest = EmbeddingList(
        object="list", data=[], model=selection.model, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
        loramux=selection.served_by,
    )  # fmt: skip
    pieces = []
    for index, vector in enumerate(vectors):
        shown = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_bytes else vector.tolist()
        pieces.append(json.dumps({"object": "embedding", "index": index, "embedding": shown}))
    head, tail = rest.json_text().split('"data":[]', 1)
    return f'{head}"data":[{",".join(pieces)}]{tail}'.encode()
