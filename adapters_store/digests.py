"""Content digests, and the only way from a digest to a path."""

import re
from pathlib import Path

DIGEST_PATTERN = re.compile(r"sha256:([0-9a-f]{64})")
"""A digest is `sha256:` and 64 lower-case hexadecimal digits; `fullmatch` it."""


def digest_from_hex(hexdigest: str) -> str:
    """`sha256:<hex>` from the bare hexadecimal digest. ValueError when it is not 64 lower-case hex digits."""
    digest = f"sha256:{hexdigest}"
    if DIGEST_PATTERN.fullmatch(digest) is None:
        raise ValueError("not a sha256 digest in lower-case hexadecimal")
    return digest


def blob_name(digest: str) -> str:
    """The blob's file name, `sha256-<hex>`. ValueError for anything but a digest, so no path can be smuggled in."""
    match = DIGEST_PATTERN.fullmatch(digest)
    if match is None:
        raise ValueError("not a sha256 digest")
    return f"sha256-{match.group(1)}"


def blob_path(blob_dir: Path, digest: str) -> Path:
    """Where the blob of this digest lies in `blob_dir`. ValueError for anything but a digest."""
    return blob_dir / blob_name(digest)
