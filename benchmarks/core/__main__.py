"""`make bench-core`: compression of SmolLM2-135M beside llm-compressor, side by side, interleaved; the figures, and whether
they are reached."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from benchmarks.core.figures import FIGURES
from benchmarks.core.inputs import PLACE, make_inputs
from benchmarks.readings import long_control
from benchmarks.rounds import Benchmark, Leg, parser, run

OURS, PEERS = "benchmarks.core.legs", "benchmarks.core.peers"

BENCHMARK = Benchmark(
    name="core",
    each_round=[
        Leg(OURS, "gptq_sequential", "3"),
        Leg(PEERS, "peer_gptq", "3"),
        Leg(OURS, "gptq_dense", "3"),
        Leg(OURS, "gptq_dense", "2,4,8,3"),
        Leg(PEERS, "peer_sparsegpt", "0.5"),
        Leg(OURS, "sparsegpt", "0.5"),
        Leg(OURS, "wanda", "0.5"),
        Leg(PEERS, "peer_wanda", "0.5"),
    ],
    figures=FIGURES,
    peers=[PEERS],
    packages=["torch", "transformers"],
    control=long_control,
    peer_packages=["torch", "transformers", "llmcompressor"],
)

if __name__ == "__main__":
    given = parser(__doc__, rounds=3).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory))
        os.environ[PLACE] = directory
        code = run(BENCHMARK, given)
    sys.exit(code)
