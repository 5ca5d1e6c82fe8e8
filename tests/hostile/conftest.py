"""Fixtures of the hostile tests: the API's own."""

from api.conftest import anyio_backend, bench, live, make

__all__ = ["anyio_backend", "bench", "live", "make"]
