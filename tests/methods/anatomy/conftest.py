"""Models to look at."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.methods.anatomy.tiny_models import tiny


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], Any]:
    """One model of each class; whoever changes it takes a copy."""
    made: dict[str, Any] = {}

    def of(architecture: str) -> Any:
        if architecture not in made:
            made[architecture] = tiny(architecture)
        return made[architecture]

    return of
