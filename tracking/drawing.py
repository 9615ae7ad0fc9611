"""What the pictures are drawn with: the canvas, axes for values, bars and marks, and labels that keep out of each other's way.

The four colours of text and ground appear nowhere else: the HTML report replaces them by those of the reader's theme.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pare.tracking.record import clipped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

INK, MUTED, GRID, PAPER = "#1f2933", "#66727f", "#e2e7ec", "#fffffe"

DPI = 100

STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "figure.facecolor": PAPER,
    "hatch.linewidth": 1.4,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "pare",
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
}


def canvas(
    width: float,
    height: float,
    title: str,
    subtitle: str,
    legend: dict[str, tuple[str, str]] | None = None,
    left: float = 0.85,
    right: float = 0.35,
    panels: int = 1,
) -> tuple[Figure, Axes]:
    """A figure of that many inches with title, subtitle and a legend line on top, and axes beneath each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    height += 0.3 if legend else 0
    figure = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(figure)
    figure.text(0.25 / width, 1 - 0.36 / height, title, size=14, weight="bold", va="center")
    figure.text(0.25 / width, 1 - 0.66 / height, subtitle, size=9.5, color=MUTED, va="center")
    if legend:
        handles = [
            Line2D(
                [],
                [],
                linestyle="none",
                marker=marker,
                color=colour,
                markersize=7.5,
                markeredgecolor=PAPER,
                label=clipped(name, 24),
            )
            for name, (colour, marker) in legend.items()
        ]
        figure.legend(
            handles=handles,
            loc="center left",
            bbox_to_anchor=(0.12 / width, 1 - 0.95 / height),
            ncols=len(handles),
            handletextpad=0.1,
            columnspacing=1.2,
            fontsize=9.5,
        )
    above = 1.17 if legend else 0.92
    grid = figure.add_gridspec(
        panels, 1, left=left / width, right=1 - right / width, bottom=0.6 / height, top=1 - above / height, hspace=0.35
    )
    axes = [figure.add_subplot(grid[i]) for i in range(panels)]
    return figure, axes[0]


def footnote(figure: Figure, string: str) -> None:
    figure.text(0.99, 0.012, string, size=8.5, color=MUTED, ha="right", va="bottom")


def value_axis(axes: Axes, which: str, values: Sequence[float], wide: float, room: tuple[float, float]) -> None:
    """Limits with room (fractions of the length) around the values; logarithmic if they span more than `wide` times."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = min(values), max(values)
    logarithmic = low > 0 and high / low > wide
    if not logarithmic and high - low < 0.05 * high:
        low, high = low - 0.05 * abs(high), high + 0.05 * abs(high)
    a, b = (math.log(low), math.log(high)) if logarithmic else (low, high)
    a, b = a - room[0] * (b - a), b + room[1] * (b - a)
    ends = (math.exp(a), math.exp(b)) if logarithmic else (a, b)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}scale": "log" if logarithmic else "linear", f"{which}lim": ends})
    axis.set_major_locator(FixedLocator(log_ticks(*ends)) if logarithmic else MaxNLocator(8))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.4g}" if v < 1e4 else f"{v:,.0f}"))


def log_ticks(low: float, high: float) -> list[float]:
    """Round values between the ends: as many as there are up to nine."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8), (1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**k for k in decades for m in steps if low <= m * 10.0**k <= high]
        if len(ticks) <= 9:
            return ticks
    return ticks


def bar(axes: Axes, y: float, left: float, width: float, colour: str, hatched: bool) -> None:
    if hatched and width:
        axes.barh(y, width, left=left, height=0.7, facecolor=PAPER, edgecolor=colour, hatch="/////", linewidth=1)
    elif width:
        axes.barh(y, width, left=left, height=0.7, facecolor=colour, edgecolor=PAPER, linewidth=0.6)


def mark(axes: Axes, x: float, y: float, look: tuple[str, str], strong: bool) -> None:
    """A strong mark is larger and lies beneath the weak ones, so that of two at one place both are seen."""
    colour, marker = look
    axes.plot(
        x,
        y,
        linestyle="none",
        marker=marker,
        color=colour,
        markersize=10.5 if strong else 6.5,
        markeredgecolor=INK if strong else PAPER,
        markeredgewidth=1.3 if strong else 0.8,
        zorder=4 if strong else 5,
    )


@dataclass
class Point:
    """Something to label, in data coordinates."""

    x: float
    y: float
    text: str
    first: bool
    """Whether it is labelled before the others."""


def arrow(axes: Axes, x: float, y: float, sign: str, look: tuple[str, str], label: str) -> Point:
    """Marks a value that lies beyond the edge."""
    axes.text(x, y, sign, color=look[0], size=15, weight="bold", ha="center", va="top" if sign == "↑" else "center", zorder=5)
    return Point(x, y, label, False)


def place_labels(axes: Axes, points: Sequence[Point], lines: Sequence[Sequence[tuple[float, float]]]) -> int:
    """Writes each text beside its point where it covers no point and no other text, and lines only if it must.

    The nearest free place counts; a label that had to move away gets a leader. Returns how many found no place.
    """
    from matplotlib import patheffects
    from matplotlib.transforms import Bbox

    figure: Any = axes.figure
    renderer = figure.canvas.get_renderer()
    figure.draw_without_rendering()
    to_pixels = axes.transData.transform
    px = figure.dpi / 72
    inside = axes.get_window_extent(renderer)
    taken: list[Bbox] = []
    for p in points:
        x, y = to_pixels((p.x, p.y))
        taken.append(Bbox.from_extents(x - 6 * px, y - 6 * px, x + 6 * px, y + 6 * px))
    strokes = []
    for line in lines:
        (x0, y0), (x1, y1) = to_pixels(list(line))
        strokes.append(Bbox.from_extents(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    left_out = 0
    for p in sorted((p for p in points if p.text), key=lambda p: not p.first):
        text = axes.annotate(
            p.text,
            (p.x, p.y),
            (0, 0),
            textcoords="offset points",
            size=9,
            color=INK if p.first else MUTED,
            va="center",
            ha="center",
            zorder=7,
            gid="label",
        )
        text.set_path_effects([patheffects.withStroke(linewidth=2.5, foreground=PAPER)])
        extent = text.get_window_extent(renderer)
        place = nearest_place(tuple(to_pixels((p.x, p.y))), extent.width, extent.height, px, inside, taken, strokes)
        if place is None:
            text.remove()
            left_out += 1
            continue
        dx, dy, distance, box = place
        text.set_position((dx / px, dy / px))
        taken.append(box)
        if distance > 12:
            x, y = to_pixels((p.x, p.y))
            near = (min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1))
            axes.annotate(
                "",
                (p.x, p.y),
                ((near[0] - x) / px, (near[1] - y) / px),
                textcoords="offset points",
                zorder=3,
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 5},
            )
    return left_out


def nearest_place(
    at: Sequence[float], width: float, height: float, px: float, inside: Bbox, taken: Sequence[Bbox], strokes: Sequence[Bbox]
) -> tuple[float, float, float, Bbox] | None:
    """(dx, dy in pixels, distance in points, box) of the best free place for a text of that size around a point."""
    from matplotlib.transforms import Bbox

    best: tuple[float, float, float, float, Bbox] | None = None
    for distance in (8, 14, 22, 32, 44, 58):
        for order, angle in enumerate((0, 180, 40, -40, 140, -140, 90, -90, 65, -65, 115, -115)):
            c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            aside = (abs(c) > 0.2) * math.copysign(width / 2, c)
            dx, dy = c * distance * px + aside, s * distance * px + s * height / 2
            x, y = at[0] + dx, at[1] + dy
            box = Bbox.from_extents(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            if outside or any(box.overlaps(other) for other in taken):
                continue
            price = distance + 0.4 * order + 9 * sum(box.overlaps(stroke) for stroke in strokes)
            if best is None or price < best[0]:
                best = (price, dx, dy, distance, box)
    return None if best is None else best[1:]


def spread(heights: Sequence[float], axes: Axes) -> list[float]:
    """Ascending data heights -> heights as fractions of the axes, at least one line of text apart and inside."""
    low, high = axes.get_ylim()
    gap = 15 / (axes.get_window_extent().height / DPI * 72)
    places: list[float] = []
    for y in heights:
        wanted = (y - low) / (high - low)
        places.append(wanted if not places else max(wanted, places[-1] + gap))
    over = max(0.0, places[-1] - 1) if places else 0.0
    for i in reversed(range(len(places))):
        limit = 1.0 if i == len(places) - 1 else places[i + 1] - gap
        places[i] = min(places[i], limit) if over else places[i]
    return places
