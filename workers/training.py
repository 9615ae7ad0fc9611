"""The training loop: Hugging Face `Trainer` runs it, the method says what is trained and on which loss.

Everything that belongs to an engine or a launcher comes in through `Engine`, so that other engines run this same function.
So do several ranks, each with its part of every step's batch: what is learnt is that of the whole batch, as on one rank, but
for the order in which gradients are summed.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor, nn

from pare.methods.contract import TrainMethod
from pare.workers.checkpoint import EVERY_S, NO_CHECKPOINT, Checkpoint
from pare.workers.ranks import Ranks
from pare.workers.task import TaskError

CURVE = "curve.jsonl"

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""The method's word -> transformers', where plain "constant" leaves the warm-up out."""


@dataclass
class Engine:
    """How and where the steps are computed."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products; what is trained stays float32."""

    arguments: dict[str, Any] = field(default_factory=dict)
    """Further `TrainingArguments`, e.g. `deepspeed`."""

    halvings: int = 0
    """How often the micro-batch is halved, for room; the batch of a step, and so what is learnt, stays."""

    ranks: Ranks = field(default_factory=Ranks)
    """This process among those that train together. Each has a copy of the model and calls `train` alike."""


@dataclass
class Step:
    loss: float
    """Mean over the predicted tokens of the step's batch, in nats."""

    learning_rate: float
    """The one that this step was taken with."""


def train(
    method: TrainMethod,
    model: nn.Module,
    data: Mapping[str, Tensor],
    directory: Path,
    seed: int,
    engine: Engine,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
    point: Callable[[int, dict[str, float]], None] = lambda step, values: None,
    checkpoint: Checkpoint = NO_CHECKPOINT,
    save_every_s: float = EVERY_S,
) -> list[Step]:
    """Trains `model`, as `method.prepare` made it, in place; from the step after `checkpoint`, if it holds one.

    data: columns, each (n, length, ...), as `TrainMethod.loss` takes rows of them. The rows are read in an order that only
    `seed` decides, all of them once before any comes again.
    Writes a line for every step to `directory`/curve.jsonl. What it returns, writes and makes of the model does not depend
    on where it was interrupted and resumed.

    Raises:
        TaskError: class "nonfinite", at the first step whose loss is not finite; the weights are still those before it.
            Else the batch cannot be divided among the ranks, or the optimizer is unknown.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.trainer_callback import PrinterCallback
    from transformers.training_args import OptimizerNames

    optimizers = [name.value for name in OptimizerNames]
    if method.optimizer not in optimizers:
        raise TaskError(f"{method.name}.optimizer must be one of {', '.join(optimizers)}, got {method.optimizer!r}")
    scratch, ranks = directory / "tmp", engine.ranks
    if method.batch_size % ranks.count:
        raise TaskError(
            f"{method.name}.batch_size={method.batch_size} cannot be divided among {ranks.count} ranks. "
            f"Try: batch_size={ranks.count * max(1, method.batch_size // ranks.count)}"
        )
    micro_batch, share = max(1, method.micro_batch_size >> engine.halvings), method.batch_size // ranks.count
    while share % micro_batch:
        micro_batch -= 1
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=method.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=share // micro_batch,
        learning_rate=method.learning_rate,
        lr_scheduler_type=SCHEDULES[method.schedule],
        warmup_steps=math.ceil(method.warmup * method.steps),
        weight_decay=method.weight_decay,
        max_grad_norm=method.max_grad_norm,
        optim=method.optimizer,
        seed=seed,
        use_cpu=engine.device.type == "cpu",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_strategy="no",
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        ddp_find_unused_parameters=False,  # it would look for them in every step, and cannot with recomputed activations
        ddp_broadcast_buffers=False,
        **engine.arguments,
    )
    if arguments.device.type != engine.device.type or arguments.n_gpu > 1:
        raise TaskError(
            f"the task was given {engine.device}, but this process sees {arguments.n_gpu} devices of type "
            f"{arguments.device.type}. Try: CUDA_VISIBLE_DEVICES with the one device that is meant",
            failure="unknown",
        )
    saved = checkpoint.latest() or {}
    steps = [Step(*step) for step in saved.get("steps", [])]
    if len(set(ranks.all(len(steps)))) > 1:
        raise TaskError("the ranks have read different checkpoints of the same task", failure="unknown")
    # Only the rows that are left: to the Trainer this is an epoch of its own that starts at a later step.
    n, length = data["input_ids"].shape
    rows = shuffled(n, method.steps * method.batch_size, seed)[len(steps) * method.batch_size :]
    expected = method.batch_size * (length - 1)
    trained = [p for p in model.parameters() if p.requires_grad]
    autocast = torch.autocast(engine.device.type, dtype=engine.dtype, enabled=engine.dtype != torch.float32)
    with torch.no_grad():
        for name, value in saved.get("trained", {}).items():
            model.get_parameter(name).copy_(value)

    class Loop(Trainer):
        """A step's gradient is that of the summed loss over the tokens predicted in its whole batch."""

        loss_is_scaled_for_ga = True
        total, tokens = 0.0, 0

        def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            with autocast:
                total, tokens = method.loss(model, inputs)
            self.total, self.tokens = self.total + total.detach(), self.tokens + tokens
            return total * (ranks.count / expected)  # of several ranks' gradients the mean is taken

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            scaled: Tensor = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                total, tokens = ranks.sum(float(self.total), int(self.tokens))
                loss, self.total, self.tokens = total / tokens, 0.0, 0
                if not math.isfinite(loss):
                    raise TaskError(
                        f"{method.name}: the loss is {loss} at step {len(steps) + 1} of {method.steps}. "
                        f"Try: a learning_rate below {method.learning_rate:g}, or dtype=float32",
                        failure="nonfinite",
                    )
                if tokens != expected:  # the method did not count every token
                    torch._foreach_mul_([p.grad for p in trained if p.grad is not None], expected / tokens)
                method.after_backward(len(steps) + 1)
                steps.append(Step(loss, self.optimizer.param_groups[0]["lr"]))
            return scaled

    class Record(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if saved:
                state.global_step = len(steps)
                loop.optimizer.load_state_dict(saved["optimizer"])
                loop.lr_scheduler.load_state_dict(saved["schedule"])
                method.load_state(saved["method"])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if saved:  # not earlier: as an epoch begins, its loader draws a number
                set_random_state(saved["random"][ranks.rank], engine.device)
                saved.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            method.after_step(state.global_step)
            values = asdict(steps[-1])
            write_point(curve, state.global_step, values)
            point(state.global_step, values)
            progress(state.global_step, method.steps, "steps")
            if state.global_step < method.steps and ranks.first(checkpoint.due(save_every_s)):
                random_states = ranks.all(random_state(engine.device))
                if ranks.is_first:
                    checkpoint.save(
                        {
                            "steps": [[step.loss, step.learning_rate] for step in steps],
                            "trained": {name: p for name, p in model.named_parameters() if p.requires_grad},
                            "optimizer": loop.optimizer.state_dict(),
                            "schedule": loop.lr_scheduler.state_dict(),
                            "random": random_states,
                            "method": method.state(),
                        }
                    )

    try:
        with (directory / CURVE).open("w") as curve:
            for number, step in enumerate(steps, start=1):
                write_point(curve, number, asdict(step))
            loop = Loop(
                model=model,
                args=arguments,
                train_dataset=[{name: column[row] for name, column in data.items()} for row in rows],
                data_collator=lambda batch: {name: torch.stack([item[name] for item in batch]) for name in data},
                callbacks=[Record()],
            )
            loop.remove_callback(PrinterCallback)
            loop.train()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not all(p.isfinite().all() for p in trained):
        raise TaskError(f"{method.name}: the weights are not finite after the last step", failure="nonfinite")
    model.eval()
    return steps


def shuffled(n: int, needed: int, seed: int) -> list[int]:
    """`needed` row numbers below n: one seeded permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(n, generator=generator) for _ in range(math.ceil(needed / n))]
    return torch.cat(epochs)[:needed].tolist()


def write_point(curve: TextIO, step: int, values: dict[str, float]) -> None:
    curve.write(json.dumps({"step": step, **values}) + "\n")
    curve.flush()


def random_state(device: torch.device) -> dict[str, Any]:
    """Where the random number generators stand that a step may draw from: torch's, Python's and numpy's own."""
    numpy: Any = np.random.get_state()
    kind, keys, *rest = numpy
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": random.getstate(),
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), *rest],
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
