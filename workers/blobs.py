"""Named blobs in a directory or in an object store: what leases, ledger segments, checkpoints and logs are kept in.

A key is a relative path with slashes. A write is whole or not there; `create` succeeds for one caller only, whoever else
tries at the same time. Artifacts, which are directories, are the store's.

Of fsspec's file systems only those are taken whose `pipe_file(mode="create")` is one conditional request: `If-None-Match: *`
(s3fs, tested), `ifGenerationMatch=0` (gcsfs) and `overwrite=False` (adlfs). Elsewhere it is a look followed by a write,
which two callers can both pass. Credentials and endpoints come from the environment or fsspec's own configuration.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

CONDITIONAL = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "abfss": "adlfs", "az": "adlfs"}
"""Scheme of a URL -> the package that serves it. Each creates conditionally."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class StoreError(OSError):
    """The place of a store cannot be used: full, read-only, unreachable, of another format. `errno` as the system gave it."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(number, message)

    def __str__(self) -> str:
        return str(self.strerror)


@contextlib.contextmanager
def explained(place: str | Path, doing: str, kind: type[Exception] = OSError) -> Iterator[None]:
    """Turns what an operation on a place may meet into a StoreError that says where, what and what to do.

    FileNotFoundError and FileExistsError pass: they are answers, not troubles.
    """
    try:
        yield
    except (StoreError, FileNotFoundError, FileExistsError):
        raise
    except kind as e:
        number = getattr(e, "errno", None) or 0
        if number in FULL:
            advice = "it is full. Make room (`pare gc --dry-run` shows what may go) or choose another place with store.url="
        elif number in REFUSED or isinstance(e, PermissionError):  # s3fs raises it without a number
            advice = f"this user may not write or read there ({e}). Give access to it or choose another place with store.url="
        elif number == errno.ENOTDIR:
            advice = f"a part of the path is a file, not a directory ({e}). Choose another place with store.url="
        else:
            advice = f"{type(e).__name__}: {e}. Check that the place is reachable and the credentials of its provider are set"
        raise StoreError(number, f"store {place}, {doing}: {advice}") from e


class Blobs(Protocol):
    """Access to the blobs beneath one place."""

    def read(self, key: str) -> bytes:
        """Raises FileNotFoundError where there is none."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Puts the blob there, in place of what was."""
        ...

    def create(self, key: str, data: bytes) -> bool:
        """Puts the blob there unless one is; whether it was put."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Keys of all blobs beneath the folder `prefix`, sorted."""
        ...

    def details(self, prefix: str) -> Sequence[tuple[str, int, float]]:
        """(key, bytes, seconds since it was written) of all blobs beneath the folder `prefix`."""
        ...

    def delete(self, key: str) -> None:
        """Takes the blob away, if there is one."""
        ...


def open_blobs(location: str | Path) -> Blobs:
    """The blobs beneath a directory or a URL.

    Raises:
        StoreError: the URL names a file system without conditional creation, or carries credentials.
    """
    directory = local_path(location)
    return FsspecBlobs(str(location)) if directory is None else LocalBlobs(directory)


def local_path(location: str | Path) -> Path | None:
    """The directory that a location means; None for a URL of an object store.

    >>> str(local_path("file:///data/store")), local_path("s3://bucket/store")
    ('/data/store', None)
    """
    if isinstance(location, Path) or "://" not in location:
        return Path(location)
    return Path(location.removeprefix("file://")) if location.startswith("file://") else None


class LocalBlobs:
    """Blobs as files of a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def read(self, key: str) -> bytes:
        with explained(self.root, f"reading {key}"):
            return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        with explained(self.root, f"writing {key}"), self._partial(key, data) as partial:
            os.replace(partial, self.root / key)

    def create(self, key: str, data: bytes) -> bool:
        with explained(self.root, f"creating {key}"), self._partial(key, data) as partial:
            try:
                os.link(partial, self.root / key)
            except FileExistsError:
                return False
            return True

    def list(self, prefix: str) -> list[str]:
        folder = self.root / prefix
        files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".partial"))
        return sorted(p.relative_to(self.root).as_posix() for p in files)

    def details(self, prefix: str) -> Sequence[tuple[str, int, float]]:
        now, found = time.time(), []
        for key in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                status = os.stat(self.root / key)
                found.append((key, status.st_size, now - status.st_mtime))
        return found

    def delete(self, key: str) -> None:
        with explained(self.root, f"deleting {key}"), contextlib.suppress(FileNotFoundError):
            os.unlink(self.root / key)

    @contextlib.contextmanager
    def _partial(self, key: str, data: bytes) -> Iterator[Path]:
        """The content in a file of its own beside its place, on the disk; taken away at the end, whatever happened."""
        target = self.root / key
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}.partial")
        try:
            try:
                write_synced(partial, data)
            except FileNotFoundError:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_synced(partial, data)
            yield partial
        finally:
            with contextlib.suppress(OSError):
                os.unlink(partial)


class FsspecBlobs:
    """Blobs as objects of an object store."""

    def __init__(self, url: str) -> None:
        scheme = url.split("://")[0]
        if scheme not in CONDITIONAL:
            raise StoreError(
                errno.EINVAL,
                f"store.url={url}: {scheme}:// cannot create a file for exactly one of several writers, which a store needs. "
                f"Allowed: a directory, file://, {', '.join(s + '://' for s in CONDITIONAL)}",
            )
        if re.match(r"[^/]*://[^/@]*:[^/@]*@", url):
            raise StoreError(
                errno.EINVAL,
                f"store.url={scheme}://...@...: credentials do not belong in a URL, it is written into ledgers and logs. "
                "Set them in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL)",
            )
        self.url = url.rstrip("/")
        with self._explained("opening"):
            self._prefix = self._fs._strip_protocol(self.url)

    @property
    def _fs(self) -> Any:
        """The file system; fsspec keeps one per process, so that a fork gets its own."""
        import fsspec

        scheme = self.url.split("://")[0]
        try:
            return fsspec.filesystem(scheme, use_listings_cache=False)
        except ImportError as e:
            package = CONDITIONAL[scheme]
            raise StoreError(errno.ENOSYS, f"store.url={self.url} needs the package {package}: pip install {package}") from e

    def _explained(self, doing: str) -> contextlib.AbstractContextManager[None]:
        return explained(self.url, doing, Exception)

    def read(self, key: str) -> bytes:
        with self._explained(f"reading {key}"):
            return bytes(self._fs.cat_file(self._path(key)))

    def write(self, key: str, data: bytes) -> None:
        with self._explained(f"writing {key}"), self._place_exists():
            self._fs.pipe_file(self._path(key), data)

    def create(self, key: str, data: bytes) -> bool:
        with self._explained(f"creating {key}"), self._place_exists():
            for pause in (0.1, 0.3, 1.0, 0.0):
                try:
                    self._fs.pipe_file(self._path(key), data, mode="create")
                    return True
                except FileExistsError:
                    return False
                except Exception as e:
                    said = getattr(e.__cause__, "response", {}).get("Error", {}).get("Code") or getattr(e, "code", None)
                    if said in ("PreconditionFailed", 412):
                        return False
                    # The answer of S3 to two conditional writes at once, of which neither need have succeeded.
                    if said not in ("ConditionalRequestConflict", 409) or not pause:
                        raise
                    time.sleep(pause)
        raise AssertionError("the last round returns or raises")

    def list(self, prefix: str) -> list[str]:
        return sorted(key for key, _, _ in self.details(prefix))

    def delete(self, key: str) -> None:
        with self._explained(f"deleting {key}"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(key))

    def exists(self, key: str) -> bool:
        with self._explained(f"looking for {key}"):
            return bool(self._fs.exists(self._path(key)))

    def details(self, prefix: str) -> Sequence[tuple[str, int, float]]:
        now = datetime.datetime.now(datetime.UTC)
        with self._explained(f"listing {prefix}"):
            try:
                found = self._fs.find(self._path(prefix), detail=True)
            except FileNotFoundError:
                return []
        return [
            (name.removeprefix(self._prefix + "/"), info["size"], (now - written(info, now)).total_seconds())
            for name, info in found.items()
        ]

    def upload(self, files: Sequence[tuple[Path, str]]) -> None:
        """Local files -> keys, several at a time."""
        with self._explained(f"uploading {len(files)} files"), self._place_exists():
            self._fs.put([str(file) for file, _ in files], [self._path(key) for _, key in files])

    def download(self, files: Sequence[tuple[str, Path]]) -> None:
        """Keys -> local files, several at a time. Raises FileNotFoundError where one is not there."""
        with self._explained(f"downloading {len(files)} files"):
            self._fs.get([self._path(key) for key, _ in files], [str(file) for _, file in files])

    @contextlib.contextmanager
    def _place_exists(self) -> Iterator[None]:
        """Writing meets FileNotFoundError only where the bucket itself is missing."""
        try:
            yield
        except FileNotFoundError as e:
            raise StoreError(errno.ENOENT, f"store {self.url}: there is no such bucket ({e}). Create it first") from e

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def written(info: dict[str, Any], unknown: datetime.datetime) -> datetime.datetime:
    """When an object was written, by its store's clock (s3fs, gcsfs and adlfs name it differently)."""
    for key in ("LastModified", "mtime", "updated", "last_modified"):
        if isinstance(info.get(key), datetime.datetime):
            return info[key]
        if isinstance(info.get(key), str):
            return datetime.datetime.fromisoformat(info[key])
    return unknown


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and waits until it is on the disk."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    finally:
        os.close(handle)


def log_key(fingerprint: str) -> str:
    """Where the log of a task is: a file of the driver's PARE_HOME, and the blob in which others find it."""
    return f"logs/{fingerprint[:12]}.log"
