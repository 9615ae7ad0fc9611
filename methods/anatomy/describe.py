"""What a decoder is made of: its blocks, the weights in them, and which of them read one tensor.

A family of models is one function, registered with `@family("ClassName")`, that writes its modules out by name. A class
without one is tried by its structure. `describe` needs no weights: a model on the meta device will do. `verify` runs a model
to see whether what is said of it is so.
"""

from __future__ import annotations

import importlib.metadata

from torch import nn

from pare.methods.anatomy import attention, mamba  # noqa: F401 - they register their families
from pare.methods.anatomy.structure import find
from pare.methods.anatomy.types import (
    FAMILIES,
    Anatomy,
    Block,
    Family,
    Fold,
    Group,
    Side,
    Tie,
    UnknownModel,
    family,
)
from pare.methods.anatomy.verify import verify

__all__ = [
    "FAMILIES", "Anatomy", "Block", "Family", "Fold", "Group", "Side", "Tie", "UnknownModel", "describe", "family", "family_of",
    "verify",
]  # fmt: skip


def family_of(architecture: str) -> Family:
    """What describes models of that transformers class; `find` for a class that no family is written for.

    Raises:
        UnknownModel: transformers has no such class either.
    """
    if known := written_for(architecture):
        return known
    import transformers

    if not hasattr(transformers, architecture):
        raise UnknownModel(
            f"the anatomy of {architecture} is not known (known: {', '.join(FAMILIES)}), and transformers has no such class to "
            "try. Write a function that names its blocks, input groups, embedding, norm and head, as "
            f"methods/anatomy/attention.py does, under @family({architecture!r}), and name its file in plugins=[...]"
        )
    return find


def describe(model: nn.Module) -> Anatomy:
    """The anatomy of a Hugging Face decoder.

    Raises:
        UnknownModel: its parts were not found; says what to write.
    """
    return (written_for(type(model).__name__) or find)(model)


def written_for(architecture: str) -> Family | None:
    """The family of a class: here, in a plugin that has been imported, or behind an entry point `pare.families`."""
    if architecture not in FAMILIES:
        for entry in importlib.metadata.entry_points(group="pare.families"):
            entry.load()
    return FAMILIES.get(architecture)
