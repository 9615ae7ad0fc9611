"""Which form an artifact is exported in, and why."""

from __future__ import annotations

from pare.workers.export import adapter, compressed_tensors
from pare.workers.export.schemes import Inexpressible
from pare.workers.models import ModelArtifact

FORMATS = ("auto", "dense", "compressed-tensors", "adapter", "gguf", "pare")
"""Values of `export.format`."""


def choose_format(artifact: ModelArtifact, wanted: str = "auto") -> tuple[str, str]:
    """(format, reason). Left to itself: a form that others can open and that says exactly what the artifact is; where none
    can, Pare's own. Weights are written out only where that takes no more bytes than what they were made of.

    GGUF is written only where it is asked for: its files are larger, for fewer artifacts.

    Raises:
        Inexpressible: the form that is wanted cannot say what the artifact is. Of GGUF this is found while it is written.
    """
    if wanted != "auto":
        return wanted, "; ".join(filter(None, [f"export.format={wanted}", can_say(artifact, wanted)]))
    if adapter.holds_adapter(artifact):
        return "adapter", "the artifact holds an adapter, which is kept apart from its base"
    if not artifact.compressed_names():
        return "dense", "no weight is compressed"
    refusals = []
    for name in ("compressed-tensors", "adapter"):
        try:
            return name, can_say(artifact, name)
        except Inexpressible as e:
            refusals.append(str(e))
    formulas = sum(artifact.effective(name).nbytes for name in artifact.compressed_names())
    written = sum(artifact.stored(name).nbytes for name in artifact.compressed_names())
    why = f"compressed-tensors cannot say it: {refusals[0]}"
    if formulas < written or any(artifact.has_quantised_input(name) for name in artifact.compressed_names()):
        return "pare", f"{why}; only Pare opens it at {formulas / written:.0%} of the bytes"
    return "dense", f"{why}; what its weights are made of is no smaller than they are"


def can_say(artifact: ModelArtifact, name: str) -> str:
    """What there is to say of the artifact in this form; empty where it is nothing.

    Raises:
        Inexpressible: the form cannot say what the artifact is.
    """
    if name != "adapter" and artifact.prompt is not None:
        raise Inexpressible("weights cannot say that a prompt stands before every input")
    if name == "compressed-tensors":
        return compressed_tensors.describe_schemes(compressed_tensors.schemes(artifact))
    if name == "adapter" and not adapter.holds_adapter(artifact):
        return adapter.describe_terms(artifact)
    rounding = [n for n in artifact.compressed_names() if artifact.has_quantised_input(n)]
    if name == "dense" and rounding:
        raise Inexpressible(f"plain weights cannot say that the input of {rounding[0]} is quantised")
    return ""
