"""The table of tuners is of all that there are, and is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.peft.measure import measured, names
from benchmarks.peft.page import number, on_codes, page

ROOT = Path(__file__).parents[2]


def test_the_page_is_that_of_the_result_and_has_every_tuner() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "peft.json").read_text())

    assert list(result["rows"]) == names()
    assert (ROOT / "docs" / "peft.md").read_text() == page(result)


def test_a_measurement_tells_what_merging_into_codes_loses() -> None:
    row = measured("dora")

    assert row["start"] == 0
    assert max(row["reload"], row["merge"]) < 1e-5 < 0.1 < row["effect"]
    assert row["nf4"]["trains"]
    assert row["nf4"]["merges"]
    assert 1e-3 < row["nf4"]["error"] < row["nf4"]["effect"]


def test_what_a_library_cannot_do_is_said_and_not_raised() -> None:
    found = measured("mica")["nf4"]

    assert found["trains"] is False
    assert "float32" in found["why"]


def test_of_a_prompt_what_is_kept_is_measured_in_place_of_a_merge() -> None:
    row = measured("prefix_tuning")

    assert (row["kept_as"], row["nf4"]["trains"], "merges" in row["nf4"]) == ("prompt", True, False)
    assert max(row["reload"], row["merge"]) < 1e-5 < 0.1 < row["start"]


def test_cells() -> None:
    assert [number(x) for x in (0.0, 0.00123, 0.123, 1.5)] == ["0", "1.2e-03", "0.12", "1.5"]
    assert on_codes({"trains": False, "why": "x"}) == ["no", "-"]
    assert on_codes({"trains": True, "start": 0.0, "effect": 0.0, "merges": True, "error": 0.0}) == [
        "runs, learns nothing",
        "-",
    ]
    assert on_codes({"trains": True, "start": 0.2, "effect": 1.0, "merges": False}) == ["yes, start 0.2", "fails"]
    assert on_codes({"trains": True, "start": 0.0, "effect": 1.0, "merges": True, "error": 0.13}) == [
        "yes",
        "error 0.13 of effect 1",
    ]
    assert on_codes({"trains": True, "start": 0.9, "effect": 1.0}) == ["yes, start 0.9", "-"]
