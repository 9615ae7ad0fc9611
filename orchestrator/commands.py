"""The verbs that plan and run. As for every verb: a function (arguments, PARE_HOME) -> exit code, named like the verb.

The verbs that only read are in `reading`, those that keep a home and its store in order in `upkeep`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.orchestrator.errors import ConfigError, InfeasibleError, nearest

if TYPE_CHECKING:
    from rich.console import Console

    from pare.orchestrator.config import Experiment
    from pare.orchestrator.ledger import Ledger
    from pare.orchestrator.plan import Plan
    from pare.workers.store import Store

SCHEMA_VERSION = 1
"""Of what `--json` prints."""

MOST_ROWS = 60
"""Tasks of which each has its row in the table of a plan; of more there is a row for each type and state."""

STYLES = {
    "new": "[yellow]run[/yellow]",
    "late": "[cyan]late[/cyan]",
    "cached": "[dim]cached[/dim]",
    "unneeded": "[dim]not needed[/dim]",
}
"""State of a task -> how the table says it. Late tasks stand for what a query will choose: at most these."""

NO_WORK = {"cached": "its result is in the store", "unneeded": "all that reads it is done"}
"""State -> why nothing has to be done."""


def plan(arguments: argparse.Namespace, home: Path) -> int:
    """Shows what would run and what it takes; spends nothing."""
    if arguments.cfg:
        return print_config(arguments)
    from pare.orchestrator import places, preflight
    from pare.orchestrator.estimate import History

    experiment, graph, device = prepare(arguments, home)
    store = places.store_of(home, experiment)
    ledger = places.ledger_if_any(home)
    states, told = states_of(graph, store, ledger)
    tasks = [task for fp, task in graph.tasks.items() if states[fp] in ("new", "late")]
    history = History.read(ledger)
    estimates, supply = preflight.forecast(experiment, graph, tasks, device, home, history)
    said = preflight.summary(graph, states, history, supply, estimates, told)
    if arguments.svg:
        from pare.orchestrator import drawing

        Path(arguments.svg).write_text(drawing.svg(graph, states, estimates), encoding="utf-8")
        say(f"the plan is drawn in {arguments.svg}")
    problem = "\n".join(short["message"] for short in said["cannot_fit"]) or None
    if arguments.json:
        show_json(plan_json(experiment, graph, device, states, said, told, problem))
    else:
        show_plan(experiment, graph, states, said, told)
    if problem:
        raise InfeasibleError(problem)
    return 10 if arguments.check and tasks else 0


def states_of(graph: Plan, store: Store, ledger: Ledger | None = None) -> tuple[dict[str, str], dict[str, str]]:
    """(fingerprint -> new, late, cached or unneeded; fingerprint -> why, where the records do not say).

    Queries whose candidates have all been scored are answered first, as a run would.
    """
    from pare.orchestrator.engine import STOPPED

    refused = graph.answer(store)
    new, there = {task.fingerprint for task in graph.missing(store)}, store.present(graph.tasks)
    states = {
        fp: "late" if task.late else "new" if fp in new else "cached" if fp in there else "unneeded"
        for fp, task in graph.tasks.items()
    }
    told = dict.fromkeys(new & there, "its files were dropped to save room, and something new needs them")
    for fp, task in graph.tasks.items():
        if task.late and refused.keys() >= set(task.trials):
            states[fp], told[fp] = "unneeded", refused[task.trials[0]]
    query = (
        "SELECT fingerprint, failure, MAX(attempt.id) FROM attempt JOIN task USING (fingerprint) "
        "WHERE task.status = 'failed' OR (task.status = 'pending' AND attempt.status = 'stopped')"
    )
    for row in ledger.rows(f"{query} GROUP BY fingerprint") if ledger else ():
        failure = row["failure"]
        told[row["fingerprint"]] = "it was stopped" if failure == STOPPED else f"it failed when it was last tried: {failure}"
    return states, told


def plan_json(
    experiment: Experiment,
    graph: Plan,
    device: str,
    states: Mapping[str, str],
    said: Mapping[str, Any],
    told: Mapping[str, str],
    problem: str | None,
) -> dict[str, Any]:
    """The object that `pare plan --json` prints."""
    return {
        "schema_version": SCHEMA_VERSION,
        "name": experiment.name,
        "device": device,
        **{key: value for key, value in said.items() if key != "new"},
        "infeasible": problem,
        "trials": [
            {"trial": t.name, "recipe": t.recipe, "overrides": t.overrides, "skipped": t.skipped} for t in experiment.trials
        ],
        "plan": [
            {
                "task": fp[:12],
                "fingerprint": fp,
                "type": t.type,
                "label": t.label,
                "state": states[fp],
                **(said["new"].get(fp) or {"why": told.get(fp) or NO_WORK[states[fp]]}),
                "trials": t.trials,
                "inputs": t.inputs,
            }
            for fp, t in graph.tasks.items()
        ],
    }


def show_plan(
    experiment: Experiment, graph: Plan, states: Mapping[str, str], said: Mapping[str, Any], told: Mapping[str, str]
) -> None:
    """The plan as a table, producers first, and below it what it takes."""
    from rich.table import Table

    from pare.orchestrator.preflight import duration, footer

    count, new = Counter(states.values()), said["new"]
    table = Table(title=f"plan of {experiment.name}: {count['new'] + count['late']} to run, {count['cached']} cached")
    rows: dict[tuple[str, str], list[str]] = {}
    for fp, task in graph.tasks.items():
        rows.setdefault((states[fp], fp if len(graph.tasks) <= MOST_ROWS else task.type), []).append(fp)
    one_each = len(rows) == len(graph.tasks)
    for column in ("", "task", "what", "used by", "time", "why"):
        table.add_column(
            column, no_wrap=column in ("", "task"), justify="right" if column == "time" else "left", overflow="fold"
        )
    for (state, key), own in rows.items():
        users = {name for fp in own for name in graph.tasks[fp].trials}
        reasons = [why for fp in own if (why := new[fp]["why"] if fp in new else told.get(fp))]
        whys = Counter(why if one_each else in_general(why) for why in reasons)
        why = "; ".join(f"{said} ({n:,})" if len(whys) > 1 else said for said, n in whys.most_common(3))
        what = (own[0][:12], graph.tasks[own[0]].label) if one_each else (f"{len(own):,} x", key)
        used = next(iter(users)) if len(users) == 1 else f"{len(users):,} trials"
        time = duration(sum(new[fp]["wall_s"] for fp in own)) if own[0] in new else ""
        table.add_row(STYLES[state], *what, used, time, why)
    console = wide_console()
    console.print(table)
    skipped = [trial for trial in experiment.trials if trial.skipped]
    lines = [f"skipped {trial.name}: {trial.skipped}" for trial in skipped[:MOST_ROWS]]
    lines += [f"and {len(skipped) - MOST_ROWS} more trials are skipped"] if len(skipped) > MOST_ROWS else []
    separate, merged = graph.total_if_separate, len(graph.tasks)
    lines.append(f"{len(experiment.trials)} trials one by one would be {separate} tasks; merged they are {merged}.")
    lines += footer(said)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def in_general(why: str) -> str:
    """A reason without what holds for one task alone.

    >>> in_general("its model is new: rtn rtn-bits=3"), in_general("spec.settings.bits 3 -> 4, spec.settings.g 32 -> 64")
    ('its model is new', 'spec.settings.bits, spec.settings.g')
    """
    return ", ".join(part.split(" ")[0] for part in why.split(", ")) if " -> " in why else why.split(":")[0]


def run(arguments: argparse.Namespace, home: Path) -> int:
    """Runs what is missing and reports."""
    if arguments.dry_run or arguments.cfg:
        arguments.check, arguments.svg = False, None
        return plan(arguments, home)
    say("reading the configuration")
    experiment, graph, device = prepare(arguments, home)
    return drive(arguments, home, experiment, graph, device, command_line())


def prefetch(arguments: argparse.Namespace, home: Path) -> int:
    """Brings models, data and evaluation tasks into the store; the sweep then runs without a network."""
    from pare.orchestrator import prefetch as fetching
    from pare.orchestrator.drive import program

    experiment, graph, device = prepare(arguments, home)
    command = shlex.join([program(), "run", *arguments.overrides])
    code, said = fetching.run(experiment, graph, device, home, command)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, **said})
    else:
        show_fetched(said, command)
    return code


def show_fetched(said: Mapping[str, Any], command: str) -> None:
    """What was fetched, as a table, and what to type next."""
    from rich.table import Table

    from pare.tracking.units import size

    table = Table(title=f"prefetched for {said['sweep']}")
    for column in ("", "task", "what", "size"):
        table.add_column(column, no_wrap=column != "what", justify="right" if column == "size" else "left", overflow="fold")
    for task in said["tasks"]:
        table.add_row(task["state"], task["task"], task["label"], size(task["bytes"]))
    lines = [f"{key} is commit {commit}" for key, commit in said["commits"].items()]
    if said["status"] == "done":
        lines.append(f"without a network: HF_HUB_OFFLINE=1 {command}")
    console = wide_console()
    console.print(table)
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


def resume(arguments: argparse.Namespace, home: Path) -> int:
    """Goes on with a sweep as the ledger keeps it, whatever has become of the files it was configured with."""
    named, overrides = name_and_overrides(arguments)
    sweep, experiment, _ = restored(arguments, home, named, overrides)
    return drive(arguments, home, experiment, *planned(experiment, home), sweep["command"])


def retry_failed(arguments: argparse.Namespace, home: Path) -> int:
    """Tries the failed trials of a sweep again, of some classes or all."""
    from pare.orchestrator.engine import RETRIES

    named, overrides = name_and_overrides(arguments)
    sweep, experiment, rows = restored(arguments, home, named, overrides)
    classes = {row["name"]: json.loads(row["failure"])["failure"] for row in rows if row["status"] == "failed"}
    for wanted in arguments.classes:
        if wanted not in {*RETRIES, *classes.values()}:
            raise ConfigError(f"--class {wanted}: there is no such class of failure. There is: {', '.join(sorted(RETRIES))}.")
    only = [name for name, failure in classes.items() if not arguments.classes or failure in arguments.classes]
    if not only:
        found = ", ".join(f"{n} {failure}" for failure, n in Counter(classes.values()).items()) or "none"
        say(f"sweep {sweep['id']} has no failed trials to try again (failed: {found})")
        return 0
    return drive(arguments, home, experiment, *planned(experiment, home), sweep["command"], only=only)


def rerun(arguments: argparse.Namespace, home: Path) -> int:
    """Runs one trial again, as it was or with other values, which makes it a sweep of its own."""
    from pare.orchestrator import config, places
    from pare.orchestrator.trials import SWEEP_PARTS

    whole = [text for text in arguments.overrides if text.split("=")[0].split(".")[0] in SWEEP_PARTS]
    values = [text for text in arguments.overrides if text not in whole]
    sweep, experiment, _ = restored(arguments, home, arguments.sweep, whole)
    trial = next((t for t in experiment.trials if t.name == arguments.trial), None)
    if trial is None:
        names = [t.name for t in experiment.trials]
        raise ConfigError(f"sweep {sweep['id']} has no trial {arguments.trial!r}.{nearest(arguments.trial, names)}")
    if trial.skipped and not values:
        raise ConfigError(f"trial {trial.name} was skipped: {trial.skipped}. Try: pare rerun {trial.name} KEY=VALUE")
    if values:
        name = f"{experiment.name}-{trial.name}"
        experiment = dataclasses.replace(experiment, name=name, trials=[config.changed(trial, values)])
        return drive(arguments, home, experiment, *planned(experiment, home), command_line())
    graph, device = planned(experiment, home)
    states_of(graph, places.store_of(home, experiment))
    tasks = [graph.tasks[fp] for fp in graph.goals[trial.name].tasks]
    again = {task.fingerprint for task in tasks if len(task.trials) == 1 and not task.late}
    return drive(arguments, home, experiment, graph, device, sweep["command"], only=[trial.name], again=again)


def drive(
    arguments: argparse.Namespace, home: Path, experiment: Experiment, graph: Plan, device: str, command: str,
    only: Collection[str] | None = None, again: Collection[str] = (),
) -> int:  # fmt: skip
    from pare.orchestrator import drive as driver

    options: dict[str, Any] = {"fail_fast": arguments.fail_fast, "as_json": arguments.json, "only": only, "again": again}
    return driver.run(experiment, graph, device, home, command, **options)


def name_and_overrides(arguments: argparse.Namespace) -> tuple[str | None, list[str]]:
    """`pare resume cluster.slots=1` names no sweep."""
    named, overrides = arguments.sweep, list(arguments.overrides)
    return (None, [named, *overrides]) if named and "=" in named else (named, overrides)


def restored(
    arguments: argparse.Namespace, home: Path, named: str | None, overrides: Sequence[str] = ()
) -> tuple[dict[str, Any], Experiment, list[dict[str, Any]]]:
    """(row of a sweep in the ledger, the experiment that it is, rows of its trials)."""
    from pare.orchestrator import config, places

    with closing(places.ledger_of(home, arguments.store)) as ledger:
        sweep = dict(ledger.find_sweep(named))
        rows = [dict(row) for row in ledger.trials(sweep["id"])]
    about = json.loads(sweep["about"])
    if "common" not in about:
        raise ConfigError(f"sweep {sweep['id']} was run by an older Pare. Go on with: {sweep['command']}")
    place = [f"store.url={json.dumps(arguments.store)}"] if arguments.store else []
    experiment = config.restore(rows, about["common"], [*place, *overrides])
    return sweep, experiment, rows


def planned(experiment: Experiment, home: Path) -> tuple[Plan, str]:
    """(plan, device) of an experiment."""
    from pare.orchestrator import places, preflight
    from pare.orchestrator.plan import build_plan

    device = preflight.device_for(experiment)
    memory = places.remembered_names(lambda: places.store_of(home, experiment))
    return build_plan(experiment, device, preflight.cores_for(experiment, device), memory), device


def submit(arguments: argparse.Namespace, home: Path) -> int:
    """Runs a command on a cluster."""
    from pare.orchestrator import submit as cluster

    return cluster.submit(arguments, home)


def jobs(arguments: argparse.Namespace, home: Path) -> int:
    """Lists, reads and stops submitted jobs."""
    from pare.orchestrator import submit as cluster

    return cluster.jobs(arguments, home)


def prepare(arguments: argparse.Namespace, home: Path) -> tuple[Experiment, Plan, str]:
    """(experiment, plan, device) of a command's overrides."""
    from pare.orchestrator import config

    experiment = config.load(arguments.overrides, arguments.config_dir, arguments.config_name)
    return (experiment, *planned(experiment, home))


def print_config(arguments: argparse.Namespace) -> int:
    """`--cfg job`: the composed config, as Hydra prints it."""
    from omegaconf import OmegaConf

    from pare.orchestrator import config

    with config.session(arguments.overrides, arguments.config_dir, arguments.config_name) as composer:
        print(OmegaConf.to_yaml(composer.top(), resolve=arguments.resolve), end="")
    return 0


def wide_console() -> Console:
    """On stdout, as wide as the terminal; wide enough for a table where there is none."""
    import shutil

    from rich.console import Console

    return Console(width=None if shutil.get_terminal_size((0, 0)).columns else 140)


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command_line() -> str:
    from pare.orchestrator.drive import program

    return shlex.join([program(), *sys.argv[1:]])
