"""Files as the store needs them: on the disk for certain, known by their digests, private until they are published."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from blake3 import blake3

from pare.workers.blobs import StoreError, explained

PAUSES_S = (0.05, 0.15, 0.4)
"""Waits before something that must be there is called missing: NFS shows a rename to other hosts late."""
CHUNK = 1 << 18

T = TypeVar("T")


def inventory(
    directory: Path, seen: Callable[[str, os.stat_result], None] = lambda name, status: None, sync: bool = True
) -> tuple[list[dict[str, Any]], list[Path]]:
    """(`path`, `bytes` and `digest` of every file beneath a directory, by path; all folders, outermost first).

    With `sync`, the files are on the disk afterwards, and readable to whom the directory is (safetensors writes them for
    their owner alone).

    Raises:
        ValueError: a symbolic link or a device, whose content is not the artifact's own.
    """
    files, folders = [], [directory]
    mode = os.stat(directory).st_mode & 0o666
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                elif entry.is_file(follow_symlinks=False):
                    name = os.path.relpath(entry.path, directory).replace(os.sep, "/")
                    handle = os.open(entry.path, os.O_RDONLY)
                    try:
                        if sync:
                            os.fsync(handle)
                        status = os.fstat(handle)
                        if sync and mode & ~status.st_mode and status.st_uid == os.geteuid():
                            os.fchmod(handle, mode)
                        files.append({"path": name, "bytes": status.st_size, "digest": digest_handle(handle)})
                        seen(name, status)
                    finally:
                        os.close(handle)
                else:
                    raise ValueError(f"{entry.path} is no plain file; an artifact holds its own content")
    return sorted(files, key=lambda e: e["path"]), folders


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What changes when a file's content does, short of reading it."""
    return status.st_size, status.st_mtime_ns, status.st_ino


def digest_file(path: Path) -> str:
    """BLAKE3 of a file's content, hexadecimal."""
    handle = os.open(path, os.O_RDONLY)
    try:
        return digest_handle(handle)
    finally:
        os.close(handle)


def digest_handle(handle: int) -> str:
    """Reads in pieces: a mapped file that shrinks meanwhile would kill the process."""
    hasher = blake3(max_threads=1)
    while piece := os.read(handle, CHUNK):
        hasher.update(piece)
    return hasher.hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names_in(folder: Path) -> list[str]:
    """Names in a folder, sorted; none where there is no folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def bytes_beneath(path: Path) -> int:
    return sum(p.lstat().st_size for p in (path.rglob("*") if path.is_dir() else [path]) if not p.is_dir())


def private_directory(path: Path) -> None:
    """Makes a directory that only this user may enter. In a shared /tmp somebody else may have been there first."""
    with explained(path, "making the cache"):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise StoreError(errno.EPERM, f"cache {path}: it is another user's. Choose a directory of your own")


def patiently(read: Callable[[], T]) -> T:
    """Does again, a few times, what meets a missing file."""
    for pause in PAUSES_S:
        try:
            return read()
        except FileNotFoundError:
            time.sleep(pause)
    return read()


@functools.cache
def host_tag() -> str:
    """Tells apart the places where a process id means something: host, boot and process namespace."""
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        with contextlib.suppress(OSError):
            parts.append(read())
    return blake3("\n".join(parts).encode()).hexdigest()[:12]


def owner_is_gone(attempt: str) -> bool:
    """Whether the process that an attempt's directory is named after has run here and is no more."""
    name, _, host = attempt.partition("@")
    pid = name.split("-")[0]
    if not pid.isdigit() or host not in ("", host_tag()):
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass
    return False
