"""The command `pare`. Results go to stdout, everything else to stderr. Heavy libraries are imported by the verb that
needs them, so that `pare --help` is instant.

Exit codes: 0 complete · 1 internal error · 2 usage or config · 3 finished, but trials failed · 4 infeasible here ·
5 the cluster was lost, resumable · 6 done, but tracking is behind · 7 another driver is at work · 8 ledger or store damaged ·
10 `plan --check`: there is work to do · 130/143 interrupted, state saved
"""

from __future__ import annotations

import argparse
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
  pare run recipe=rtn,gptq recipe.quantize.bits=2,3,4        a sweep of your own
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

    def verb(name: str, text: str, example: str, json: bool = False) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=text,
            description=text,
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if json:
            sub.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
        return sub

    def composed(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides; commas sweep")
        sub.add_argument("--config-dir", metavar="DIR", help="a directory of your own configs, searched first")
        sub.add_argument("-cn", "--config-name", default="config", metavar="NAME", help="root config (default: config)")
        sub.add_argument("-m", "--multirun", action="store_true", help="accepted for Hydra's sake: commas always sweep")
        sub.add_argument("--cfg", choices=["job"], help="print the composed config and stop")
        sub.add_argument("--resolve", action="store_true", help="with --cfg: interpolations resolved")

    plan = verb(
        "plan", "Show what would run, what is there already, and why; spends nothing.", "pare plan experiment=demo", json=True
    )
    composed(plan)
    plan.add_argument("--check", action="store_true", help="exit 10 if there is work to do, 0 if not")
    run = verb("run", "Run an experiment or a recipe; what is in the store is not run again.", "pare run experiment=demo")
    composed(run)
    run.add_argument("--json", action="store_true", help="print the report as one JSON object at the end")
    run.add_argument("--dry-run", action="store_true", help="the same as `pare plan`")
    run.add_argument("--fail-fast", action="store_true", help="stop starting tasks after the first failure")
    resume = verb("resume", "Go on with a sweep, from what the ledger keeps of it.", "pare resume demo cluster.slots=1")
    resume.add_argument("sweep", nargs="?", help="id or name; default: the latest")
    resume.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of cluster, tracking, store or budget")
    resume.add_argument("--json", action="store_true", help="print the report as one JSON object at the end")
    resume.add_argument("--fail-fast", action="store_true", help="stop starting tasks after the first failure")
    sync = verb("sync", "Tell MLflow what it has not been told yet.", "pare sync", json=True)
    sync.add_argument("sweep", nargs="?", help="id or name; default: all")
    status = verb("status", "Show how far a sweep is, from the ledger alone.", "pare status", json=True)
    status.add_argument("sweep", nargs="?", help="id or name; default: the latest")
    report = verb("report", "Print a sweep's table and front; writes nothing.", "pare report demo --format md", json=True)
    report.add_argument("sweep", nargs="?", help="id or name; default: the latest")
    report.add_argument("--format", choices=["table", "md", "html", "json"], default="table")
    verb("methods", "List the methods, their settings and sources.", "pare methods --json", json=True)
    export = verb("export", "Copy a trial's exported model to a directory of yours.", "pare export gptq-bits=3 --to my-model")
    export.add_argument("trial")
    export.add_argument("--to", metavar="DIR", help="a directory that does not exist yet; default: ./TRIAL")
    export.add_argument("--sweep", help="id or name; default: the latest")
    ui = verb("ui", "Serve the MLflow UI on this machine's loopback address.", "pare ui --port 5000")
    ui.add_argument("--port", type=int, default=5000)
    verb("doctor", "Check this installation, with remedies.", "pare doctor", json=True)
    submit.add_parsers(verbs)
    return top


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    arguments, unknown = parser().parse_known_args(argv)
    if unknown:
        if arguments.verb not in ("plan", "run") or any(word.startswith("-") for word in unknown):
            parser().error(f"unrecognized arguments: {' '.join(unknown)}")
        arguments.overrides += unknown  # argparse stops collecting overrides at an option between them
    signal.signal(signal.SIGTERM, terminated)
    from pare.orchestrator.errors import PareError

    try:
        from pare.orchestrator import commands

        return int(getattr(commands, arguments.verb)(arguments, home()) or 0)
    except PareError as e:
        print(f"pare {arguments.verb}: {e}", file=sys.stderr)
        return e.exit_code
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
