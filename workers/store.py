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

In an object store (`RemoteStore`) there is no rename. Files are put under a prefix of the attempt's own, and
`manifests/ab/abcdef....json`, which names that prefix, is created by a conditional write: that is the publication.
Readers fetch into a cache on their own disk, which has the local layout.

Beside artifacts the place holds named blobs (`store.blobs`): leases, segments of ledgers, checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from blake3 import blake3

from pare.workers.blobs import Blobs, FsspecBlobs, LocalBlobs, StoreError, explained, local_path, write_synced

__all__ = ["FORMAT", "MANIFEST", "ArtifactError", "RemoteStore", "Store", "StoreError", "open_store"]

FORMAT = 2
MANIFEST = "manifest.json"
PAUSES_S = (0.05, 0.15, 0.4)
"""Waits before something that must be there is called missing: NFS shows a rename to other hosts late."""
CHUNK = 1 << 18
LIGHT_BYTES = 1 << 20
"""JSON files up to this size outlive `drop_files`: reports read curves and scores from them."""

T = TypeVar("T")
Manifest = dict[str, Any]


class ArtifactError(Exception):
    """An artifact is missing, damaged or dropped. `fingerprint` names it."""

    def __init__(self, message: str, fingerprint: str) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


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
    store = Store(directory) if directory is not None else RemoteStore(str(location), cache)
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


class RemoteStore(Store):
    """A store at a URL, read through a cache on this machine that has the layout of a local store.

    manifests/ab/abcdef....json      the publication; `prefix` says where the files are
    objects/ab/abcdef.../<attempt>/  the files of one attempt
    """

    _manifest_belongs_inside = False

    def __init__(self, url: str, cache: Path | None = None) -> None:
        self._remote = FsspecBlobs(url)
        self._cache = cache or Path(tempfile.gettempdir()) / f"pare-cache-{os.getuid()}"
        super().__init__(self._cache / blake3(self._remote.url.encode()).hexdigest()[:16])
        self.location, self.blobs = self._remote.url, self._remote
        self._opened: dict[str, Manifest] = {}
        self._small: dict[tuple[str, str], bytes | None] = {}

    def has(self, fingerprint: str) -> bool:
        return self._remote.exists(manifest_key(fingerprint))

    def present(self, fingerprints: Iterable[str]) -> set[str]:
        wanted = set(fingerprints)
        return set(filter(self.has, wanted)) if len(wanted) < 16 else wanted.intersection(self.artifacts())

    def artifacts(self) -> Iterator[str]:
        for key in self._remote.list("manifests"):
            yield PurePosixPath(key).stem

    def open(self, fingerprint: str) -> Path:
        directory = self.path(fingerprint)
        manifest = self._opened.get(fingerprint) or self._held_manifest(fingerprint)
        if not self._cached(fingerprint, manifest):
            with self._locked(fingerprint):  # one process of this machine fetches
                if not self._cached(fingerprint, manifest):
                    self._fetch(fingerprint, manifest)
        self._opened[fingerprint] = manifest
        return directory

    def read_file(self, fingerprint: str, name: str) -> bytes | None:
        if (fingerprint, name) not in self._small:
            data = super().read_file(fingerprint, name)
            if data is None or len(data) > LIGHT_BYTES:
                return data
            self._small[fingerprint, name] = data
        return self._small[fingerprint, name]

    def publish(self, directory: Path, fingerprint: str, kind: str, result: Any, cost: dict[str, Any]) -> tuple[Manifest, bool]:
        with explained(self.root, f"publishing artifact {fingerprint[:12]}"):
            files, _ = inventory(directory, self._stamp_as(fingerprint), sync=False)
        prefix = f"objects/{fingerprint[:2]}/{fingerprint}/{uuid.uuid4().hex}"
        manifest = make_manifest(fingerprint, kind, files, result, cost, prefix=prefix)
        in_force = self.manifest(fingerprint) if self.has(fingerprint) else None
        if in_force and not in_force.get("dropped"):
            return {**in_force, **self._difference(in_force, manifest)}, False
        keys = [f"{prefix}/{e['path']}" for e in files]
        try:
            self._remote.upload([(directory / e["path"], key) for e, key in zip(files, keys, strict=True)])
            if in_force:  # made anew, because something new needs the files
                self._replace_manifest(fingerprint, manifest)
            elif not self._remote.create(manifest_key(fingerprint), text_of(manifest)):
                in_force = self.manifest(fingerprint)
        except Exception:
            if self._prefix_in(manifest_key(fingerprint)) != prefix:
                self._delete_all(keys)
            raise
        difference = self._difference(in_force, manifest) if in_force else {}
        # Our own prefix in force where a create was refused: it went through, and its answer was lost.
        if in_force and not in_force.get("dropped") and in_force["prefix"] != prefix:
            self._delete_all(keys)
            return {**in_force, **difference}, False
        self._keep(directory, fingerprint, manifest)
        return {**manifest, **difference}, True

    def quarantine(self, fingerprint: str) -> Path:
        """Moves the manifest out of sight of readers; the objects that it names stay."""
        key = f"quarantine/{fingerprint}-{uuid.uuid4().hex[:8]}.json"
        with contextlib.suppress(FileNotFoundError):
            self._remote.write(key, self._manifest_text(fingerprint))
        self._remote.delete(manifest_key(fingerprint))
        self._opened.pop(fingerprint, None)
        return Path(key)

    def leftovers(self) -> list[Leftover]:
        quarantine = self._remote.details("quarantine")
        named = {self._prefix_in(manifest_key(fp)) for fp in self.artifacts()}
        named |= {self._prefix_in(key) for key, _, _ in quarantine}
        found = [Leftover(key, size, age, "quarantine") for key, size, age in quarantine]
        for key, size, age in self._remote.details("objects"):
            if "/".join(key.split("/")[:4]) not in named:
                found.append(Leftover(key, size, age, "unknown"))
        return found

    def discard(self, leftover: Leftover) -> None:
        if leftover.kind == "quarantine":
            prefix = self._prefix_in(leftover.name)
            self._delete_all(self._remote.list(prefix) if prefix else [])
        self._remote.delete(leftover.name)

    def stored(self, manifest: Manifest) -> list[Stored]:
        found = [Stored(f"{manifest['prefix']}/{e['path']}", e["bytes"], is_light(e)) for e in manifest["files"]]
        return [file for file in found if file.light or not manifest.get("dropped")]

    def problems(self, fingerprint: str) -> list[str]:
        try:
            manifest = parse_manifest(self._manifest_text(fingerprint), fingerprint)
        except (FileNotFoundError, ValueError) as e:
            return [f"its manifest is damaged ({e})"]
        there = {key.removeprefix(manifest["prefix"] + "/") for key in self._remote.list(manifest["prefix"])}
        files = {}
        with self._private_for_a_while() as directory:
            for entry in manifest["files"]:
                if entry["path"] in there:
                    copy = directory / "file"
                    self._remote.download([(f"{manifest['prefix']}/{entry['path']}", copy)])
                    files[entry["path"]] = {"bytes": copy.stat().st_size, "digest": digest_file(copy)}
        return differences(manifest, files | {name: {} for name in there - files.keys()})

    def _prepare(self) -> None:
        """Also sees to it that the endpoint honours conditional writes, on which exactly-once publication stands."""
        if not self.check_format():
            text = json.dumps({"format": FORMAT}).encode()
            if self._remote.create("format", text) and self._remote.create("format", text):
                raise StoreError(
                    errno.ENOTSUP,
                    f"store {self.location}: this endpoint does not honour conditional writes (If-None-Match), so two workers "
                    "could publish one artifact. Use one that does, or a shared file system",
                )
            self.check_format()
        private_directory(self.root)
        self._prepared = True

    def _holds_unmarked_artifacts(self) -> bool:
        return False

    def _manifest_text(self, fingerprint: str) -> bytes:
        return self._remote.read(manifest_key(fingerprint))

    def _file_bytes(self, manifest: Manifest, name: str) -> bytes:
        return self._remote.read(f"{manifest['prefix']}/{name}")

    def _set_aside(self, fingerprint: str) -> None:
        self._opened.pop(fingerprint, None)
        self._remote.delete(manifest_key(fingerprint))
        self._delete_all(self._remote.list(f"objects/{fingerprint[:2]}/{fingerprint}"))

    def _replace_manifest(self, fingerprint: str, manifest: Manifest) -> None:
        self._remote.write(manifest_key(fingerprint), text_of(manifest))

    def _delete_files(self, fingerprint: str, names: list[str], manifest: Manifest) -> None:
        self._opened.pop(fingerprint, None)
        self._delete_all([f"{manifest['prefix']}/{name}" for name in names])

    def _delete_all(self, keys: list[str]) -> None:
        for key in keys:
            self._remote.delete(key)

    def _prefix_in(self, key: str) -> str:
        """The prefix that a manifest names; empty where the manifest cannot be read."""
        try:
            return str(json.loads(self._remote.read(key))["prefix"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return ""

    def _cached(self, fingerprint: str, manifest: Manifest) -> bool:
        """Whether the cache holds this very artifact, intact."""
        try:
            kept = json.loads((self.path(fingerprint) / MANIFEST).read_bytes())
            return bool(kept["digest"] == manifest["digest"]) and not self._damaged(
                fingerprint, self.path(fingerprint), manifest
            )
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def _fetch(self, fingerprint: str, manifest: Manifest) -> None:
        """Brings an artifact into the cache. A second download tells a broken transfer from a damaged object."""
        names = [e["path"] for e in manifest["files"]]
        damaged: str | None = None
        for _ in range(2):
            with self._private_for_a_while() as directory, explained(self.root, f"fetching artifact {fingerprint[:12]}"):
                try:
                    self._remote.download([(f"{manifest['prefix']}/{name}", directory / name) for name in names])
                    damaged = self._damaged(fingerprint, directory, manifest)
                except FileNotFoundError as e:
                    manifest = self._held_manifest(fingerprint)  # dropped or replaced in the meantime
                    damaged = str(e.filename or e)
                if not damaged:
                    self._into_cache(directory, fingerprint, manifest)
                    return
        raise self._condemn(fingerprint, f"{damaged} differs from its digest")

    def _into_cache(self, directory: Path, fingerprint: str, manifest: Manifest) -> None:
        (directory / MANIFEST).write_bytes(text_of(manifest))
        super()._set_aside(fingerprint)
        self.path(fingerprint).parent.mkdir(parents=True, exist_ok=True)
        os.rename(directory, self.path(fingerprint))

    def _keep(self, directory: Path, fingerprint: str, manifest: Manifest) -> None:
        """What was made here need not be fetched again."""
        with contextlib.suppress(OSError), self._locked(fingerprint):  # only a cache: it is published
            self._into_cache(directory, fingerprint, manifest)

    @contextlib.contextmanager
    def _locked(self, fingerprint: str) -> Iterator[None]:
        """Holds a lock of this machine on an artifact's place in the cache; the kernel frees it when its holder dies."""
        private_directory(self.root)
        (self.root / "locks").mkdir(exist_ok=True)
        handle = os.open(self.root / "locks" / fingerprint, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    @contextlib.contextmanager
    def _private_for_a_while(self) -> Iterator[Path]:
        private_directory(self.root)
        directory = self._private()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)


# -- manifests ---------------------------------------------------------------------------------------------------------


def make_manifest(
    fingerprint: str, kind: str, files: list[dict[str, Any]], result: Any, cost: dict[str, Any], **more: Any
) -> Manifest:
    """The manifest of an artifact. `digest` covers what the task came to, so that two attempts can be compared; `seal`
    covers everything, so that no later change goes unseen."""
    result, cost = json.loads(json.dumps([result, cost]))  # as a reader will see them
    manifest = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "type": kind,
        "digest": digest_of({"files": files, "result": result}),
        "files": files,
        "result": result,
        "cost": cost,
        "published": time.time(),
        **more,
    }
    return sealed(manifest)


def sealed(manifest: Manifest) -> Manifest:
    content = {key: value for key, value in manifest.items() if key != "seal"}
    return {**content, "seal": digest_of(content)}


def parse_manifest(text: bytes, fingerprint: str) -> Manifest:
    """A manifest from its file.

    Raises:
        ArtifactError: its format is not the one that this Pare reads.
        ValueError: damaged.
    """
    manifest = json.loads(text)
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError("no format in it")
    if manifest["format"] != FORMAT:
        raise ArtifactError(
            f"artifact {fingerprint[:12]} has format {manifest['format']}, this Pare reads {FORMAT}", fingerprint
        )
    if manifest.get("seal") != sealed(manifest)["seal"]:
        raise ValueError("it was changed after it was written")
    if manifest["fingerprint"] != fingerprint:
        raise ValueError(f"it is that of {manifest['fingerprint'][:12]}")
    for entry in manifest["files"]:
        path = PurePosixPath(entry["path"])
        if path.is_absolute() or ".." in path.parts or "\0" in entry["path"]:
            raise ValueError(f"it names the file {entry['path']!r}")
    return manifest


def text_of(manifest: Manifest) -> bytes:
    return json.dumps(manifest).encode()


def digest_of(content: Any) -> str:
    return blake3(json.dumps(content, sort_keys=True).encode()).hexdigest()


def manifest_key(fingerprint: str) -> str:
    return f"manifests/{fingerprint[:2]}/{fingerprint}.json"


def is_light(entry: dict[str, Any]) -> bool:
    return entry["bytes"] <= LIGHT_BYTES and entry["path"].endswith((".json", ".jsonl"))


def differences(manifest: Manifest, files: dict[str, dict[str, Any]]) -> list[str]:
    """How the files that are there differ from those that a manifest names."""
    said = []
    for entry in manifest["files"]:
        found = files.get(entry["path"])
        if found is None and not (manifest.get("dropped") and not is_light(entry)):
            said.append(f"{entry['path']} is missing")
        elif found and (found["bytes"], found["digest"]) != (entry["bytes"], entry["digest"]):
            said.append(f"{entry['path']} differs from its digest")
        elif found and manifest.get("dropped") and not is_light(entry):
            said.append(f"{entry['path']} is still there although the artifact was dropped")
    unknown = files.keys() - {e["path"] for e in manifest["files"]}
    return said + [f"{name} is not in its manifest" for name in sorted(unknown)]


# -- files -------------------------------------------------------------------------------------------------------------


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
