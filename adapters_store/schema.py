"""The registry's database: its tables, and how a file of an older version becomes one of this version.

A new file takes the same steps as an old one, all in one transaction: a crash leaves the version it had before.
"""

import os
import secrets
import sqlite3
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from loramux.adapters_store.errors import StoreUnavailableError
from loramux.adapters_store.names import LOCAL_TENANT

REGISTRY_FILE = "registry.sqlite3"
PRIVATE = 0o600
SALT_BYTES = 32
BUSY_SECONDS = 5.0

_ADAPTERS = """
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY,
    owner TEXT NOT NULL,
    name TEXT NOT NULL,
    last_version INTEGER NOT NULL,
    current_version INTEGER,
    description TEXT,
    examples TEXT,
    UNIQUE (owner, name)
);
CREATE TABLE blobs (
    digest TEXT PRIMARY KEY,
    bytes INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE versions (
    adapter INTEGER NOT NULL REFERENCES adapters (id),
    version INTEGER NOT NULL,
    digest TEXT NOT NULL REFERENCES blobs (digest),
    status TEXT NOT NULL,
    last_error TEXT,
    base_model TEXT NOT NULL,
    ranks TEXT NOT NULL,
    target_modules TEXT NOT NULL,
    warnings TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (adapter, version)
) WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);
CREATE INDEX adapters_alive ON adapters (owner, name) WHERE current_version IS NOT NULL;
"""

_TENANTS = """
ALTER TABLE adapters ADD COLUMN visibility TEXT NOT NULL DEFAULT 'private';
CREATE INDEX adapters_public ON adapters (owner, name) WHERE visibility = 'public' AND current_version IS NOT NULL;
CREATE TABLE shares (
    adapter INTEGER NOT NULL REFERENCES adapters (id),
    tenant TEXT NOT NULL,
    PRIMARY KEY (adapter, tenant)
) WITHOUT ROWID;
CREATE INDEX shares_by_tenant ON shares (tenant, adapter);
CREATE TABLE tenants (
    name TEXT PRIMARY KEY,
    salt BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    adapters INTEGER,
    adapter_bytes INTEGER,
    pinned INTEGER,
    requests INTEGER,
    tokens_per_minute INTEGER
) WITHOUT ROWID;
CREATE TABLE keys (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    digest BLOB NOT NULL UNIQUE,
    tenant TEXT NOT NULL REFERENCES tenants (name),
    role TEXT NOT NULL,
    label TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER,
    revoked_at INTEGER,
    last_used_at INTEGER
);
CREATE INDEX keys_by_tenant ON keys (tenant, number);
"""


def _run(connection: sqlite3.Connection, script: str) -> None:
    """Each statement of a script; `executescript` would end the transaction. No statement here holds a semicolon."""
    for statement in script.split(";"):
        if statement.strip():
            connection.execute(statement)


def _add_adapters(connection: sqlite3.Connection) -> None:
    _run(connection, _ADAPTERS)


def _add_tenants(connection: sqlite3.Connection) -> None:
    _run(connection, _TENANTS)
    add_tenant(connection, LOCAL_TENANT, int(time.time()))


STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (_add_adapters, _add_tenants)
"""Step i turns a file of version i into one of version i + 1."""
SCHEMA_VERSION = len(STEPS)


def add_tenant(connection: sqlite3.Connection, name: str, now: int) -> None:
    """Registers a tenant with a secret salt of its own, unless it exists. Inside a transaction."""
    connection.execute(
        "INSERT INTO tenants (name, salt, created_at) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
        (name, secrets.token_bytes(SALT_BYTES), now),
    )


def open_database(path: Path) -> sqlite3.Connection:
    """A connection in autocommit mode to the database, created or brought to this version first.

    Several processes may open it at once. The file is its owner's alone to read: it holds the tenants' salts. Raises
    `StoreUnavailableError` for a version that this program does not know.
    """
    os.close(os.open(path, os.O_CREAT | os.O_RDWR, PRIVATE))
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    try:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")
        if _version(connection) != SCHEMA_VERSION:
            for suffix in ("", "-wal", "-shm"):
                with suppress(FileNotFoundError, PermissionError):
                    path.with_name(path.name + suffix).chmod(PRIVATE)
            _migrate(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def _migrate(connection: sqlite3.Connection) -> None:
    """The missing steps, in one transaction; another process may have taken them just before."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        version = _version(connection)
        if not 0 <= version <= SCHEMA_VERSION:
            raise StoreUnavailableError(
                f"the adapter store has schema version {version}, this program knows {SCHEMA_VERSION}"
            )
        for step in STEPS[version:]:
            step(connection)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise
