"""Speed of exports that are measured in turns."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pare.workers.export.reader import NO_DEPLOYMENT_FIGURE
from pare.workers.probe import ExportUnderTest
from pare.workers.tasks import export, speed

SPEC = {"prompt_tokens": 16, "new_tokens": 4, "repeats": 3, "threads": 1}


class Recorder:
    """Stands where a fresh process would, answers at once and writes down what was asked of whom."""

    calls: list[tuple[str, str]] = []

    def __init__(self, cls: type, *, threads: int, directory: str, dtype: str, device: str) -> None:
        assert cls is ExportUnderTest
        self.name = Path(directory).name

    def ask(self, method: str, **arguments: Any) -> Any:
        self.calls.append((self.name, f"{method} {arguments['new_tokens']}" if method == "speed" else method))
        turn = sum(call == (self.name, "speed 4") for call in self.calls)
        return {
            "open": {"runtime": "transformers-cpu", "notes": [], "threads": 1},
            "speed": {"prefill_tok_s": 100.0 * turn, "decode_tok_s": 10.0 * turn, "control_gflop_s": 50.0},
            "peak_bytes": 1000 + turn,
            "close": None,
            "ready": None,
        }[method]

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def exports(workshop: Any, codes: Callable[..., Any]) -> dict[str, Path]:
    artifact = workshop.artifact("rtn", lambda name, weight: codes(weight, 4, 32))
    dense, _ = workshop.run(export, "dense", {"card": {}}, model=workshop.base)
    compressed, _ = workshop.run(export, "compressed", {"card": {}}, model=artifact)
    return {"export.0": dense, "export.1": compressed}


def measure(workshop: Any, exports: dict[str, Path], **changes: int) -> dict[str, Any]:
    return workshop.run(speed, "speed", {**SPEC, **changes}, **exports)[1]["exports"]


def test_exports_take_turns_and_the_medians_are_reported(
    workshop: Any, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "FreshProcess", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])

    found = measure(workshop, exports)

    turns = [name for name, method in Recorder.calls if method == "speed 4"]
    assert turns == ["dense", "compressed"] * 3
    assert [name for name, method in Recorder.calls if method == "open"] == ["dense", "compressed"]
    assert [method for _, method in Recorder.calls[:2]] == ["ready", "ready"]
    assert found["export.0"]["speed/transformers-cpu/decode_tok_s"] == 20
    assert found["export.0"]["speed/transformers-cpu/prefill_tok_s"] == 200
    assert found["export.0"]["speed/transformers-cpu/decode_tok_s_iqr"] == 10  # of 10, 20, 30
    assert found["export.1"]["memory/transformers-cpu/peak_bytes"] == 1003
    assert [r["control_gflop_s"] for r in found["export.1"]["readings"]] == [50.0] * 3


def test_exports_that_do_not_fit_in_memory_together_are_loaded_for_each_turn(
    workshop: Any, exports: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "FreshProcess", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    monkeypatch.setattr(speed, "PROCESS_BYTES", 1 << 60)

    found = measure(workshop, exports)

    held: set[str] = set()
    for name, method in Recorder.calls:
        held |= {name} if method == "open" else set()
        held -= {name} if method == "close" else set()
        assert len(held) <= 1
    assert not found["export.0"]["kept_loaded"]


@pytest.mark.slow
def test_real_exports_are_timed_each_in_its_own_process(workshop: Any, exports: dict[str, Path]) -> None:
    found = measure(workshop, exports, threads=2)

    for figures in found.values():
        assert figures["speed/transformers-cpu/decode_tok_s"] > 0
        assert figures["speed/transformers-cpu/prefill_tok_s"] > 0
        assert 0 < figures["memory/transformers-cpu/peak_bytes"] < 1 << 30
        assert figures["hardware"]["threads"] == 2
        assert len(figures["readings"]) == 3
    assert found["export.0"]["notes"] == []
    assert found["export.0"]["deployable"]
    assert found["export.1"]["notes"] == [NO_DEPLOYMENT_FIGURE]
    assert not found["export.1"]["deployable"]


def test_peak_memory_outlives_what_it_was_the_peak_of() -> None:
    program = (
        "from pare.workers.probe import resident_bytes\n"
        "before = resident_bytes('VmHWM')\n"
        "held = bytearray(b'x' * (64 << 20))\n"
        "del held\n"
        "print(resident_bytes('VmHWM') - before, resident_bytes('VmRSS') - before)"
    )

    grown, left = map(int, subprocess.check_output([sys.executable, "-c", program], text=True).split())

    assert grown > 60 << 20
    assert left < 32 << 20
