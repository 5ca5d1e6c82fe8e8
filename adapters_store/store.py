"""The adapter store: uploads are checked and become immutable versions of names; the engine reads their blobs.

    root/lock              held by the one process that has the store open
    root/registry.sqlite3  names and versions
    root/blobs/sha256-*    canonical files
    root/uploads/*         uploads in progress, swept when the store opens

A version becomes visible by one transaction, after its blob has its final name: a crash before leaves an unreferenced
blob, which the next opening removes. A deletion first commits, then removes the blob.
"""

import fcntl
import os
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, Final, Literal, get_args

from loramux.adapters_store.base_spec import BaseSpec
from loramux.adapters_store.digests import blob_name
from loramux.adapters_store.errors import (
    AdapterConflict,
    AdapterNotFound,
    InvalidAdapter,
    QuotaExceeded,
    StoreFull,
    StoreUnavailableError,
    shorten,
)
from loramux.adapters_store.limits import StoreLimits
from loramux.adapters_store.names import LOCAL_TENANT, NAME_PATTERN, VERSION_PATTERN, key_of, owner_and_name
from loramux.adapters_store.peft_format import AdapterPlan, plan_adapter, write_plan
from loramux.adapters_store.registry import AdapterVersion, NewVersion, Registry, Sharing, Visibility
from loramux.adapters_store.schema import REGISTRY_FILE
from loramux.adapters_store.storage import BlobFolder, StagedBlob, Upload, check_free_space

AUTO = "auto"

Strings = list[str]
Versions = list[AdapterVersion]
Texts = dict[Literal["description", "examples"], Any]


class Unset(Enum):
    """The mark of an argument that was not given, where None means something."""

    UNSET = "unset"


UNSET: Final = Unset.UNSET


@dataclass(frozen=True, slots=True)
class CommitResult:
    """`created` is False when the content was the newest version already."""

    adapter: AdapterVersion
    created: bool


@dataclass(frozen=True, slots=True)
class Page:
    """A stretch of a list in order of names, and whether more follows."""

    data: list[AdapterVersion]
    has_more: bool


@dataclass(frozen=True, slots=True)
class StoreQuota:
    """What one tenant may keep: names, and bytes of canonical files (each counted once per tenant); None: any."""

    adapters: int | None = None
    bytes: int | None = None


@dataclass(frozen=True, slots=True)
class StoreUsage:
    """What one tenant keeps, counted as in `StoreQuota`."""

    adapters: int
    bytes: int


class AdapterStore:
    """Everything the API does with adapters; safe from any thread, every method may block on the disk."""

    def __init__(
        self,
        root: Path,
        base: BaseSpec,
        limits: StoreLimits | None = None,
        *,
        reserved_names: Collection[str] = (),
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Opens the store in `root`, creating it when absent, and puts right what a crash left.

        `reserved_names` are names, or `tenant/name`, that no adapter may have. Raises `StoreUnavailableError` when
        another process has the store open.
        """
        self.base = base
        self.limits = limits or StoreLimits()
        self._clock = clock
        self._reserved = {AUTO, base.name, *reserved_names}
        self._root = root
        self._uploads = root / "uploads"
        self._blobs = BlobFolder(root / "blobs")
        self._guard = threading.RLock()
        self._leases: dict[str, int] = {}
        self._leaving: set[str] = set()  # deleted while leased
        self._generation = 0
        for folder in (root, self._uploads, self._blobs.folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock_file = self._take_lock()
        try:
            self._registry = Registry(self.registry_path)
            self._recover()
        except BaseException:
            self._lock_file.close()
            raise

    @property
    def blob_dir(self) -> Path:
        """Where the canonical files are, for `HostTier`."""
        return self._blobs.folder

    @property
    def registry_path(self) -> Path:
        """The database that the registry shares with `Tenants`."""
        return self._root / REGISTRY_FILE

    @property
    def generation(self) -> int:
        """Grows with every change of what any tenant may use; what was read at one value holds until the next."""
        return self._generation

    def close(self) -> None:
        """Closes the registry and lets another process open the store."""
        with self._guard:
            self._registry.close()
            self._lock_file.close()

    # Uploading.

    def begin_upload(self) -> Upload:
        """A context manager that takes the files; `commit` makes them a version. Raises `StoreFull`."""
        return Upload(self._uploads, self.limits)

    def commit(
        self,
        upload: Upload,
        *,
        name: str,
        description: str | None = None,
        examples: Sequence[str] | None = None,
        sharing: Sharing | None = None,
        owner: str = LOCAL_TENANT,
        quota: StoreQuota | None = None,
    ) -> CommitResult:
        """Checks the upload against the base and makes it the newest version of `name`, or finds that it is already.

        `description`, `examples` and `sharing` belong to the name; None leaves what it has. Nothing is visible before
        all checks passed. What others keep changes nothing of the answer, equal content included: it is written, and
        counts for `quota`, for each owner. Raises `InvalidAdapter`, `UnsupportedAdapter`, `IncompatibleAdapter`,
        `AdapterConflict`, `QuotaExceeded`, `StoreFull`.
        """
        self._check_name(name, owner)
        if sharing is not None:
            sharing = self._checked_sharing(sharing)
        changes: Texts = {}
        if description is not None:
            changes["description"] = self._checked_description(description)
        if examples is not None:
            changes["examples"] = self._checked_examples(examples)
        config_path, weights_path = upload.finish()
        plan = plan_adapter(config_path, weights_path, self.base, self.limits)
        check_free_space(self._root, weights_path.stat().st_size, self.limits)
        warnings: list[str] = list(plan.warnings)

        def write(file: IO[bytes]) -> tuple[str, int]:
            hexdigest, size, found = write_plan(plan, weights_path, file)
            warnings.extend(found)
            return hexdigest, size

        blob = upload.stage(write)
        return self._register(blob, self._new_version(blob, plan, warnings), owner, name, changes, sharing, quota)

    def _register(
        self,
        blob: StagedBlob,
        new: NewVersion,
        owner: str,
        name: str,
        changes: Texts,
        sharing: Sharing | None,
        quota: StoreQuota | None,
    ) -> CommitResult:
        with self._guard:
            newest = self._registry.newest(owner, name)
            same = newest is not None and newest.digest == blob.digest
            if not same:
                self._check_quota(blob, owner, quota or StoreQuota(), is_new=newest is None)
                self._check_room(blob, owner, name, is_new=newest is None)
            self._blobs.put(blob)
            try:
                with self._registry.transaction():
                    self._registry.mark(blob.digest, "ready", None)
                    if not same:
                        self._registry.add_version(owner, name, new)
                    self._registry.describe(owner, name, changes)
                    if sharing is not None:
                        self._registry.share(owner, name, sharing)
            finally:
                self._generation += 1
                self._drop_if_unreferenced(blob.digest)
            return CommitResult(self.get(name, owner=owner), created=not same)

    def _new_version(self, blob: StagedBlob, plan: AdapterPlan, warnings: list[str]) -> NewVersion:
        return NewVersion(
            blob.digest,
            blob.size,
            self.base.name,
            plan.ranks,
            plan.target_modules,
            warnings,
            int(self._clock()),
        )

    def _check_quota(self, blob: StagedBlob, owner: str, quota: StoreQuota, *, is_new: bool) -> None:
        if quota.adapters is None and quota.bytes is None:
            return
        used = self.usage(owner)
        if is_new and quota.adapters is not None and used.adapters >= quota.adapters:
            raise QuotaExceeded(
                f"you have {used.adapters} adapters, your quota is {quota.adapters}; delete some",
                code="rate_limit_exceeded", field="name",
            )  # fmt: skip
        size = 0 if self._registry.is_referenced_by(owner, blob.digest) else blob.size
        if quota.bytes is not None and size and used.bytes + size > quota.bytes:
            raise QuotaExceeded(
                f"this adapter's {size} bytes and the {used.bytes} that you keep exceed your quota of {quota.bytes};"
                " delete some adapters",
                code="rate_limit_exceeded", field="files",
            )  # fmt: skip

    def _check_room(self, blob: StagedBlob, owner: str, name: str, *, is_new: bool) -> None:
        limits = self.limits
        if is_new and self._registry.count_names() >= limits.max_adapters:
            raise StoreFull(f"the store has its {limits.max_adapters} adapters", code="store_full", field="name")
        if not is_new and self._registry.count_versions(owner, name) >= limits.max_versions:
            raise StoreFull(
                f"{name!r} has its {limits.max_versions} versions; delete it first", code="store_full", field="name"
            )
        known = self._registry.is_referenced_by(owner, blob.digest)  # who else has it is nobody's business
        if not known and self._registry.total_bytes() + blob.size > limits.max_total_bytes:
            raise StoreFull(
                f"the store holds at most {limits.max_total_bytes} bytes of adapters; delete some",
                code="store_full",
                field="files",
            )

    # Reading.

    def list(self, limit: int = 20, after: str | None = None, owner: str = LOCAL_TENANT) -> Page:
        """The newest versions of up to `limit` names that sort after `after`, a name or an `id`.

        Raises `InvalidAdapter` when `after` is neither.
        """
        start = (after or "").partition("@")[0]
        if start and NAME_PATTERN.fullmatch(start) is None:
            raise InvalidAdapter(f"`after` is {shorten(start, 80)!r}, not a name", code="invalid_after", field="after")
        with self._guard:
            found = self._registry.page(owner, start, limit + 1)
        return Page(found[:limit], len(found) > limit)

    def get(self, name: str, version: int | None = None, *, owner: str = LOCAL_TENANT) -> AdapterVersion:
        """The newest version of a name, or the one asked for. Raises `AdapterNotFound`."""
        _check_existing(name)
        with self._guard:
            found = (
                self._registry.newest(owner, name) if version is None else self._registry.version(owner, name, version)
            )
        if found is None:
            raise _not_found(name if version is None else f"{name}@{version}")
        return found

    def ever_registered(self, name: str, *, owner: str = LOCAL_TENANT) -> bool:
        """Whether the name is registered or was deleted; a name that never was is False."""
        with self._guard:
            return self._registry.is_known(owner, name)

    def versions(self, name: str, *, owner: str = LOCAL_TENANT) -> Versions:
        """All versions of a name, newest first. Raises `AdapterNotFound`."""
        _check_existing(name)
        with self._guard:
            found = self._registry.versions(owner, name)
        if not found:
            raise _not_found(name)
        return found

    def resolve(self, model: str, *, tenant: str = LOCAL_TENANT) -> AdapterVersion:
        """What `tenant` means by `model`: `name` (its own, newest version), `owner/name`, or either with `@3`.

        Raises the same `AdapterNotFound` for what does not exist and for what this tenant may not use.
        """
        address, at, version = model.partition("@")
        owner, slash, name = address.rpartition("/")
        if not slash:
            owner = tenant
        names_fit = NAME_PATTERN.fullmatch(name) is not None and NAME_PATTERN.fullmatch(owner) is not None
        if not names_fit or (at and VERSION_PATTERN.fullmatch(version) is None):
            raise _not_found(model)
        with self._guard:
            found = self._registry.visible(tenant, owner, name, int(version) if at else None)
        if found is None:
            raise _not_found(model)
        return found

    def own(self, address: str, *, owner: str) -> AdapterVersion:
        """The newest version of what `owner` calls `address` (`name` or `owner/name`) if it is its own.

        Raises `AdapterNotFound`, the same for others' adapters, be they public or not there at all.
        """
        prefix, slash, name = address.rpartition("/")
        if (slash and prefix != owner) or NAME_PATTERN.fullmatch(name) is None:
            raise _not_found(address)
        with self._guard:
            found = self._registry.newest(owner, name)
        if found is None:
            raise _not_found(address)
        return found

    def by_key(self, key: str) -> AdapterVersion:
        """The newest version of the adapter with this key, whoever may use it. Raises `AdapterNotFound`."""
        owner, name = owner_and_name(key)
        return self.get(name, owner=owner)

    def visible(self, tenant: str, limit: int = 20, after: str | None = None) -> Page:
        """The newest versions of what `tenant` may use: its own by name, then others' by owner and name.

        `after` is the address that the last page ended with, a version included or not. Raises `InvalidAdapter` when
        it is none.
        """
        owner, slash, name = (after or "").partition("@")[0].rpartition("/")
        if any(part and NAME_PATTERN.fullmatch(part) is None for part in (owner, name)) or (slash and not owner):
            shown = shorten(after or "", 130)
            raise InvalidAdapter(f"`after` is {shown!r}, not a name", code="invalid_after", field="after")
        with self._guard:
            found = [] if slash else self._registry.page(tenant, name, limit + 1)
            if len(found) <= limit:
                found += self._registry.foreign_page(
                    tenant, (owner, name) if slash else ("", ""), limit + 1 - len(found)
                )
        return Page(found[:limit], len(found) > limit)

    def every(self, limit: int = 500, after: str | None = None) -> Page:
        """The newest versions of everybody's adapters, in order of owner and name; `after` is a `key`."""
        start = ("", "") if after is None else owner_and_name(after)
        with self._guard:
            found = self._registry.every_page(start, limit + 1)
        return Page(found[:limit], len(found) > limit)

    def visible_keys(self, tenant: str) -> frozenset[str]:
        """Keys of every adapter that `tenant` may use and whose content is whole; the same until `generation` grows."""
        with self._guard:
            return frozenset(key_of(owner, name) for owner, name in self._registry.visible_names(tenant))

    def usage(self, owner: str) -> StoreUsage:
        """What one tenant keeps."""
        with self._guard:
            return StoreUsage(*self._registry.usage(owner))

    # Changing.

    def update(
        self,
        name: str,
        *,
        description: str | Unset | None = UNSET,
        examples: Sequence[str] | Unset | None = UNSET,
        sharing: Sharing | None = None,
        owner: str = LOCAL_TENANT,
    ) -> AdapterVersion:
        """Changes the texts of a name (None removes one), and who may use it (None leaves that).

        Raises `AdapterNotFound`, `InvalidAdapter`.
        """
        changes: Texts = {}
        if not isinstance(description, Unset):
            changes["description"] = None if description is None else self._checked_description(description)
        if not isinstance(examples, Unset):
            changes["examples"] = None if examples is None else self._checked_examples(examples)
        if sharing is not None:
            sharing = self._checked_sharing(sharing)
        with self._guard:
            self.get(name, owner=owner)
            try:
                with self._registry.transaction():
                    self._registry.describe(owner, name, changes)
                    if sharing is not None:
                        self._registry.share(owner, name, sharing)
            finally:
                self._generation += 1
            return self.get(name, owner=owner)

    def delete(self, name: str, *, owner: str = LOCAL_TENANT) -> Strings:
        """Deletes a name with all its versions; returns the digests that nobody has any more.

        Their blobs leave the disk now, or when their last lease ends. Raises `AdapterNotFound`.
        """
        _check_existing(name)
        with self._guard:
            try:
                with self._registry.transaction():
                    gone = self._registry.delete(owner, name)
            finally:
                self._generation += 1
            if gone is None:
                raise _not_found(name)
            for digest in gone:
                self._drop_if_unreferenced(digest)
            return gone

    def _drop_if_unreferenced(self, digest: str) -> None:
        """Removes the blob of a digest that no version has, now or when its last lease ends."""
        self._leaving.discard(digest)
        if self._registry.is_referenced(digest):
            return
        if self._leases.get(digest):
            self._leaving.add(digest)
        else:
            self._blobs.remove(digest)

    # Leases.

    def acquire_lease(self, digest: str) -> None:
        """Keeps the blob on disk until `release_lease`.

        Raises `AdapterNotFound` when the digest is neither registered nor leased.
        """
        with self._guard:
            if not self._leases.get(digest) and not self._registry.is_referenced(digest):
                raise AdapterNotFound("the adapter was deleted", code="adapter_not_found", field="model")
            self._leases[digest] = self._leases.get(digest, 0) + 1

    def release_lease(self, digest: str) -> None:
        """Gives a lease back. KeyError for one that is not held."""
        with self._guard:
            self._leases[digest] -= 1
            if self._leases[digest]:
                return
            del self._leases[digest]
            if digest in self._leaving:
                self._leaving.discard(digest)
                self._blobs.remove(digest)

    @contextmanager
    def lease(self, digest: str) -> Iterator[None]:
        """`acquire_lease` and `release_lease` around a block."""
        self.acquire_lease(digest)
        try:
            yield
        finally:
            self.release_lease(digest)

    # Opening.

    def _take_lock(self) -> IO[bytes]:
        file = (self._root / "lock").open("ab")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise StoreUnavailableError(
                "another process has this adapter store open; stop it or use another store folder"
            ) from None
        return file

    def _recover(self) -> None:
        """Sweeps unfinished uploads and unreferenced blobs; marks versions whose blob is gone or of another size."""
        for entry in os.scandir(self._uploads):
            shutil.rmtree(entry.path, ignore_errors=True)
        registered = self._registry.blobs()
        found = self._blobs.sizes()
        self._blobs.remove_strangers(set(registered), found)
        unhealthy = self._registry.unhealthy()
        lost = {digest for digest, size in registered.items() if found.get(blob_name(digest)) != size}
        if lost != unhealthy:
            with self._registry.transaction():
                for digest in lost - unhealthy:
                    why = "is missing from the disk" if blob_name(digest) not in found else "has the wrong size"
                    self._registry.mark(digest, "failed", f"the adapter's blob {why}; upload it again")
                for digest in unhealthy - lost:
                    self._registry.mark(digest, "ready", None)

    # Checking texts.

    def _checked_sharing(self, sharing: Sharing) -> Sharing:
        """In order, without repetition. Says nothing of whether the tenants exist, which is not the owner's to know."""
        tenants = tuple(sorted(set(sharing.shared_with)))
        if sharing.visibility not in get_args(Visibility):
            raise InvalidAdapter(
                f"`visibility` is one of {', '.join(get_args(Visibility))}", code="invalid_visibility",
                field="visibility",
            )  # fmt: skip
        if (sharing.visibility == "shared") != bool(tenants):
            raise InvalidAdapter(
                "`shared_with` names tenants exactly when `visibility` is `shared`", code="invalid_sharing",
                field="shared_with",
            )  # fmt: skip
        if len(tenants) > self.limits.max_shares:
            raise InvalidAdapter(
                f"`shared_with` has {len(tenants)} tenants, the limit is {self.limits.max_shares}; make it public",
                code="limit_exceeded", field="shared_with",
            )  # fmt: skip
        wrong = next((tenant for tenant in tenants if NAME_PATTERN.fullmatch(tenant) is None), None)
        if wrong is not None:
            raise InvalidAdapter(
                f"`shared_with`: {shorten(wrong, 80)!r} is no tenant's name", code="invalid_sharing",
                field="shared_with",
            )  # fmt: skip
        return Sharing(sharing.visibility, tenants)

    def _check_name(self, name: str, owner: str) -> None:
        if NAME_PATTERN.fullmatch(name) is None:
            raise InvalidAdapter(
                f"{shorten(name, 80)!r} is not a name: 1 to 64 of a-z, 0-9, '.', '_', '-', the first a letter or digit",
                code="invalid_name",
                field="name",
            )
        if name in self._reserved or f"{owner}/{name}" in self._reserved:
            raise AdapterConflict(f"{name!r} is reserved; choose another name", code="name_reserved", field="name")

    def _checked_description(self, text: str) -> str:
        return _checked_text(text, self.limits.max_description_chars, "description")

    def _checked_examples(self, examples: Sequence[str]) -> Strings:
        if isinstance(examples, str) or not isinstance(examples, Sequence):
            raise InvalidAdapter("`examples` must be a list of strings", code="invalid_examples", field="examples")
        if len(examples) > self.limits.max_examples:
            raise InvalidAdapter(
                f"`examples` has {len(examples)} entries, the limit is {self.limits.max_examples}",
                code="limit_exceeded",
                field="examples",
            )
        return [_checked_text(text, self.limits.max_example_chars, "examples") for text in examples]


def _checked_text(text: object, max_chars: int, field: str) -> str:
    if not isinstance(text, str):
        raise InvalidAdapter(f"`{field}` must be made of strings", code=f"invalid_{field}", field=field)
    if len(text) > max_chars:
        raise InvalidAdapter(f"`{field}` is longer than {max_chars} characters", code="limit_exceeded", field=field)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidAdapter(f"`{field}` is not valid Unicode text", code=f"invalid_{field}", field=field) from error
    return text


def _not_found(model: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no adapter {shorten(model, 100)!r}", code="adapter_not_found", field="model")


def _check_existing(name: str) -> None:
    """What cannot be a name never reaches the database."""
    if NAME_PATTERN.fullmatch(name) is None:
        raise _not_found(name)
