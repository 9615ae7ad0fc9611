"""Errors that a person can act on, each with the exit code of the command line.

PareError
├── ConfigError      2   what was asked for is not well formed
├── InfeasibleError  4   it cannot be done here: memory, disk, devices
├── BusyError        7   another driver holds this PARE_HOME
└── LedgerError      8   the ledger or the store is damaged
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PareError(Exception):
    """Root of all errors that are shown without a traceback."""

    exit_code = 1


class ConfigError(PareError):
    exit_code = 2


class InfeasibleError(PareError):
    exit_code = 4


class BusyError(PareError):
    exit_code = 7


class LedgerError(PareError):
    exit_code = 8


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint: ` Did you mean 'x'?` where one is close, else what there is.

    >>> nearest("gtpq", ["gptq", "rtn"])
    " Did you mean 'gptq'?"
    """
    options = sorted(known)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" There is: {', '.join(options)}." if options else ""
