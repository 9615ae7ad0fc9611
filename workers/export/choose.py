"""Which form an artifact is exported in, and why."""

from __future__ import annotations

from pare.workers.export.compressed_tensors import Inexpressible, schemes
from pare.workers.models import ModelArtifact


def choose_format(artifact: ModelArtifact) -> tuple[str, str]:
    """(format, reason): the smallest form that others can open and that says exactly what the artifact is."""
    if (artifact.directory / "adapter").is_dir():
        return "adapter", "the artifact holds an adapter, which is kept apart from its base"
    if not artifact.compressed_names():
        return "dense", "no weight is compressed"
    try:
        found = schemes(artifact)
    except Inexpressible as e:
        return (
            "dense",
            f"compressed-tensors cannot say it: {e}; with all weights written out it is as large as the base",
        )
    return "compressed-tensors", f"all {len(found)} compressed weights are integer codes in groups of a row"
