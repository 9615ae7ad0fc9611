"""DeepSpeed on one rank; two are in `test_zero_ranks.py`, and on Ray in `tests/orchestrator/test_ranks.py`."""

from __future__ import annotations

import gc
import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.methods.contract import Context
from pare.methods.finetune.full import Full
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.task import TaskError
from pare.workers.training import Engine, Step, train
from pare.workers.zero import Shards, Zero, merged
from tests.workers.zero_ranks import CPU, llama, packed

pytest.importorskip("deepspeed")
SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0.1}
DATA = packed()


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Imports what training by DeepSpeed imports; then the Trainer's collection of garbage need not walk all that each time."""
    run(Full(steps=1), tmp_path_factory.mktemp("warm"), Zero(2))
    gc.freeze()
    yield
    gc.unfreeze()


def run(
    method: Full,
    out: Path,
    zero: Zero | None,
    dtype: torch.dtype = torch.float32,
    checkpoint: Checkpoint = NO_CHECKPOINT,
    **more: Any,
) -> tuple[list[Step], nn.Module]:
    out.mkdir(exist_ok=True)
    model = method.prepare(llama().to(dtype), Context(CPU, 3))
    return train(method, model, DATA, out, 3, Engine(CPU, dtype, zero, **more), checkpoint=checkpoint), model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    "zero",
    [
        Zero(2),
        Zero(3),
        pytest.param(Zero(1), marks=pytest.mark.slow),
        pytest.param(Zero(2, offload=True), marks=pytest.mark.slow),
        pytest.param(Zero(3, offload=True), marks=pytest.mark.slow),
    ],
)
def test_every_stage_gives_the_steps_and_the_weights_of_plain_torch(tmp_path: Path, zero: Zero) -> None:
    steps, model = run(Full(**SETTINGS), tmp_path / "zero", zero)
    expected, plain = run(Full(**SETTINGS), tmp_path / "torch", None)

    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], abs=1e-6)
    assert [step.learning_rate for step in steps] == [step.learning_rate for step in expected]
    torch.testing.assert_close(weights(model), weights(plain), atol=1e-5, rtol=0)
    assert not model.training


@pytest.mark.parametrize("stage", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_in_bfloat16_what_is_trained_stays_float32(tmp_path: Path, stage: int) -> None:
    steps, model = run(Full(**SETTINGS), tmp_path / "zero", Zero(stage), torch.bfloat16)
    expected, _ = run(Full(**SETTINGS), tmp_path / "torch", None, torch.bfloat16)

    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], abs=2e-3)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_halved_micro_batch_keeps_the_batch_of_a_step(tmp_path: Path) -> None:
    """What an attempt gets that follows one which ran out of memory."""
    method = Full(**{**SETTINGS, "micro_batch_size": 4})

    whole, halved = (run(method, tmp_path / str(n), Zero(2), halvings=n)[0] for n in (0, 2))

    assert [step.loss for step in halved] == pytest.approx([step.loss for step in whole], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        (1, {}),
        (3, {"gradient_checkpointing": True, "schedule": "linear"}),
        pytest.param(2, {"optimizer": "sgd"}, marks=pytest.mark.slow),
        pytest.param(2, {"optimizer": "adamw_8bit"}, marks=pytest.mark.slow),
        pytest.param(3, {"optimizer": "adamw_8bit"}, marks=pytest.mark.slow),
    ],
)
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint], stage: int, settings: dict[str, Any]
) -> None:
    @dataclass
    class Dies(Full):
        def after_step(self, step: int) -> None:
            if step == 3:
                raise KeyboardInterrupt

    whole, expected = run(Full(**SETTINGS, **settings), tmp_path / "whole", Zero(stage))
    with pytest.raises(KeyboardInterrupt):
        run(Dies(**SETTINGS, **settings), tmp_path / "killed", Zero(stage), checkpoint=attempt_checkpoint())
    steps, model = run(Full(**SETTINGS, **settings), tmp_path / "again", Zero(stage), checkpoint=attempt_checkpoint())

    assert steps == whole
    assert torch.equal(weights(model), weights(expected))
    assert (tmp_path / "again/curve.jsonl").read_text() == (tmp_path / "whole/curve.jsonl").read_text()


def test_a_checkpoint_of_another_stage_is_refused(tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint]) -> None:
    run(Full(**SETTINGS), tmp_path, Zero(2), checkpoint=attempt_checkpoint())

    with pytest.raises(TaskError, match=r"is of ranks=1 and ZeRO stage=2, .* has ranks=1 and stage=0\. Try: engine\.ranks"):
        run(Full(**SETTINGS), tmp_path, None, checkpoint=attempt_checkpoint())


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_ends_the_task_before_the_weights_move(tmp_path: Path, stage: int, where: str) -> None:
    """DeepSpeed by itself leaves such a step out and goes on."""
    moved: list[int] = []

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient * float("nan")

    @dataclass
    class Breaks(Full):
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            total, tokens = super().loss(model, batch)
            if len(moved) == 2:
                total = Spoilt.apply(total) if where == "gradient" else total * float("nan")
            return total, tokens

        def after_step(self, step: int) -> None:
            moved.append(step)

    with pytest.raises(
        TaskError, match=rf"full: the {where} is (not finite|nan) at step 3 of 4.*Try: a learning_rate"
    ) as error:
        run(Breaks(**SETTINGS), tmp_path, Zero(stage))

    assert error.value.failure == "nonfinite"
    assert moved == [1, 2]
    assert [p.name for p in tmp_path.iterdir()] == ["curve.jsonl"]


@pytest.mark.parametrize("stage", [1, 2])
def test_what_a_method_writes_into_weights_after_a_step_stays(tmp_path: Path, stage: int) -> None:
    @dataclass
    class Clipped(Full):
        def prepare(self, model: nn.Module, context: Context) -> nn.Module:
            self.model = super().prepare(model, context)
            return self.model

        def after_step(self, step: int) -> None:
            for p in self.model.parameters():
                p.data.clamp_(-0.02, 0.02)

    steps, model = run(Clipped(**SETTINGS), tmp_path / "zero", Zero(stage))
    expected, plain = run(Clipped(**SETTINGS), tmp_path / "torch", None)

    assert [step.loss for step in steps] == pytest.approx([step.loss for step in expected], abs=1e-6)
    torch.testing.assert_close(weights(model), weights(plain), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("shards", "stage", "why"), [("data", 3, "in stage 3 no rank has any"), ("none", 1, "for one rank")])
def test_a_method_that_cannot_be_spread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: str, stage: int, why: str
) -> None:
    monkeypatch.setattr(Full, "shards", shards)

    with pytest.raises(TaskError, match=f"full cannot be trained by ZeRO-{stage}: .*{why}"):
        run(Full(**SETTINGS), tmp_path, Zero(stage))


def test_without_deepspeed_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "deepspeed" else found(name, *a))

    with pytest.raises(TaskError, match=r"engine=deepspeed_zero2 needs DeepSpeed\. Try: pip install 'pare-lm\[deepspeed\]'"):
        run(Full(**SETTINGS), tmp_path, Zero(2))


def test_a_process_is_afterwards_as_good_as_before(tmp_path: Path) -> None:
    """Warm workers go on to other tasks: nothing of the engine may reach these."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    before = dict(os.environ)
    linear = nn.functional.linear
    plain, _ = run(Full(**SETTINGS), tmp_path / "before", None)
    run(Full(**SETTINGS), tmp_path / "zero", Zero(3), torch.bfloat16)
    again, _ = run(Full(**SETTINGS), tmp_path / "after", None)

    assert again == plain
    assert dict(os.environ) == before
    assert not is_deepspeed_zero3_enabled()
    assert nn.functional.linear is linear


def test_only_one_parameter_at_a_time_is_made_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed

    gathered: list[int] = []
    ending: list[bool] = []
    end, gather = Shards.end, deepspeed.zero.GatheredParameters

    def watched(params: list[nn.Parameter], *args: Any, **kwargs: Any) -> Any:
        if ending:
            gathered.append(len(params))
        return gather(params, *args, **kwargs)

    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", watched)
    monkeypatch.setattr(Shards, "end", lambda *args: (ending.append(True), end(*args)))
    _, model = run(Full(steps=1), tmp_path, Zero(3))

    assert gathered == [1] * len(list(model.parameters()))


def test_keys_of_the_user_are_laid_over_those_of_the_engine() -> None:
    zero = Zero(3, True, {"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True})

    config = zero.arguments(torch.bfloat16)

    assert config["zero_optimization"] == {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}, "overlap_comm": False,
    }  # fmt: skip
    assert config["wall_clock_breakdown"]
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert merged({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "c": 4}) == {"a": {"b": 1, "d": 3}, "c": 4}
