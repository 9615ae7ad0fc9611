"""`make bench-orchestration`: all readings in one run, side by side, interleaved; the figures, and whether they are reached."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.orchestration.readings import Reading, as_json, control, figures, flush_ms, usual
from benchmarks.provenance import ROOT, provenance

RESULT = ROOT / "benchmarks" / "results" / "orchestration.json"
OURS, PEERS = "benchmarks.orchestration.legs", "benchmarks.orchestration.peers"

EACH_ROUND = [
    (PEERS, "prototype", "1000"),
    (OURS, "pare_tasks", "1000"),
    (PEERS, "ray_tasks", "1000"),
    (OURS, "pare_tasks", "10000"),
    (PEERS, "prototype", "10000"),
    (PEERS, "tune_trials", "500"),
    (OURS, "pare_tasks", "1000"),
    (OURS, "makespan", "sweep"),
    (OURS, "pare_tracked", "500"),
    (PEERS, "mlflow_runs", "200"),
    (OURS, "makespan", "long_pole"),
    (PEERS, "tune_tracked", "200"),
]
"""(module, reading, its argument)."""
ONCE = [(OURS, "large", "10000")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default=sys.executable, help="Python of the peers' virtualenv")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of readings; default: all")
    parser.add_argument("--result", type=Path, default=RESULT)
    given = parser.parse_args()
    started = time.monotonic()
    readings: list[Reading] = []
    for round_, legs in [*((i, EACH_ROUND) for i in range(given.rounds)), (0, ONCE)]:
        for module, name, argument in legs:
            if given.only and name not in given.only:
                continue
            python = given.peers if module == PEERS else sys.executable
            flushed, before = flush_ms(), control()
            values = measure([python, "-m", module, name, argument])
            readings.append(Reading(name, argument, round_, values, before, control(), flushed))
            say(f"{time.monotonic() - started:5.0f} s  {name} {argument}: {shown(values)}")
    found = figures(readings)
    result = {
        "schema_version": 1,
        **provenance("benchmarks.orchestration", "torch", "ray", "mlflow"),
        "peers": versions(given.peers),
        "wall_s": round(time.monotonic() - started, 1),
        "control_s": usual(readings),
        "dropped": sum(not row["kept"] for row in as_json(readings)),
        "figures": found,
        "readings": as_json(readings),
    }
    given.result.parent.mkdir(parents=True, exist_ok=True)
    given.result.write_text(json.dumps(result, indent=1) + "\n")
    for figure in found:
        value = (
            f"{figure['value']:.3g} {figure['unit']}" if figure["value"] is not None else f"no reading of {figure['missing']}"
        )
        verdict = {True: "reached", False: "MISSED", None: ""}[figure["reached"]]
        say(f"{figure['name']:45} {value:>12}  {figure['target']:8} {verdict}")
    say(f"{result['dropped']} of {len(readings)} readings dropped; written to {given.result}")
    return 0 if all(figure["reached"] is not False for figure in found) else 1


def measure(command: list[str]) -> dict[str, float]:
    """What a reading's process says on its last line."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    values: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return values


def versions(peers: str) -> dict[str, str]:
    ask = "import importlib.metadata as m; print(m.version('ray'), m.version('mlflow'))"
    ray, mlflow = subprocess.run([peers, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    return {"ray": ray, "mlflow": mlflow}


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items())


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
