"""When a sequence ends, and what its client is told."""

from loramux.server.engine.protocol import EngineOutput, FinishReason
from loramux.server.engine.sequence import Sequence

INVALID_TOKEN = -1


def accept_token(seq: Sequence, token: int, eos_token_ids: tuple[int, ...]) -> EngineOutput:
    """Appends the chosen token and says whether the sequence ends with it.

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
    seq.tokens.append(token)
    reason: FinishReason | None = None
    stop_token = None
    ends = token in sampling.stop_token_ids or (token in eos_token_ids and not sampling.ignore_eos)
    if ends and seq.num_output > sampling.min_tokens:
        reason, stop_token = "stop", token
    elif seq.num_output >= sampling.max_tokens:
        reason = "length"
    return EngineOutput(seq.request_id, (token,), reason, seq.cached_tokens, stop_token, scheduled_at=seq.scheduled_at)
