"""Keys and tenants in the registry: hashed, looked up exactly, shared by processes, kept when the schema changes."""

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from loramux.adapters_store import schema
from loramux.adapters_store import tenants as tenants_module
from loramux.adapters_store.errors import InvalidAdapter, KeyNotFound, StoreUnavailableError, TenantNotFound
from loramux.adapters_store.names import address_of, key_at, key_of, owner_and_name
from loramux.adapters_store.tenants import TenantLimits, Tenants

INJECTIONS = (
    "' OR '1'='1", "'; DROP TABLE keys; --", '" OR ""="', "x' UNION SELECT 1,2,3,4,5,6,7,8,9,10 --", "%", "_", "\\",
    "\0",
    "acme'--", "acme\x00", "*", "NULL", "😀", "",
)  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite3"


@pytest.fixture
def tenants(path: Path):
    made = Tenants(path, clock=lambda: 1000.0)
    yield made
    made.close()


def test_a_key_is_kept_as_its_hash(tenants: Tenants, path: Path) -> None:
    secret, key = tenants.create_key("acme", label="laptop", role="admin", expires_at=2000)
    assert secret.startswith("lm-")
    assert len(secret) == 3 + 43  # 256 bits
    assert (key.tenant, key.label, key.role, key.expires_at) == ("acme", "laptop", "admin", 2000)
    assert (key.created_at, key.revoked_at, key.last_used_at) == (1000, None, None)
    for file in path.parent.iterdir():
        assert secret.encode() not in file.read_bytes()
        assert secret.removeprefix("lm-").encode() not in file.read_bytes()
    found = tenants.authenticate(secret.encode())
    assert found is not None
    assert found[0] == key
    assert found[1].name == "acme"
    assert len({tenants.create_key("acme")[0] for _ in range(100)}) == 100


def test_only_the_very_key_is_accepted(tenants: Tenants) -> None:
    secret, key = tenants.create_key("acme")
    good = secret.encode()
    digest = tenants_module.digest_of(good)
    wrong = [
        good[:-1],
        good + b"x",
        good.upper(),
        good[3:],
        b"",
        b"lm-",
        b"\0",
        key.id.encode(),
        digest,
        b"x" * 100_000,
    ]
    wrong += [digest.hex().encode(), *(text.encode() for text in INJECTIONS)]
    for given in wrong:
        assert tenants.authenticate(given) is None, given
    assert tenants.authenticate(good) is not None


def test_revoked_and_expired_keys(path: Path) -> None:
    now = [1000.0]
    tenants = Tenants(path, clock=lambda: now[0])
    secret, key = tenants.create_key("acme")
    timed, _ = tenants.create_key("acme", expires_at=1010)
    now[0] = 1009.9
    assert tenants.authenticate(timed.encode()) is not None
    now[0] = 1010.0
    assert tenants.authenticate(timed.encode()) is None
    assert tenants.revoke_key(key.id).revoked_at == 1010
    assert tenants.authenticate(secret.encode()) is None
    now[0] = 1020.0
    assert tenants.revoke_key(key.id).revoked_at == 1010
    assert tenants.has_keys()
    with pytest.raises(KeyNotFound):
        tenants.revoke_key("key_0")
    tenants.close()


@pytest.mark.parametrize("text", INJECTIONS)
def test_hostile_texts_change_nothing(tenants: Tenants, text: str) -> None:
    tenants.create_key("acme")
    for call in (lambda: tenants.create_key(text), lambda: tenants.set_limits("acme", {text: 1})):
        with pytest.raises(InvalidAdapter):
            call()
    with pytest.raises(TenantNotFound):
        tenants.tenant(text)
    for call in (lambda: tenants.key(text), lambda: tenants.revoke_key(text), lambda: tenants.keys(after=text)):
        with pytest.raises(KeyNotFound):
            call()
    assert tenants.keys(tenant=text).data == []
    assert [tenant.name for tenant in tenants.tenants().data] == ["acme", "default"]
    assert len(tenants.keys().data) == 1


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"tenant": "Acme"}, "tenant"), ({"tenant": "a/b"}, "tenant"), ({"tenant": "../x"}, "tenant"),
        ({"tenant": "x" * 65}, "tenant"), ({"tenant": "a", "role": "root"}, "role"),
        ({"tenant": "a", "label": "x" * 257}, "label"), ({"tenant": "a", "label": "a\nb"}, "label"),
        ({"tenant": "a", "expires_at": 1000}, "expires_at"), ({"tenant": "a", "expires_at": 1 << 70}, "expires_at"),
    ],
)  # fmt: skip
def test_keys_that_make_no_sense(tenants: Tenants, fields, field: str) -> None:
    with pytest.raises(InvalidAdapter) as caught:
        tenants.create_key(**fields)
    assert caught.value.field == field
    assert not tenants.has_keys()
    assert [tenant.name for tenant in tenants.tenants().data] == ["default"]


def test_pages(tenants: Tenants) -> None:
    made = [tenants.create_key(name)[1] for name in ("b", "a", "b", "a", "b")]
    first = tenants.keys(limit=2)
    assert (first.data, first.has_more) == (made[:2], True)
    assert tenants.keys(limit=3, after=made[1].id).data == made[2:]
    assert not tenants.keys(limit=3, after=made[1].id).has_more
    assert tenants.keys(tenant="a").data == [made[1], made[3]]
    page = tenants.tenants(limit=2)
    assert ([tenant.name for tenant in page.data], page.has_more) == (["a", "b"], True)
    assert [tenant.name for tenant in tenants.tenants(after="b").data] == ["default"]


def test_limits(tenants: Tenants) -> None:
    tenants.create_key("acme")
    assert tenants.tenant("acme").limits == TenantLimits()
    limits = tenants.set_limits("acme", {"adapters": 0, "tokens_per_minute": 60}).limits
    assert limits == TenantLimits(adapters=0, tokens_per_minute=60)
    assert tenants.set_limits("acme", {"adapters": None}).limits == TenantLimits(tokens_per_minute=60)
    assert limits.over(TenantLimits(adapters=5, requests=2)) == TenantLimits(0, None, None, 2, 60)
    for changes in ({"adapters": -1}, {"adapters": 1 << 70}, {"name": 1}):
        with pytest.raises(InvalidAdapter):
            tenants.set_limits("acme", changes)
    with pytest.raises(TenantNotFound):
        tenants.set_limits("nobody", {"adapters": 1})


def test_each_tenant_has_a_secret_salt_for_ever(tenants: Tenants, path: Path) -> None:
    tenants.create_key("acme")
    salts = {tenant.name: tenant.salt for tenant in tenants.tenants().data}
    assert {len(salt) for salt in salts.values()} == {32}
    assert len(set(salts.values())) == 2
    tenants.create_key("acme")
    again = Tenants(path)
    assert {tenant.name: tenant.salt for tenant in again.tenants().data} == salts
    assert not any(repr(salt) in repr(tenants.tenants()) for salt in salts.values())
    again.close()


def test_another_process_is_heard_at_once(tenants: Tenants, path: Path) -> None:
    assert not tenants.has_keys()
    other = Tenants(path, clock=lambda: 1000.0)
    secret, key = other.create_key("acme")
    assert tenants.has_keys()
    assert tenants.authenticate(secret.encode()) is not None
    other.revoke_key(key.id)
    assert tenants.authenticate(secret.encode()) is None
    other.set_limits("acme", {"requests": 3})
    assert tenants.tenant("acme").limits.requests == 3
    other.close()


def test_names_have_two_forms() -> None:
    for owner in ("default", "acme"):
        for asker in ("default", "acme", "other"):
            key = key_of(owner, "skill")
            assert owner_and_name(key) == (owner, "skill")
            address = address_of(key, asker)
            assert address == ("skill" if owner == asker else f"{owner}/skill")
            assert key_at(address, asker) == key_at(f"{address}@3", asker) == key
            assert key_at(f"{owner}/skill", asker) == key


# Migration.


def make_version_1(path: Path) -> None:
    """A registry as the first version of the program wrote it, with one adapter."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(f"BEGIN; {schema._ADAPTERS} PRAGMA user_version = 1; COMMIT;")
    connection.execute(
        "INSERT INTO adapters (owner, name, last_version, current_version) VALUES ('default', 'a', 1, 1)"
    )
    digest = f"sha256:{1:064x}"
    connection.execute("INSERT INTO blobs VALUES (?, 7)", (digest,))
    connection.execute(
        "INSERT INTO versions VALUES (1, 1, ?, 'ready', NULL, 'b', '[4]', '[\"q\"]', '[]', 5)", (digest,)
    )
    connection.close()


def content(path: Path) -> tuple[int, list[tuple[object, ...]], bool]:
    """(version, adapters by the columns of version 1, whether there are tenants)."""
    connection = sqlite3.connect(path)
    try:
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        rows = connection.execute("SELECT owner, name, last_version, current_version FROM adapters").fetchall()
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master")}
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return version, rows, {"tenants", "keys", "shares", "adapters_public"} <= tables
    finally:
        connection.close()


def test_a_registry_of_version_1_is_brought_along(path: Path) -> None:
    make_version_1(path)
    tenants = Tenants(path)
    assert [tenant.name for tenant in tenants.tenants().data] == ["default"]
    assert not tenants.has_keys()
    tenants.close()
    assert content(path) == (2, [("default", "a", 1, 1)], True)
    connection = sqlite3.connect(path)
    assert connection.execute("SELECT visibility FROM adapters").fetchall() == [("private",)]
    connection.close()


@pytest.mark.parametrize("exists", [False, True])
def test_the_file_is_its_owners_alone(path: Path, exists: bool) -> None:
    if exists:
        make_version_1(path)
        path.chmod(0o644)
    tenants = Tenants(path)
    tenants.create_key("acme")
    assert {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {
        path.name + suffix: 0o600 for suffix in ("", "-wal", "-shm")
    }
    tenants.close()


def test_an_unknown_version_is_refused(path: Path) -> None:
    for version in (3, -1):
        connection = sqlite3.connect(path)
        connection.execute(f"PRAGMA user_version = {version}")
        connection.close()
        with pytest.raises(StoreUnavailableError, match=f"version {version}"):
            Tenants(path)


def test_a_failed_step_changes_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_version_1(path)

    def fails(connection: sqlite3.Connection) -> None:
        schema._add_tenants(connection)
        raise OSError("disk")

    monkeypatch.setattr(schema, "STEPS", (schema._add_adapters, fails))
    with pytest.raises(OSError, match="disk"):
        schema.open_database(path)
    assert content(path) == (1, [("default", "a", 1, 1)], False)


WORKER = """
import os, signal, sys
from pathlib import Path
from loramux.adapters_store import schema
from loramux.adapters_store.tenants import Tenants

seen, kill_at = 0, int(sys.argv[2])
FILES = {"schema.py", "tenants.py"}

def trace(frame, event, _):
    global seen
    if os.path.basename(frame.f_code.co_filename) not in FILES:
        return None
    if event == "line":
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return trace

sys.settrace(trace)
tenants = Tenants(Path(sys.argv[1]))
tenants.create_key("acme")
sys.settrace(None)
print(seen)
"""


def test_a_kill_at_any_line_leaves_the_old_registry_or_the_new_one(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(schema.__file__).parents[2])}

    def run(number: int, kill_at: int) -> "subprocess.CompletedProcess[str]":
        path = tmp_path / f"{number}.sqlite3"
        make_version_1(path)
        command = [sys.executable, "-c", WORKER, str(path), str(kill_at)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)

    whole = run(0, 0)
    assert whole.returncode == 0, whole.stderr
    lines, points, states = int(whole.stdout), 16, []
    for point in range(points):
        done = run(point + 1, 1 + point * (lines - 1) // (points - 1))
        assert done.returncode == -signal.SIGKILL, done.stderr
        version, rows, migrated = content(tmp_path / f"{point + 1}.sqlite3")
        assert rows == [("default", "a", 1, 1)]
        assert migrated == (version == 2)
        after = Tenants(tmp_path / f"{point + 1}.sqlite3")
        states.append((version, len(after.keys().data)))
        assert after.create_key("next")[1].tenant == "next"
        after.close()
    assert states == sorted(states)
    assert states[0] == (1, 0)
    assert states[-1] == (2, 1)


def test_look_ups_are_by_index(tenants: Tenants) -> None:
    secret, key = tenants.create_key("acme")
    traced: list[str] = []
    tenants._reader.set_trace_callback(traced.append)
    tenants.authenticate(secret.encode())
    tenants.tenant("acme")
    tenants.keys(after=key.id, tenant="acme")
    tenants._reader.set_trace_callback(None)
    plans = [step[3] for query in traced for step in tenants._reader.execute(f"EXPLAIN QUERY PLAN {query}")]
    assert len(plans) >= 4
    assert not [step for step in plans if step.startswith("SCAN")]


def test_a_look_up_does_not_wait_for_a_writer(tenants: Tenants, path: Path) -> None:
    secret, _ = tenants.create_key("acme")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    other.execute("UPDATE tenants SET requests = 1")
    tenants._reader.execute("PRAGMA busy_timeout = 0")  # waiting would be a failure
    assert tenants.authenticate(secret.encode()) is not None
    other.execute("ROLLBACK")
    other.close()
