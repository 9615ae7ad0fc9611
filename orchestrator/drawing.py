"""The task graph of a plan as one SVG: producers on the left, a column for each depth, colours by state."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from xml.sax.saxutils import escape

from pare.orchestrator.estimate import Estimate
from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.preflight import duration, size
from pare.orchestrator.schedule import in_order, longest_chain, ranks, successors

MOST_BOXES = 300
"""Up to so many tasks each has a box; of larger plans there is one for all tasks of a type, depth and state."""

WIDTH, HEIGHT, GAP, COLUMN, MARGIN, HEAD = 212, 40, 10, 78, 24, 64
"""Of a box, between boxes of a column, between columns, around all, above the columns; in pixels."""

LETTERS = 26
"""Letters of a label that fit into a box."""

COLOURS = {
    "new": ("#fff3d6", "#c98a00", "to run"),
    "late": ("#efe6fb", "#8250c4", "late: depends on results"),
    "cached": ("#e3f4e8", "#3f9a5b", "cached"),
    "unneeded": ("#f1f2f4", "#a7adb6", "not needed"),
}
"""State -> fill, border, what the legend says."""

SWEEPS = 6
"""Passes over the columns that move each box towards those it is joined to."""


@dataclass
class Box:
    key: str
    state: str
    title: str
    small: str
    hint: str
    depth: int
    tasks: list[Task] = field(default_factory=list)
    x: float = 0.0
    y: float = 0.0


def svg(plan: Plan, states: Mapping[str, str], estimates: Mapping[str, Estimate]) -> str:
    """states: fingerprint -> new, late, cached or unneeded; estimates: of the tasks that would run."""
    tasks = list(plan.tasks.values())
    after = successors(tasks)
    depth = dict.fromkeys(plan.tasks, 0)
    for fingerprint in in_order(tasks, after):
        for follower in after[fingerprint]:
            depth[follower] = max(depth[follower], depth[fingerprint] + 1)
    one_each = len(tasks) <= MOST_BOXES
    grouped: dict[str, list[Task]] = {}
    for task in tasks:
        same = f"{depth[task.fingerprint]} {task.type} {states[task.fingerprint]}"
        grouped.setdefault(task.fingerprint if one_each else same, []).append(task)
    make = of_task if one_each else of_group
    boxes = {key: make(key, own, states, depth[own[0].fingerprint], estimates) for key, own in grouped.items()}
    box_of = {task.fingerprint: box for box in boxes.values() for task in box.tasks}
    edges = Counter(
        (box_of[fp].key, box_of[task.fingerprint].key)
        for task in tasks
        for fp in dict.fromkeys(task.inputs.values())
        if fp in box_of
    )
    width, height = place(boxes, edges)

    chain: set[tuple[str, str]] = set()
    run = [task for task in tasks if task.fingerprint in estimates and states[task.fingerprint] in ("new", "late")]
    if one_each and run:
        times = {task.fingerprint: estimates[task.fingerprint].wall_s for task in run}
        path = longest_chain(run, ranks(run, times), successors(run))
        chain = set(pairwise(path))
    count = Counter(states[task.fingerprint] for task in tasks)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="system-ui, sans-serif">',
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
        text(MARGIN, 26, f"{len(tasks)} tasks for {len(plan.goals)} trials", 15, "#1f2328", "600"),
        *legend(count, bool(chain)),
        *(line(boxes[a], boxes[b], n, (a, b) in chain) for (a, b), n in edges.items()),
        *(drawn(box) for box in boxes.values()),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def of_task(key: str, tasks: list[Task], states: Mapping[str, str], depth: int, estimates: Mapping[str, Estimate]) -> Box:
    (task,) = tasks
    estimate = estimates.get(key)
    small = " · ".join(
        [
            task.type,
            *([trials_of(len(task.trials))] if len(task.trials) > 1 else []),
            *([duration(estimate.wall_s)] if estimate else []),
        ]
    )
    need = f"\nabout {duration(estimate.wall_s)}, {size(estimate.peak_bytes)} of memory" if estimate else ""
    hint = f"{task.label}\n{task.fingerprint[:12]}\nfor {', '.join(task.trials)}{need}"
    return Box(key, states[key], task.label, small, hint, depth, tasks)


def of_group(key: str, tasks: list[Task], states: Mapping[str, str], depth: int, estimates: Mapping[str, Estimate]) -> Box:
    state = states[tasks[0].fingerprint]
    trials = len({name for task in tasks for name in task.trials})
    seconds = sum(estimates[task.fingerprint].wall_s for task in tasks if task.fingerprint in estimates)
    small = trials_of(trials) + (f" · {duration(seconds)} of work" if seconds else "")
    return Box(
        key, state, f"{len(tasks):,} × {tasks[0].type}", small, f"{len(tasks)} tasks of type {tasks[0].type}", depth, tasks
    )


def trials_of(n: int) -> str:
    return "1 trial" if n == 1 else f"{n:,} trials"


def place(boxes: Mapping[str, Box], edges: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """Sets every box's corner; returns width and height of the drawing."""
    columns: dict[int, list[Box]] = {}
    for box in boxes.values():
        columns.setdefault(box.depth, []).append(box)
    joined: dict[str, list[Box]] = {key: [] for key in boxes}
    for a, b in edges:
        joined[a].append(boxes[b])
        joined[b].append(boxes[a])
    tallest = max(map(len, columns.values()), default=0)

    def spread(column: list[Box]) -> None:
        top = MARGIN + HEAD + (tallest - len(column)) * (HEIGHT + GAP) / 2
        for i, box in enumerate(column):
            box.y = top + i * (HEIGHT + GAP)

    for number, column in columns.items():
        for box in column:
            box.x = MARGIN + number * (WIDTH + COLUMN)
        spread(column)
    for sweep in range(SWEEPS):
        for number in sorted(columns, reverse=bool(sweep % 2)):
            column = columns[number]
            middle = {b.key: sum(o.y for o in joined[b.key]) / len(joined[b.key]) if joined[b.key] else b.y for b in column}
            column.sort(key=lambda box: middle[box.key])
            spread(column)
    width = 2 * MARGIN + len(columns) * (WIDTH + COLUMN) - COLUMN if columns else 400
    return max(width, 700), 2 * MARGIN + HEAD + tallest * (HEIGHT + GAP)


def legend(count: Mapping[str, int], with_chain: bool) -> list[str]:
    parts, x = [], float(MARGIN)
    for state, (fill, border, meaning) in COLOURS.items():
        if count.get(state):
            said = f"{count[state]} {meaning}"
            parts.append(f'<rect x="{x}" y="40" width="14" height="14" rx="3" fill="{fill}" stroke="{border}"/>')
            parts.append(text(x + 20, 52, said, 12, "#57606a"))
            x += 44 + 6.6 * len(said)
    if with_chain:
        parts.append(f'<path d="M{x} 47 h26" stroke="#c2410c" stroke-width="2.5"/>')
        parts.append(text(x + 32, 52, "longest chain", 12, "#57606a"))
    return parts


def drawn(box: Box) -> str:
    fill, border, _ = COLOURS.get(box.state, COLOURS["unneeded"])
    dashed = ' stroke-dasharray="5 3"' if box.state == "late" else ""
    corner = f'x="{box.x:.1f}" y="{box.y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="6"'
    return (
        f"<g><title>{escape(box.hint)}</title>"
        f'<rect {corner} fill="{fill}" stroke="{border}"{dashed}/>'
        f"{text(box.x + 9, box.y + 17, cut(box.title, LETTERS), 12, '#1f2328', '600')}"
        f"{text(box.x + 9, box.y + 32, cut(box.small, LETTERS + 6), 10.5, '#57606a')}</g>"
    )


def line(a: Box, b: Box, n: int, on_chain: bool) -> str:
    """A curve from the right of one box to the left of another, wider where it stands for many."""
    x1, y1, x2, y2 = a.x + WIDTH, a.y + HEIGHT / 2, b.x, b.y + HEIGHT / 2
    bend = COLUMN * 0.55
    look = 'stroke="#c2410c" stroke-width="2.5"' if on_chain else 'stroke="#8c959f" stroke-opacity="0.45"'
    wide = "" if on_chain or n == 1 else f' stroke-width="{min(1 + n**0.5 / 10, 6):.1f}"'
    curve = f"M{x1:.1f} {y1:.1f} C{x1 + bend:.1f} {y1:.1f} {x2 - bend:.1f} {y2:.1f} {x2:.1f} {y2:.1f}"
    return f'<path d="{curve}" fill="none" {look}{wide}/>'


def text(x: float, y: float, content: str, points: float, colour: str, weight: str = "400") -> str:
    style = f'font-size="{points}" fill="{colour}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


def cut(content: str, letters: int) -> str:
    """At most so many letters; what is left out is in the middle, for labels differ at both ends."""
    if len(content) <= letters:
        return content
    return f"{content[: letters // 2]}…{content[-(letters - letters // 2 - 1) :]}"
