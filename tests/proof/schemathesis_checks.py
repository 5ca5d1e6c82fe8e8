"""schemathesis on our own /openapi.json: no 5xx, answers as the document has them, bad requests refused.

`make test-schemathesis`; `SCHEMATHESIS_EXAMPLES` says how many requests per operation its fuzzing makes.
"""

import os
import subprocess
import sys
from pathlib import Path

from support.live import live_server

KEY = "proof-key"
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "negative_data_rejection", "unsupported_method",
)  # fmt: skip
ANSWERED = (
    "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
    "/v1/models", "/v1/adapters", "/v1/route",
)  # fmt: skip
HOOKS = Path(__file__).with_name("schemathesis_hooks.py")
EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "25")


def test_the_document_is_true(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("schemathesis")
    with live_server(tmp_path, "--api-key", KEY, "--metrics-open", "--max-num-seqs", "8") as server:
        done = subprocess.run(
            [program, "run", f"{server.url}/openapi.json", "--header", f"Authorization: Bearer {KEY}",
             "--checks", ",".join(CHECKS), "--max-examples", EXAMPLES, "--generation-deterministic", "--no-shrink",
             "--phases", "examples,coverage,fuzzing", "--no-color", "--suppress-health-check", "all",
             "--request-timeout", "120", "--continue-on-failure", "--warnings", "off"],
            cwd=tmp_path, env={**os.environ, "SCHEMATHESIS_HOOKS": str(HOOKS)}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4000:]
        assert server.process.poll() is None
        samples = [key for key in server.metrics() if key.startswith("loramux_http_requests_total")]
        for path in ANSWERED:
            answered = any(f'route="{path}"' in key and 'status="200"' in key for key in samples)
            assert answered, f"{path} was never asked anything that it answers"
