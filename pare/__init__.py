"""Pare: a distributed experiment platform for making models smaller and better.

This package is only the door. The rooms stand at the top of the repository and install beneath it:
`pare.methods`, `pare.workers`, `pare.orchestrator`, `pare.tracking`, `pare.conf`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

__version__ = "0.1.0"


def results(sweep: str | None = None, home: str | None = None) -> pandas.DataFrame:
    """A sweep as a data frame, one row for each trial (see `pare.orchestrator.results`)."""
    from pare.orchestrator import results as reader

    return reader.results(sweep, home)
