"""Checking settings: ranges are refused with the name of the setting, the value, and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class SettingsError(ValueError):
    """A setting is outside its range. Carries the pieces, so that the caller can add where the setting came from."""

    def __init__(self, method: str, setting: str, got: Any, allowed: str) -> None:
        super().__init__(f"{method}.{setting} must be {allowed}, got {got!r}")
        self.method, self.setting, self.got, self.allowed = method, setting, got, allowed


def check(
    settings: Any,
    field_name: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    one_of: Sequence[Any] | None = None,
) -> None:
    """Raises `SettingsError` unless the field lies in the given range (`at_least`/`at_most` closed, `above`/`below` open).

    >>> from types import SimpleNamespace
    >>> check(SimpleNamespace(name="rtn", bits=0), "bits", at_least=2, at_most=8)
    Traceback (most recent call last):
    ...
    pare.methods.settings.SettingsError: rtn.bits must be in [2, 8], got 0
    """
    value = getattr(settings, field_name)
    if one_of is not None:
        if value not in one_of:
            raise SettingsError(settings.name, field_name, value, "one of " + ", ".join(map(str, one_of)))
        return
    inside = (
        (at_least is None or value >= at_least)
        and (above is None or value > above)
        and (at_most is None or value <= at_most)
        and (below is None or value < below)
    )
    if not inside:
        low = f"[{at_least}" if at_least is not None else f"({above}" if above is not None else "(-inf"
        high = f"{at_most}]" if at_most is not None else f"{below})" if below is not None else "inf)"
        raise SettingsError(settings.name, field_name, value, f"in {low}, {high}")
