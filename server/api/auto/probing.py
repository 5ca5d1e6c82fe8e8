"""Asking the engine for a text's hidden states: the prompt that stands for a text, and one pooling request."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import cast

from loramux.server.api.rendering import Renderer
from loramux.server.engine.protocol import (
    AdapterRef,
    EngineClient,
    EngineDeadError,
    EngineError,
    EngineOutput,
    EngineRequest,
    PoolingParams,
    SamplingParams,
)

CHARS_PER_TOKEN = 16  # of a text that is too long, so many characters per token are looked at before it is tokenised


@dataclass(frozen=True, slots=True, eq=False)
class Prompts:
    """Texts as prompts: the only user turn of a conversation, plain text where the model has no chat template.

    A request of one turn thus probes the very tokens that it would answer from, and the base's answer reuses the
    probe's blocks. Of longer prompts the last `max_tokens` tokens are taken.
    """

    renderer: Renderer
    max_tokens: int

    def tokens(self, text: str) -> tuple[int, ...]:
        """The prompt of a text, () for one without tokens. Blocks. Raises a 400 where the chat template refuses it."""
        text = text[-self.max_tokens * CHARS_PER_TOKEN :]
        if self.renderer.can_chat:
            prompt = self.renderer.render([{"role": "user", "content": text}])
            found = self.renderer.encode(prompt, add_special_tokens=False)
        else:
            found = self.renderer.encode(text, add_special_tokens=True)
        return tuple(found[-self.max_tokens :])

    async def tokens_of(self, text: str) -> tuple[int, ...]:
        """`tokens`, made in a thread of the renderer's: what a template does is not known."""
        return await self.renderer.in_thread(partial(self.tokens, text))


async def pooled(
    engine: EngineClient,
    request_id: str,
    tokens: tuple[int, ...],
    pooling: PoolingParams,
    salt: str,
    adapters: tuple[AdapterRef, ...] = (),
    tenant: str = "",
) -> bytes:
    """The answer to one pooling request, see `EngineOutput.embedding`. Raises `EngineError`."""
    request = EngineRequest(request_id, tokens, SamplingParams(max_tokens=1), adapters, salt, pooling, tenant)
    outputs = cast(AsyncGenerator[EngineOutput, None], engine.generate(request))
    async with aclosing(outputs):
        async for output in outputs:
            if output.embedding is not None:
                return output.embedding
            if output.finish_reason is not None:
                raise EngineError(output.error or "the engine gave the probe up", retryable=output.error_kind is None)
    raise EngineDeadError("the engine stopped without answering the probe")
