"""A store in an object store (see `store`): publication by a conditional write, reading through a cache on one's own disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from blake3 import blake3

from pare.workers.blobs import FsspecBlobs, StoreError, explained
from pare.workers.files import digest_file, inventory, private_directory
from pare.workers.manifest import (
    FORMAT,
    LIGHT_BYTES,
    MANIFEST,
    Manifest,
    differences,
    is_light,
    make_manifest,
    manifest_key,
    parse_manifest,
    text_of,
)
from pare.workers.store import Leftover, Store, Stored


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
