"""The manifest of an artifact: what it is made of, what its task returned, and the digests by which a reader knows it."""

from __future__ import annotations

import json
import time
from pathlib import PurePosixPath
from typing import Any

from blake3 import blake3

FORMAT = 2
MANIFEST = "manifest.json"
LIGHT_BYTES = 1 << 20
"""JSON files up to this size outlive `Store.drop_files`: reports read curves and scores from them."""

Manifest = dict[str, Any]


class ArtifactError(Exception):
    """An artifact is missing, damaged or dropped. `fingerprint` names it."""

    def __init__(self, message: str, fingerprint: str) -> None:
        super().__init__(message)
        self.fingerprint = fingerprint


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
