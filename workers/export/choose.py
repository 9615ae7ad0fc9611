"""Which form an artifact is exported in, and why."""

from __future__ import annotations

from pare.workers.export.compressed_tensors import Inexpressible, schemes
from pare.workers.models import ModelArtifact


def choose_format(artifact: ModelArtifact) -> tuple[str, str]:
    """(format, reason): a form that others can open and that says exactly what the artifact is; where none can, Pare's own.

    Weights are written out only where that takes no more bytes than what they were made of.
    """
    if (artifact.directory / "adapter").is_dir():
        return "adapter", "the artifact holds an adapter, which is kept apart from its base"
    if not artifact.compressed_names():
        return "dense", "no weight is compressed"
    try:
        found = schemes(artifact)
    except Inexpressible as e:
        formulas = sum(artifact.effective(name).nbytes for name in artifact.compressed_names())
        written = sum(artifact.stored(name).nbytes for name in artifact.compressed_names())
        if formulas < written:
            return "pare", f"compressed-tensors cannot say it: {e}; only Pare opens it at {formulas / written:.0%} of the bytes"
        return "dense", f"compressed-tensors cannot say it: {e}; what its weights are made of is no smaller than they are"
    return "compressed-tensors", f"all {len(found)} compressed weights are integer codes in groups of a row"
