"""The report: which columns there are, what the sentences claim, and that nothing in a record can break the page."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pare.tracking import drawing, plots, reading, report
from pare.tracking.pareto import mark_front
from tests.tracking import records

NASTY = "<script>alert(1)</script> | `x` [a](b) \x1b[31m$\\frac$ --> ]]> & \"'"


@pytest.fixture
def demo() -> dict[str, Any]:
    record = records.demo()
    mark_front(record)
    return record


def shown(record: dict[str, Any], width: int = 220) -> str:
    console = Console(width=width, file=io.StringIO(), color_system=None)
    console.print(report.terminal(record))
    return console.file.getvalue()  # type: ignore[attr-defined]


def titles(record: dict[str, Any]) -> list[str]:
    return [column.title for column in report.columns(record)]


def find(record: dict[str, Any], recipe: str, **overrides: Any) -> dict[str, Any]:
    return next(
        t
        for t in record["trials"]
        if t["recipe"] == recipe and all(t["overrides"].get(f"recipe.quantize.{k}") == v for k, v in overrides.items())
    )


def page_of(record: dict[str, Any]) -> str:
    return report.html(record, {name: plots.svg(figure) for name, figure in plots.draw(record).items()})


class Page(HTMLParser):
    """The elements of a page; fails on one that was opened and not closed."""

    VOID = ("meta", "use", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)


def test_a_row_of_the_terminal_says_what_the_trial_is_and_what_it_measured(demo: dict[str, Any]) -> None:
    gptq = find(demo, "gptq", bits=3)

    row = next(line for line in shown(demo).splitlines() if gptq["trial"] in line)

    for cell in ("●", "gptq", "bits=3", "24.4 (23.7–25.1)", "+33.3 %", "0.269", "56.2 %", "99.8 MB", "5.93", "16.7†"):
        assert cell in row


def test_only_overrides_that_tell_trials_apart_are_settings(demo: dict[str, Any]) -> None:
    for trial in demo["trials"]:
        trial["overrides"] = {**trial["overrides"], "model.dtype": "bfloat16"}

    table = shown(demo)

    assert "bits=3" in table
    assert "dtype" not in table


def test_columns_are_there_only_for_what_was_measured(demo: dict[str, Any]) -> None:
    every = titles(demo)
    for trial in demo["trials"]:
        trial["metrics"] = {k: v for k, v in trial["metrics"].items() if k.startswith(("quality/ppl", "size/"))}

    assert {"KL", "acc pydoc_choice", "decode tok/s", "peak", "cost"} < set(every)
    assert titles(demo) == ["", "trial", "recipe", "settings", "perplexity", "vs base", "size", "bits/w"]


def test_a_metric_that_one_trial_lacks_is_a_dash_there(demo: dict[str, Any]) -> None:
    trial = find(demo, "rtn", bits=4)
    del trial["metrics"]["quality/kl"]

    row = next(line for line in report.markdown(demo).splitlines() if f"| {report.md(trial['trial'])} |" in line)

    assert row.split(" | ")[titles(demo).index("KL")].strip() == "–"


def test_where_runtimes_differ_each_speed_stands_beside_its_runtime(demo: dict[str, Any]) -> None:
    one, both = demo["trials"][0], demo["trials"][5]
    one["metrics"] = {"quality/ppl": 18.3, "speed/llama.cpp/decode_tok_s": 99.0}
    both["metrics"] |= {"speed/llama.cpp/decode_tok_s": 88.0, "speed/transformers/decode_tok_s": 11.0}
    columns = {column.title: column.cell for column in report.columns(demo)}

    assert "runtime" not in titles(records.demo())
    assert (columns["decode tok/s"](one), columns["runtime"](one), columns["prefill tok/s"](one)) == ("99.0", "llama.cpp", "–")
    assert (columns["decode tok/s"](both), columns["runtime"](both)) == ("88.0 / 11.0", "llama.cpp / transformers")
    assert columns["decode tok/s"](find(demo, "gptq", bits=3)).endswith("†")


def test_the_cell_of_a_trial_that_no_runtime_ran_is_a_dash(demo: dict[str, Any]) -> None:
    demo["trials"][0]["metrics"] = {"quality/ppl": 18.3}
    demo["trials"][1]["metrics"]["speed/llama.cpp/decode_tok_s"] = 1.0
    columns = {column.title: column.cell for column in report.columns(demo)}

    assert [columns[title](demo["trials"][0]) for title in ("decode tok/s", "peak", "runtime")] == ["–", "–", "–"]


def test_a_narrow_terminal_keeps_the_essentials_and_names_what_had_no_room(demo: dict[str, Any]) -> None:
    lines = shown(demo, width=100).splitlines()

    assert max(map(len, lines)) <= 100
    assert any("gptq" in line and "24.4 (23.7–25.1)" in line for line in lines)
    assert "No room for: peak, prefill tok/s" in "\n".join(lines)


def test_a_long_sweep_shows_its_front_in_the_terminal_and_all_trials_in_markdown() -> None:
    record = records.large(120)
    members = mark_front(record)

    table, markdown = shown(record), report.markdown(record)

    assert all(t["trial"] in table for t in members)
    assert f"{report.MOST_ROWS} of 120 trials" in table
    assert all(report.md(t["trial"]) in markdown for t in record["trials"])


def test_a_failed_trial_is_named_with_one_printable_line_of_its_reason(demo: dict[str, Any]) -> None:
    demo["trials"][2] = records.failed(demo["trials"][2], "Traceback ...\n  File x\nOutOfMemoryError: 14 GiB \x1b[31mneeded")
    mark_front(demo)

    text = shown(demo)

    assert "rtn bits=3: out_of_memory in export: OutOfMemoryError: 14 GiB  [31mneeded" in text
    assert "\x1b" not in text
    assert "7 of 8 trials are done, 1 failed." in text


def test_a_failure_without_a_task_is_told_without_one(demo: dict[str, Any]) -> None:
    demo["trials"][1]["error"] = {"failure": "invalid", "message": "group_size must divide 576", "task": None}

    assert ("rtn bits=4", "invalid", "group_size must divide 576") in report.failures(demo)


@pytest.mark.parametrize("make", [records.all_failed, records.single, records.demo, lambda: records.record([])])
def test_every_form_of_report_is_made_for_any_outcome(make: Any, tmp_path: Path) -> None:
    record = make()
    mark_front(record)

    files = report.write_report(record, tmp_path)

    assert all(f.stat().st_size > 0 for f in files)
    assert {"report.json", "report.md", "report.html"} <= {f.name for f in files}
    assert shown(record)


def test_a_sweep_without_a_finished_trial_says_so() -> None:
    assert "No trial has finished, so there is no front (8 failed)." in shown(records.all_failed())


def test_a_running_sweep_says_how_far_it_is(demo: dict[str, Any]) -> None:
    for trial, status in zip(demo["trials"][3:], ("running", "pending", "pending", "pending", "skipped"), strict=True):
        trial.update(status=status, metrics={}, curves={}, artifact=None, export_path=None, tasks=[])
    mark_front(demo)

    assert reading.sentences(demo)[0] == "3 of 8 trials are done, 1 running, 3 pending, 1 skipped."
    assert "running" in shown(demo)


def test_json_comes_back_as_it_was_with_nan_and_infinity_as_null(tmp_path: Path) -> None:
    record = records.single()
    record["trials"][0]["metrics"] |= {"quality/kl": math.nan, "quality/top1_agreement": -math.inf}
    expected = copy.deepcopy(record)
    expected["trials"][0]["metrics"] |= {"quality/kl": None, "quality/top1_agreement": None}

    report.write_report(record, tmp_path)

    assert json.loads((tmp_path / "report.json").read_text()) == expected


@pytest.mark.filterwarnings("ignore:Glyph 27")
def test_nothing_in_a_record_becomes_markup(demo: dict[str, Any]) -> None:
    demo["name"] = demo["about"]["command"] = demo["about"]["data"] = demo["about"]["base"]["name"] = NASTY
    for i, trial in enumerate(demo["trials"]):
        trial.update(trial=f"{NASTY}{i}", block=NASTY, notes=[NASTY], opens_with=NASTY, export_path=NASTY)
        trial["overrides"] = {f"recipe.{NASTY}": f"{NASTY}{i}"}
        trial["config"] = {NASTY: NASTY}
        trial["curves"] = {NASTY: [[1, 2.0], [2, 1.0]]}
        for task in trial["tasks"]:
            task.update(label=NASTY, type=NASTY)
    demo["saving"]["shared"][0]["label"] = NASTY
    demo["trials"][3]["error"] = {"failure": NASTY, "message": NASTY, "task": NASTY}

    page, markdown = page_of(demo), report.markdown(demo)

    assert "script" not in Page(page).tags
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in re.sub(r"`[^`]*`", "", markdown)
    rows = [line for line in markdown.splitlines() if line.startswith("| ") and "alert" in line]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows[:8]} == {len(titles(demo)) + 1}


def test_the_page_needs_nothing_beside_it_and_follows_the_theme(demo: dict[str, Any]) -> None:
    page = page_of(demo)

    loads = re.findall(r'(?:src|href)="(?!#)([^"]*)"|url\((?!#)([^)]*)\)|@import', page)
    assert loads == []
    assert Page(page).tags.count("svg") == 6
    assert "prefers-color-scheme: dark" in page
    assert not any(colour in page.split("</style>")[1] for colour in (drawing.INK, drawing.MUTED, drawing.GRID, drawing.PAPER))


def test_pictures_that_a_record_no_longer_has_are_taken_away(tmp_path: Path) -> None:
    report.write_report(records.single(), tmp_path)
    report.write_report(records.all_failed(), tmp_path)

    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == ["cost.png", "sharing.png"]


def contest(low: tuple[float, float] | None, high: tuple[float, float] | None) -> str:
    """The sentence about GPTQ (24.4) against RTN (58.7) at 3 bits, with these intervals."""
    record = records.demo()
    for recipe, bounds in (("gptq", low), ("rtn", high)):
        metrics = find(record, recipe, bits=3)["metrics"]
        metrics["quality/ppl_low"], metrics["quality/ppl_high"] = bounds or (None, None)
    return next(s for s in reading.sentences(record) if s.startswith("At bits=3"))


def test_a_difference_is_called_one_only_where_intervals_do_not_overlap() -> None:
    # 1 - 24.4 / 58.7 = 0.584
    assert contest((23, 26), (55, 60)) == "At bits=3, gptq beats rtn by 58.4 % (perplexity 24.4 against 58.7): beyond noise."
    assert "gptq and rtn are not distinguishable" in contest((20, 56), (55, 60))
    assert "no interval was measured, so it may be noise" in contest(None, (55, 60))


def test_touching_intervals_overlap() -> None:
    assert "not distinguishable" in contest((20, 55), (55, 60))


def test_what_is_compared_at_unlike_sizes_says_so(demo: dict[str, Any]) -> None:
    find(demo, "gptq", bits=3)["metrics"]["size/bytes"] *= 2

    assert any("perplexity 24.4 against 58.7, at 2.00 times its bytes" in s for s in reading.sentences(demo))


def test_the_smallest_that_is_no_worse_than_the_base_is_named(demo: dict[str, Any]) -> None:
    # Base 17.8-18.8; GPTQ at 4 bits 18.4-19.4 overlaps it, both at 3 bits do not. 269.06 MB / 113.04 MB = 2.38
    said = reading.sentences(demo)

    assert "Smallest that is not measurably worse than the base: gptq bits=4, 113 MB, 2.38 times smaller." in said


def test_sharing_is_told_in_tasks_and_time(demo: dict[str, Any]) -> None:
    first, second = reading.sharing(demo)

    # 7 x (12.1 + 2.4 + 1.1 + 21.0) + 1 x 58.0 = 314.2 s
    assert first == "37 tasks instead of 66: 29 were not repeated, which saved 5 min 14 s of work."
    assert second.startswith("Shared most: score of the base (21.0 s, for 8 trials)")


def test_a_sweep_that_shares_nothing_claims_nothing() -> None:
    assert reading.sharing(records.single()) == ["9 tasks, 0 of them there already; no two trials had one in common."]
