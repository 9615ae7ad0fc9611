"""The report of a sweep, from its record: a table for the terminal, Markdown, one HTML page, JSON, and the pictures."""

from __future__ import annotations

import html as markup
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pare.tracking import comparisons, drawing, plots, reading, units
from pare.tracking.paired import Difference, compare
from pare.tracking.record import (
    NO_DEPLOYMENT_FIGURE,
    Record,
    Trial,
    base_trial,
    direction,
    has_deployment_speed,
    labels,
    measured,
    metric,
    plain,
    settings,
)

MOST_ROWS = 40
"""Trials in the terminal's table; Markdown and HTML have all."""
ORDER = ("quality/kl", "quality/top1", "quality/acc", "size/bytes", "size/")
"""In which the columns stand."""
MARKS = {"done": "", "failed": "✗", "running": "▶", "pending": "·", "skipped": "–"}
ON_FRONT, NOT_APART = "●", "≈"
MOST_TASKS = 8
"""Columns of accuracy: those with the most questions; a group of tasks has more than each of its tasks."""
MOST_DETAILS = 300
"""Trials that the page shows in full."""

DIFFERENCES = ("trial", "metric", "against the base", "against the best", "the best")
TITLES = {
    "front": "Quality against size",
    "recipes": "Which recipe won where",
    "cost": "Cost of each trial",
    "sharing": "What sharing saved",
    "curves": "Training curves",
    "agreement": "Export against memory",
}


@dataclass(frozen=True)
class Column:
    title: str
    cell: Callable[[Trial], str]
    about: str = ""
    """What the figures mean; a tooltip in HTML."""
    rank: int = 0
    """Where the terminal is too narrow, columns of higher rank give way first; those of rank 0 never do."""
    figures: bool = True
    best: tuple[str, Callable[..., Trial]] | None = None
    """(metric, min or max): the finished trial with the best value is set off."""


def columns(record: Record) -> list[Column]:
    """What the record has figures for, and nothing else."""
    chosen, base = settings(record), base_trial(record)
    base_ppl = base["metrics"]["quality/ppl"] if base else None
    names = {name for t in record["trials"] for name, value in t["metrics"].items() if value is not None}
    runtimes = sorted({name.split("/")[1] for name in names if name.startswith(("speed/", "memory/"))})

    differences: dict[str, Difference | None] = {}

    def difference_to_base(t: Trial, base: Trial) -> Difference | None:
        if t["trial"] not in differences:  # the same cell is asked for again and again
            differences[t["trial"]] = compare(t, base)
        return differences[t["trial"]]

    def against_base(t: Trial) -> str:
        ppl = metric(t, "quality/ppl")
        if ppl is None or base is None or t is base or not base_ppl:
            return units.MISSING
        difference = difference_to_base(t, base)
        mark = "" if difference is None or difference.beyond_noise else f" {NOT_APART}"
        return units.percent(ppl / base_ppl - 1, signed=True) + mark

    def perplexity(t: Trial) -> str:
        if t["status"] != "done" and t["metrics"].get("quality/ppl") is None:
            return t["status"]
        if "quality/ppl" not in t["metrics"]:
            return units.MISSING
        return units.interval(t["metrics"]["quality/ppl"], metric(t, "quality/ppl_low"), metric(t, "quality/ppl_high"))

    def of(name: str, title: str, show: Callable[[float | None], str], about: str, rank: int) -> Column:
        best = None if name.startswith("cost/") else (name, min if direction(record, name) == "lower" else max)
        return Column(title, lambda t: show(t["metrics"].get(name)), about, rank, best=best)

    def by_runtime(
        kind: str, figure: str, title: str, show: Callable[[float | None], str], about: str, rank: int
    ) -> list[Column]:
        """One column whatever ran a trial: what ran it stands in a column of its own, where that was not always the same."""

        def cell(t: Trial) -> str:
            found = [show(t["metrics"][name]) for r in runtimes if t["metrics"].get(name := f"{kind}/{r}/{figure}") is not None]
            return " / ".join(found) + ("" if has_deployment_speed(t) else "†") if found else units.MISSING

        known = any(f"{kind}/{r}/{figure}" in names for r in runtimes)
        return [Column(title, cell, f"{about}; compare only equal runtimes ({', '.join(runtimes)})", rank)] if known else []

    def runtimes_of(t: Trial) -> str:
        return " / ".join(r for r in runtimes if any(name.split("/")[1:2] == [r] for name in t["metrics"])) or units.MISSING

    found = [
        Column("", lambda t: ON_FRONT if t["pareto"] else MARKS[t["status"]], "on the front: no other is smaller and better"),
        Column("trial", lambda t: t["trial"], figures=False),
        Column("recipe", lambda t: t["recipe"], rank=3, figures=False),
        Column(
            "settings",
            lambda t: " ".join(f"{k}={v}" for k, v in chosen[t["trial"]].items()),
            "overrides that differ",
            figures=False,
        ),
        Column(
            "perplexity",
            perplexity,
            "of the export on the test split, with its interval; lower is better",
            best=("quality/ppl", min),
        ),
    ]
    if base and len(record["trials"]) > 1:
        found.append(Column("vs base", against_base, "change of perplexity against the base", rank=1))
    tasks = accuracies(record, names)
    known = {name for t in record["trials"] for name in t.get("directions") or {} if not name.startswith("quality/acc")}
    for name in sorted(names, key=lambda name: (next((i for i, start in enumerate(ORDER) if name.startswith(start)), 0), name)):
        task = name.removeprefix("quality/acc/")
        if name == "quality/kl":
            found.append(of(name, "KL", units.number, "divergence from the base's predictions, nats a token", 4))
        elif name == "quality/top1_agreement":
            found.append(of(name, "same top", units.percent, "positions where the likeliest token is the base's", 8))
        elif name in tasks:
            found.append(of(name, f"acc {task}", units.percent, f"accuracy on {task}; higher is better", 5))
        elif name in known:
            better = f"{direction(record, name)} is better"
            found.append(of(name, name.removeprefix("quality/"), units.number, f"{name}; {better}", 5))
        elif name == "size/bytes":
            found.append(of(name, "size", units.size, "all weight files with headers", 1))
        elif name == "size/bits_per_weight":
            found.append(of(name, "bits/w", units.number, "bits per weight of the whole model", 2))
    found += by_runtime("speed", "decode_tok_s", "decode tok/s", units.number, "new tokens a second", 6)
    found += by_runtime("speed", "prefill_tok_s", "prefill tok/s", units.number, "tokens of the prompt a second", 9)
    found += by_runtime("memory", "peak_bytes", "peak", units.size, "peak memory", 10)
    if len(runtimes) > 1:
        found.append(Column("runtime", runtimes_of, "what ran it to measure speed and memory", 7, figures=False))
    if "cost/wall_s" in names:
        found.append(of("cost/wall_s", "cost", units.duration, "time of its tasks, a shared one divided by its trials", 7))
    if "cost/gpu_s" in names:
        found.append(of("cost/gpu_s", "GPU time", units.duration, "GPU-seconds of its tasks", 7))
    return found


def accuracies(record: Record, names: set[str]) -> set[str]:
    """The accuracies that have a column. Those of single groups of minimal pairs stand with each trial."""
    found = [n for n in names if n.startswith("quality/acc/") and not n.endswith(("_low", "_high"))]
    found = [n for n in found if not n.startswith("quality/acc/pairs.")]

    def questions(name: str) -> float:
        count = f"eval/questions/{name.removeprefix('quality/acc/')}"
        return max(metric(t, count) or 0 for t in record["trials"])

    return set(sorted(found, key=lambda n: (-questions(n), n))[:MOST_TASKS])


def best_trials(record: Record, column: Column) -> list[str]:
    """The trials with the best value of the column, if there is a choice."""
    if column.best is None:
        return []
    name, pick = column.best
    of_itself = name in ("quality/kl", "quality/top1_agreement")  # the base agrees with the base
    base = base_trial(record) if of_itself else None
    trials = [t for t in measured(record, name) if t is not base]
    if len(trials) < 2:
        return []
    value = metric(pick(trials, key=lambda t: t["metrics"][name]), name)
    winners = [t["trial"] for t in trials if metric(t, name) == value]
    return winners if len(winners) < len(trials) else []


def headline(record: Record) -> str:
    about = record["about"]
    base = about["base"]
    sizes = [f"{units.parameters(base['parameters'])} parameters"] if base.get("parameters") else []
    sizes += [units.size(base["bytes"])] if base.get("bytes") else []
    protocol = about["evaluation"].get("protocol")
    tokens = about["evaluation"].get("test_tokens") if not protocol else None
    return (
        base["name"]
        + (f" ({', '.join(sizes)})" if sizes else "")
        + f" on {about['data']}"
        + (f", {tokens:,} test tokens" if tokens else "")
        + (f", {protocol}" if protocol else "")
        + f"; {about['status']}, {units.duration(about.get('wall_s'))}"
    )


def notes(record: Record) -> list[tuple[str, str]]:
    """(which trials, note), equal notes of several trials together."""
    name, said = labels(record), dict[str, list[str]]()
    for t in record["trials"]:
        for note in t["notes"]:
            said.setdefault(note, []).append(name[t["trial"]])
    return [(", ".join(who[:6]) + (f" and {len(who) - 6} more" if len(who) > 6 else ""), note) for note, who in said.items()]


def failures(record: Record) -> list[tuple[str, str, str]]:
    """(trial, what failed where, message in one printable line)."""
    name = labels(record)
    return [(name[t["trial"]], *failure(t)) for t in record["trials"] if t["error"]]


def failure(trial: Trial) -> tuple[str, str]:
    """(class of the failure and where, last line of the message with nothing unprintable)."""
    error = trial["error"]
    where = f" in {error['task']}" if error.get("task") else ""
    last = (str(error["message"]).strip().splitlines() or [""])[-1]
    return error["failure"] + where, "".join(c if c.isprintable() else " " for c in last).strip()


def legend(record: Record, shown: Sequence[Column]) -> list[str]:
    lines = (
        [f"{ON_FRONT} on the front: no other trial is both smaller and better."]
        if any(t["pareto"] for t in record["trials"])
        else []
    )
    signed = any(column.cell(t).endswith("†") for column in shown for t in record["trials"])
    if any(NOT_APART in column.cell(t) for column in shown if column.title == "vs base" for t in record["trials"]):
        lines.append(f"{NOT_APART} not distinguishable from the base: the interval of the difference holds zero.")
    return lines + ([f"† {NO_DEPLOYMENT_FIGURE}: see the notes."] if signed else [])


# Terminal


def terminal(record: Record) -> Any:
    """A rich renderable: the table, as many columns as the width has room for, and what it says in words."""
    return Terminal(record)


@dataclass
class Terminal:
    record: Record

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.measure import Measurement
        from rich.padding import Padding
        from rich.text import Text

        record = self.record
        shown, hidden = columns(record), list[Column]()
        table = rich_table(record, shown)
        endless = options.update(max_width=10_000)
        while Measurement.get(console, endless, table).maximum > options.max_width and any(c.rank for c in shown):
            hidden.append(max(shown, key=lambda c: c.rank))
            shown.remove(hidden[-1])
            table = rich_table(record, shown)
        yield Text.assemble((record["name"], "bold"), "  ", (f"sweep {record['sweep']}", "dim"))
        yield Text(headline(record), style="dim")
        yield table
        lines = legend(record, shown)
        if len(record["trials"]) > MOST_ROWS:
            lines.append(
                f"{MOST_ROWS} of {len(record['trials'])} trials: the front, then the lowest perplexities. The report has all."
            )
        if hidden:
            lines.append(
                f"No room for: {', '.join(dict.fromkeys(c.title for c in hidden))}. A wider terminal or the report shows them."
            )
        for line in lines:
            yield Text(line, style="dim")
        told = (("What it says", reading.sentences), ("Sharing", reading.sharing), ("Cost", reading.costs))
        for title, sentences in ((title, read(record)) for title, read in told):
            if not sentences:
                continue
            yield Text(f"\n{title}", style="bold")
            for sentence in sentences:
                yield Padding(Text(f"{sentence}"), (0, 0, 0, 2))
        for title, rows in (("Failed", failures(record)), ("Notes", notes(record))):
            if rows:
                yield Text(f"\n{title}", style="bold red" if title == "Failed" else "bold")
            for row in rows:
                yield Padding(Text(": ".join(row)), (0, 0, 0, 2))


def rich_table(record: Record, shown: Sequence[Column]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", padding=(0, 1))
    best = {c.title + c.about: best_trials(record, c) for c in shown}
    for column in shown:
        wraps = column.title == "settings"
        table.add_column(Text(column.title), justify="right" if column.figures else "left", no_wrap=not wraps, overflow="fold")
    tone = {"failed": "red", "pending": "dim", "skipped": "dim", "running": "cyan"}
    for t in rows(record):
        cells = []
        for column in shown:
            style = tone.get(t["status"], "")
            if t["trial"] in best[column.title + column.about]:
                style = "bold green"
            elif t["pareto"] and column.title in ("", "trial"):
                style = "green"
            cells.append(Text(column.cell(t), style=style))
        table.add_row(*cells)
    return table


def rows(record: Record) -> list[Trial]:
    """The trials to show in a terminal, in the order of the record."""
    trials = record["trials"]
    if len(trials) <= MOST_ROWS:
        return trials

    base = base_trial(record)

    def order(t: Trial) -> tuple[bool, float]:
        ppl = metric(t, "quality/ppl")
        return (not t["pareto"] and t is not base, float("inf") if ppl is None else ppl)

    kept = [t["trial"] for t in sorted(trials, key=order)[:MOST_ROWS]]
    return [t for t in trials if t["trial"] in kept]


# Markdown


def markdown(record: Record, pictures: Sequence[str] = ()) -> str:
    """The report as GitHub-flavoured Markdown; `pictures` are the names of those that lie in plots/ beside it."""
    shown = columns(record)
    best = [best_trials(record, c) for c in shown]
    lines = [
        f"# {md(record['name'])}",
        "",
        md(f"{headline(record)}."),
        "",
        f"Sweep `{code(record['sweep'])}`, made by `{code(record['about']['command'])}`.",
    ]
    lines += [
        "",
        "## Trials",
        "",
        table_row(md(c.title) for c in shown),
        table_row("--:" if c.figures else ":--" for c in shown),
    ]
    for t in record["trials"]:
        cells = [md(column.cell(t)) for column in shown]
        lines.append(
            table_row(
                f"**{cell}**" if cell and t["trial"] in winners else cell for cell, winners in zip(cells, best, strict=True)
            )
        )
    lines += ["", *legend(record, shown)]
    lines += ["", "## What it says", "", *(f"- {md(s)}" for s in reading.sentences(record)), "", "## Sharing", ""]
    lines += [f"- {md(s)}" for s in reading.sharing(record)]
    if costs := reading.costs(record):
        lines += ["", "## Cost", "", *(f"- {md(s)}" for s in costs)]
    if differences := comparisons.rows(record):
        head = DIFFERENCES
        lines += ["", "## Differences", "", comparisons.HOW, "", table_row(head), table_row((":--",) * len(head))]
        lines += [table_row(map(md, (row.trial, row.metric, row.base, row.best, row.winner))) for row in differences]
    for title, found in (("Failed", failures(record)), ("Notes", notes(record))):
        if found:
            lines += ["", f"## {title}", "", *("- " + ": ".join([f"**{md(row[0])}**", *map(md, row[1:])]) for row in found)]
    exported = [t for t in record["trials"] if t["export_path"]]
    if exported:
        lines += ["", "## Exports", "", table_row(("trial", "opens with", "path")), table_row((":--",) * 3)]
        lines += [
            table_row((md(t["trial"]), md(t["opens_with"] or units.MISSING), f"`{code(t['export_path'])}`")) for t in exported
        ]
    for name in pictures:
        lines += ["", f"## {TITLES[name]}", "", f"![{TITLES[name]}](plots/{name}.png)"]
    return "\n".join(lines) + "\n"


def md(string: str) -> str:
    """Text as itself: one line in which nothing is Markdown or HTML."""
    for sign in "\\`*_[]|~#":
        string = string.replace(sign, "\\" + sign)
    return " ".join(string.replace("&", "&amp;").replace("<", "&lt;").split())


def code(string: str) -> str:
    return " ".join(str(string).replace("`", "'").replace("|", "¦").split())


def table_row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


# HTML


def html(record: Record, pictures: Mapping[str, str]) -> str:
    """One page that needs nothing beside it. pictures: name -> <svg> element, as `plots.svg` makes it."""
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    figures = {name: themed(picture) for name, picture in pictures.items()}
    about, name = record["about"], labels(record)
    parts = [
        f"<header><h1>{esc(record['name'])}</h1><p>{esc(headline(record))}.</p>",
        f"<p class=dim>Sweep <code>{esc(record['sweep'])}</code>, started {esc(about['started_at'])}, "
        f"by <code>{esc(about['command'])}</code></p></header>",
        bullets("What it says", reading.sentences(record)),
        figure("front", figures),
        html_table(record),
        html_differences(record),
        bullets("Failed", [": ".join(row) for row in failures(record)]),
        *(figure(name, figures) for name in ("recipes", "cost", "sharing")),
        bullets("Sharing", reading.sharing(record)),
        bullets("Cost", reading.costs(record)),
        *(figure(name, figures) for name in ("curves", "agreement")),
        bullets("Notes", [": ".join(row) for row in notes(record)]),
        "<section><h2>Each trial</h2>",
        *(html_trial(i, record["trials"][i], name[record["trials"][i]["trial"]]) for i in detailed(record)),
        more_trials(record),
        f"</section><section><h2>Made with</h2>{definitions(about)}</section>",
    ]
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{esc(record["name"])}: Pare</title>'
    )
    body = "\n".join(part for part in parts if part)
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{style}</style></head>\n<body><main>{body}</main></body></html>\n'
    )


def detailed(record: Record) -> list[int]:
    """Places of the trials that the page shows in full: all, or of very many the front, the base, what failed and the first."""
    trials = record["trials"]
    first = sorted(
        range(len(trials)), key=lambda i: not (trials[i]["pareto"] or trials[i]["recipe"] == "base" or trials[i]["error"])
    )
    return sorted(first[:MOST_DETAILS])


def more_trials(record: Record) -> str:
    more = len(record["trials"]) - MOST_DETAILS
    return f"<p class=dim>{more:,} further trials stand in the table above and in full in report.json.</p>" if more > 0 else ""


def esc(value: Any) -> str:
    return markup.escape(str(value), quote=True)


def themed(svg: str) -> str:
    """The picture with the reader's colours of text and ground."""
    for colour, name in ((drawing.INK, "ink"), (drawing.MUTED, "muted"), (drawing.GRID, "grid"), (drawing.PAPER, "paper")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def figure(name: str, figures: Mapping[str, str]) -> str:
    return f'<figure role="img" aria-label="{esc(TITLES[name])}">{figures[name]}</figure>' if name in figures else ""


def bullets(title: str, lines: Sequence[str]) -> str:
    return (
        f"<section><h2>{esc(title)}</h2><ul>{''.join(f'<li>{esc(line)}</li>' for line in lines)}</ul></section>"
        if lines
        else ""
    )


def html_table(record: Record) -> str:
    shown = columns(record)
    best = [best_trials(record, c) for c in shown]
    head = "".join(f'<th class="{"n" if c.figures else "t"}" title="{esc(c.about)}">{esc(c.title)}</th>' for c in shown)
    body = []
    for i, t in enumerate(record["trials"]):
        cells = []
        for column, winners in zip(shown, best, strict=True):
            kind = ("n" if column.figures else "t") + (" best" if t["trial"] in winners else "")
            cell = esc(column.cell(t))
            cells.append(f'<td class="{kind}">{f"<a href=#t{i}>{cell}</a>" if column.title == "trial" else cell}</td>')
        body.append(f'<tr class="{esc(t["status"])}{" front" if t["pareto"] else ""}">{"".join(cells)}</tr>')
    below = "".join(f"<p class=dim>{esc(line)}</p>" for line in legend(record, shown))
    table = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    return f"<section><h2>Trials</h2>{table}{below}</section>"


def html_differences(record: Record) -> str:
    rows = [(row.trial, row.metric, row.base, row.best, row.winner) for row in comparisons.rows(record)]
    if not rows:
        return ""
    head = "".join(f"<th class=t>{esc(title)}</th>" for title in DIFFERENCES)
    body = "".join(f"<tr>{''.join(f'<td class=t>{esc(cell)}</td>' for cell in row)}</tr>" for row in rows)
    table = f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    return f"<section><h2>Differences</h2><p class=dim>{esc(comparisons.HOW)}</p>{table}</section>"


def html_trial(i: int, t: Trial, name: str) -> str:
    tasks = "".join(
        f"<tr><td>{esc(task['label'])}</td><td>{esc(task['type'])}</td><td>{esc(task['status'])}</td>"
        f"<td class=n>{units.duration(task['wall_s'])}</td>"
        f"<td class=n>{task['shared_by']}</td><td><code>{esc(task['task'])}</code></td></tr>"
        for task in t["tasks"]
    )
    facts = {
        "artifact": t["artifact"],
        "export": t["export_path"],
        "opens with": t["opens_with"],
        "overrides": " ".join(f"{key}={value}" for key, value in t["overrides"].items()),
        "error": t["error"] and "\n".join(str(value) for value in t["error"].values()),
        "notes": "\n".join(t["notes"]),
        **t["metrics"],
    }
    heads = "".join(f"<th>{name}</th>" for name in ("task", "type", "status", "time", "for trials", "fingerprint"))
    return (
        f'<details id="t{i}"><summary><b>{esc(name)}</b> <span class=dim>{esc(t["trial"])}, {esc(t["status"])}</span></summary>'
        f"{definitions({key: value for key, value in facts.items() if value not in (None, '')})}"
        f"<div class=wide><table><thead><tr>{heads}</tr></thead><tbody>{tasks}</tbody></table></div>"
        f"<pre>{esc(json.dumps(plain(t['config']), indent=2, ensure_ascii=False))}</pre></details>"
    )


def definitions(facts: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{k} {shown(v)}" for k, v in value.items())
        if isinstance(value, (list, tuple)):
            return ", ".join(map(shown, value)) or "none"
        return f"{value:,.6g}" if isinstance(value, float) else str(value)

    return "<dl>" + "".join(f"<dt>{esc(key)}</dt><dd>{esc(shown(value))}</dd>" for key, value in facts.items()) + "</dl>"


# Files


def write_report(record: Record, directory: Path) -> list[Path]:
    """Writes report.json, report.md, report.html and plots/*.png into the directory and returns their paths."""
    (directory / "plots").mkdir(parents=True, exist_ok=True)
    figures = plots.draw(record)
    written = []
    for name in plots.PICTURES:
        path = directory / "plots" / f"{name}.png"
        if name in figures:
            path.write_bytes(plots.png(figures[name]))
            written.append(path)
        else:
            path.unlink(missing_ok=True)
    pages: dict[str, Callable[[], str]] = {
        "report.md": lambda: markdown(record, list(figures)),
        "report.html": lambda: html(record, {name: plots.svg(figure) for name, figure in figures.items()}),
    }
    for name, page in pages.items():
        (directory / name).write_text(page(), encoding="utf-8")
    return [write_json(record, directory), *(directory / name for name in pages), *written]


def write_json(record: Record, directory: Path) -> Path:
    """Writes report.json, a line for each trial: that of ten thousand trials is never in memory as a whole."""
    path = directory / "report.json"
    head = json.dumps(plain({**{k: v for k, v in record.items() if k != "trials"}, "trials": []}), indent=1, allow_nan=False)
    with path.open("w", encoding="utf-8") as f:
        f.write(head.removesuffix("]\n}"))
        for i, trial in enumerate(record["trials"]):
            f.write((",\n  " if i else "\n  ") + json.dumps(plain(trial), ensure_ascii=False, allow_nan=False))
        f.write("\n ]\n}\n")
    return path
