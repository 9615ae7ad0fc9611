"""A task for tests of several ranks: a small real fine-tuning that does what its spec says on the way."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import ray
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context
from pare.methods.finetune.full import Full
from pare.workers.ranks import Ranks
from pare.workers.task import TaskContext, TaskError
from pare.workers.training import Engine, train
from pare.workers.zero import Zero

DATA = {"input_ids": torch.randint(96, (24, 16), generator=torch.Generator().manual_seed(3))}


def run(ctx: TaskContext) -> dict[str, Any]:
    """spec: settings of full fine-tuning; dropout of attention; zero: stage of DeepSpeed, 0 for plain torch; save_every_s;
    told: a directory for the ranks' process ids; at the step `at`, `fail` (a failure class) ends the second rank, and `wait`
    all of them for so many seconds, if the file told/waited is not there.
    """
    spec, ranks, cpu = ctx.spec, Ranks.here(), torch.device("cpu")
    told = Path(spec["told"])
    taken: list[int] = []

    def progress(done: int, total: int, unit: str) -> None:
        taken.append(done)
        ctx.progress(done, total, unit)
        if done != spec.get("at"):
            return
        (told / f"{ranks.rank}.pid").write_text(str(os.getpid()))
        if spec.get("fail") and ranks.rank == 1:
            raise TaskError("as told", spec["fail"])
        if not (told / "waited").exists():
            time.sleep(spec.get("wait", 0))

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        attention_dropout=spec.get("dropout", 0.2),
    )  # fmt: skip
    method = Full(**spec["settings"])
    model = method.prepare(LlamaForCausalLM(config).eval(), Context(cpu, 3))
    engine = Engine(cpu, torch.float32, Zero(spec["zero"]) if spec.get("zero") else None, ranks=ranks)
    steps = train(
        method,
        model,
        DATA,
        ctx.out,
        3,
        engine,
        progress,
        ctx.point,
        ctx.checkpoint,
        spec.get("save_every_s", 1e9),
    )
    weights = [float(p.detach().double().abs().sum()) for p in model.parameters() if p.requires_grad]
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
    losses = [step.loss for step in steps]
    return {"losses": losses, "weights": weights, "taken": taken, "ranks": ranks.count, "nodes": ranks.all(node)}
