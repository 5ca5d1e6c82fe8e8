"""When a sequence ends, and what its client is told."""

import torch
from torch import Tensor

from loramux.server.engine.protocol import EngineOutput, FinishReason
from loramux.server.engine.sampler import INVALID_TOKEN
from loramux.server.engine.sequence import Sequence


def accept_token(seq: Sequence, position: int, token: int, eos_token_ids: tuple[int, ...]) -> EngineOutput:
    """Puts the chosen token in its place, where a pending one stands, and says whether the sequence ends with it.

    An end-of-sequence id (unless `ignore_eos`) or a stop id ends it as "stop", `max_tokens` as "length". A token of -1
    (logits that are not finite) ends it as "error".
    """
    sampling = seq.request.sampling
    if token == INVALID_TOKEN:
        message = "the model's output is not finite (NaN or infinity); check the adapter's weights and the dtype"
        return EngineOutput(
            seq.request_id,
            (),
            "error",
            seq.cached_tokens,
            error=message,
            error_kind="model",
            scheduled_at=seq.scheduled_at,
        )
    seq.tokens[position] = token
    reason: FinishReason | None = None
    stop_token = None
    ends = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
    if ends and position + 1 - seq.prompt_len > sampling.min_tokens:
        reason, stop_token = "stop", token
    if reason is None and position + 1 >= seq.limit:
        reason = "length"
    return EngineOutput(
        seq.request.request_id, (token,), reason, seq.cached_tokens, stop_token, None, None, seq.scheduled_at
    )


def pooled_output(seq: Sequence, states: Tensor) -> EngineOutput:
    """The answer to a pooling request: float32 hidden states, or an error where they are not finite."""
    if not bool(torch.isfinite(states).all()):
        message = "the hidden states are not finite (NaN or infinity); check the adapter's weights and the dtype"
        return EngineOutput(seq.request_id, (), "error", error=message, error_kind="model")
    return EngineOutput(
        seq.request_id, (), "stop", scheduled_at=seq.scheduled_at, embedding=states.contiguous().numpy().tobytes()
    )
