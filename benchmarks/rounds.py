"""A benchmark: legs in processes of their own, interleaved, each between two readings of a control, and a file of figures."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.provenance import ROOT, provenance
from benchmarks.readings import Figure, Reading, as_json, control, figures, flush_ms, usual


@dataclass(frozen=True)
class Leg:
    """One reading: `python -m module name argument`, which prints its values as a line of JSON last."""

    module: str
    name: str
    argument: str


@dataclass
class Benchmark:
    name: str
    """Of the file of the outcome, beneath `benchmarks/results`."""

    each_round: Sequence[Leg]
    figures: Sequence[Figure]
    peers: Sequence[str]
    """Modules that run in the peers' virtualenv."""

    packages: Sequence[str]
    """Whose versions decide the figures."""

    peer_packages: Sequence[str]
    once: Sequence[Leg] = ()
    control: Callable[[], float] = control


def parser(text: str | None, rounds: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=text)
    found.add_argument("--peers", default=sys.executable, help="Python of the peers' virtualenv")
    found.add_argument("--rounds", type=int, default=rounds)
    found.add_argument("--only", nargs="*", help="names of readings; default: all")
    found.add_argument("--result", type=Path, help="default: beneath benchmarks/results")
    return found


def run(benchmark: Benchmark, given: argparse.Namespace) -> int:
    """Exit code: 1 when a target is missed."""
    started = time.monotonic()
    target = given.result or ROOT / "benchmarks" / "results" / f"{benchmark.name}.json"
    readings: list[Reading] = []
    for round_, legs in [*((i, benchmark.each_round) for i in range(given.rounds)), (0, benchmark.once)]:
        for leg in legs:
            if given.only and leg.name not in given.only:
                continue
            python = given.peers if leg.module in benchmark.peers else sys.executable
            flushed, before = flush_ms(), benchmark.control()
            values = measure([python, "-m", leg.module, leg.name, leg.argument])
            readings.append(Reading(leg.name, leg.argument, round_, values, before, benchmark.control(), flushed))
            say(f"{time.monotonic() - started:5.0f} s  {leg.name} {leg.argument}: {shown(values)}")
    found = figures(benchmark.figures, readings)
    result = {
        "schema_version": 1,
        **provenance(f"benchmarks.{benchmark.name}", *benchmark.packages),
        "peers": versions(given.peers, benchmark.peer_packages),
        "wall_s": round(time.monotonic() - started, 1),
        "control_s": usual(readings),
        "dropped": sum(not row["kept"] for row in as_json(readings)),
        "figures": found,
        "readings": as_json(readings),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(result, indent=1) + "\n")
    for figure in found:
        value = (
            f"{figure['value']:.3g} {figure['unit']}" if figure["value"] is not None else f"no reading of {figure['missing']}"
        )
        verdict = {True: "reached", False: "MISSED", None: ""}[figure["reached"]]
        say(f"{figure['name']:55} {value:>12}  {figure['target']:8} {verdict}")
    say(f"{result['dropped']} of {len(readings)} readings dropped; written to {target}")
    return 0 if all(figure["reached"] is not False for figure in found) else 1


def measure(command: list[str]) -> dict[str, float]:
    """What a reading's process says on its last line."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    values: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


def versions(python: str, packages: Sequence[str]) -> dict[str, str]:
    """Of packages in another virtualenv."""
    ask = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {list(packages)!r}}}))"
    answer: dict[str, str] = json.loads(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout)
    return answer


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
