"""The content-addressed store: immutable artifacts, published whole or not at all, verified on read.

On a local or shared file system (`Store`):

    ROOT/format                      which layout this is
    ROOT/objects/ab/abcdef.../       one artifact: its files and manifest.json
    ROOT/attempts/<pid>-<random>@<host>/   private directory of a running attempt, on the same file system
    ROOT/quarantine/                 artifacts whose digests did not hold
    ROOT/nondeterminism/<fingerprint>/<n>.json   a later attempt that came to something else

Publishing is: fsync every file -> write the manifest with a digest per file -> fsync -> rename the directory -> fsync
the parent. A crash at any point leaves either nothing or the whole artifact. Execution is at-least-once, publication
exactly-once: the second of two attempts finds the place taken and drops its copy.

In an object store (`remote_store`) there is no rename. Files are put under a prefix of the attempt's own, and
`manifests/ab/abcdef....json`, which names that prefix, is created by a conditional write: that is the publication.
Readers fetch into a cache on their own disk, which has the local layout.

Beside artifacts the place holds named blobs (`store.blobs`): leases, segments of ledgers, checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from pare.workers.blobs import Blobs, LocalBlobs, StoreError, explained, local_path, write_synced
from pare.workers.files import (
    bytes_beneath,
    digest_file,
    fsync,
    host_tag,
    inventory,
    names_in,
    owner_is_gone,
    patiently,
    stamp_of,
)
from pare.workers.manifest import (
    FORMAT,
    MANIFEST,
    ArtifactError,
    Manifest,
    differences,
    is_light,
    make_manifest,
    parse_manifest,
    sealed,
    text_of,
)

__all__ = ["MANIFEST", "ArtifactError", "Store", "StoreError", "open_store"]


class Leftover(NamedTuple):
    """Something in the store that belongs to no artifact."""

    name: str
    bytes: int
    age_s: float
    kind: str
    """`dead` (its process is gone), `unknown` (it may still be written) or `quarantine`."""


class Stored(NamedTuple):
    """A file of an artifact, as it takes room."""

    key: Any
    """The same for files that share their content by a hard link."""
    bytes: int
    light: bool
    """Whether it outlives `drop_files`."""


def open_store(location: str | Path, cache: Path | None = None) -> Store:
    """The store in a directory or at a URL. For a URL, artifacts are fetched into `cache` (a directory of this user's).

    Nothing is written until the first attempt, so looking at a place leaves no trace.

    Raises:
        StoreError: it is of another format, is no directory, or cannot be reached.
    """
    directory = local_path(location)
    if directory is not None:
        store = Store(directory)
    else:
        from pare.workers.remote_store import RemoteStore

        store = RemoteStore(str(location), cache)
    store.check_format()
    return store


class Store:
    """A store on a local or shared file system."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.location = str(self.root.absolute())
        self.blobs: Blobs = LocalBlobs(self.root)
        self._verified: dict[tuple[str, str], tuple[int, int, int]] = {}
        self._prepared = False

    def check_format(self) -> bool:
        """Whether this store exists.

        Raises:
            StoreError: it has a format that this version of Pare does not read, or the place is no directory.
        """
        try:
            text = self.blobs.read("format")
        except FileNotFoundError:
            if not self._holds_unmarked_artifacts():
                return False
            text = b'{"format": 1}'
        try:
            found = json.loads(text)["format"]
        except (ValueError, KeyError, TypeError) as e:
            message = f"store {self.location}: its file `format` is damaged ({e}). If the place is right, write "
            raise StoreError(errno.EINVAL, message + json.dumps({"format": FORMAT}) + " into it") from e
        if found != FORMAT:
            advice = "Use the Pare that wrote it" if found > FORMAT else "Move it away (what it holds can be made anew)"
            raise StoreError(
                errno.EPROTONOSUPPORT,
                f"store {self.location} has format {found}, this Pare reads format {FORMAT}. {advice}, or choose another "
                "place with store.url=",
            )
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    def path(self, fingerprint: str) -> Path:
        """Where an artifact's files lie on this machine, if they do."""
        return self.root / "objects" / fingerprint[:2] / fingerprint

    def has(self, fingerprint: str) -> bool:
        """Whether the task is done; its files may have been dropped since."""
        return os.path.exists(f"{self.path(fingerprint)}/{MANIFEST}")

    def held(self, fingerprint: str) -> bool:
        """Whether the artifact is there with its files."""
        try:
            return self.has(fingerprint) and not self.manifest(fingerprint).get("dropped")
        except ArtifactError:
            return False

    def present(self, fingerprints: Iterable[str]) -> set[str]:
        """Which of many artifacts are there, by listing folders where that is fewer calls than asking for each."""
        folders: dict[str, set[str]] = {}
        for fingerprint in fingerprints:
            folders.setdefault(fingerprint[:2], set()).add(fingerprint)
        found: set[str] = set()
        for prefix, wanted in folders.items():
            if len(wanted) < 4:
                found.update(filter(self.has, wanted))
            else:
                found |= wanted.intersection(names_in(self.root / "objects" / prefix))
        return found

    def artifacts(self) -> Iterator[str]:
        """Fingerprints of all artifacts."""
        for prefix in names_in(self.root / "objects"):
            yield from names_in(self.root / "objects" / prefix)

    def manifest(self, fingerprint: str) -> Manifest:
        """The manifest: `files`, `digest`, `type`, `result` (what the task returned), `cost`, and `dropped` where its files
        went.

        Raises:
            ArtifactError: missing, or damaged; then the artifact has been quarantined.
        """
        try:
            text = self._manifest_text(fingerprint)
        except FileNotFoundError:
            if self.path(fingerprint).is_dir() and self._manifest_belongs_inside:
                raise self._condemn(fingerprint, "its manifest is missing") from None
            raise ArtifactError(f"artifact {fingerprint[:12]} is not in the store {self.location}", fingerprint) from None
        try:
            return parse_manifest(text, fingerprint)
        except ValueError as e:
            raise self._condemn(fingerprint, f"its manifest is damaged ({e})") from e

    def open(self, fingerprint: str) -> Path:
        """Directory of an artifact, after every file's digest was checked (once in this process while unchanged).

        Raises:
            ArtifactError: missing, dropped, or a file differs from its digest; then the artifact has been quarantined.
        """
        manifest = self._held_manifest(fingerprint)
        directory = self.path(fingerprint)
        try:
            damaged = patiently(lambda: self._damaged(fingerprint, directory, manifest))
        except FileNotFoundError as e:
            self._held_manifest(fingerprint)  # dropped in the meantime: that is no damage
            damaged = Path(e.filename).relative_to(directory).as_posix()
        if damaged:
            raise self._condemn(fingerprint, f"{damaged} differs from its digest")
        return directory

    def read_file(self, fingerprint: str, name: str) -> bytes | None:
        """One small file of an artifact, verified; None where there is no such artifact or file, or it was dropped."""
        if not self.has(fingerprint):
            return None
        manifest = self.manifest(fingerprint)
        entry = next((e for e in manifest["files"] if e["path"] == name), None)
        if entry is None:
            return None
        try:
            data = self._file_bytes(manifest, name)
        except FileNotFoundError:
            if is_light(entry) or self.held(fingerprint):
                raise self._condemn(fingerprint, f"{name} is missing") from None
            return None
        if blake3(data).hexdigest() != entry["digest"]:
            raise self._condemn(fingerprint, f"{name} differs from its digest")
        return data

    # -- writing -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Path]:
        """A private, empty directory; removed at the end unless it was published."""
        if not self._prepared:
            self._prepare()
        directory = self._private()
        try:
            yield directory
        finally:
            if os.path.exists(directory):
                shutil.rmtree(directory, ignore_errors=True)

    def publish(self, directory: Path, fingerprint: str, kind: str, result: Any, cost: dict[str, Any]) -> tuple[Manifest, bool]:
        """Makes `directory` the artifact `fingerprint`. Returns (manifest in force, whether it is this attempt's).

        Where another attempt was first and came to something else, the returned manifest has a key `nondeterminism` that
        says how they differ, and the store keeps a note of it.
        """
        with explained(self.location, f"publishing artifact {fingerprint[:12]}"):
            files, folders = inventory(directory, self._stamp_as(fingerprint), sync=True)
            manifest = make_manifest(fingerprint, kind, files, result, cost)
            write_synced(directory / MANIFEST, text_of(manifest))
            for folder in reversed(folders):
                fsync(folder)
            in_force = self._place(directory, fingerprint)
            if in_force is None:
                return manifest, True
            if in_force.get("dropped"):  # made anew, because something new needs the files
                self._set_aside(fingerprint)
                if (newer := self._place(directory, fingerprint)) is None:
                    return {**manifest, **self._difference(in_force, manifest)}, True
                in_force = newer
            return {**in_force, **self._difference(in_force, manifest)}, False

    def drop_files(self, fingerprint: str) -> None:
        """Retention: the files go, the manifest stays and counts as done. Small JSON files stay for reports.

        The manifest says so first, so that a crash in between leaves files that nothing reads, never a torn artifact.
        """
        manifest = self.manifest(fingerprint)
        with explained(self.location, f"dropping files of artifact {fingerprint[:12]}"):
            if not manifest.get("dropped"):
                self._replace_manifest(fingerprint, sealed({**manifest, "dropped": True}))
            self._delete_files(fingerprint, [e["path"] for e in manifest["files"] if not is_light(e)], manifest)

    def remove(self, fingerprint: str) -> None:
        """Takes an artifact away, manifest and all."""
        with explained(self.location, f"removing artifact {fingerprint[:12]}"):
            self._set_aside(fingerprint)

    def quarantine(self, fingerprint: str) -> Path:
        """Takes an artifact out of sight of readers, kept for inspection."""
        target = self.root / "quarantine" / f"{fingerprint}-{uuid.uuid4().hex[:8]}"
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # another reader was faster
            os.rename(self.path(fingerprint), target)
        return target

    # -- housekeeping --------------------------------------------------------------------------------------------

    def remove_dead_attempts(self) -> int:
        """Removes directories of attempts whose process on this host is gone. Returns how many."""
        dead = [d for d in self._attempts() if owner_is_gone(d.name)]
        for directory in dead:
            shutil.rmtree(directory, ignore_errors=True)
        return len(dead)

    def leftovers(self) -> list[Leftover]:
        """What belongs to no artifact: abandoned attempts, half-written blobs, the quarantine."""
        found = [(d, "dead" if owner_is_gone(d.name) else "unknown") for d in self._attempts()]
        found += [(self.root / "quarantine" / name, "quarantine") for name in names_in(self.root / "quarantine")]
        for name in set(names_in(self.root)) - {"objects", "attempts", "quarantine"}:
            found += [(partial, "unknown") for partial in (self.root / name).rglob("*.partial")]
        now = time.time()
        return [
            Leftover(str(p.relative_to(self.root)), bytes_beneath(p), now - p.stat().st_mtime, kind)
            for p, kind in found
            if p.exists()
        ]

    def discard(self, leftover: Leftover) -> None:
        """Takes a leftover away."""
        with explained(self.location, f"removing {leftover.name}"):
            place = self.root / leftover.name
            shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)

    def stored(self, manifest: Manifest) -> list[Stored]:
        """The files of an artifact that are there."""
        found = []
        for entry in manifest["files"]:
            with contextlib.suppress(FileNotFoundError):
                status = os.stat(self.path(manifest["fingerprint"]) / entry["path"])
                found.append(Stored((status.st_dev, status.st_ino), status.st_size, is_light(entry)))
        return found

    def problems(self, fingerprint: str) -> list[str]:
        """What is wrong with an artifact, every byte read anew; nothing is moved."""
        directory = self.path(fingerprint)
        try:
            manifest = parse_manifest(self._manifest_text(fingerprint), fingerprint)
            files, _ = inventory(directory, sync=False)
        except FileNotFoundError as e:
            return [f"{Path(e.filename).name} is missing"]
        except (ValueError, NotADirectoryError) as e:
            return [f"its manifest is damaged ({e})"]
        return differences(manifest, {f["path"]: f for f in files if f["path"] != MANIFEST})

    # -- what differs in an object store ---------------------------------------------------------------------------

    _manifest_belongs_inside = True

    def _manifest_text(self, fingerprint: str) -> bytes:
        return patiently(lambda: (self.path(fingerprint) / MANIFEST).read_bytes())

    def _file_bytes(self, manifest: Manifest, name: str) -> bytes:
        return (self.path(manifest["fingerprint"]) / name).read_bytes()

    def _holds_unmarked_artifacts(self) -> bool:
        return any(names_in(self.root / "objects"))

    def _prepare(self) -> None:
        """Marks a new place as a store, once per process."""
        if not self.check_format():
            self.blobs.create("format", json.dumps({"format": FORMAT}).encode())
            self.check_format()
        self._prepared = True

    def _place(self, directory: Path, fingerprint: str) -> Manifest | None:
        """Moves a finished directory to where artifacts are; the manifest that is in force where the place is taken."""
        target = self.path(fingerprint)
        for _ in range(4):  # a new folder, and damaged ones in the way
            try:
                os.rename(directory, target)
            except FileNotFoundError:
                with contextlib.suppress(FileExistsError):  # the first artifact of its folder
                    target.parent.mkdir(parents=True)
                fsync(target.parent.parent)
                if not directory.exists():
                    raise
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                with contextlib.suppress(ArtifactError):  # a damaged one has made room by this
                    return self.manifest(fingerprint)
            else:
                fsync(target.parent)
                return None
        return self.manifest(fingerprint)

    def _set_aside(self, fingerprint: str) -> None:
        """Takes an artifact's directory away in one step, then removes what was in it."""
        aside = self._private()
        with contextlib.suppress(FileNotFoundError):
            os.rename(self.path(fingerprint), aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _replace_manifest(self, fingerprint: str, manifest: Manifest) -> None:
        private = self._private()
        write_synced(private / MANIFEST, text_of(manifest))
        os.replace(private / MANIFEST, self.path(fingerprint) / MANIFEST)
        fsync(self.path(fingerprint))
        private.rmdir()

    def _delete_files(self, fingerprint: str, names: list[str], manifest: Manifest) -> None:
        for name in names:
            (self.path(fingerprint) / name).unlink(missing_ok=True)

    # -- common to both ----------------------------------------------------------------------------------------------

    def _held_manifest(self, fingerprint: str) -> Manifest:
        manifest = self.manifest(fingerprint)
        if manifest.get("dropped"):
            raise ArtifactError(
                f"artifact {fingerprint[:12]} ({manifest['type']}): its files were dropped to save room; it has to be made "
                "anew by the sweep that it belongs to",
                fingerprint,
            )
        return manifest

    def _damaged(self, fingerprint: str, directory: Path, manifest: Manifest) -> str | None:
        """The first file that differs from its digest. Raises FileNotFoundError for one that is not there."""
        for entry in manifest["files"]:
            file = directory / entry["path"]
            stamp = stamp_of(file.stat())
            if self._verified.get((fingerprint, entry["path"])) != stamp:
                if stamp[0] != entry["bytes"] or digest_file(file) != entry["digest"]:
                    return str(entry["path"])
                self._verified[fingerprint, entry["path"]] = stamp
        return None

    def _stamp_as(self, fingerprint: str) -> Callable[[str, os.stat_result], None]:
        def remember(name: str, status: os.stat_result) -> None:
            self._verified[fingerprint, name] = stamp_of(status)

        return remember

    def _difference(self, in_force: Manifest, dropped: Manifest) -> Manifest:
        """{"nondeterminism": how they differ} where an attempt came to something else; a note is kept in the store."""
        if in_force["digest"] == dropped["digest"]:
            return {}
        fingerprint = in_force["fingerprint"]
        files, others = ({e["path"]: e["digest"] for e in m["files"]} for m in (in_force, dropped))
        note = {
            "fingerprint": fingerprint,
            "type": in_force["type"],
            "in_force": in_force["digest"],
            "dropped": dropped["digest"],
            "files": sorted(name for name in files.keys() | others.keys() if files.get(name) != others.get(name)),
            "results": [in_force["result"], dropped["result"]] if in_force["result"] != dropped["result"] else [],
        }
        n = len(self.blobs.list(f"nondeterminism/{fingerprint}"))
        while not self.blobs.create(f"nondeterminism/{fingerprint}/{n}.json", json.dumps(note).encode()):
            n += 1
        return {"nondeterminism": note}

    def _condemn(self, fingerprint: str, why: str) -> ArtifactError:
        """Quarantines an artifact; the error to raise."""
        try:
            outcome = f"moved to {self.quarantine(fingerprint)}"
        except OSError as e:
            outcome = f"it could not be moved to the quarantine ({e})"
        for key in [key for key in self._verified if key[0] == fingerprint]:
            del self._verified[key]
        return ArtifactError(f"artifact {fingerprint[:12]}: {why}; {outcome}", fingerprint)

    def _private(self) -> Path:
        """A new directory of this process's own."""
        directory = self.root / "attempts" / f"{os.getpid()}-{uuid.uuid4().hex}@{host_tag()}"
        with explained(self.location, "starting an attempt"):
            try:
                os.mkdir(directory)
            except FileNotFoundError:
                directory.mkdir(parents=True)
            except FileExistsError as e:
                raise StoreError(errno.EEXIST, f"store {self.location}: {directory} is there already") from e
        return directory

    def _attempts(self) -> list[Path]:
        return [self.root / "attempts" / name for name in names_in(self.root / "attempts") if "-" in name]
