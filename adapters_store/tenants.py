"""Tenants, their limits, and the keys by which they are known. In the registry's database, on connections of its own.

Several processes may use it at once: the server while it runs, and a command line on the same folder. Each look-up
reads the database, so that a key that was made or revoked counts, or no longer counts, from the next request on.

A key is 256 random bits and is shown once, when it is made; kept is its SHA-256. A look-up hashes what was given, finds
the digest by index and compares it in constant time. What an index look-up's time may tell is how far the *hash* of a
guess agrees with hashes that are kept, which nobody can steer; and with 256 bits there is nothing to guess one by one.
"""

import hashlib
import hmac
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from loramux.adapters_store.errors import InvalidAdapter, KeyNotFound, TenantNotFound, shorten
from loramux.adapters_store.names import NAME_PATTERN
from loramux.adapters_store.schema import add_tenant, open_database

Role = Literal["user", "admin", "metrics"]

KEY_PREFIX = "lm-"
KEY_BYTES = 32
MAX_LABEL_CHARS = 256
MAX_LIMIT = 2**62

_KEY = "number, id, tenant, role, label, created_at, expires_at, revoked_at, last_used_at"


@dataclass(frozen=True, slots=True)
class Key:
    """What is known of a key but the key itself. Times are in Unix seconds; `last_used_at` is up to a minute late.

    `role`: a `user` key serves requests, an `admin` key manages keys and tenants besides, a `metrics` key reads
    `/metrics` and nothing else.
    """

    id: str
    tenant: str
    role: Role
    label: str | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


@dataclass(frozen=True, slots=True)
class TenantLimits:
    """What one tenant may have at once; None is "as the server's settings say" in the registry, else "any number".

    `adapters` names, `adapter_bytes` bytes of canonical files, `pinned` adapters held on the device, `requests`
    sequences under way, `tokens_per_minute` of prompts and answers together.
    """

    adapters: int | None = None
    adapter_bytes: int | None = None
    pinned: int | None = None
    requests: int | None = None
    tokens_per_minute: int | None = None

    def over(self, defaults: "TenantLimits") -> "TenantLimits":
        """These limits, and the defaults where there is none."""
        return TenantLimits(**{**asdict(defaults), **{n: v for n, v in asdict(self).items() if v is not None}})


LIMITS = tuple(item.name for item in fields(TenantLimits))
_TENANT = f"name, created_at, salt, {', '.join(LIMITS)}"


@dataclass(frozen=True, slots=True)
class Tenant:
    """One tenant; `salt` is the secret that keeps its prefix cache apart from others'."""

    name: str
    created_at: int
    salt: bytes = field(repr=False)
    limits: TenantLimits


@dataclass(frozen=True, slots=True)
class KeyPage:
    """A stretch of the keys, oldest first, and whether more follow."""

    data: list[Key]
    has_more: bool


@dataclass(frozen=True, slots=True)
class TenantPage:
    """A stretch of the tenants, by name, and whether more follow."""

    data: list[Tenant]
    has_more: bool


def digest_of(key: bytes) -> bytes:
    """SHA-256 of a key, which is all that is kept of it. A slow hash would add nothing to 256 random bits."""
    return hashlib.sha256(key).digest()


class Tenants:
    """The registry's tenants and keys. `authenticate`, `has_keys` and `tenant` take microseconds and may be called on
    an event loop; everything else may wait for the disk and for other processes. Safe from any thread.
    """

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Opens or creates the registry's database. Raises `StoreUnavailableError` for one of another version."""
        self._clock = clock
        self._writer = open_database(path)
        self._writing = threading.Lock()
        self._reader = open_database(path)
        self._reader.execute("PRAGMA query_only = ON")
        self._reading = threading.Lock()
        self._any_keys = False

    def close(self) -> None:
        """Closes the database."""
        with self._reading, self._writing:
            self._reader.close()
            self._writer.close()

    # Look-ups.

    def has_keys(self) -> bool:
        """Whether a key was ever made. It stays so: revoking the last key locks the door, it does not take it out."""
        if not self._any_keys:
            self._any_keys = bool(self._read("SELECT 1 FROM keys LIMIT 1"))
        return self._any_keys

    def authenticate(self, key: bytes) -> tuple[Key, Tenant] | None:
        """Whose key this is; None for one that never was, was revoked, or has expired."""
        given = digest_of(key)
        found = self._read(
            f"SELECT k.digest, k.{_KEY.replace(', ', ', k.')}, t.{_TENANT.replace(', ', ', t.')}"
            " FROM keys k JOIN tenants t ON t.name = k.tenant WHERE k.digest = ?",
            (given,),
        )
        if not found or not hmac.compare_digest(found[0][0], given):
            return None
        record = _key(found[0][1:10])
        if record.revoked_at is not None or self._is_over(record):
            return None
        return record, _tenant(found[0][10:])

    def tenant(self, name: str) -> Tenant:
        """One tenant. Raises `TenantNotFound`."""
        found = self._read(f"SELECT {_TENANT} FROM tenants WHERE name = ?", (name,))
        if not found:
            raise TenantNotFound(f"there is no tenant {shorten(name, 100)!r}", code="tenant_not_found", field="tenant")
        return _tenant(found[0])

    def key(self, id: str) -> Key:
        """One key by its id. Raises `KeyNotFound`."""
        found = self._read(f"SELECT {_KEY} FROM keys WHERE id = ?", (id,))
        if not found:
            raise KeyNotFound(f"there is no key {shorten(id, 100)!r}", code="key_not_found", field="id")
        return _key(found[0])

    def keys(self, limit: int = 100, after: str | None = None, tenant: str | None = None) -> KeyPage:
        """Keys after the one with the id `after`, oldest first, of one tenant or of all. Raises `KeyNotFound`."""
        start = 0
        if after is not None:
            self.key(after)
            start = int(self._read("SELECT number FROM keys WHERE id = ?", (after,))[0][0])
        which, values = ("", ()) if tenant is None else (" AND tenant = ?", (tenant,))
        rows = self._read(
            f"SELECT {_KEY} FROM keys WHERE number > ?{which} ORDER BY number LIMIT ?", (start, *values, limit + 1)
        )
        return KeyPage([_key(row) for row in rows[:limit]], len(rows) > limit)

    def tenants(self, limit: int = 100, after: str | None = None) -> TenantPage:
        """Tenants whose names sort after `after`."""
        rows = self._read(
            f"SELECT {_TENANT} FROM tenants WHERE name > ? ORDER BY name LIMIT ?", (after or "", limit + 1)
        )
        return TenantPage([_tenant(row) for row in rows[:limit]], len(rows) > limit)

    # Changes.

    def create_key(
        self, tenant: str, *, role: Role = "user", label: str | None = None, expires_at: int | None = None
    ) -> tuple[str, Key]:
        """A new key, which is not to be had again, and what is known of it. The tenant is made if it is new.

        Raises `InvalidAdapter` for a name, role, label or time that cannot be.
        """
        if NAME_PATTERN.fullmatch(tenant) is None:
            raise InvalidAdapter(
                f"{shorten(tenant, 80)!r} is not a tenant's name: 1 to 64 of a-z, 0-9, '.', '_', '-', the first a"
                " letter or digit",
                code="invalid_name", field="tenant",
            )  # fmt: skip
        if role not in get_args(Role):
            raise InvalidAdapter(f"`role` is one of {', '.join(get_args(Role))}", code="invalid_role", field="role")
        if label is not None and (len(label) > MAX_LABEL_CHARS or not label.isprintable()):
            raise InvalidAdapter(
                f"`label` has at most {MAX_LABEL_CHARS} printable characters", code="invalid_label", field="label"
            )
        now = int(self._clock())
        if expires_at is not None and not now < expires_at < MAX_LIMIT:
            raise InvalidAdapter("`expires_at` is not in the future", code="invalid_expiry", field="expires_at")
        secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        id = f"key_{secrets.token_hex(8)}"
        with self._transaction() as connection:
            add_tenant(connection, tenant, now)
            connection.execute(
                "INSERT INTO keys (id, digest, tenant, role, label, created_at, expires_at)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (id, digest_of(secret.encode()), tenant, role, label, now, expires_at),
            )
        return secret, self.key(id)

    def revoke_key(self, id: str) -> Key:
        """Ends a key for good; one that is revoked stays as it is. Raises `KeyNotFound`."""
        with self._transaction() as connection:
            connection.execute(
                "UPDATE keys SET revoked_at = ? WHERE id = ? AND revoked_at IS NULL", (int(self._clock()), id)
            )
        return self.key(id)

    def note_uses(self, times: Mapping[str, float]) -> None:
        """Key id -> when it was last used."""
        with self._transaction() as connection:
            connection.executemany(
                "UPDATE keys SET last_used_at = ? WHERE id = ?", [(int(at), id) for id, at in times.items()]
            )

    def set_limits(self, tenant: str, changes: Mapping[str, int | None]) -> Tenant:
        """Sets limits by their names in `TenantLimits`. Raises `TenantNotFound`, `InvalidAdapter`."""
        for name, value in changes.items():
            if name not in LIMITS:
                raise InvalidAdapter(f"there is no limit {name!r}", code="invalid_limit", field=name)
            if value is not None and not 0 <= value <= MAX_LIMIT:
                raise InvalidAdapter(f"`{name}` must be a whole number from 0 on", code="invalid_limit", field=name)
        self.tenant(tenant)
        with self._transaction() as connection:
            for name, value in changes.items():
                connection.execute(f"UPDATE tenants SET {name} = ? WHERE name = ?", (value, tenant))
        return self.tenant(tenant)

    def _is_over(self, key: Key) -> bool:
        return key.expires_at is not None and self._clock() >= key.expires_at

    def _read(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """All rows: a statement left unfinished would go on reading the past."""
        with self._reading:
            return self._reader.execute(query, values).fetchall()

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing, durable at the end."""
        with self._writing:
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                self._writer.execute("ROLLBACK")
                raise


def _key(row: tuple[Any, ...]) -> Key:
    return Key(*row[1:])


def _tenant(row: tuple[Any, ...]) -> Tenant:
    return Tenant(row[0], row[1], row[2], TenantLimits(*row[3:]))
