"""Files on disk: durable writes, uploads in progress, blobs by digest. No database here."""

import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from loramux.adapters_store.digests import blob_name, blob_path, digest_from_hex
from loramux.adapters_store.errors import InvalidAdapter, StoreFull, UploadTooLarge, shorten
from loramux.adapters_store.limits import StoreLimits

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CHECK_EVERY = 16 << 20


@contextmanager
def storage_errors() -> Iterator[None]:
    """A full disk becomes `StoreFull`; every other error of the system passes."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise disk_full() from error
        raise


def disk_full() -> StoreFull:
    """The refusal when the disk has no room."""
    return StoreFull("the adapter store's disk is full; delete adapters or make room", code="store_full", field="files")


def check_free_space(root: Path, needed: int, limits: StoreLimits) -> None:
    """Raises `StoreFull` unless `needed` bytes fit and the reserve stays free."""
    if shutil.disk_usage(root).free < needed + limits.min_free_bytes:
        raise disk_full()


def sync_folder(folder: Path) -> None:
    """Makes the folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class FileSink:
    """Receives one uploaded file in pieces, never more of it in memory than the piece at hand."""

    def __init__(self, path: Path, filename: str, max_bytes: int, limits: StoreLimits) -> None:
        self._filename = filename
        self._max_bytes = max_bytes
        self._limits = limits
        self._folder = path.parent
        self._written = 0
        self._checked = 0
        with storage_errors():
            self._file: IO[bytes] = path.open("xb")

    def write(self, data: bytes) -> None:
        """Appends. Raises `UploadTooLarge` and `StoreFull`; after either the upload can only be dropped."""
        self._written += len(data)
        if self._written > self._max_bytes:
            raise UploadTooLarge(
                f"{self._filename} is larger than the limit of {self._max_bytes} bytes",
                code="upload_too_large",
                field="files",
            )
        with storage_errors():
            if self._written - self._checked >= _CHECK_EVERY:
                self._checked = self._written
                check_free_space(self._folder, 0, self._limits)
            self._file.write(data)

    def close(self) -> None:
        """Ends the file; closing twice is allowed. Raises `StoreFull`."""
        with storage_errors():
            self._file.close()


class Upload:
    """The files of one upload in a folder of its own, which is gone when the `with` block ends."""

    def __init__(self, uploads_dir: Path, limits: StoreLimits) -> None:
        self._limits = limits
        self._sinks: dict[str, FileSink] = {}
        self._folder = uploads_dir / secrets.token_hex(16)
        with storage_errors():
            check_free_space(uploads_dir, 0, limits)
            self._folder.mkdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sink in self._sinks.values():
            with suppress(StoreFull, OSError):
                sink.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open_file(self, filename: str) -> FileSink:
        """Where the bytes of a part go; the part's file name says what it is and never becomes a path.

        Raises `InvalidAdapter` for other names than `adapter_config.json` and `adapter_model.safetensors`, and for
        a name that comes twice.
        """
        shown = shorten(filename, 80)
        if filename.lower().endswith(_PICKLES):
            raise InvalidAdapter(
                f"{shown!r} is a pickle file, which is never opened; convert it to {WEIGHTS_FILE}",
                code="pickle_refused",
                field="files",
            )
        sizes = {CONFIG_FILE: self._limits.max_config_bytes, WEIGHTS_FILE: self._limits.max_upload_bytes}
        if filename not in sizes:
            raise InvalidAdapter(
                f"{shown!r} is not one of the files of an adapter: {CONFIG_FILE} and {WEIGHTS_FILE}",
                code="invalid_file_name",
                field="files",
            )
        if filename in self._sinks:
            raise InvalidAdapter(f"{filename} came twice", code="duplicate_file", field="files")
        self._sinks[filename] = sink = FileSink(self._folder / filename, filename, sizes[filename], self._limits)
        return sink

    def finish(self) -> tuple[Path, Path]:
        """Closes both files and returns their paths. Raises `InvalidAdapter` when one has not come."""
        for filename in (CONFIG_FILE, WEIGHTS_FILE):
            if filename not in self._sinks:
                raise InvalidAdapter(f"the upload has no {filename}", code="missing_file", field="files")
            self._sinks[filename].close()
        return self._folder / CONFIG_FILE, self._folder / WEIGHTS_FILE

    def stage(self, write: Callable[[IO[bytes]], tuple[str, int]]) -> "StagedBlob":
        """Writes a file beside the upload's and makes its bytes durable; `write` returns its digest in hex and size."""
        path = self._folder / "canonical"
        with storage_errors(), path.open("wb") as file:
            hexdigest, size = write(file)
            file.flush()
            os.fsync(file.fileno())
        return StagedBlob(path, digest_from_hex(hexdigest), size)


class StagedBlob:
    """A finished canonical file that is not in the store yet."""

    def __init__(self, path: Path, digest: str, size: int) -> None:
        self.path = path
        self.digest = digest
        self.size = size


class BlobFolder:
    """`blobs/sha256-<hex>`: immutable files under the digest of their content."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, blob: StagedBlob) -> None:
        """Moves the file under its digest, atomically and durably; a file already there has the same content."""
        with storage_errors():
            blob.path.replace(blob_path(self.folder, blob.digest))
            sync_folder(self.folder)

    def remove(self, digest: str) -> None:
        """Deletes the blob; memory that has been read from it stays valid. Absent blobs are ignored."""
        blob_path(self.folder, digest).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        """Size in bytes of every file in the folder by file name, from one scan."""
        with os.scandir(self.folder) as entries:
            return {entry.name: entry.stat(follow_symlinks=False).st_size for entry in entries if entry.is_file()}

    def remove_strangers(self, digests: set[str], found: dict[str, int]) -> None:
        """Deletes every file of `found` that is not the blob of one of `digests`."""
        known = {blob_name(digest) for digest in digests}
        for name in found.keys() - known:
            (self.folder / name).unlink(missing_ok=True)
