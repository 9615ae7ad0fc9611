"""Two ranks, joined by gloo, learn the prompt that one process learns: `shards = "data"` is true of prompts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import METHODS, Context, load_all
from pare.methods.ops.tuner_kinds import PROMPTS
from pare.workers.ranks import Ranks
from pare.workers.training import Engine, train
from pare.workers.zero import Zero

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def learn(directory: Path, ranks: Ranks, stage: int) -> None:
    """Each prompt, as one of the ranks; the first writes it to `directory`/NAME."""
    load_all()
    for name in PROMPTS:
        torch.manual_seed(0)
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=96, num_key_value_heads=1, **shape)
        cls: Any = METHODS[name]
        method = cls(steps=6, batch_size=4, virtual_tokens=3, learning_rate=1e-2)
        model = method.prepare(LlamaForCausalLM(config).eval(), Context(CPU, 3))
        data = {"input_ids": torch.randint(96, (10, 12), generator=torch.Generator().manual_seed(3))}
        out = directory / f"{name}.{ranks.rank}"
        (out / "start").mkdir(parents=True)
        method.finish(model, out / "start")
        train(method, model, data, out, 3, Engine(CPU, torch.float32, Zero(stage) if stage else None, ranks=ranks))
        if ranks.is_first:
            method.finish(model, out)


def one_of_two(rank: int, directory: Path, stage: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=2)
    learn(directory, Ranks.here(), stage)


@pytest.mark.parametrize("stage", [0, 2])
def test_two_ranks_learn_the_prompt_that_one_process_learns(tmp_path: Path, stage: int) -> None:
    if stage:
        pytest.importorskip("deepspeed")
    (both := tmp_path / "both").mkdir()
    line = "import sys; from tests.workers.test_prompt_ranks import *; one_of_two(int(sys.argv[1]), Path(sys.argv[2]), {})"
    words = [sys.executable, "-c", line.format(stage)]
    group = [subprocess.Popen([*words, f"{rank}", f"{both}"], cwd=ROOT) for rank in range(2)]
    learn(tmp_path / "alone", Ranks(), 0)

    assert [process.wait(300) for process in group] == [0, 0]
    for name in PROMPTS:
        one, two = (load_file(d / f"{name}.0" / "prompt.safetensors")["prompt"] for d in (tmp_path / "alone", both))
        torch.testing.assert_close(two, one, atol=1e-4, rtol=0)
        start = load_file(both / f"{name}.0" / "start" / "prompt.safetensors")["prompt"]
        assert (one - start).abs().max() > 1e-3
