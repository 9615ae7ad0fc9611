"""How long this process has spent on bringing things in and out: models, artifacts, fresh processes. The rest is the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

seconds = 0.0
"""Since the process began. What loads while it loads counts once."""
_depth = 0


@contextmanager
def loading() -> Iterator[None]:
    """Counts what is done inside."""
    global seconds, _depth
    _depth += 1
    start = time.perf_counter()
    try:
        yield
    finally:
        _depth -= 1
        if not _depth:
            seconds += time.perf_counter() - start


def is_loading(function: Callable[P, R]) -> Callable[P, R]:
    """Counts the time of a function."""

    @wraps(function)
    def counted(*args: P.args, **kwargs: P.kwargs) -> R:
        with loading():
            return function(*args, **kwargs)

    return counted
