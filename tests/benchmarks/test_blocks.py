"""The benchmark of blocks on a GPU runs anywhere, on small ones."""

import json
from pathlib import Path

from benchmarks.gpu.blocks import main


def test_it_writes_down_what_every_method_takes(tmp_path: Path) -> None:
    small = {"hidden": 64, "ffn": 128, "heads": 4, "blocks": 2, "sequences": 2, "length": 16}
    words = [word for name, value in small.items() for word in (f"--{name}", str(value))]

    assert main([*words, "--result", str(tmp_path / "result.json")]) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["shape"] == small
    assert set(result["seconds_a_block"]) == {"statistics", "rtn", "gptq", "gptq_mse", "sparsegpt", "wanda", "eora"}
    assert all(seconds > 0 for seconds in result["seconds_a_block"].values())
    assert result["hours_of_32_blocks"]["gptq"] == result["seconds_a_block"]["gptq"] * 32 / 3600
