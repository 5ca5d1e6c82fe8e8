"""The registry: which names exist, which versions they have, which blob each version is. SQLite, parametrised SQL only.

A name keeps its row after deletion, for the number of its last version: `name@3` never means two contents. A version
row is never changed but for its health. Versions share blobs.
"""

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from loramux.adapters_store.names import LOCAL_TENANT, address_of, key_of
from loramux.adapters_store.schema import open_database
from loramux.adapters_store.storage import disk_full

Status = Literal["ready", "failed"]
Values = tuple[str | int, ...] | Mapping[str, str | int | None]
Visibility = Literal["private", "shared", "public"]

_SELECT = """
SELECT a.name, v.version, v.digest, v.status, v.last_error, v.base_model, v.ranks, v.target_modules, v.warnings,
       v.created_at, a.description, a.examples, b.bytes, a.owner, a.visibility,
       CASE a.visibility WHEN 'shared' THEN (
           SELECT json_group_array(s.tenant) FROM shares s WHERE s.adapter = a.id
       ) END
FROM adapters a JOIN versions v ON v.adapter = a.id JOIN blobs b ON b.digest = v.digest
"""
_VISIBLE = """(a.owner = :tenant OR a.visibility = 'public'
     OR EXISTS (SELECT 1 FROM shares s WHERE s.adapter = a.id AND s.tenant = :tenant))"""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One immutable version of an adapter, with the description its name has now.

    `id` is `name@version`; `rank` is the largest of `ranks` (the distinct ranks, ascending); `target_modules` are the
    last names of the adapted modules; `bytes` the size of the canonical file; `created_at` in Unix seconds. `status`
    is `failed` with `last_error` when its blob is gone or damaged. `owner` is the tenant it belongs to, `shared_with`
    the tenants, sorted, that may use it while its `visibility` is `shared`.
    """

    id: str
    name: str
    version: int
    digest: str
    status: Status
    base_model: str
    rank: int
    target_modules: tuple[str, ...]
    bytes: int
    created_at: int
    description: str | None
    examples: list[str] | None
    ranks: tuple[int, ...]
    warnings: list[str]
    last_error: str | None
    owner: str = LOCAL_TENANT
    visibility: Visibility = "private"
    shared_with: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """The adapter's name inside the server, one for everybody."""
        return key_of(self.owner, self.name)

    def address(self, tenant: str) -> str:
        """What `tenant` calls the adapter."""
        return address_of(self.key, tenant)


@dataclass(frozen=True, slots=True)
class Sharing:
    """Who may use an adapter besides its owner: nobody, the tenants named, or everybody."""

    visibility: Visibility
    shared_with: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NewVersion:
    """What a version row is made of."""

    digest: str
    bytes: int
    base_model: str
    ranks: Sequence[int]
    target_modules: Sequence[str]
    warnings: Sequence[str]
    created_at: int


class Registry:
    """One connection; the caller serialises calls. Every method outside `transaction` is one transaction of its own."""

    def __init__(self, path: Path) -> None:
        """Opens or creates the database. Raises `StoreUnavailableError` for another schema version."""
        self.connection = open_database(path)

    def close(self) -> None:
        """Closes the connection."""
        self.connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, durable on return. Raises `StoreFull` when the disk has no room."""
        try:
            self.connection.execute("BEGIN IMMEDIATE")
            yield
            self.connection.execute("COMMIT")
        except BaseException as error:
            if self.connection.in_transaction:
                self.connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode == sqlite3.SQLITE_FULL:
                raise disk_full() from error
            raise

    # Reading.

    def is_known(self, owner: str, name: str) -> bool:
        """Whether the name has a row, which it keeps when it is deleted."""
        row = self.connection.execute("SELECT 1 FROM adapters WHERE owner = ? AND name = ?", (owner, name)).fetchone()
        return row is not None

    def newest(self, owner: str, name: str) -> AdapterVersion | None:
        """The current version of a name, or None."""
        where = "WHERE a.owner = ? AND a.name = ? AND v.version = a.current_version"
        return self._one(where, (owner, name))

    def version(self, owner: str, name: str, version: int) -> AdapterVersion | None:
        """One version of a name that is not deleted, or None."""
        return self._one("WHERE a.owner = ? AND a.name = ? AND v.version = ?", (owner, name, version))

    def versions(self, owner: str, name: str) -> list[AdapterVersion]:
        """All versions of a name, newest first."""
        return self._all("WHERE a.owner = ? AND a.name = ? ORDER BY v.version DESC", (owner, name))

    def page(self, owner: str, after: str, limit: int) -> list[AdapterVersion]:
        """The current versions of up to `limit` names that sort after `after`, by name."""
        where = "WHERE a.owner = ? AND a.name > ? AND a.current_version IS NOT NULL AND v.version = a.current_version"
        return self._all(f"{where} ORDER BY a.name LIMIT ?", (owner, after, limit))

    def visible(self, tenant: str, owner: str, name: str, version: int | None) -> AdapterVersion | None:
        """The current version of `owner`'s adapter, or the one asked for, if `tenant` may use it; else None."""
        chosen = "a.current_version" if version is None else ":version"
        where = f"WHERE a.owner = :owner AND a.name = :name AND v.version = {chosen} AND {_VISIBLE}"
        return self._one(where, {"tenant": tenant, "owner": owner, "name": name, "version": version})

    def foreign_page(self, tenant: str, after: tuple[str, str], limit: int) -> list[AdapterVersion]:
        """Up to `limit` adapters of others that `tenant` may use, after (owner, name), in that order."""
        current = "AND a.current_version IS NOT NULL AND v.version = a.current_version"
        place = "AND a.owner <> :tenant AND (a.owner, a.name) > (:owner, :name) ORDER BY a.owner, a.name LIMIT :limit"
        values: Values = {"tenant": tenant, "owner": after[0], "name": after[1], "limit": limit}
        public = self._all(f"WHERE a.visibility = 'public' {current} {place}", values)
        given = "a.visibility = 'shared' AND a.id IN (SELECT s.adapter FROM shares s WHERE s.tenant = :tenant)"
        shared = self._all(f"WHERE {given} {current} {place}", values)
        return sorted([*public, *shared], key=lambda found: (found.owner, found.name))[:limit]

    def every_page(self, after: tuple[str, str], limit: int) -> list[AdapterVersion]:
        """Up to `limit` adapters of anybody after (owner, name), in that order."""
        where = "WHERE (a.owner, a.name) > (?, ?) AND a.current_version IS NOT NULL AND v.version = a.current_version"
        return self._all(f"{where} ORDER BY a.owner, a.name LIMIT ?", (*after, limit))

    def visible_names(self, tenant: str) -> list[tuple[str, str]]:
        """(owner, name) of every adapter whose current version is whole and that `tenant` may use; in no order."""
        ready = (
            "JOIN versions v ON v.adapter = a.id AND v.version = a.current_version"
            " WHERE a.current_version IS NOT NULL AND v.status = 'ready' AND"
        )
        rows = self.connection.execute(
            f"SELECT a.owner, a.name FROM adapters a {ready} a.owner = :tenant"
            f" UNION ALL SELECT a.owner, a.name FROM adapters a {ready} a.visibility = 'public' AND a.owner <> :tenant"
            " UNION ALL SELECT a.owner, a.name FROM shares s CROSS JOIN adapters a ON a.id = s.adapter"
            f" {ready} s.tenant = :tenant AND a.owner <> :tenant",
            {"tenant": tenant},
        )
        return [(str(owner), str(name)) for owner, name in rows]

    def is_referenced_by(self, owner: str, digest: str) -> bool:
        """Whether a version of this owner's has the blob."""
        versions = "SELECT 1 FROM versions v JOIN adapters a ON a.id = v.adapter WHERE v.digest = ? AND a.owner = ?"
        return self._value(f"SELECT EXISTS ({versions})", (digest, owner)) == 1

    def usage(self, owner: str) -> tuple[int, int]:
        """(names, bytes) of one owner; a blob counts once for each owner that has it, whoever else does."""
        names = self._value("SELECT count(*) FROM adapters WHERE owner = ? AND current_version IS NOT NULL", (owner,))
        query = (
            "SELECT coalesce(sum(bytes), 0) FROM blobs WHERE digest IN"
            " (SELECT v.digest FROM adapters a JOIN versions v ON v.adapter = a.id WHERE a.owner = ?)"
        )
        return names, self._value(query, (owner,))

    def is_referenced(self, digest: str) -> bool:
        """Whether a version of anybody has this blob."""
        return self._value("SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?)", (digest,)) == 1

    def blobs(self) -> dict[str, int]:
        """Size in bytes of every registered blob by digest."""
        return dict(self.connection.execute("SELECT digest, bytes FROM blobs"))

    def total_bytes(self) -> int:
        """Bytes of all registered blobs."""
        return self._value("SELECT coalesce(sum(bytes), 0) FROM blobs", ())

    def count_names(self) -> int:
        """Names that are not deleted, of all owners."""
        return self._value("SELECT count(*) FROM adapters WHERE current_version IS NOT NULL", ())

    def count_versions(self, owner: str, name: str) -> int:
        """Versions of a name."""
        query = "SELECT count(*) FROM versions v JOIN adapters a ON a.id = v.adapter WHERE a.owner = ? AND a.name = ?"
        return self._value(query, (owner, name))

    # Writing.

    def add_version(self, owner: str, name: str, new: NewVersion) -> int:
        """Registers a version under the name's next number, which is returned. Inside `transaction`."""
        execute = self.connection.execute
        execute(
            "INSERT INTO adapters (owner, name, last_version) VALUES (?, ?, 0) ON CONFLICT DO NOTHING", (owner, name)
        )
        execute(
            "UPDATE adapters SET last_version = last_version + 1, current_version = last_version + 1"
            " WHERE owner = ? AND name = ?",
            (owner, name),
        )
        adapter, version = execute(
            "SELECT id, last_version FROM adapters WHERE owner = ? AND name = ?", (owner, name)
        ).fetchone()
        execute("INSERT INTO blobs (digest, bytes) VALUES (?, ?) ON CONFLICT DO NOTHING", (new.digest, new.bytes))
        execute(
            "INSERT INTO versions (adapter, version, digest, status, base_model, ranks, target_modules, warnings,"
            " created_at) VALUES (?, ?, ?, 'ready', ?, ?, ?, ?, ?)",
            (
                adapter,
                version,
                new.digest,
                new.base_model,
                json.dumps(list(new.ranks)),
                json.dumps(list(new.target_modules)),
                json.dumps(list(new.warnings)),
                new.created_at,
            ),
        )
        return int(version)

    def describe(self, owner: str, name: str, changes: Mapping[Literal["description", "examples"], Any]) -> None:
        """Sets the given texts of a name. Inside `transaction`."""
        if "description" in changes:
            self.connection.execute(
                "UPDATE adapters SET description = ? WHERE owner = ? AND name = ?",
                (changes["description"], owner, name),
            )
        if "examples" in changes:
            examples = changes["examples"]
            self.connection.execute(
                "UPDATE adapters SET examples = ? WHERE owner = ? AND name = ?",
                (None if examples is None else json.dumps(examples), owner, name),
            )

    def share(self, owner: str, name: str, sharing: Sharing) -> None:
        """Sets who may use a name. Inside `transaction`."""
        execute = self.connection.execute
        row = execute("SELECT id FROM adapters WHERE owner = ? AND name = ?", (owner, name)).fetchone()
        execute("DELETE FROM shares WHERE adapter = ?", row)
        execute("UPDATE adapters SET visibility = ? WHERE id = ?", (sharing.visibility, *row))
        for tenant in sharing.shared_with:
            execute("INSERT INTO shares (adapter, tenant) VALUES (?, ?)", (*row, tenant))

    def delete(self, owner: str, name: str) -> list[str] | None:
        """Deletes all versions of a name and returns the digests that nobody has any more; None for no such name.

        The row stays for its last version number. Inside `transaction`.
        """
        execute = self.connection.execute
        row = execute(
            "SELECT id FROM adapters WHERE owner = ? AND name = ? AND current_version IS NOT NULL", (owner, name)
        ).fetchone()
        if row is None:
            return None
        digests = {str(r[0]) for r in execute("SELECT digest FROM versions WHERE adapter = ?", row)}
        execute("DELETE FROM versions WHERE adapter = ?", row)
        execute("DELETE FROM shares WHERE adapter = ?", row)  # who takes the name again starts private
        execute(
            "UPDATE adapters SET current_version = NULL, description = NULL, examples = NULL, visibility = 'private'"
            " WHERE id = ?",
            row,
        )
        gone = sorted(d for d in digests if not self.is_referenced(d))
        self.connection.executemany("DELETE FROM blobs WHERE digest = ?", [(d,) for d in gone])
        return gone

    def mark(self, digest: str, status: Status, last_error: str | None) -> None:
        """Sets the health of every version with this blob. Inside `transaction`."""
        self.connection.execute(
            "UPDATE versions SET status = ?, last_error = ? WHERE digest = ?", (status, last_error, digest)
        )

    def unhealthy(self) -> set[str]:
        """Digests whose versions are marked as failed."""
        return {str(r[0]) for r in self.connection.execute("SELECT digest FROM versions WHERE status = 'failed'")}

    def _value(self, query: str, values: tuple[str | int, ...]) -> int:
        return int(self.connection.execute(query, values).fetchone()[0])

    def _one(self, where: str, values: Values) -> AdapterVersion | None:
        found = self._all(where, values)
        return found[0] if found else None

    def _all(self, where: str, values: Values) -> list[AdapterVersion]:
        return [_version(row) for row in self.connection.execute(_SELECT + where, values)]


def _version(row: tuple[Any, ...]) -> AdapterVersion:
    ranks = tuple(json.loads(row[6]))
    return AdapterVersion(
        id=f"{row[0]}@{row[1]}",
        name=row[0],
        version=row[1],
        digest=row[2],
        status=row[3],
        last_error=row[4],
        base_model=row[5],
        rank=max(ranks),
        ranks=ranks,
        target_modules=tuple(json.loads(row[7])),
        warnings=json.loads(row[8]),
        created_at=row[9],
        description=row[10],
        examples=None if row[11] is None else json.loads(row[11]),
        bytes=row[12],
        owner=row[13],
        visibility=row[14],
        shared_with=() if row[15] is None else tuple(json.loads(row[15])),
    )
