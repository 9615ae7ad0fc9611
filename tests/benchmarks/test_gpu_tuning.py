"""The benchmark of training on a GPU runs anywhere, on a small model."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu.tuning import main

SMALL = {
    "hidden": 64,
    "ffn": 128,
    "heads": 4,
    "blocks": 2,
    "vocabulary": 512,
    "batch": 2,
    "micro-batch": 1,
    "length": 16,
    "steps": 3,
}


def test_it_writes_down_what_every_method_takes(tmp_path: Path) -> None:
    words = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]

    assert main([*words, "--dtype", "float32", "--result", str(tmp_path / "result.json")]) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    methods = result["methods"]
    assert set(methods) == {"lora", "qlora", "full"}
    assert all(m["tokens_s"] > 0 and m["peak_bytes"] >= 0 for m in methods.values())  # so little may find room in what is there
    assert methods["full"]["trained_weights"] == methods["full"]["weights"] > methods["lora"]["trained_weights"]
    assert result["asked"]["micro_batch"] == 1


def test_a_single_step_says_nothing_and_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--steps", "1"])
    assert "--steps must be >= 2" in capsys.readouterr().err
