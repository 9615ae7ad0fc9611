"""The pictures: that each is there when it has something to show, names what it should, and that labels stay apart."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from matplotlib.figure import Figure

from pare.tracking import drawing, plots
from pare.tracking.pareto import mark_front
from pare.tracking.record import labels
from tests.tracking import records


def texts(figure: Figure, gid: str = "label") -> list[Any]:
    return [t for axes in figure.axes for t in axes.texts if t.get_gid() == gid]


def drawn(record: dict[str, Any]) -> dict[str, Figure]:
    mark_front(record)
    return plots.draw(record)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (records.demo, {"front", "recipes", "cost", "sharing", "curves", "agreement"}),
        (records.single, {"front", "cost", "agreement"}),
        (records.all_failed, {"cost", "sharing"}),
        (lambda: records.record([]), set()),
    ],
)
def test_a_picture_is_made_only_where_there_is_something_to_show(make: Any, names: set[str]) -> None:
    assert set(drawn(make())) == names


def test_pictures_are_png_of_twice_the_resolution_and_svg_elements() -> None:
    figure = drawn(records.single())["front"]

    png, svg = plots.png(figure), plots.svg(figure)

    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    width = int.from_bytes(png[16:20], "big")
    assert width == round(figure.get_figwidth() * 2 * drawing.DPI)
    assert svg.startswith("<svg")
    assert svg.rstrip().endswith("</svg>")


def test_every_point_of_a_small_front_has_its_label_once() -> None:
    record = records.demo()

    named = [t.get_text() for t in texts(drawn(record)["front"])]

    assert sorted(named) == sorted(labels(record).values())


def test_with_many_points_the_front_and_the_base_are_labelled_and_nothing_else() -> None:
    record = records.large(120)
    figure = drawn(record)["front"]
    members = {labels(record)[t["trial"]] for t in record["trials"] if t["pareto"]}

    named = [t.get_text() for t in texts(figure)]
    left_out = [t.get_text() for t in figure.texts if "labels had no room" in t.get_text()]

    assert set(named) <= members | {"base"}
    assert len(named) == len(set(named)) >= 10
    assert len(members | {"base"}) - len(named) == (int(left_out[0].split()[0]) if left_out else 0)


@pytest.mark.parametrize("make", [records.demo, records.large, lambda: records.large(200)])
def test_labels_lie_inside_the_picture_and_do_not_cover_each_other(make: Any) -> None:
    figure = drawn(make())["front"]
    figure.draw_without_rendering()
    canvas: Any = figure.canvas
    boxes = [t.get_window_extent(canvas.get_renderer()) for t in texts(figure)]

    assert boxes
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(figure.bbox.containsx(b.x0) and figure.bbox.containsx(b.x1) for b in boxes)


def test_the_step_line_goes_down_through_the_members_of_the_front() -> None:
    record = records.demo()
    figure = drawn(record)["front"]
    line = next(line for line in figure.axes[0].lines if line.get_gid() == "front")
    members = sorted((t["metrics"]["size/bytes"] / 1e6, t["metrics"]["quality/ppl"]) for t in record["trials"] if t["pareto"])

    xs, ys = line.get_data()

    assert list(zip(xs, ys, strict=True))[1:-1] == members
    assert list(ys) == sorted(ys, reverse=True)


def test_a_diverged_trial_is_named_at_the_edge_instead_of_flattening_the_rest() -> None:
    record = records.demo()
    record["trials"][2]["metrics"].update({"quality/ppl": 48_211.0, "quality/ppl_low": 47_000.0, "quality/ppl_high": 50_000.0})

    figure = drawn(record)["front"]

    assert figure.axes[0].get_ylim()[1] < 60
    assert "rtn bits=3 (48,211)" in [t.get_text() for t in texts(figure)]


def test_each_class_of_size_names_the_recipe_that_won_there() -> None:
    figure = drawn(records.demo())["recipes"]

    won = [t.get_text() for t in texts(figure, "winner")]
    said = [t.get_text() for t in figure.axes[0].texts]

    # 99.8 MB and 113 MB: RTN against GPTQ; 125 MB: QLoRA alone; 269-274 MB: base against LoRA
    assert won == ["gptq bits=3", "gptq bits=4", "qlora", "lora learning_rate=0.001"]
    assert "24.4, 58.4 % below rtn" in said
    assert "18.9, not distinguishable from rtn" in said


def test_many_sizes_are_put_into_few_classes_that_hold_every_trial() -> None:
    trials = [
        records.trial("rtn", "rtn", {"i": i}, 20.0, 5e7 * 1.02**i)  # a chain without a gap from 50 MB to 2.6 GB
        for i in range(200)
    ]

    classes = plots.size_classes(trials)

    assert len(classes) <= plots.MOST_CLASSES
    assert sum(map(len, classes)) == 200
    assert all(a[-1]["metrics"]["size/bytes"] < b[0]["metrics"]["size/bytes"] for a, b in itertools.pairwise(classes))


def test_the_bars_of_all_trials_add_up_to_the_work_that_was_done() -> None:
    record = records.demo()
    done = sum({task["task"]: task["wall_s"] for t in record["trials"] for task in t["tasks"]}.values())
    bars = drawn(record)["cost"].axes[0].patches

    total = sum(bar.get_width() for bar in bars)  # type: ignore[attr-defined]

    assert total == pytest.approx(done, rel=1e-6)
    assert any(bar.get_hatch() for bar in bars)


def test_a_cost_without_times_yet_is_drawn_empty() -> None:
    record = records.single()
    for task in record["trials"][0]["tasks"]:
        task["wall_s"] = None

    assert drawn(record)["cost"].axes[0].patches[:] == []


def test_training_curves_are_named_at_their_ends() -> None:
    named = [t.get_text() for t in texts(drawn(records.demo())["curves"])]

    assert sorted(named) == ["lora learning_rate=0.0002", "lora learning_rate=0.001", "qlora"]


def test_of_many_curves_some_are_named() -> None:
    assert len(texts(drawn(records.large())["curves"])) == plots.MOST_LINES


def test_a_curve_that_is_no_number_throughout_has_no_line() -> None:
    record = records.demo()
    record["trials"][5]["curves"] = {"train/loss": [[1, float("nan")], [2, None]]}

    named = [t.get_text() for t in texts(drawn(record)["curves"])]

    assert sorted(named) == ["lora learning_rate=0.001", "qlora"]


def test_the_trial_whose_export_disagrees_most_is_named() -> None:
    record = records.demo()
    record["trials"][3]["metrics"]["quality/ppl_in_memory"] = 18.9 / 1.004

    (note,) = texts(drawn(record)["agreement"])

    assert note.get_text() == "most: gptq bits=4, +0.4 %"


def test_recipes_differ_in_colour_and_marker_and_keep_both_in_all_pictures() -> None:
    record = records.record([records.trial(f"r{i}", f"r{i}", {}, 20.0 + i, 1e8 + i) for i in range(14)])

    look = plots.looks(record)

    assert len(set(look.values())) == 15
    assert look["r0"] == plots.looks(records.record(record["trials"][:1]))["r0"]


def test_a_dollar_sign_is_a_dollar_sign() -> None:
    record = records.demo()
    for trial in record["trials"]:
        trial["block"] = "cost$\\frac$"

    assert all(plots.svg(figure) for figure in drawn(record).values())
