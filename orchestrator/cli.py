"""The command `pare`. Results go to stdout, everything else to stderr. Heavy libraries are imported by the verb that
needs them, so that `pare --help` is instant.

Exit codes: 0 complete · 1 internal error · 2 usage or config · 3 finished, but trials failed · 4 infeasible here ·
5 the cluster was lost, resumable · 6 done, but tracking is behind · 7 another driver is at work · 8 ledger or store damaged ·
10 `plan --check`: there is work to do · 130/143 interrupted, state saved
"""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from pare import __version__
from pare.orchestrator import submit

EXAMPLES = """examples:
  pare run experiment=demo                                   the main job on a real model
  pare plan experiment=demo blocks.gptq.recipe.quantize.bits=4,3,2    what would run, what is there already
  pare prefetch experiment=demo                              bring what it needs from the network into the store
  pare run recipe=rtn,gptq recipe.quantize.bits=2,3,4        a sweep of your own
  pare explain gptq-bits=3                                   why its tasks would run again, field by field
  pare report                                                the latest sweep's table
  pare export gptq-bits=3 --to my-model                      a model to take away
"""


def home() -> Path:
    """Where store, ledger and tracking live: PARE_HOME, by default ./.pare."""
    return Path(os.environ.get("PARE_HOME") or ".pare")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="pare",
        description="Pares models down along their Pareto front: sweeps of compression and fine-tuning on Ray, kept in MLflow.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"pare {__version__}")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(
        room: str, name: str, text: str, example: str, json: bool = False, sweep: str | None = None, store: bool = False
    ) -> argparse.ArgumentParser:
        """room: the module that has the verb's function; sweep: what a sweep that is not named stands for."""
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(room=room)
        if sweep:
            sub.add_argument("sweep", nargs="?", help=f"id or name; default: {sweep}")
        if json:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        if store:
            sub.add_argument("--store", metavar="URL", help="of the sweep: all that this machine need know to go on with it")
        return sub

    def composed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; commas sweep")
        sub.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, searched first")
        sub.add_argument("-cn", "--config-name", default="config", metavar="NAME", help="root config (default: config)")
        sub.add_argument("-m", "--multirun", action="store_true", help="accepted for Hydra's sake: commas always sweep")

    def printed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--cfg", choices=["job"], help="print the composed config and stop")
        sub.add_argument("--resolve", action="store_true", help="with --cfg: interpolations resolved")

    def running(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--json", action="store_true", help="print the report as one JSON object at the end")
        sub.add_argument("--fail-fast", action="store_true", help="stop starting tasks after the first failure")

    latest = "the latest"
    plan = verb("commands", "plan", "Show what would run, why, and what it takes; spends nothing.",
                "pare plan experiment=demo --svg plan.svg", json=True)  # fmt: skip
    composed(plan)
    printed(plan)
    plan.add_argument("--check", action="store_true", help="exit 10 if there is work to do, 0 if not")
    plan.add_argument("--svg", metavar="FILE", help="draw the graph of tasks there")
    run = verb("commands", "run", "Run an experiment or a recipe; what is in the store is not run again.",
               "pare run experiment=demo")  # fmt: skip
    composed(run)
    printed(run)
    running(run)
    run.add_argument("--dry-run", action="store_true", help="the same as `pare plan`")
    prefetch = verb("commands", "prefetch", "Bring what needs the network into the store, so that the sweep runs without one.",
                    "pare prefetch experiment=demo model=hf model.name=ORG/NAME", json=True)  # fmt: skip
    composed(prefetch)
    resume = verb("commands", "resume", "Go on with a sweep, from what the ledger keeps of it.",
                  "pare resume demo cluster.slots=1", sweep=latest, store=True)  # fmt: skip
    retry = verb("commands", "retry-failed", "Try the failed trials of a sweep again.",
                 "pare retry-failed demo --class oom_host cluster.slots=1", sweep=latest, store=True)  # fmt: skip
    retry.add_argument("--class", dest="classes", action="append", default=[], metavar="C", help="only failures of this class")
    rerun = verb("commands", "rerun", "Run one trial of a sweep again; with other values it becomes a sweep of its own.",
                 "pare rerun gptq-bits=3 recipe.quantize.damping=0.02", store=True)  # fmt: skip
    rerun.add_argument("trial")
    for sub in (resume, retry, rerun):
        about = "of the trial, or of " if sub is rerun else "of "
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=about + "cluster, tracking, store or budget")
        running(sub)
    explain = verb("reading", "explain", "Say field by field why a trial's tasks, or one task, are new or there already.",
                   "pare explain gptq-bits=3", json=True, store=True)  # fmt: skip
    explain.add_argument("what", metavar="TRIAL|TASK", help="a trial, or the beginning of a task's fingerprint")
    composed(explain)
    verb("reading", "status", "Show how far a sweep is, from the ledger alone.", "pare status", json=True, sweep=latest,
         store=True)  # fmt: skip
    report = verb("reading", "report", "Print a sweep's table and front; writes nothing.", "pare report demo --format md",
                  json=True, sweep=latest, store=True)  # fmt: skip
    report.add_argument("--format", choices=["table", "md", "html", "json"], default="table")
    logs = verb("reading", "logs", "Print what a task wrote, or the tasks of a trial that failed or run.",
                "pare logs gptq-bits=3", json=True, store=True)  # fmt: skip
    logs.add_argument("what", metavar="TRIAL|TASK", help="a trial, or the beginning of a task's fingerprint")
    logs.add_argument("-f", "--follow", action="store_true", help="go on printing until the task has ended")
    verb("reading", "methods", "List the methods, their settings and sources.", "pare methods --json", json=True)
    export = verb("reading", "export", "Copy a trial's exported model to a directory of yours.",
                  "pare export gptq-bits=3 --to my-model", store=True)  # fmt: skip
    export.add_argument("trial")
    export.add_argument("--to", metavar="DIR", help="a directory that does not exist yet; default: ./TRIAL")
    for sub in (rerun, explain, logs, export):
        sub.add_argument("--sweep", help=f"id or name; default: {latest}")
    ui = verb("reading", "ui", "Serve the MLflow UI on this machine's loopback address.", "pare ui --port 5000")
    ui.add_argument("--port", type=int, default=5000)
    doctor = verb("reading", "doctor", "Check this installation, with remedies; or how Pare sees a model.",
                  "pare doctor --model DIR", json=True)  # fmt: skip
    doctor.add_argument("--model", metavar="DIR|CLASS", help="a directory with a config.json, or a class of transformers")
    doctor.add_argument("--plugin", action="append", default=[], metavar="FILE|MODULE", help="import this first")
    verb("upkeep", "sync", "Tell MLflow what it has not been told yet.", "pare sync", json=True, sweep="all")
    stop = verb("upkeep", "stop", "Ask the driver at work in PARE_HOME to end, and wait until it has.", "pare stop",
                sweep="whatever runs")  # fmt: skip
    stop.add_argument("--now", action="store_true", help="by force: running tasks lose what they have not saved")
    gc = verb("upkeep", "gc", "Free disk: drop what no unfinished work needs, and remove what nobody knows.",
              "pare gc --keep exports --dry-run", json=True, store=True)  # fmt: skip
    gc.add_argument("--dry-run", action="store_true", help="say what would go, and leave it")
    gc.add_argument("--keep", choices=["all", "pareto", "exports"], default="all",
                    help="whose files stay: all, exports, or exports on the front (default: all)")  # fmt: skip
    gc.add_argument("--limit-gb", type=float, metavar="N", help="drop intermediates until the store takes no more")
    fsck = verb("upkeep", "fsck", "Read every byte of the store and say what is damaged; exit 8 if anything is.",
                "pare fsck --repair", json=True, store=True)  # fmt: skip
    fsck.add_argument("--repair", action="store_true", help="set damaged artifacts aside, so that the next run makes them anew")
    submit.add_parsers(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments, unknown = parser().parse_known_args(argv)
    if unknown:
        if "overrides" not in arguments or any(word.startswith("-") for word in unknown):
            parser().error(f"unrecognized arguments: {' '.join(unknown)}")
        arguments.overrides += unknown  # argparse stops collecting overrides at an option between them
    signal.signal(signal.SIGTERM, terminated)
    from pare.orchestrator.errors import PareError
    from pare.workers.blobs import StoreError

    try:
        room = importlib.import_module(f"pare.orchestrator.{getattr(arguments, 'room', 'commands')}")
        return int(getattr(room, arguments.verb.replace("-", "_"))(arguments, home()) or 0)
    except PareError as e:
        print(f"pare {arguments.verb}: {e}", file=sys.stderr)
        return e.exit_code
    except StoreError as e:
        print(f"pare {arguments.verb}: {e}", file=sys.stderr)
        return 8 if e.errno in (errno.EINVAL, errno.EPROTONOSUPPORT) else 4
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    except BrokenPipeError:  # `pare report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as e:
        return internal_error(arguments.verb, e)


class Terminated(BaseException):
    """SIGTERM arrived."""


def terminated(_signal: int, _frame: FrameType | None) -> None:
    raise Terminated


def internal_error(verb: str, error: Exception) -> int:
    """Keeps the traceback in a file and says where."""
    import traceback

    log = home() / "logs" / "error.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as f:
        traceback.print_exception(error, file=f)
    print(f"pare {verb}: unexpected {type(error).__name__}: {error}\nThe traceback is in {log}.", file=sys.stderr)
    return 1
