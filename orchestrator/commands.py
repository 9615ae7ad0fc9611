"""What each verb of the command line does. A function per verb: (arguments, PARE_HOME) -> exit code."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pare.orchestrator.errors import ConfigError, InfeasibleError, PareError, nearest

if TYPE_CHECKING:
    from pare.orchestrator.config import Experiment
    from pare.orchestrator.plan import Plan

SCHEMA_VERSION = 1
"""Of what `--json` prints."""


def plan(arguments: argparse.Namespace, home: Path) -> int:
    """Shows what would run; spends nothing."""
    if arguments.cfg:
        return print_config(arguments)
    from pare.orchestrator import preflight
    from pare.workers.store import Store

    experiment, graph, device = prepare(arguments)
    store = Store(home / "store")
    missing = graph.missing(store)
    problem = None
    try:
        preflight.check_feasible(graph, missing, experiment, home, device)
    except InfeasibleError as e:
        problem = e
    new = {task.fingerprint for task in missing}
    states = {
        fp: "late" if task.late else "new" if fp in new else "cached" if store.has(fp) else "unneeded"
        for fp, task in graph.tasks.items()
    }
    if arguments.json:
        show_json(plan_json(experiment, graph, device, states, problem))
    else:
        show_plan(experiment, graph, states)
    if problem:
        raise problem
    return 10 if arguments.check and missing else 0


def plan_json(
    experiment: Experiment, graph: Plan, device: str, states: dict[str, str], problem: Exception | None
) -> dict[str, Any]:
    """The object that `pare plan --json` prints."""
    count = Counter(states.values())
    return {
        "schema_version": SCHEMA_VERSION,
        "name": experiment.name,
        "device": device,
        "tasks": {"total_if_separate": graph.total_if_separate, "unique": len(graph.tasks), **count},
        "infeasible": str(problem) if problem else None,
        "trials": [
            {"trial": t.name, "recipe": t.recipe, "overrides": t.overrides, "skipped": t.skipped} for t in experiment.trials
        ],
        "plan": [
            {
                "task": t.fingerprint[:12],
                "fingerprint": t.fingerprint,
                "type": t.type,
                "label": t.label,
                "state": states[t.fingerprint],
                "trials": t.trials,
                "inputs": t.inputs,
            }
            for t in graph.tasks.values()
        ],
    }


def show_plan(experiment: Experiment, graph: Plan, states: dict[str, str]) -> None:
    """The plan as a table, producers first."""
    from rich.console import Console
    from rich.table import Table

    # Late tasks stand for what a query will choose: at most these.
    styles = {
        "new": "[yellow]run[/yellow]",
        "late": "[cyan]late[/cyan]",
        "cached": "[dim]cached[/dim]",
        "unneeded": "[dim]not needed[/dim]",
    }
    count = Counter(states.values())
    table = Table(title=f"plan of {experiment.name}: {count['new']} to run, {count['cached']} cached")
    for column in ("", "task", "what", "used by"):
        table.add_column(column, no_wrap=column in ("", "task"))
    for task in graph.tasks.values():
        users = task.trials[0] if len(task.trials) == 1 else f"{len(task.trials)} trials"
        table.add_row(styles[states[task.fingerprint]], task.fingerprint[:12], task.label, users)
    console = Console()
    console.print(table)
    for trial in experiment.trials:
        if trial.skipped:
            console.print(f"skipped {trial.name}: {trial.skipped}", highlight=False)
    separate, merged = graph.total_if_separate, len(graph.tasks)
    console.print(
        f"{len(experiment.trials)} trials one by one would be {separate} tasks; merged they are {merged}.", highlight=False
    )


def run(arguments: argparse.Namespace, home: Path) -> int:
    """Runs what is missing and reports."""
    if arguments.dry_run or arguments.cfg:
        arguments.check = False
        return plan(arguments, home)
    from pare.orchestrator import drive

    say("reading the configuration")
    experiment, graph, device = prepare(arguments)
    return drive.run(experiment, graph, device, home, command_line(), fail_fast=arguments.fail_fast, as_json=arguments.json)


def resume(arguments: argparse.Namespace, home: Path) -> int:
    """Goes on with a sweep as the ledger keeps it, whatever has become of the files it was configured with."""
    from contextlib import closing

    from pare.orchestrator import config, drive, preflight
    from pare.orchestrator.ledger import Ledger
    from pare.orchestrator.plan import build_plan

    named, overrides = arguments.sweep, list(arguments.overrides)
    if named and "=" in named:  # `pare resume cluster.slots=1`
        named, overrides = None, [named, *overrides]
    with closing(Ledger(home)) as ledger:
        sweep = ledger.find_sweep(named)
        about = json.loads(sweep["about"])
        if "common" not in about:
            raise ConfigError(f"sweep {sweep['id']} was run by an older Pare. Go on with: {sweep['command']}")
        experiment = config.restore([dict(row) for row in ledger.trials(sweep["id"])], about["common"], overrides)
    refuse_unbuilt(experiment)
    device = preflight.device_for(experiment)
    graph = build_plan(experiment, device, preflight.cores_for(experiment, device))
    return drive.run(experiment, graph, device, home, sweep["command"], fail_fast=arguments.fail_fast, as_json=arguments.json)


def sync(arguments: argparse.Namespace, home: Path) -> int:
    """Empties the outbox."""
    from pare.orchestrator import outbox

    sent, left, problems = outbox.sync(home, arguments.sweep)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "sent": sent, "left": left, "problems": problems})
    else:
        print(f"{sent} rows told to MLflow, {left} left")
        for problem in problems:
            say(problem)
    return 6 if left or problems else 0


def status(arguments: argparse.Namespace, home: Path) -> int:
    """How far a sweep is, from the ledger alone."""
    from pare.orchestrator.ledger import Ledger

    ledger = Ledger(home)
    sweep = ledger.find_sweep(arguments.sweep)
    last = ledger.last_run(sweep["id"])
    trials = ledger.trials(sweep["id"])
    counts: dict[str, int] = {}
    fingerprints = {fp for trial in trials for fp in (json.loads(trial["goals"]) or {"tasks": []})["tasks"]}
    tasks = ledger.tasks(sorted(fingerprints))
    for task in tasks.values():
        counts[task["status"]] = counts.get(task["status"], 0) + 1
    running = [task["label"] for task in tasks.values() if task["status"] == "running"]
    if arguments.json:
        show_json(
            {
                "schema_version": SCHEMA_VERSION,
                "sweep": sweep["id"],
                "status": last["status"],
                "tasks": counts,
                "running": running,
                "trials": [{"trial": t["name"], "status": t["status"], "failure": json.loads(t["failure"])} for t in trials],
            }
        )
        return 0
    print(f"sweep {sweep['id']}: {last['status']}; tasks: " + ", ".join(f"{n} {state}" for state, n in sorted(counts.items())))
    for trial in trials:
        failure = json.loads(trial["failure"])
        print(f"  {trial['status']:8} {trial['name']}" + (f"  {failure['failure']}: {failure['message']}" if failure else ""))
    for label in running:
        print(f"  now: {label}")
    return 0


def report(arguments: argparse.Namespace, home: Path) -> int:
    """Prints a sweep's report; writes nothing."""
    from pare.orchestrator.ledger import Ledger
    from pare.orchestrator.record import build_record
    from pare.tracking import plots
    from pare.tracking import report as render
    from pare.workers.store import Store

    ledger = Ledger(home)
    record = build_record(ledger, Store(home / "store"), ledger.find_sweep(arguments.sweep)["id"])
    if arguments.json or arguments.format == "json":
        show_json(record)
    elif arguments.format == "md":
        print(render.markdown(record))
    elif arguments.format == "html":
        print(render.html(record, {name: plots.svg(figure) for name, figure in plots.draw(record).items()}))
    else:
        from rich.console import Console

        Console().print(render.terminal(record))
    return 0


def methods(arguments: argparse.Namespace, home: Path) -> int:
    """Lists the methods."""
    from pare.methods.contract import family, field_docs, load_all
    from pare.orchestrator.plan import default_of

    found: list[dict[str, Any]] = [
        {
            "name": name,
            "kind": cls.kind,
            "family": family(cls),
            "needs": [s.name for s in cls.needs],
            "summary": (sys.modules[cls.__module__].__doc__ or "").strip().split("\n")[0],
            "source": cls.source,
            "extra": cls.extra,
            "settings": [
                {"name": f.name, "type": str(f.type), "default": default_of(f), "doc": field_docs(cls).get(f.name, "")}
                for f in dataclasses.fields(cls)  # type: ignore[arg-type]
            ],
        }
        for name, cls in sorted(load_all().items())
    ]
    if arguments.json:
        show_json(found)
        return 0
    from rich.console import Console
    from rich.table import Table

    table = Table(title="methods", show_lines=True)
    for column in ("method", "kind", "family", "what", "settings"):
        table.add_column(column)
    for entry in found:
        settings = ", ".join(f"{s['name']}={s['default']}" for s in entry["settings"])
        table.add_row(
            entry["name"], entry["kind"], entry["family"], f"{entry['summary']}\n[dim]{entry['source']}[/dim]", settings
        )
    Console().print(table)
    return 0


def export(arguments: argparse.Namespace, home: Path) -> int:
    """Copies a trial's exported model to a directory."""
    from pare.orchestrator.ledger import Ledger
    from pare.orchestrator.record import build_record
    from pare.workers.export import adapter
    from pare.workers.export.card import with_metrics
    from pare.workers.store import MANIFEST, ArtifactError, Store

    ledger = Ledger(home)
    sweep = ledger.find_sweep(arguments.sweep)
    trials = {trial["name"]: trial for trial in ledger.trials(sweep["id"])}
    if arguments.trial not in trials:
        raise ConfigError(f"sweep {sweep['id']} has no trial {arguments.trial!r}.{nearest(arguments.trial, trials)}")
    goals = json.loads(trials[arguments.trial]["goals"])
    store = Store(home / "store")
    target = Path(arguments.to or arguments.trial)
    if target.exists():
        raise ConfigError(f"--to {target}: exists already; name a directory that does not")
    try:
        source = store.open(goals["export"]) if goals else None
    except ArtifactError as e:
        raise ConfigError(f"{e}. Make it again: {sweep['command']}") from e
    if source is None:
        raise ConfigError(f"trial {arguments.trial} was skipped; it has no export")
    partial = target.with_name(target.name + ".partial")
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(MANIFEST))
    partial.rename(target)
    if (target / "adapter_config.json").exists():
        adapter.relocate(target)
    record = build_record(ledger, store, sweep["id"])
    metrics = next(t["metrics"] for t in record["trials"] if t["trial"] == arguments.trial)
    (target / "README.md").write_text(with_metrics((target / "README.md").read_text(), metrics))
    about = json.loads((target / "export.json").read_text())
    print(f"{target}: {about['format']}, opens with {about['opens_with']}")
    return 0


def ui(arguments: argparse.Namespace, home: Path) -> int:
    """Serves the MLflow UI."""
    from pare.orchestrator.outbox import tracking_place
    from pare.tracking import ui as server

    uri, artifacts, _ = tracking_place(home)
    if uri == "auto" and not (home / "mlflow.db").exists():
        raise ConfigError(f"nothing is tracked in {home} yet. Try: pare run experiment=demo")
    try:
        server.serve(uri, artifacts, port=arguments.port)
    except server.UiError as e:
        raise PareError(str(e)) from e
    return 0


def doctor(arguments: argparse.Namespace, home: Path) -> int:
    """Checks the installation."""
    from pare.orchestrator import doctor as clinic

    findings = clinic.examine(home)
    if arguments.json:
        show_json({"schema_version": SCHEMA_VERSION, "findings": findings})
    else:
        for finding in findings:
            print(f"{ {'ok': '✓', 'warn': '!', 'fail': '✗'}[finding['state']] } {finding['what']}: {finding['found']}")
            if finding["remedy"]:
                print(f"    {finding['remedy']}")
    return 0 if all(f["state"] != "fail" for f in findings) else 4


def submit(arguments: argparse.Namespace, home: Path) -> int:
    """Runs a command on a cluster."""
    from pare.orchestrator import submit as cluster

    return cluster.submit(arguments, home)


def jobs(arguments: argparse.Namespace, home: Path) -> int:
    """Lists, reads and stops submitted jobs."""
    from pare.orchestrator import submit as cluster

    return cluster.jobs(arguments, home)


def prepare(arguments: argparse.Namespace) -> tuple[Any, Any, str]:
    """(experiment, plan, device) of a command's overrides."""
    from pare.orchestrator import config, preflight
    from pare.orchestrator.plan import build_plan

    experiment = config.load(arguments.overrides, arguments.config_dir, arguments.config_name)
    refuse_unbuilt(experiment)
    device = preflight.device_for(experiment)
    return experiment, build_plan(experiment, device, preflight.cores_for(experiment, device)), device


def refuse_unbuilt(experiment: Experiment) -> None:
    """Settings that the configuration knows and this version does not honour yet are refused, not passed over."""
    cluster, store = experiment.cluster, experiment.store
    for key, value, default in (
        ("cluster.address", cluster.address, "local"),
        ("cluster.gpus", cluster.gpus, None),
        ("cluster.gpu_memory_gb", cluster.gpu_memory_gb, None),
        ("cluster.labels", cluster.labels, {}),
        ("store.url", store.url, None),
        ("store.keep", store.keep, "all"),
        ("store.limit_gb", store.limit_gb, None),
    ):
        if value != default:
            raise ConfigError(f"{key}={value}: this version does not honour it yet. Try: {key}={json.dumps(default)}")


def print_config(arguments: argparse.Namespace) -> int:
    """`--cfg job`: the composed config, as Hydra prints it."""
    from omegaconf import OmegaConf

    from pare.orchestrator import config

    with config.session(arguments.overrides, arguments.config_dir, arguments.config_name) as composer:
        print(OmegaConf.to_yaml(composer.top(), resolve=arguments.resolve), end="")
    return 0


def show_json(value: Any) -> None:
    print(json.dumps(value, indent=1, default=str))


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def command_line() -> str:
    from pare.orchestrator.drive import program

    return shlex.join([program(), *sys.argv[1:]])
