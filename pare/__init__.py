"""Pare: a distributed experiment platform for making models smaller and better.

This package is only the door. The rooms stand at the top of the repository and install beneath it:
`pare.methods`, `pare.workers`, `pare.orchestrator`, `pare.tracking`, `pare.conf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Any

    import pandas

__version__ = "0.1.0"


def results(sweep: str | None = None, home: str | None = None) -> pandas.DataFrame:
    """A sweep as a data frame, one row for each trial (see `pare.orchestrator.results`)."""
    from pare.orchestrator import results as reader

    return reader.results(sweep, home)


def load(directory: str | Path, dtype: Any = None, device: str = "cpu") -> Any:
    """The model of an export whose `opens_with` says "pare", ready to be used as any model of transformers.

    dtype: what it computes in, a torch dtype; None: that of its base. Every weight is worked out: it takes as much memory as
    the base. Reads nothing but the directory, and runs no code that lies in it.
    """
    from pathlib import Path

    from pare.workers.export.pare_form import open_pare

    return open_pare(Path(directory), dtype, device)
