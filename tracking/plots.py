"""Pictures of a record. Each takes the record and returns a figure, or None where there is nothing to show.

Colour and marker belong to a recipe, in all pictures of a record; both differ, so that no one has to tell colours apart.
"""

from __future__ import annotations

import io
import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pare.tracking import pareto, units
from pare.tracking.drawing import (
    DPI,
    GRID,
    INK,
    MUTED,
    STYLE,
    Point,
    arrow,
    bar,
    canvas,
    footnote,
    mark,
    place_labels,
    spread,
    value_axis,
)
from pare.tracking.reading import distinct
from pare.tracking.record import BASE_RECIPE, Record, Trial, base_trial, clipped, labels, measured, metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PPL, BYTES = "quality/ppl", "size/bytes"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31")
"""After Okabe and Ito (2008), without black and yellow, each of which one of the two themes would swallow."""
MARKERS = ("o", "s", "^", "v", "P", "X", "h")
TASK_COLOURS = ("#4477aa", "#44aa99", "#ddcc77", "#cc6677", "#88ccee", "#aa4499")
"""After Tol's "muted" and "bright": kinds of task are no recipes and look unlike them."""
OTHER_COLOUR = "#9aa5b1"

FACTOR = 12.0
"""A perplexity more than this many times the lowest is an arrow at the edge; else nobody could tell the rest apart."""
ALL_LABELLED = 20
"""Up to so many points each has its label and interval; beyond, only the front and the base have a label."""
MOST_BARS = 28
MOST_CLASSES = 7
MOST_LINES = 8


def draw(record: Record) -> dict[str, Figure]:
    """Every picture that the record has something for: name -> figure."""
    from matplotlib import rc_context

    with rc_context(STYLE):
        drawn = {name: make(record) for name, make in PICTURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def png(figure: Figure) -> bytes:
    """The picture at twice the usual resolution."""
    return render(figure, "png", dpi=2 * DPI)


def svg(figure: Figure) -> str:
    """One <svg> element to stand in a page; letters are outlines, so no font has to be there."""
    string = render(figure, "svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))).decode()
    return string[string.index("<svg") :]


def render(figure: Figure, kind: str, **options: Any) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(STYLE):
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


# The pictures


def front(record: Record) -> Figure | None:
    """Quality against bytes, with the front as a step line, and a line at the base to hold against."""
    trials = measured(record, PPL, BYTES)
    if not trials:
        return None
    members, base, name, look = pareto.front(record), base_trial(record), labels(record), looks(record)
    on_front = {t["trial"] for t in members}
    everything = len(trials) <= ALL_LABELLED
    figure, axes = canvas(
        9.6,
        6.0,
        "Quality against size",
        "Lower left is better. Line: the front. Dashes: the base. "
        + (
            "Vertical bars: interval of the perplexity."
            if everything
            else "Named: the front and the base. Arrows: off the scale."
        ),
        {} if everything else {r: look[r] for r in look if any(t["recipe"] == r for t in trials)},
    )
    limit = FACTOR * min(t["metrics"][PPL] for t in trials)
    inside = [t for t in trials if t["metrics"][PPL] <= limit]
    value_axis(axes, "x", [t["metrics"][BYTES] / 1e6 for t in trials], wide=2.2, room=(0.09, 0.14))
    value_axis(axes, "y", [v for t in inside for v in span(t) if v <= 1.3 * limit], wide=1.8, room=(0.09, 0.1))
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]

    lines: list[list[tuple[float, float]]] = []
    if base is not None:
        lines.append([(axes.get_xlim()[0], base["metrics"][PPL]), (right, base["metrics"][PPL])])
        axes.plot(*zip(*lines[-1], strict=True), color=MUTED, linewidth=1.1, dashes=(4, 3), zorder=1.5)
    corners = [(t["metrics"][BYTES] / 1e6, t["metrics"][PPL]) for t in members]
    xs = [corners[0][0], *(x for x, _ in corners), right]
    ys = [top, *(min(y, top) for _, y in corners), corners[-1][1]]
    axes.step(xs, ys, where="post", color=INK, linewidth=1.6, zorder=2, gid="front")
    axes.fill_between(xs, ys, top, step="post", color=MUTED, alpha=0.07, linewidth=0, zorder=1)
    for (x0, y0), (x1, y1) in zip(zip(xs, ys, strict=True), list(zip(xs, ys, strict=True))[1:], strict=False):
        lines += [[(x0, y0), (x1, y0)], [(x1, y0), (x1, y1)]]

    points = []
    for t in trials:
        x, y, recipe, first = t["metrics"][BYTES] / 1e6, t["metrics"][PPL], t["recipe"], t["trial"] in on_front
        if y > limit:
            points.append(
                arrow(axes, x, top, "↑", look[recipe], f"{name[t['trial']]} ({units.number(y)})" if everything else "")
            )
            continue
        if everything:
            lines.append([(x, min(v, top)) for v in span(t)])
            axes.plot(*zip(*lines[-1], strict=True), color=look[recipe][0], linewidth=1.4, alpha=0.6, zorder=3)
        mark(axes, x, y, look[recipe], strong=first)
        points.append(Point(x, y, name[t["trial"]] if everything or first or t is base else "", first or t is base))
    left_out = place_labels(axes, points, lines)
    if left_out:
        footnote(figure, f"{left_out} labels had no room: see the table.")
    axes.set_xlabel("size of all weight files, MB")
    axes.set_ylabel("perplexity on the test split")
    return figure


def recipes(record: Record) -> Figure | None:
    """The best of each recipe within each class of size, and by how much the first leads."""
    trials = measured(record, PPL, BYTES)
    if len({t["recipe"] for t in trials}) < 2:
        return None
    base, name, look = base_trial(record), labels(record), looks(record)
    classes = size_classes(trials)
    bests = [best_of_each_recipe(members) for members in classes]
    figure, axes = canvas(
        9.6,
        1.9 + 0.62 * len(classes),
        "Which recipe won where",
        "Best perplexity of each recipe among trials of like size; further left is better. Dashes: the base.",
        {r: look[r] for r in look if any(t["recipe"] == r for t in trials)},
        left=1.75,
        right=2.75,
    )
    limit = FACTOR * min(t["metrics"][PPL] for best in bests for t in best)
    value_axis(axes, "x", [v for best in bests for t in best for v in span(t) if v <= limit], wide=1.8, room=(0.04, 0.06))
    edge = axes.get_xlim()[1]
    if base is not None:
        axes.axvline(base["metrics"][PPL], color=MUTED, linewidth=1.1, dashes=(4, 3), zorder=1.5)
    for row, best in enumerate(bests):
        reach = [min(t["metrics"][PPL], edge) for t in best]
        axes.plot([min(reach), max(reach)], [row, row], color=GRID, linewidth=5, solid_capstyle="round", zorder=1.6)
        for t in reversed(best):
            if t["metrics"][PPL] > limit:
                arrow(axes, edge, row, "→", look[t["recipe"]], "")
                continue
            axes.plot(
                [min(v, edge) for v in span(t)], [row, row], color=look[t["recipe"]][0], linewidth=1.4, alpha=0.6, zorder=3
            )
            mark(axes, t["metrics"][PPL], row, look[t["recipe"]], strong=t is best[0])
        axes.text(
            1.02,
            row - 0.17,
            clipped(name[best[0]["trial"]], 34),
            transform=axes.get_yaxis_transform(),
            va="center",
            gid="winner",
        )
        axes.text(1.02, row + 0.19, lead(best), transform=axes.get_yaxis_transform(), va="center", size=8.5, color=MUTED)
    axes.set_ylim(len(classes) - 0.45, -0.6)
    axes.set_yticks(range(len(classes)), [class_name(members) for members in classes])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("perplexity on the test split")
    return figure


def cost(record: Record) -> Figure | None:
    """Work behind each trial by kind of task; what several trials share is hatched, each bearing its part."""
    trials = sorted((t for t in record["trials"] if t["tasks"]), key=lambda t: -sum(bearing(task) for task in t["tasks"]))
    if not trials:
        return None
    name = labels(record)
    totals: dict[str, float] = defaultdict(float)
    for t in trials:
        for task in t["tasks"]:
            totals[task["type"]] += bearing(task)
    kinds = sorted(totals, key=lambda kind: -totals[kind])
    colour = {kind: TASK_COLOURS[i] if i < len(TASK_COLOURS) else OTHER_COLOUR for i, kind in enumerate(kinds)}
    shown = [kind for kind in kinds if totals[kind] > 0]
    legend = {kind: (colour[kind], "s") for kind in shown[: len(TASK_COLOURS)]}
    legend |= {"other": (OTHER_COLOUR, "s")} if len(shown) > len(TASK_COLOURS) else {}
    bars = [(("✗ " if t["status"] == "failed" else "") + clipped(name[t["trial"]], 34), [t]) for t in trials[:MOST_BARS]]
    if len(trials) > MOST_BARS:
        bars.append((f"mean of {len(trials) - MOST_BARS} others", trials[MOST_BARS:]))
    figure, axes = canvas(
        9.6,
        1.75 + 0.32 * len(bars),
        "Cost of each trial",
        "Time of its tasks. Hatched: its part of work that was done once for several trials.",
        legend,
        left=2.95,
    )
    longest = max(sum(bearing(task) for task in t["tasks"]) for t in trials)
    unit, divisor = time_unit(longest)
    for row, (_, members) in enumerate(bars):
        start = 0.0
        for shared in (False, True):
            for kind in kinds:
                tasks = [
                    task for t in members for task in t["tasks"] if task["type"] == kind and (task["shared_by"] > 1) == shared
                ]
                width = sum(bearing(task) for task in tasks) / divisor / len(members)
                bar(axes, row, start, width, colour[kind], hatched=shared)
                start += width
        axes.annotate(units.duration(start * divisor), (start, row), (5, 0), textcoords="offset points", va="center", size=9)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.14 * longest / divisor or 1)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(unit)
    return figure


def sharing(record: Record) -> Figure | None:
    """The work if every trial had run alone against the work that was done, and where the difference comes from."""
    saved = record["saving"]["wall_s_saved"]
    shared = sorted(record["saving"]["shared"], key=lambda s: -(s["used_by"] - 1) * s["wall_s"])[:MOST_LINES]
    if not saved or not shared:
        return None
    done = sum({task["task"]: task["wall_s"] or 0.0 for t in record["trials"] for task in t["tasks"]}.values())
    tasks = record["tasks"]
    figure, axes = canvas(
        9.6,
        2.75 + 0.32 * len(shared),
        "What sharing saved",
        f"{tasks['total_if_separate']} tasks if every trial stood alone, {tasks['unique']} after merging equal ones: "
        f"{units.percent(saved / (done + saved))} of the work was not repeated.",
        left=2.95,
    )
    unit, divisor = time_unit(done + saved)
    for row in (0, 1):
        bar(axes, row, 0, done / divisor, TASK_COLOURS[0], hatched=False)
    bar(axes, 0, done / divisor, saved / divisor, TASK_COLOURS[0], hatched=True)
    rows = [("every trial alone", 0.0, done + saved, ""), ("as it was done", 1.0, done, "")]
    for i, s in enumerate(shared):
        times = s["used_by"] - 1
        rows.append((clipped(s["label"], 34), i + 2.6, times * s["wall_s"], f": {times} × {units.duration(s['wall_s'])}"))
        bar(axes, i + 2.6, 0, rows[-1][2] / divisor, TASK_COLOURS[0], hatched=True)
    for _, y, width, note in rows:
        axes.annotate(
            units.duration(width) + note, (width / divisor, y), (5, 0), textcoords="offset points", va="center", size=9
        )
    axes.text(
        -0.008,
        1.85,
        "of that, saved by sharing",
        transform=axes.get_yaxis_transform(),
        ha="right",
        va="center",
        color=MUTED,
        size=9,
    )
    axes.set_ylim(len(shared) + 2.2, -0.6)
    axes.set_xlim(0, 1.16 * (done + saved) / divisor)
    axes.set_yticks([y for _, y, _, _ in rows], [label for label, *_ in rows])
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel(unit)
    return figure


def curves(record: Record) -> Figure | None:
    """What training reported step by step, one panel a kind of loss; where there is no loss, whatever there is."""
    trials = [t for t in record["trials"] if any(len(points) > 1 for points in t["curves"].values())]
    known = sorted({kind for t in trials for kind in t["curves"]})
    kinds = ([kind for kind in known if "loss" in kind] or known)[:3]
    if not kinds:
        return None
    name, look = labels(record), looks(record)
    crowded = len(trials) > MOST_LINES
    figure, _ = canvas(
        9.6,
        1.0 + 3.4 * len(kinds),
        "Training curves",
        "Thin: as reported. Thick: running mean" + (f" of the {MOST_LINES} that end lowest." if crowded else "."),
        {r: look[r] for r in look if any(t["recipe"] == r for t in trials)} if crowded else {},
        panels=len(kinds),
        right=3.0,
    )
    for axes, kind in zip(figure.axes, kinds, strict=True):
        ends = []
        dashes: dict[str, int] = defaultdict(int)
        for t in trials:
            points = [(s, v) for s, v in t["curves"].get(kind, []) if v is not None and math.isfinite(v)]
            if not points:
                continue
            colour = look[t["recipe"]][0]
            style = ("-", "--", ":", "-.")[dashes[t["recipe"]] % 4]
            dashes[t["recipe"]] += 1
            steps, values = zip(*points, strict=True)
            mean = running_mean(values)
            axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
            ends.append((mean[-1], steps, mean, name[t["trial"]], colour, style))
        named = sorted(ends)[:MOST_LINES]
        for _, steps, mean, _, colour, style in named:
            axes.plot(steps, mean, color=colour, linewidth=1.9, linestyle=style)
        heights = spread([y for y, *_ in named], axes)
        for (y, steps, _, label, colour, _), height in zip(named, heights, strict=True):
            axes.annotate(
                clipped(label, 40),
                (steps[-1], y),
                (1.03, height),
                textcoords="axes fraction",
                va="center",
                size=9,
                gid="label",
                arrowprops={
                    "arrowstyle": "-",
                    "color": colour,
                    "linewidth": 0.8,
                    "shrinkA": 1,
                    "shrinkB": 2,
                    "relpos": (0, 0.5),
                },
            )
        axes.set_ylabel(kind)
        axes.set_xlabel("step")
    return figure


def agreement(record: Record) -> Figure | None:
    """How far the export's perplexity is from that of the model in memory, per recipe."""
    memory = f"{PPL}_in_memory"
    trials = measured(record, PPL, memory)
    if not trials:
        return None
    name, look = labels(record), looks(record)
    kinds = [r for r in look if any(t["recipe"] == r for t in trials)]
    figure, axes = canvas(
        9.6,
        1.75 + 0.42 * len(kinds),
        "Export against memory",
        "Perplexity of the export, read by a fresh process, against that of the model before export.",
        left=1.75,
    )
    difference = {t["trial"]: 100 * (t["metrics"][PPL] / t["metrics"][memory] - 1) for t in trials}
    tolerance = record["about"]["evaluation"].get("tolerance")
    worst = max(trials, key=lambda t: abs(difference[t["trial"]]))
    most = max(abs(difference[worst["trial"]]), 0.01)
    reach = 1.15 * (min(max(100 * tolerance, most), 300 * tolerance) if tolerance else most)
    at = {trial: min(max(d, -0.98 * reach), 0.98 * reach) for trial, d in difference.items()}
    if tolerance:
        axes.axvspan(-100 * tolerance, 100 * tolerance, color=MUTED, alpha=0.08, linewidth=0, zorder=0.5)
        axes.text(100 * tolerance, -0.62, "tolerance ", ha="right", va="center", size=8.5, color=MUTED)
    axes.axvline(0, color=MUTED, linewidth=1)
    for t in trials:
        mark(axes, at[t["trial"]], kinds.index(t["recipe"]), look[t["recipe"]], strong=t is worst)
    where = (at[worst["trial"]], kinds.index(worst["recipe"]))
    far = difference[worst["trial"]]
    note = f"most: {name[worst['trial']]}, " + (f"{far:+,.3g} %".replace("-", "−") if abs(far) >= 0.001 else "under 0.001 %")
    side = math.copysign(1, where[0]) * (1 if abs(where[0]) < 0.5 * reach else -1)
    axes.annotate(
        note,
        where,
        (side * 9, 0),
        textcoords="offset points",
        va="center",
        ha="right" if side < 0 else "left",
        size=9,
        gid="label",
    )
    axes.set_xlim(-reach, reach)
    axes.set_ylim(len(kinds) - 0.4, -0.85)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("difference in %")
    return figure


PICTURES = {"front": front, "recipes": recipes, "cost": cost, "sharing": sharing, "curves": curves, "agreement": agreement}


# What they are made of


def looks(record: Record) -> dict[str, tuple[str, str]]:
    """Recipe -> (colour, marker), in the order in which the recipes appear; the base is grey."""
    names = dict.fromkeys(t["recipe"] for t in record["trials"] if t["recipe"] != BASE_RECIPE)
    n = len(COLOURS)
    look = {name: (COLOURS[i % n], MARKERS[(i + i // n) % n]) for i, name in enumerate(names)}
    return {BASE_RECIPE: (MUTED, "D"), **look}


def span(trial: Trial) -> tuple[float, float]:
    """The interval of the perplexity; the perplexity itself twice where there is none."""
    low, high, value = metric(trial, f"{PPL}_low"), metric(trial, f"{PPL}_high"), trial["metrics"][PPL]
    return (value if low is None else low, value if high is None else high)


def bearing(task: dict[str, Any]) -> float:
    """Seconds of the task that one of its trials bears."""
    return (task["wall_s"] or 0.0) / max(1, task["shared_by"])


def time_unit(longest: float) -> tuple[str, float]:
    """Unit in which to draw seconds, and how many seconds it has."""
    return ("hours", 3600.0) if longest > 7200 else ("minutes", 60.0) if longest > 240 else ("seconds", 1.0)


def size_classes(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Trials of like size together, small ones first: cut where sizes jump by 6 %, or else into equal ratios."""
    ordered = sorted(trials, key=lambda t: t["metrics"][BYTES])
    classes = [[ordered[0]]]
    for before, t in itertools.pairwise(ordered):
        if t["metrics"][BYTES] > 1.06 * before["metrics"][BYTES]:
            classes.append([])
        classes[-1].append(t)
    wide = any(members[-1]["metrics"][BYTES] > 1.35 * members[0]["metrics"][BYTES] for members in classes)
    if not wide and len(classes) <= MOST_CLASSES:
        return classes
    low, high = (math.log(t["metrics"][BYTES]) for t in (ordered[0], ordered[-1]))
    binned: dict[int, list[Trial]] = defaultdict(list)
    for t in ordered:
        place = (math.log(t["metrics"][BYTES]) - low) / (high - low)
        binned[min(MOST_CLASSES - 1, int(MOST_CLASSES * place))].append(t)
    return list(binned.values())


def class_name(members: Sequence[Trial]) -> str:
    low, high = (units.size(t["metrics"][BYTES]) for t in (members[0], members[-1]))
    return low if low == high else f"{low.removesuffix(high[high.rindex(' ') :])}–{high}"


def best_of_each_recipe(members: Sequence[Trial]) -> list[Trial]:
    """Best recipe first."""
    best: dict[str, Trial] = {}
    for t in sorted(members, key=lambda t: t["metrics"][PPL]):
        best.setdefault(t["recipe"], t)
    return list(best.values())


def lead(best: Sequence[Trial]) -> str:
    """By how much the first of a class leads over the recipe behind it."""
    value = units.number(best[0]["metrics"][PPL])
    if len(best) == 1:
        return f"{value}, no other recipe here"
    second = best[1]["recipe"]
    is_distinct = distinct(best[0], best[1])
    if is_distinct is False:
        return f"{value}, not distinguishable from {second}"
    by = units.percent(1 - best[0]["metrics"][PPL] / best[1]["metrics"][PPL])
    return f"{value}, {by} below {second}" + (", interval unknown" if is_distinct is None else "")


def running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a window of a tenth of the curve, centred, narrower at the ends."""
    half = len(values) // 20
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]
