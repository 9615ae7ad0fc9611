"""Imported: a checkpoint that somebody else made of the base, taken as it is. The work is the platform's: it measures the
files as it would an export of its own, in a fresh process and against the same base, and changes nothing in them.

Source: none to cite; Pare (2026), docs/architecture.md. No equation: the weights are those of the files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pare.methods.contract import Method, method


@method("imported", source="Pare (2026): a checkpoint made elsewhere, as it is")
@dataclass
class Imported(Method):
    kind: ClassVar[str] = "import"

    path: str | None = None
    """The checkpoint: a directory in transformers' form (dense, compressed-tensors, GPTQ, AWQ, bitsandbytes, ...) or of a PEFT
    adapter, or a GGUF file. It has to be made of the model that `model` names, and is read in place, nothing of it run."""
