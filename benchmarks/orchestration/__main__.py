"""`make bench-orchestration`: all readings in one run, side by side, interleaved; the figures, and whether they are reached."""

from __future__ import annotations

import sys

from benchmarks.orchestration.figures import FIGURES
from benchmarks.rounds import Benchmark, Leg, parser, run

OURS, PEERS = "benchmarks.orchestration.legs", "benchmarks.orchestration.peers"

BENCHMARK = Benchmark(
    name="orchestration",
    each_round=[
        Leg(PEERS, "prototype", "1000"),
        Leg(OURS, "pare_tasks", "1000"),
        Leg(PEERS, "ray_tasks", "1000"),
        Leg(OURS, "pare_tasks", "10000"),
        Leg(PEERS, "prototype", "10000"),
        Leg(PEERS, "tune_trials", "500"),
        Leg(OURS, "pare_tasks", "1000"),
        Leg(OURS, "makespan", "sweep"),
        Leg(OURS, "pare_tracked", "500"),
        Leg(PEERS, "mlflow_runs", "200"),
        Leg(OURS, "makespan", "long_pole"),
        Leg(PEERS, "tune_tracked", "200"),
    ],
    once=[Leg(OURS, "large", "10000")],
    figures=FIGURES,
    peers=[PEERS],
    packages=["torch", "ray", "mlflow"],
    peer_packages=["ray", "mlflow"],
)

if __name__ == "__main__":
    sys.exit(run(BENCHMARK, parser(__doc__, rounds=2).parse_args()))
