"""One rank of several that train together, for tests: `python -m tests.workers.zero_ranks RANK RANKS DIRECTORY`.

Reads DIRECTORY/cases.json, a list of `Case` as dicts, and trains one after another. Of each it writes DIRECTORY/NAME.RANK.json
(losses, steps taken, how it failed) and, as the first rank, DIRECTORY/NAME.safetensors: what the method made of it, beside the
adapter if it makes one, in DIRECTORY/NAME.RANK/adapter.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context, load_all
from pare.workers.blobs import LocalBlobs
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.ranks import Ranks
from pare.workers.task import TaskError
from pare.workers.training import Engine, train
from pare.workers.zero import Zero

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {
    "steps": 20, "batch_size": 4, "micro_batch_size": 1, "learning_rate": 1e-3, "weight_decay": 0.1,
}  # fmt: skip


def packed(rows: int = 40, length: int = 24) -> dict[str, torch.Tensor]:
    """Rows of several documents each, of which nothing predicts the first token."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(96, (rows, length), generator=generator)
    begins = torch.rand(rows, length, generator=generator) < 0.15
    begins[:, 0] = True
    where = torch.arange(length).expand(rows, length)
    return {
        "input_ids": ids,
        "labels": ids.masked_fill(begins, -100),
        "position_ids": where - where.masked_fill(~begins, 0).cummax(1).values,
    }


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).eval()


class Every(Checkpoint):
    """Due after so many steps."""

    def __init__(self, directory: Path, steps: int) -> None:
        super().__init__(LocalBlobs(directory), "checkpoints/a-task")
        self.steps, self.asked = steps, 0

    def due(self, every_s: float = 0.0) -> bool:
        self.asked += 1
        return self.asked % self.steps == 0


@dataclass
class Case:
    name: str
    stage: int = 0
    method: str = "full"
    offload: bool = False
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)
    keep: str = ""
    """Directory of its checkpoints."""
    every: int = 1
    """Steps between two checkpoints."""
    dies_at: int = 0
    """The last rank ends by SIGKILL after this step."""


def run(case: Case, directory: Path, ranks: Ranks) -> dict[str, Any]:
    cls: Any = load_all()[case.method]
    method = cls(**{**SETTINGS, **case.settings})
    dtype = getattr(torch, case.dtype)
    engine = Engine(CPU, dtype, Zero(case.stage, case.offload) if case.stage else None, ranks=ranks)
    model = method.prepare(llama().to(dtype), Context(CPU, 3))
    taken: list[int] = []

    def progress(done: int, total: int, unit: str) -> None:
        taken.append(done)
        if done == case.dies_at and ranks.rank == ranks.count - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint = Every(Path(case.keep), case.every) if case.keep else NO_CHECKPOINT
    out = directory / f"{case.name}.{ranks.rank}"
    out.mkdir()
    try:
        steps = train(method, model, packed(), out, 3, engine, progress, checkpoint=checkpoint)
    except TaskError as e:
        return {"failure": e.failure, "message": str(e), "taken": taken}
    if ranks.is_first:
        formulas = method.finish(model, out)
        save_file({name: formula.materialise() for name, formula in formulas.items()}, directory / f"{case.name}.safetensors")
    return {"losses": [step.loss for step in steps], "taken": taken, "ranks": ranks.count}


def main(rank: int, count: int, directory: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}"}
    if count > 1:
        torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/group", rank=rank, world_size=count)
    for case in json.loads((directory / "cases.json").read_text()):
        result = run(Case(**case), directory, Ranks.here())
        (directory / f"{case['name']}.{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
