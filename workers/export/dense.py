"""Export as a plain Hugging Face checkpoint: every weight worked out, in the dtype in which the base is stored.

It can say anything and makes nothing smaller: the bytes of the codes that a weight was made of are gone.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from pare.methods.anatomy.views import parse
from pare.workers.export.files import copy_companions, write_weights
from pare.workers.models import ModelArtifact


def export_dense(artifact: ModelArtifact, out: Path) -> None:
    """Writes config, weights, tokenizer and generation config to `out`."""
    source = artifact.dense.directory
    shutil.copyfile(source / "config.json", out / "config.json")
    copy_companions(source, out)
    write_weights(dense_weights(artifact), out)


def dense_weights(artifact: ModelArtifact) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of every parameter that the base stores."""
    changed = {parse(name).parameter for name in artifact.compressed_names()}
    for name in artifact.parameter_names():
        stored = artifact.stored(name)
        yield name, artifact.materialise(name).view(stored.shape).to(stored.dtype) if name in changed else stored
