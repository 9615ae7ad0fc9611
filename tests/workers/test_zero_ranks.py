"""Two ranks, started directly and joined by gloo: the result is that of one process, also when one of them is lost."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pare.workers.ranks import Ranks
from tests.workers import zero_ranks
from tests.workers.zero_ranks import Case

pytest.importorskip("deepspeed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]


def train(directory: Path, *cases: Case, ranks: int = 2) -> list[int]:
    """Trains the cases by so many processes -> their exit statuses. Where one is lost the others are ended too."""
    directory.mkdir()
    (directory / "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    group = [
        subprocess.Popen([sys.executable, "-m", "tests.workers.zero_ranks", f"{rank}", f"{ranks}", f"{directory}"], cwd=ROOT)
        for rank in range(ranks)
    ]
    while any(process.poll() is None for process in group):
        if any(process.poll() for process in group):
            for process in group:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in group]


def told(directory: Path, name: str, rank: int = 0) -> dict[str, Any]:
    return dict(json.loads((directory / f"{name}.{rank}.json").read_text()))


def difference(first: Path, second: Path) -> float:
    """The largest between any two weights of the same name."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    assert len(one) > 10
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def test_two_ranks_of_every_stage_learn_what_one_process_learns_and_the_first_publishes_it(tmp_path: Path) -> None:
    """Rows are packed and predict unlike numbers of tokens, so that ranks weigh differently."""
    alone = tmp_path / "alone"
    alone.mkdir()
    expected = zero_ranks.run(Case("alone"), alone, Ranks())
    stages = [Case("torch"), Case("one", 1), Case("two", 2), Case("three", 3), Case("offloaded", 3, offload=True)]

    assert train(tmp_path / "both", *stages) == [0, 0]

    for case in stages:
        both = told(tmp_path / "both", case.name)
        assert both["ranks"] == 2
        assert len(both["losses"]) == 20
        assert both["losses"] == pytest.approx(expected["losses"], abs=1e-3), case.name
        assert told(tmp_path / "both", case.name, rank=1)["losses"] == both["losses"]
        assert difference(alone / "alone.safetensors", tmp_path / "both" / f"{case.name}.safetensors") < 1e-3, case.name
    assert expected["losses"][-1] < expected["losses"][0] - 0.1


def test_adapters_that_two_ranks_train_on_shards_of_weights_are_those_of_one_process(tmp_path: Path) -> None:
    """The frozen weights beneath them are spread as well. What is published is whole, and is what peft opens."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    cases = [Case(name, 3, name, settings={"learning_rate": 1e-2, "rank": 4}) for name in ("lora", "pissa")]

    assert train(both, *cases) == [0, 0]

    start = zero_ranks.llama()
    for case in cases:
        expected, found = zero_ranks.run(replace(case, stage=0), alone, Ranks()), told(both, case.name)
        assert found["ranks"] == 2
        assert found["losses"] == pytest.approx(expected["losses"], abs=1e-3), case.name
        assert difference(alone / f"{case.name}.safetensors", both / f"{case.name}.safetensors") < 1e-3, case.name
        opened = PeftModel.from_pretrained(zero_ranks.llama(), both / f"{case.name}.0" / "adapter").merge_and_unload()
        for name, update in load_file(alone / f"{case.name}.safetensors").items():
            assert update.abs().max() > 0.05, (case.name, name)
            learnt = opened.get_parameter(name) - start.get_parameter(name)
            torch.testing.assert_close(learnt, update, atol=1e-3, rtol=0)
        assert not (both / f"{case.name}.1" / "adapter").exists()


def test_in_bfloat16_the_gradients_of_two_ranks_are_still_summed_in_float32(tmp_path: Path) -> None:
    cases = [Case("torch", dtype="bfloat16"), Case("two", 2, dtype="bfloat16"), Case("three", 3, dtype="bfloat16")]

    assert train(tmp_path / "both", *cases) == [0, 0]

    expected = told(tmp_path / "both", "torch")["losses"]
    for case in cases[1:]:
        assert told(tmp_path / "both", case.name)["losses"] == pytest.approx(expected, abs=2e-3), case.name


@pytest.mark.parametrize("stage", [2, 3])
def test_after_kill_9_of_one_rank_the_group_goes_on_from_the_checkpoint(tmp_path: Path, stage: int) -> None:
    whole = Case("whole", stage, keep=f"{tmp_path}/undisturbed", every=5)
    lost = Case("lost", stage, keep=f"{tmp_path}/kept", every=5, dies_at=13)
    resumed = Case("resumed", stage, keep=f"{tmp_path}/kept", every=5)

    assert train(tmp_path / "first", whole) == [0, 0]
    assert -signal.SIGKILL in train(tmp_path / "second", lost)
    assert train(tmp_path / "third", resumed) == [0, 0]

    expected, after = told(tmp_path / "first", "whole"), told(tmp_path / "third", "resumed")
    assert after["taken"] == list(range(11, 21)), "of the thirteen steps three are taken again, fewer than the interval"
    assert after["losses"][-1] == pytest.approx(expected["losses"][-1], abs=1e-4)
    assert after["losses"] == expected["losses"]
    assert difference(tmp_path / "first/whole.safetensors", tmp_path / "third/resumed.safetensors") == 0
    pieces = list((tmp_path / "undisturbed").rglob("pieces/*"))
    assert len(pieces) == 4, "of two ranks, for the two checkpoints that are kept"


def test_a_checkpoint_of_other_ranks_is_refused_and_one_with_a_damaged_part_is_not_used(tmp_path: Path) -> None:
    kept = f"{tmp_path}/kept"
    assert train(tmp_path / "first", Case("first", 3, keep=kept, every=5, settings={"steps": 8})) == [0, 0]

    alone = tmp_path / "alone"
    alone.mkdir()
    refused = zero_ranks.run(Case("alone", 3, keep=kept), alone, Ranks())
    assert refused["failure"] == "user_error"
    assert "the checkpoint of this task is of ranks=2 and ZeRO stage=3" in refused["message"]
    assert "has ranks=1 and stage=3. Try: engine.ranks" in refused["message"]

    (piece,) = (tmp_path / "kept").rglob("pieces/*_001-*")
    piece.write_bytes(piece.read_bytes()[:-1] + b"x")
    assert train(tmp_path / "again", Case("again", 3, keep=kept, every=5, settings={"steps": 8})) == [0, 0]
    assert told(tmp_path / "again", "again")["taken"] == list(range(1, 9))
    assert told(tmp_path / "again", "again")["losses"] == told(tmp_path / "first", "first")["losses"]
