"""When a sequence ends, and what its client is told."""

import numpy as np
import torch
from torch import Tensor

from loramux.server.engine.logprobs import Floats
from loramux.server.engine.protocol import EngineOutput, FinishReason
from loramux.server.engine.sampler import INVALID_TOKEN
from loramux.server.engine.sequence import Sequence


def answer(
    seq: Sequence, position: int, token: int, eos_token_ids: tuple[int, ...], logprobs: Floats | None = None
) -> EngineOutput:
    """What the client is told of the token chosen for a position, and whether the sequence ends with it.

    An end-of-sequence id (unless `ignore_eos`) or a stop id ends it as "stop", `max_tokens` as "length". A token of -1
    (logits that are not finite) ends it as "error". `logprobs` are what the request wants of the token.
    """
    sampling = seq.request.sampling
    if token == INVALID_TOKEN:
        return _not_finite(seq)
    reason: FinishReason | None = None
    stop_token = None
    ends = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
    if ends and position >= seq.free_at:
        reason, stop_token = "stop", token
    if reason is None and position + 1 >= seq.limit:
        reason = "length"
    return EngineOutput(
        seq.request.request_id, (token,), reason, seq.cached_tokens, stop_token, None, None, seq.scheduled_at,
        logprobs=None if logprobs is None else logprobs.tobytes(), prompt_logprobs=_prompt_logprobs(seq),
    )  # fmt: skip


def prompt_output(seq: Sequence) -> EngineOutput:
    """The answer to a request that wants nothing but what the model makes of its prompt."""
    scores = _prompt_logprobs(seq)
    if scores is not None and not np.isfinite(np.frombuffer(scores)).all():
        return _not_finite(seq)
    return EngineOutput(
        seq.request_id, (), "length", seq.cached_tokens, scheduled_at=seq.scheduled_at, prompt_logprobs=scores
    )


def _prompt_logprobs(seq: Sequence) -> bytes | None:
    """What is known of the prompt, for the first output; None after it, and for requests that do not ask."""
    if not seq.prompt_scores:
        return None
    scores, seq.prompt_scores = b"".join(seq.prompt_scores), []
    return scores


def _not_finite(seq: Sequence) -> EngineOutput:
    message = "the model's output is not finite (NaN or infinity); check the adapter's weights and the dtype"
    return EngineOutput(
        seq.request_id, (), "error", seq.cached_tokens, error=message, error_kind="model",
        scheduled_at=seq.scheduled_at,
    )  # fmt: skip


def pooled_output(seq: Sequence, states: Tensor) -> EngineOutput:
    """The answer to a pooling request: float32 hidden states, or an error where they are not finite."""
    if not bool(torch.isfinite(states).all()):
        message = "the hidden states are not finite (NaN or infinity); check the adapter's weights and the dtype"
        return EngineOutput(seq.request_id, (), "error", error=message, error_kind="model")
    return EngineOutput(
        seq.request_id, (), "stop", scheduled_at=seq.scheduled_at, embedding=states.contiguous().numpy().tobytes()
    )
