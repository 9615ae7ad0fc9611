"""The Hugging Face hub: names to commits, commits to files, and its failures in words that say what to do.

`huggingface_hub` is imported inside the functions, for a plan that does not need the hub.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
"""What is read of a model directory or fetched from the hub; README.md and LICENSE for the licence only."""

log = logging.getLogger("pare")


class Memory:
    """What names of the hub stand for: what was known before, asked where the hub gives no answer, and what is learnt now."""

    def __init__(self, read: Callable[[str], dict[str, Any] | None] = lambda key: None) -> None:
        """read: key (see `key_of`) -> what was learnt of it before, plain JSON."""
        self.read = read
        self.learnt: dict[str, dict[str, Any]] = {}


MEMORY: ContextVar[Memory | None] = ContextVar("memory", default=None)
"""The memory of the plan that is being made."""


@contextlib.contextmanager
def remembering(memory: Memory) -> Iterator[Memory]:
    token = MEMORY.set(memory)
    try:
        yield memory
    finally:
        MEMORY.reset(token)


def key_of(spec: Mapping[str, Any], kind: str) -> str:
    """`model org/name@main`."""
    return f"{kind} {spec['name']}@{spec.get('revision') or 'main'}"


def learn(spec: Mapping[str, Any], kind: str, **known: Any) -> None:
    memory = MEMORY.get()
    if memory:
        memory.learnt.setdefault(key_of(spec, kind), {}).update(known)


def recall(spec: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What was learnt before; empty where that is nothing."""
    memory = MEMORY.get()
    return (memory.read(key_of(spec, kind)) if memory else None) or {}


def hub_commit(spec: Mapping[str, Any], kind: str) -> str:
    """The commit that `name` and `revision` stand for on the hub; without a connection what they stood for when they were
    prefetched, else in the local cache of the hub."""
    commit = asked_commit(spec, kind)
    learn(spec, kind, commit=commit)
    return commit


def asked_commit(spec: Mapping[str, Any], kind: str) -> str:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    name, revision = spec["name"], spec.get("revision") or "main"
    with hub_errors(spec, kind):
        if re.fullmatch(r"[0-9a-f]{40}", revision):
            return revision
        try:
            info = HfApi().repo_info(name, revision=revision, repo_type=kind, timeout=10)
            if info.gated:
                HfApi().auth_check(name, repo_type=kind)
            return str(info.sha)
        except HfHubHTTPError:  # an answer, and one that the cache must not hide
            raise
        except no_connection() as e:
            if known := recall(spec, kind):
                log.warning(
                    "no answer from the hub (%s): %s@%s is the prefetched commit %s", e, name, revision, known["commit"]
                )
                return str(known["commit"])
            cached = cached_snapshot(name, revision, kind)
            if cached is None:
                raise
            log.warning("no answer from the hub (%s): %s@%s is commit %s of the local cache", e, name, revision, cached.name)
            return cached.name


def cached_snapshot(name: str, revision: str, kind: str) -> Path | None:
    """Directory of a snapshot that is whole in the local cache of the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = list(MODEL_FILES) if kind == "model" else None
    try:
        found = Path(snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return found if is_whole(found, kind) else None


def is_whole(snapshot: Path, kind: str) -> bool:
    """Whether a snapshot has what it is read for: a plan fetches a config alone, and streaming a data set leaves its card."""
    if kind != "model":
        cards = ("README.md", ".gitattributes", "dataset_infos.json")
        return any(p.is_file() and p.name not in cards for p in snapshot.rglob("*"))
    index = snapshot / "model.safetensors.index.json"
    weights = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return all((snapshot / name).exists() for name in ("config.json", *weights))


def fetch_model(name: str, commit: str) -> Path:
    """Directory with the safetensors model of a commit of the hub, downloaded unless it is cached."""
    from huggingface_hub import snapshot_download

    with hub_errors({"name": name, "revision": commit}, "model"):
        cached = cached_snapshot(name, commit, "model")
        return cached or Path(snapshot_download(name, revision=commit, allow_patterns=list(MODEL_FILES)))


def no_connection() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises when the hub is not reached, and its errors of answers: catch `HfHubHTTPError` before."""
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return (OfflineModeIsEnabled, HTTPError, LocalEntryNotFoundError)


@contextlib.contextmanager
def hub_errors(spec: Mapping[str, Any], kind: str) -> Iterator[None]:
    """Turns what huggingface_hub raises into a `SourceError` that says what to do."""
    from huggingface_hub import constants, errors

    group = "model" if kind == "model" else "data"
    name, revision = spec["name"], spec.get("revision") or "main"
    where = f"{group}.name={name}"
    page = f"{constants.ENDPOINT}/{'' if kind == 'model' else 'datasets/'}{name}"
    try:
        yield
    except errors.GatedRepoError:
        raise SourceError(
            f"{where}: is gated. Accept its licence at {page}, then set HF_TOKEN to a token of that account", f"{group}.name"
        ) from None
    except errors.RevisionNotFoundError:
        raise SourceError(f"{where}: has no revision {revision!r}; {page} lists them", f"{group}.revision") from None
    except errors.RepositoryNotFoundError:
        raise SourceError(
            f"{where}: the hub knows no such {kind} (or it is private: set HF_TOKEN). Names are ORG/NAME; search at "
            f"{constants.ENDPOINT}/{kind}s",
            f"{group}.name",
        ) from None
    except errors.HFValidationError as e:
        raise SourceError(
            f"{where}: is no name of the hub ({e}). Names are ORG/NAME; for a directory use {group}.path", f"{group}.name"
        ) from None
    except errors.NotASafetensorsRepoError:
        raise SourceError(
            f"{where}: has no safetensors weights, and Pare opens no pickled ones. Choose another revision or model",
            f"{group}.name",
        ) from None
    except errors.RemoteEntryNotFoundError:
        raise SourceError(f"{where}: has no config.json, so it is no transformers model", f"{group}.name") from None
    except errors.HfHubHTTPError as e:
        raise SourceError(f"{where}: the hub answered with an error: {e}", f"{group}.name") from None
    except no_connection() as e:
        reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"no connection to {constants.ENDPOINT}"
        fetch = f"hf download {name}" + ("" if kind == "model" else " --repo-type dataset")
        raise SourceError(
            f"{where}: {reason} ({type(e).__name__}), and revision {revision!r} is neither in this store nor in the local "
            f"cache {constants.HF_HUB_CACHE}. Fetch it where there is a connection (pare prefetch, or {fetch}), or give a "
            f"directory: {group}.path=DIRECTORY",
            f"{group}.name",
        ) from None
