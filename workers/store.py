"""The content-addressed store: immutable artifacts, published whole or not at all, verified on read.

    ROOT/objects/ab/abcdef.../       one artifact: its files and manifest.json
    ROOT/attempts/<pid>-<random>/    private directory of a running attempt, on the same file system
    ROOT/quarantine/                 artifacts whose digests did not hold

Publishing is: fsync every file -> write the manifest with a digest per file -> fsync -> rename the directory -> fsync
the parent. A crash at any point leaves either nothing or the whole artifact. Execution is at-least-once, publication
exactly-once: the second of two equal attempts finds the place taken and drops its copy.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blake3 import blake3

FORMAT = 1
MANIFEST = "manifest.json"


class ArtifactError(Exception):
    """An artifact is missing or damaged. `fingerprint` names it."""

    def __init__(self, message: str, fingerprint: str) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


class Store:
    """A store on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self._verified: dict[Path, tuple[int, int]] = {}

    def path(self, fingerprint: str) -> Path:
        return self.root / "objects" / fingerprint[:2] / fingerprint

    def has(self, fingerprint: str) -> bool:
        return (self.path(fingerprint) / MANIFEST).exists()

    def manifest(self, fingerprint: str) -> dict[str, Any]:
        """The manifest: `files`, `digest`, `type`, `result` (what the task returned) and `cost`."""
        try:
            manifest = json.loads((self.path(fingerprint) / MANIFEST).read_text())
        except FileNotFoundError:
            raise ArtifactError(f"artifact {fingerprint[:12]} is not in the store {self.root}", fingerprint) from None
        except ValueError as e:
            raise ArtifactError(f"artifact {fingerprint[:12]}: its manifest is damaged ({e})", fingerprint) from e
        if manifest["format"] != FORMAT:
            raise ArtifactError(
                f"artifact {fingerprint[:12]} has format {manifest['format']}, this Pare reads {FORMAT}", fingerprint
            )
        return manifest

    def open(self, fingerprint: str) -> Path:
        """Directory of an artifact, after every file's digest was checked (once in this process while unchanged).

        Raises:
            ArtifactError: missing, or a file differs from its digest; then the artifact has been quarantined.
        """
        directory = self.path(fingerprint)
        for entry in self.manifest(fingerprint)["files"]:
            file = directory / entry["path"]
            try:
                stat = file.stat()
                stamp = (stat.st_size, stat.st_mtime_ns)
                if self._verified.get(file) == stamp:
                    continue
                intact = stat.st_size == entry["bytes"] and digest_file(file) == entry["digest"]
            except FileNotFoundError:
                intact = False
            if not intact:
                kept = self.quarantine(fingerprint)
                raise ArtifactError(
                    f"artifact {fingerprint[:12]}: {entry['path']} differs from its digest; moved to {kept}", fingerprint
                )
            self._verified[file] = stamp
        return directory

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Path]:
        """A private, empty directory; removed at the end unless it was published."""
        directory = self.root / "attempts" / f"{os.getpid()}-{uuid.uuid4().hex}"
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def publish(
        self, directory: Path, fingerprint: str, kind: str, result: Any, cost: dict[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """Makes `directory` the artifact `fingerprint`. Returns (manifest in force, whether it is this attempt's)."""
        files = []
        for file in sorted(p for p in directory.rglob("*") if p.is_file()):
            fsync(file)
            files.append(
                {"path": file.relative_to(directory).as_posix(), "bytes": file.stat().st_size, "digest": digest_file(file)}
            )
        content = json.dumps({"files": files, "result": result}, sort_keys=True)
        manifest = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "type": kind,
            "digest": blake3(content.encode()).hexdigest(),
            "files": files,
            "result": result,
            "cost": cost,
        }
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
        fsync(directory / MANIFEST)
        for folder in [directory, *(p for p in directory.rglob("*") if p.is_dir())]:
            fsync(folder)
        target = self.path(fingerprint)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(directory, target)
        except OSError:
            if not self.has(fingerprint):
                raise
            return self.manifest(fingerprint), False
        fsync(target.parent)
        return manifest, True

    def quarantine(self, fingerprint: str) -> Path:
        """Takes an artifact out of sight of readers, kept for inspection."""
        target = self.root / "quarantine" / f"{fingerprint}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another reader was faster
            os.rename(self.path(fingerprint), target)
        return target

    def remove_dead_attempts(self) -> int:
        """Removes directories of attempts whose process is gone. Returns how many."""
        removed = 0
        for directory in (self.root / "attempts").glob("*-*"):
            if not Path(f"/proc/{directory.name.split('-')[0]}").exists():
                shutil.rmtree(directory, ignore_errors=True)
                removed += 1
        return removed


def digest_file(path: Path) -> str:
    """BLAKE3 of a file's content, hexadecimal."""
    return blake3(max_threads=1).update_mmap(path).hexdigest() if path.stat().st_size else blake3(b"").hexdigest()


def fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
