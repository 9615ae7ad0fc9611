"""The Hugging Face hub: names to commits, commits to files, and its failures in words that say what to do.

`huggingface_hub` is imported inside the functions, for a plan that does not need the hub.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pare.workers.corpus import SourceError

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*")
"""What is read of a model directory or fetched from the hub; README.md and LICENSE for the licence only."""

log = logging.getLogger("pare")


def hub_commit(spec: Mapping[str, Any], kind: str) -> str:
    """The commit that `name` and `revision` stand for on the hub; without a connection, in the local cache of the hub."""
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
        return Path(snapshot_download(name, revision=revision, repo_type=kind, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


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
            f"{where}: {reason} ({type(e).__name__}), and revision {revision!r} is not in the local cache "
            f"{constants.HF_HUB_CACHE}. Fetch it where there is a connection ({fetch}), or give a directory: "
            f"{group}.path=DIRECTORY",
            f"{group}.name",
        ) from None
