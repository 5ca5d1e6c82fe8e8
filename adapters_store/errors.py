"""What the store refuses, and why. Messages name the remedy and never hold a path of this machine."""


class AdapterError(Exception):
    """A request to the store that changed nothing.

    `code` is a stable machine-readable reason, `field` the part of the request that is at fault (`name`, `files`,
    `description`, `examples`, or a file with its key: `adapter_config.json:use_dora`), `status` the HTTP status.
    """

    status = 400

    def __init__(self, message: str, *, code: str, field: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.field = field


class InvalidAdapter(AdapterError):  # noqa: N818 - these names are the store's interface
    """The files, or what came with them, are damaged, malformed, or contradict each other."""


class UnsupportedAdapter(AdapterError):  # noqa: N818
    """A well-formed adapter whose method, task or tensors this server does not carry out."""


class IncompatibleAdapter(AdapterError):  # noqa: N818
    """An adapter for another base model; the message shows the first difference."""


class AdapterNotFound(AdapterError):  # noqa: N818
    """No such adapter, or not this owner's."""

    status = 404


class AdapterConflict(AdapterError):  # noqa: N818
    """The name is taken by something that is not an adapter (the base model, `auto`)."""

    status = 409


class UploadTooLarge(AdapterError):  # noqa: N818
    """More bytes than the store takes in one upload."""

    status = 413


class StoreFull(AdapterError):  # noqa: N818
    """The disk, or the store's own bound, has no room left."""

    status = 507


class QuotaExceeded(AdapterError):  # noqa: N818
    """The tenant has used up what it may keep in the store."""

    status = 429


class TenantNotFound(AdapterError):  # noqa: N818
    """No such tenant."""

    status = 404


class KeyNotFound(AdapterError):  # noqa: N818
    """No such API key."""

    status = 404


class StoreUnavailableError(RuntimeError):
    """The store's folder cannot be opened: another process has it, or it is of an unknown version."""


def shorten(text: str, limit: int = 160) -> str:
    """Text from an upload as it may stand in a message: one line, of bounded length, without control characters."""
    clean = "".join(c if c.isprintable() else "?" for c in text[: limit + 1])
    return clean if len(clean) <= limit else clean[: limit - 1] + "…"
