"""The benchmark of blocks on a GPU runs anywhere, on small ones."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_writes_down_what_every_method_takes(tmp_path: Path) -> None:
    small = "--hidden 64 --ffn 128 --heads 4 --blocks 2 --sequences 2 --length 16".split()
    words = [sys.executable, "-m", "benchmarks.gpu.blocks", *small, "--result", str(tmp_path / "result.json")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result["seconds_a_block"]) == {"statistics", "rtn", "gptq", "gptq_mse", "sparsegpt", "wanda", "eora"}
    assert all(seconds > 0 for seconds in result["seconds_a_block"].values())
    assert result["hours_of_32_blocks"]["gptq"] == result["seconds_a_block"]["gptq"] * 32 / 3600
    assert result["shape"]["hidden"] == 64
