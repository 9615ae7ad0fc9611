"""The training loop: Hugging Face `Trainer` runs it, the method says what is trained and on which loss.

Everything that belongs to an engine or a launcher comes in through `Engine`, so that other engines run this same function.
So do several ranks, each with its part of every step's batch: what is learnt is that of the whole batch, as on one rank, but
for the order in which gradients are summed.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor, nn

from pare.methods.contract import TrainMethod
from pare.workers.checkpoint import EVERY_S, NO_CHECKPOINT, Checkpoint
from pare.workers.ranks import Ranks
from pare.workers.task import TaskError
from pare.workers.training_state import keep, resumed, set_random_state
from pare.workers.zero import Shards, Zero, objection, opened, overrides

CURVE = "curve.jsonl"

SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}
"""The method's word -> transformers', where plain "constant" leaves the warm-up out."""


@dataclass
class Engine:
    """How and where the steps are computed."""

    device: torch.device
    dtype: torch.dtype
    """Of matrix products; what is trained stays float32."""

    zero: Zero | None = None
    """How DeepSpeed spreads the training over the ranks; None: plain torch, of which each rank holds all."""

    halvings: int = 0
    """How often the micro-batch is halved, for room; the batch of a step, and so what is learnt, stays."""

    ranks: Ranks = field(default_factory=Ranks)
    """This process among those that train together. Each has a copy of the model and calls `train` alike."""

    @property
    def prepared_on(self) -> torch.device:
        """Where a model is to be when `train` is given it: shards of weights go to the device one weight at a time."""
        return torch.device("cpu") if self.zero and self.zero.stage == 3 else self.device

    @property
    def layout(self) -> dict[str, Any]:
        """What a checkpoint of the optimizer's state fits."""
        return {"ranks": self.ranks.count, "stage": self.zero.stage if self.zero else 0}


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
    on where it was interrupted and resumed. After ZeRO-3 only the first rank has the model, and has it on the CPU.

    Raises:
        TaskError: class "nonfinite", at the first step whose loss or gradient is not finite; the weights are still those
            before it. "oom_gpu", where there was no room. Else the batch cannot be divided among the ranks, the optimizer
            is unknown, a step has nothing to learn from, or the engine is not one for this method, machine or checkpoint.
    """
    try:
        with opened(engine.zero, engine.device):
            return follow(method, model, data, directory, seed, engine, progress, point, checkpoint, save_every_s)
    except torch.OutOfMemoryError as e:
        micro_batch = max(1, method.micro_batch_size >> engine.halvings)
        again = "" if method.gradient_checkpointing else ", gradient_checkpointing=true"
        raise TaskError(
            f"{method.name}: no room on {engine.device} for the steps with a micro-batch of {micro_batch}: {e}. Try: "
            f"micro_batch_size={max(1, micro_batch // 2)}{again}, optimizer=adamw_8bit or engine=deepspeed_zero3",
            failure="oom_gpu",
        ) from e


def follow(
    method: TrainMethod,
    model: nn.Module,
    data: Mapping[str, Tensor],
    directory: Path,
    seed: int,
    engine: Engine,
    progress: Callable[[int, int, str], None],
    point: Callable[[int, dict[str, float]], None],
    checkpoint: Checkpoint,
    save_every_s: float,
) -> list[Step]:
    """`train`, in a process that its engine can run in."""
    from transformers import Trainer, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    scratch, ranks = directory / "tmp", engine.ranks
    arguments = arguments_of(method, engine, scratch, seed)
    saved = resumed(checkpoint, ranks, engine.layout)
    steps = [Step(*step) for step in saved.get("steps", [])]
    # Only the rows that are left: to the Trainer this is an epoch of its own that starts at a later step.
    n, length = data["input_ids"].shape
    rows = shuffled(n, method.steps * method.batch_size, seed)
    need_targets(method, data, rows)
    rows = rows[len(steps) * method.batch_size :]
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
        shards: Shards | None = None

        def compute_loss(self, model: nn.Module, inputs: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            with autocast:
                total, tokens = method.loss(model, inputs)
            self.total, self.tokens = self.total + total.detach(), self.tokens + tokens
            return total * (ranks.count / expected)  # of several ranks' gradients the mean is taken

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            scaled: Tensor = super().training_step(*args, **kwargs)
            if self.accelerator.sync_gradients:
                total, tokens = ranks.sum(float(self.total), int(self.tokens))
                if not tokens:
                    raise TaskError(nothing_to_learn(method, len(steps) + 1))
                loss, self.total, self.tokens = total / tokens, 0.0, 0
                if not math.isfinite(loss):
                    raise diverged(method, f"the loss is {loss}", len(steps) + 1)
                rate = self.optimizer.param_groups[0]["lr"]
                if self.shards is None:
                    if tokens != expected:  # the method did not count every token
                        torch._foreach_mul_([p.grad for p in trained if p.grad is not None], expected / tokens)
                    method.after_backward(len(steps) + 1)
                elif not self.shards.step(expected / tokens):
                    raise diverged(method, "the gradient is not finite", len(steps) + 1)
                steps.append(Step(loss, rate))
            return scaled

    class Record(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if engine.zero:
                loop.shards = Shards(loop.accelerator)
            if saved:
                state.global_step = len(steps)
                (loop.shards or loop.optimizer).load_state_dict(saved["optimizer"])
                loop.lr_scheduler.load_state_dict(saved["schedule"])
                method.load_state(saved["method"])

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if saved:  # not earlier: as an epoch begins, its loader draws a number
                set_random_state(saved["random"][ranks.rank], engine.device)
                saved.clear()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            method.after_step(state.global_step)
            if loop.shards and overrides(method, "after_step"):
                loop.shards.take_edits()
            values = asdict(steps[-1])
            write_point(curve, state.global_step, values)
            point(state.global_step, values)
            progress(state.global_step, method.steps, "steps")
            if state.global_step < method.steps and ranks.first(checkpoint.due(save_every_s)):
                is_sharded = engine.layout["stage"] == 3  # then the weights are among what each rank keeps
                kept = {
                    "layout": engine.layout,
                    "steps": [[step.loss, step.learning_rate] for step in steps],
                    "trained": {} if is_sharded else {n: p for n, p in model.named_parameters() if p.requires_grad},
                    "schedule": loop.lr_scheduler.state_dict(),
                    "method": method.state(),
                }
                keep(checkpoint, ranks, engine.device, (loop.shards or loop.optimizer).state_dict(), kept)

    try:
        with (directory / CURVE).open("w") as curve:
            for number, step in enumerate(steps, start=1):
                write_point(curve, number, asdict(step))
            if engine.zero:
                engine.zero.spread(model, engine.device)
            loop = Loop(
                model=model,
                args=arguments,
                train_dataset=[{name: column[row] for name, column in data.items()} for row in rows],
                data_collator=lambda batch: {name: torch.stack([item[name] for item in batch]) for name in data},
                callbacks=[Record()],
            )
            loop.remove_callback(PrinterCallback)
            loop.train()
            if loop.shards:
                loop.shards.end(model, ranks)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not ranks.first(all(p.isfinite().all() for p in trained)):
        raise TaskError(f"{method.name}: the weights are not finite after the last step", failure="nonfinite")
    model.eval()
    return steps


def arguments_of(method: TrainMethod, engine: Engine, scratch: Path, seed: int) -> Any:
    """The method's settings and the engine as `TrainingArguments`."""
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    optimizers = [name.value for name in OptimizerNames]
    if method.optimizer not in optimizers:
        raise TaskError(f"{method.name}.optimizer must be one of {', '.join(optimizers)}, got {method.optimizer!r}")
    if engine.zero and (reason := objection(method, engine.zero.stage)):
        raise TaskError(f"{method.name} cannot be trained by ZeRO-{engine.zero.stage}: {reason}")
    ranks = engine.ranks.count
    if method.batch_size % ranks:
        raise TaskError(
            f"{method.name}.batch_size={method.batch_size} cannot be divided among {ranks} ranks. "
            f"Try: batch_size={ranks * max(1, method.batch_size // ranks)}"
        )
    micro_batch, share = max(1, method.micro_batch_size >> engine.halvings), method.batch_size // ranks
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
        gradient_checkpointing=method.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=seed,
        use_cpu=engine.device.type == "cpu" and engine.zero is None,  # with it the Trainer leaves DeepSpeed out, and is silent
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
        deepspeed=engine.zero and engine.zero.arguments(engine.dtype),
        accelerator_config={"use_configured_state": bool(engine.zero) and engine.device.type == "cpu"},
    )
    if arguments.world_size != ranks:
        raise TaskError(f"this is one of {ranks} ranks, and accelerate knows of {arguments.world_size}", failure="unknown")
    if arguments.device.type != engine.device.type or arguments.n_gpu > 1:
        raise TaskError(
            f"the task was given {engine.device}, but this process sees {arguments.n_gpu} devices of type "
            f"{arguments.device.type}. Try: CUDA_VISIBLE_DEVICES with the one device that is meant",
            failure="unknown",
        )
    return arguments


def need_targets(method: TrainMethod, data: Mapping[str, Tensor], rows: list[int]) -> None:
    """Raises TaskError if there is a step none of whose rows has a token to predict."""
    if "labels" in data:
        known = (data["labels"][:, 1:] >= 0).any(1)[torch.tensor(rows)].view(-1, method.batch_size).any(1)
        if not known.all():
            raise TaskError(nothing_to_learn(method, int(known.int().argmin()) + 1))


def nothing_to_learn(method: TrainMethod, step: int) -> str:
    return (
        f"{method.name}: no token of step {step} is to be predicted, so there is nothing that it could learn from. Try: a "
        f"batch_size above {method.batch_size}, or a larger data.train.length, so that what is learnt is in the window"
    )


def diverged(method: TrainMethod, what: str, step: int) -> TaskError:
    return TaskError(
        f"{method.name}: {what} at step {step} of {method.steps}. "
        f"Try: a learning_rate below {method.learning_rate:g}, or dtype=float32",
        failure="nonfinite",
    )


def shuffled(n: int, needed: int, seed: int) -> list[int]:
    """`needed` row numbers below n: one seeded permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(n, generator=generator) for _ in range(math.ceil(needed / n))]
    return torch.cat(epochs)[:needed].tolist()


def write_point(curve: TextIO, step: int, values: dict[str, float]) -> None:
    curve.write(json.dumps({"step": step, **values}) + "\n")
    curve.flush()
