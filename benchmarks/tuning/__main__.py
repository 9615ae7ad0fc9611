"""`make bench-tuning`: training of SmolLM2-135M beside a bare Hugging Face script, interleaved; and what soups and healing
bring on the test windows. The figures, and whether they are reached.

    python -m benchmarks.tuning --only lora peer_lora --rounds 1 --steps 2        a part of it, quickly
    python -m benchmarks.tuning --only soup --training 20
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from benchmarks.core.inputs import PLACE, make_inputs
from benchmarks.readings import long_control
from benchmarks.rounds import Benchmark, Leg, parser, run
from benchmarks.tuning.figures import quality, speed

OURS, PEERS, QUALITY = "benchmarks.tuning.legs", "benchmarks.tuning.peers", "benchmarks.tuning.quality"
PACKAGES = ["torch", "transformers", "peft", "accelerate", "bitsandbytes"]


def benchmarks(given: argparse.Namespace) -> list[Benchmark]:
    argument, training = f"{given.dtype},{given.steps}", str(given.training)
    return [
        Benchmark(
            name="tuning",
            each_round=[
                Leg(OURS, "lora", argument),
                Leg(PEERS, "peer_lora", argument),
                Leg(OURS, "qlora", argument),
                Leg(PEERS, "peer_qlora", argument),
            ],
            once=[Leg(OURS, "four_bit_base", argument)],
            figures=speed(argument),
            peers=[PEERS],
            packages=PACKAGES,
            peer_packages=PACKAGES,
            control=long_control,
        ),
        Benchmark(
            name="tuning_quality",
            each_round=[],
            once=[Leg(QUALITY, "soup", training), Leg(QUALITY, "heal", training)],
            figures=quality(training),
            peers=[],
            packages=PACKAGES,
            peer_packages=[],
            control=lambda: 1.0,  # a busy machine changes no perplexity
        ),
    ]


def main() -> int:
    words = parser(__doc__, rounds=7)
    words.formatter_class = argparse.RawDescriptionHelpFormatter
    words.add_argument("--steps", type=int, default=6, help="optimizer steps of a timed training")
    words.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of a timed training")
    words.add_argument("--training", type=int, default=60, help="optimizer steps of members and of healing")
    given = words.parse_args()
    chosen = [
        benchmark
        for benchmark in benchmarks(given)
        if not given.only or {leg.name for leg in (*benchmark.each_round, *benchmark.once)} & set(given.only)
    ]
    if given.result and len(chosen) > 1:
        words.error("--result takes one outcome, and both benchmarks are asked for. Try: --only soup heal")
    code = 0
    with tempfile.TemporaryDirectory() as directory:
        make_inputs(Path(directory))
        os.environ[PLACE] = directory
        for benchmark in chosen:
            code = max(code, run(benchmark, given))
    return code


if __name__ == "__main__":
    sys.exit(main())
