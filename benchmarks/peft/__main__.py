"""`python -m benchmarks.peft`: which tuners of peft merge, reload and run on 4-bit bases, with what error; two minutes.

Writes benchmarks/results/peft.json and from it docs/peft.md. Ends with 1 when a tuner does not reload or merge to 1e-5.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

from benchmarks.peft.measure import RANK, SHAPE, STEPS, measured, names
from benchmarks.peft.page import page
from benchmarks.provenance import ROOT, provenance

EXACT = 1e-5


def main() -> int:
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--only", nargs="*", help="some tuners; then nothing is written")
    words.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "peft.json")
    words.add_argument("--page", type=Path, default=ROOT / "docs" / "peft.md")
    given = words.parse_args()
    warnings.simplefilter("ignore")
    rows: dict[str, Any] = {}
    for name in given.only or names():
        rows[name] = measured(name)
        print(name, json.dumps(rows[name]), flush=True)
    if not given.only:
        about = provenance("benchmarks.peft", "torch", "transformers", "peft", "bitsandbytes")
        result = {"provenance": about, "model": SHAPE, "rank": RANK, "steps": STEPS, "rows": rows}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
        given.page.write_text(page(result))
    wrong = [name for name, row in rows.items() if max(row["reload"], row["merge"]) > EXACT]
    for name in wrong:
        print(f"{name}: off by {rows[name]['reload']:.2g} reloaded, {rows[name]['merge']:.2g} merged", file=sys.stderr)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
