"""What schemathesis cannot know: names of models that exist, and that answers of a test may be short."""

import json
from typing import Any

import schemathesis

MODELS = ("loramux-demo", "reverse", "roman@1")
MAX_MODEL_CHARS = 512
MAX_TOKENS = 4
INT64_MAX = (1 << 63) - 1
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    """Requests that name a model name one of ours, and generate little. What is wrong stays wrong."""
    model = body.get("model") if isinstance(body, dict) else None
    if not isinstance(model, str) or not 1 <= len(model) <= MAX_MODEL_CHARS:
        return body
    changed = {**body, "model": MODELS[len(model) % len(MODELS)]}
    for name in LIMITS:
        if type(changed.get(name)) is int and MAX_TOKENS < changed[name] <= INT64_MAX:
            changed[name] = MAX_TOKENS
    return changed


@schemathesis.serializer("application/x-ndjson")
def ndjson(context: Any, value: Any) -> bytes:
    """One JSON value per line."""
    return b"".join(json.dumps(item).encode() + b"\n" for item in (value if isinstance(value, list) else [value]))
