"""Every bound of the store in one place; they are published to clients."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoreLimits:
    """Bounds that are checked before memory or disk is spent. Sizes are in bytes."""

    max_upload_bytes: int = 4 << 30
    """Size of `adapter_model.safetensors`."""
    max_config_bytes: int = 1 << 20
    """Size of `adapter_config.json`."""
    max_header_bytes: int = 8 << 20
    """The safetensors header; a 70B model with every linear adapted has 150 KB."""
    max_tensors: int = 20_000
    max_metadata_bytes: int = 64 << 10
    """The strings of the header's `__metadata__` together."""
    max_rank: int = 512
    """The largest rank of a module."""
    max_pattern_work: int = 5_000_000
    """Steps spent on matching `alpha_pattern` keys, a few seconds at most."""
    max_adapters: int = 100_000
    """Names, of all owners together."""
    max_versions: int = 1_000
    """Versions kept under one name."""
    max_total_bytes: int = 1 << 40
    """Canonical files, each counted once however many versions share it."""
    min_free_bytes: int = 256 << 20
    """Left free on the disk."""
    max_description_chars: int = 4_096
    max_examples: int = 256
    max_example_chars: int = 4_096
    max_shares: int = 256
    """Tenants that one adapter may be shared with."""
