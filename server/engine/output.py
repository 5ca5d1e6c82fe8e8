"""When a sequence ends, and what its client is told."""

import numpy as np
import torch
from torch import Tensor

from loramux.server.engine.logprobs import Floats
from loramux.server.engine.protocol import EngineOutput, ErrorKind, FinishReason
from loramux.server.engine.sampler import INVALID_TOKEN
from loramux.server.engine.sequence import Sequence


def answer(
    seq: Sequence, position: int, token: int, eos_token_ids: tuple[int, ...], logprobs: Floats | None = None
) -> EngineOutput:
    """What the client is told of the token chosen for a position, and whether the sequence ends with it.

    An end-of-sequence id (unless `ignore_eos`) or a stop id ends it as "stop", and so does a constraint that is
    fulfilled; `max_tokens` as "length". A token of -1 (logits that are not finite) ends it as "error", and so does a
    constraint that cannot be followed any further. `logprobs` are what the request wants of the token.
    """
    sampling = seq.request.sampling
    if token == INVALID_TOKEN:
        return _not_finite(seq)
    if seq.broken is not None:
        return _failed(seq, seq.broken, "request")
    reason: FinishReason | None = None
    stop_token = None
    is_eos = token in eos_token_ids
    ends = token in sampling.stop_token_ids or (is_eos and not sampling.ignore_eos)
    is_complete = seq.matcher is not None and seq.matcher.is_complete
    if (ends and position >= seq.free_at) or (is_complete and (ends or is_eos)):
        reason, stop_token = "stop", token
    elif is_complete:
        reason = "stop"
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
    return _failed(seq, message, "model")


def _failed(seq: Sequence, message: str, kind: ErrorKind) -> EngineOutput:
    return EngineOutput(
        seq.request_id, (), "error", seq.cached_tokens, error=message, error_kind=kind, scheduled_at=seq.scheduled_at
    )


def pooled_output(seq: Sequence, states: Tensor) -> EngineOutput:
    """The answer to a pooling request: float32 hidden states, or an error where they are not finite."""
    if not bool(torch.isfinite(states).all()):
        message = "the hidden states are not finite (NaN or infinity); check the adapter's weights and the dtype"
        return EngineOutput(seq.request_id, (), "error", error=message, error_kind="model")
    return EngineOutput(
        seq.request_id, (), "stop", scheduled_at=seq.scheduled_at, embedding=states.contiguous().numpy().tobytes()
    )
