from __future__ import annotations

import gc
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import Context, TrainMethod
from pare.methods.finetune.full import Full
from pare.methods.finetune.lora import Lora
from pare.methods.ops.adapters import updates
from pare.methods.ops.grids import IntegerGrid
from pare.methods.parts.formula import Formula
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.models import ModelArtifact, load_in_memory, write_formulas
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import train as train_task
from pare.workers.training import Engine, Step, shuffled, train

CPU = torch.device("cpu")
SEQUENCES = torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(3))
DATA = {"input_ids": SEQUENCES}


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def run(method: Lora, out: Path, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[list[Step], nn.Module]:
    out.mkdir(exist_ok=True)
    model = method.prepare(llama(dtype), Context(CPU, seed))
    return train(method, model, DATA, out, seed, Engine(CPU, dtype)), model


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Imports what training imports; then the Trainer's collection of garbage need not walk all that each time."""
    run(Lora(steps=1), tmp_path_factory.mktemp("warm"))
    gc.freeze()
    yield
    gc.unfreeze()


def weights(model: nn.Module) -> Tensor:
    """All that was trained, as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def mean_loss(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_loss_of_a_step_is_the_mean_over_the_tokens_of_its_whole_batch(tmp_path: Path) -> None:
    steps, _ = run(Lora(steps=2, batch_size=4, micro_batch_size=2, warmup=0), tmp_path)

    first_batch = SEQUENCES[shuffled(6, 4, seed=0)]
    assert steps[0].loss == pytest.approx(mean_loss(llama(), first_batch), abs=1e-5)


def test_documents_in_one_sequence_do_not_see_each_other_and_masked_tokens_do_not_count() -> None:
    """A sequence of two documents, told apart by positions, has the loss of the two by themselves."""
    method, model = Lora(rank=2), llama()
    ids = SEQUENCES[:1]
    labels = ids.clone()
    labels[0, [0, 6, 9]] = -100  # what a document begins with follows from nothing
    positions = torch.cat([torch.arange(6), torch.arange(10)])[None]

    total, tokens = method.loss(model, {"input_ids": ids, "labels": labels, "position_ids": positions})

    pieces = [slice(0, 6), slice(6, 16)]
    alone = [method.loss(model, {"input_ids": ids[:, piece], "labels": labels[:, piece]}) for piece in pieces]
    assert tokens == sum(n for _, n in alone) == 13
    torch.testing.assert_close(total, sum(loss for loss, _ in alone))
    whole, _ = method.loss(model, {"input_ids": ids, "labels": labels})
    assert abs(whole - total) > 1e-3


def test_training_learns_and_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    steps, model = run(Lora(steps=12, batch_size=2, learning_rate=1e-2), tmp_path)

    assert steps[-1].loss < steps[0].loss - 0.1
    untouched = dict(llama().named_parameters())
    for name, parameter in model.unload().named_parameters():
        assert torch.equal(parameter, untouched[name]), name


@dataclass
class HalfTheTokens(Lora):
    """Learns to predict the tokens below 48 only, so that sequences count for unlike numbers of tokens."""

    name = "half"

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        ids = batch["input_ids"]
        logits = model(input_ids=ids).logits[:, :-1]
        targets = ids[:, 1:].where(ids[:, 1:] < 48, -100)
        return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), (targets >= 0).sum()


@pytest.mark.parametrize("cls", [Lora, HalfTheTokens])
def test_the_micro_batch_changes_memory_and_not_the_result(tmp_path: Path, cls: type[Lora]) -> None:
    results = [run(cls(steps=3, batch_size=4, micro_batch_size=m, learning_rate=1e-2), tmp_path) for m in (4, 2, 1)]

    for steps, model in results[1:]:
        for one, other in zip(results[0][0], steps, strict=True):
            assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert torch.allclose(weights(results[0][1]), weights(model), atol=2e-5)


def test_a_halved_micro_batch_is_that_of_the_setting_to_the_bit(tmp_path: Path) -> None:
    """What an attempt gets that follows one which ran out of memory."""

    def trained(micro_batch: int, halvings: int) -> Tensor:
        method = Lora(steps=2, batch_size=4, micro_batch_size=micro_batch)
        out = tmp_path / f"{micro_batch} {halvings}"
        out.mkdir(exist_ok=True)
        model = method.prepare(llama(), Context(CPU, 0))
        train(method, model, DATA, out, 0, Engine(CPU, torch.float32, halvings=halvings))
        return weights(model)

    assert torch.equal(trained(4, 1), trained(2, 0))
    assert torch.equal(trained(4, 5), trained(1, 0))
    assert torch.equal(trained(1, 1), trained(1, 0))


def test_a_gradient_is_divided_by_the_tokens_that_the_method_counted(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    @dataclass
    class Watched(HalfTheTokens):
        def after_backward(self, step: int) -> None:
            seen.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))

    method = Watched(steps=1, batch_size=4, micro_batch_size=1)
    model = method.prepare(llama(), Context(CPU))
    train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))

    fresh = Lora().prepare(llama(), Context(CPU))
    total, tokens = method.loss(fresh, {"input_ids": SEQUENCES[shuffled(6, 4, seed=0)]})
    (total / tokens).backward()
    expected = torch.cat([p.grad.flatten() for p in fresh.parameters() if p.requires_grad])
    assert tokens < 4 * 15
    assert torch.allclose(seen[0], expected, atol=1e-6)


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    rows = shuffled(6, 15, seed=4)

    assert sorted(rows[:6]) == sorted(rows[6:12]) == list(range(6))
    assert len(set(rows[12:])) == 3
    assert rows == shuffled(6, 15, seed=4) != shuffled(6, 15, seed=5)
    assert rows[:6] != rows[6:12]


def test_one_seed_gives_one_result_bit_for_bit_and_another_seed_another(tmp_path: Path) -> None:
    method = Lora(steps=3, batch_size=2, dropout=0.3, learning_rate=1e-2)

    first, again, other = (run(method, tmp_path / str(i), seed) for i, seed in enumerate((1, 1, 2)))

    assert first[0] == again[0]
    assert torch.equal(weights(first[1]), weights(again[1]))
    assert not torch.allclose(weights(first[1]), weights(other[1]), atol=1e-4)


def test_dropout_is_drawn_from_the_seed(tmp_path: Path) -> None:
    method = Lora(steps=2, dropout=0.5, learning_rate=1e-2, warmup=0)

    def after(seed: int) -> Tensor:
        model = method.prepare(llama(), Context(CPU, seed))
        train(
            method, model, {"input_ids": SEQUENCES[:1]}, tmp_path, seed, Engine(CPU, torch.float32)
        )  # one sequence has one order
        return weights(model)

    assert torch.equal(after(1), after(1))
    assert not torch.allclose(after(1), after(2), atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0, 0.5, 1, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0, 0.5, *(0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4))]),
    ],
)
def test_the_curve_holds_every_step_and_the_rate_it_was_taken_with(tmp_path: Path, schedule: str, rates: list[float]) -> None:
    # Two of six steps rise; a decay then runs over the other four.
    method = Lora(steps=6, warmup=0.3, learning_rate=0.02, schedule=schedule)
    steps, _ = run(method, tmp_path)

    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]

    assert [line["step"] for line in curve] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in curve] == [step.loss for step in steps]
    assert [line["learning_rate"] / 0.02 for line in curve] == pytest.approx(rates)


def test_hooks_see_gradients_before_and_new_weights_after_the_optimizer(tmp_path: Path) -> None:
    events: list[tuple[str, int, bool]] = []

    @dataclass
    class Watched(Lora):
        def after_backward(self, step: int) -> None:
            changed = not torch.equal(weights(model), last[0])
            events.append(("backward", step, changed))
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

        def after_step(self, step: int) -> None:
            events.append(("step", step, not torch.equal(weights(model), last[0])))
            last[0] = weights(model)

    method = Watched(steps=2, batch_size=2, micro_batch_size=1, warmup=0)
    model = method.prepare(llama(), Context(CPU))
    last = [weights(model)]
    train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))

    assert events == [("backward", 1, False), ("step", 1, True), ("backward", 2, False), ("step", 2, True)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_task_with_the_weights_before_it(tmp_path: Path, value: float) -> None:
    calls: list[Tensor] = []

    @dataclass
    class Breaks(Lora):
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            calls.append(weights(model))
            total, tokens = super().loss(model, batch)
            return (total * value if len(calls) == 5 else total), tokens

    method = Breaks(steps=4, batch_size=2, micro_batch_size=1, warmup=0)
    model = method.prepare(llama(), Context(CPU))

    with pytest.raises(
        TaskError, match=r"lora: the loss is (nan|inf) at step 3 of 4.*Try: a learning_rate below 0\.0002"
    ) as error:
        train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))

    assert error.value.failure == "nonfinite"
    assert torch.equal(weights(model), calls[4])
    assert len((tmp_path / "curve.jsonl").read_text().splitlines()) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.jsonl"]


def test_weights_that_the_last_step_spoils_end_the_task_too(tmp_path: Path) -> None:
    @dataclass
    class Breaks(Lora):
        def after_backward(self, step: int) -> None:
            if step == 2:
                next(p for p in model.parameters() if p.requires_grad).grad[0, 0] = float("nan")

    method = Breaks(steps=2, warmup=0)
    model = method.prepare(llama(), Context(CPU))

    with pytest.raises(TaskError, match="not finite after the last step") as error:
        train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))
    assert error.value.failure == "nonfinite"


def test_in_bfloat16_the_adapters_are_still_updated_in_float32(tmp_path: Path) -> None:
    # In bfloat16 such steps of 1e-5 would be lost beside values of 0.1.
    steps, model = run(Lora(steps=3, learning_rate=1e-5, warmup=0), tmp_path, dtype=torch.bfloat16)

    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = dict(Lora().prepare(llama(torch.bfloat16), Context(CPU)).named_parameters())
    assert all(math.isfinite(step.loss) for step in steps)
    for name, parameter in trained.items():
        assert parameter.dtype == torch.float32
        if "lora_A" in name:
            assert (parameter != start[name]).float().mean() > 0.9, name


def test_in_bfloat16_the_products_with_the_adapters_are_bfloat16_too(tmp_path: Path) -> None:
    method = Lora(steps=1)
    model = method.prepare(llama(torch.bfloat16), Context(CPU))
    products: list[Tensor] = []
    a = model.get_base_model().model.layers[0].mlp.up_proj.lora_A["default"]
    a.register_forward_hook(lambda module, args, output: products.append(output))

    train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.bfloat16))

    assert [product.dtype for product in products] == [torch.bfloat16]


def test_bfloat16_and_float32_train_alike(tmp_path: Path) -> None:
    method = Lora(steps=8, batch_size=2, learning_rate=1e-2)

    exact, rough = run(method, tmp_path)[0], run(method, tmp_path, dtype=torch.bfloat16)[0]

    for one, other in zip(exact, rough, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=0.02)


def test_nothing_is_printed_and_nothing_is_left_but_the_curve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    method = Lora(steps=2)
    model = method.prepare(llama(), Context(CPU))
    capfd.readouterr()

    train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))

    assert capfd.readouterr().out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["curve.jsonl"]
    assert not model.training


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_learns_and_keeps_two_bytes_a_weight(
    tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint], optimizer: str
) -> None:
    """Of tensors of 4,096 numbers and more; the scales of blocks of 256 and a table of 256 entries come on top."""
    pytest.importorskip("bitsandbytes")
    method = Lora(rank=128, steps=12, batch_size=2, learning_rate=1e-2, optimizer=optimizer)
    model, checkpoint = method.prepare(llama(), Context(CPU)), attempt_checkpoint()

    steps = train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32), checkpoint=checkpoint)

    saved = checkpoint.latest()
    assert saved is not None
    assert steps[-1].loss < steps[0].loss - 0.1
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    assert min(sizes) >= 4096
    states = [state["__bnb_optimizer_quant_state__"] for state in saved["optimizer"]["state"].values()]
    held = [sum(state[name].nbytes for name in ("state1", "state2", "absmax1", "absmax2")) for state in states]
    assert sum(held) == pytest.approx(2 * sum(sizes), rel=0.04)


@pytest.mark.parametrize("cls", [Lora, Full])
def test_recomputed_activations_change_memory_and_not_the_result(tmp_path: Path, cls: type[TrainMethod]) -> None:
    results: list[tuple[list[Step], Tensor]] = []
    passes: list[int] = []
    for again in (False, True):
        method = cls(steps=2, batch_size=2, learning_rate=1e-2, gradient_checkpointing=again)
        model = method.prepare(llama(), Context(CPU))
        seen: list[None] = []
        (up,) = (module for name, module in model.named_modules() if name.endswith("layers.1.mlp.up_proj"))
        up.register_forward_hook(lambda *args, seen=seen: seen.append(None))
        steps = train(method, model, DATA, tmp_path, 0, Engine(CPU, torch.float32))
        results.append((steps, weights(model)))
        passes.append(len(seen))

    assert passes == [4, 8], "two steps of two passes each, and then each of them twice"
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


def test_data_with_nothing_to_predict_in_a_step_are_refused_before_the_first(tmp_path: Path) -> None:
    labels = SEQUENCES.clone()
    rows = shuffled(6, 6, seed=0)
    labels[rows[2:4], 1:] = -100  # what a row begins with is never predicted
    method = Lora(steps=3, batch_size=2)

    with pytest.raises(TaskError, match=r"lora: no token of step 2 is to be predicted.* Try: a batch_size above 2") as error:
        train(
            method, method.prepare(llama(), Context(CPU)), {**DATA, "labels": labels}, tmp_path, 0, Engine(CPU, torch.float32)
        )

    assert error.value.failure == "user_error"
    assert not (tmp_path / "curve.jsonl").exists()


def test_a_micro_batch_with_nothing_to_predict_adds_nothing_to_its_step(tmp_path: Path) -> None:
    labels = SEQUENCES.clone()
    labels[shuffled(6, 2, seed=0)[0]] = -100
    method = Lora(steps=1, batch_size=2, micro_batch_size=1)

    (step,) = train(
        method, method.prepare(llama(), Context(CPU)), {**DATA, "labels": labels}, tmp_path, 0, Engine(CPU, torch.float32)
    )

    assert step.loss == pytest.approx(mean_loss(llama(), SEQUENCES[shuffled(6, 2, seed=0)[1:]]), abs=1e-5)


def test_without_room_for_a_micro_batch_the_error_says_what_makes_room(tmp_path: Path) -> None:
    @dataclass
    class Large(Lora):
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    method = Large(steps=1, batch_size=8, micro_batch_size=8)
    engine = Engine(CPU, torch.float32, halvings=1)
    with pytest.raises(TaskError, match=r"lora: no room .* micro-batch of 4: .*Try: micro_batch_size=2, gradient_ch") as error:
        train(method, method.prepare(llama(), Context(CPU)), DATA, tmp_path, 0, engine)

    assert error.value.failure == "oom_gpu"


def test_a_method_that_counts_no_token_ends_with_an_error_and_not_a_division_by_zero(tmp_path: Path) -> None:
    @dataclass
    class Blind(Lora):
        def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
            total, tokens = super().loss(model, batch)
            return total * 0, tokens * 0

    with pytest.raises(TaskError, match="no token of step 1 is to be predicted"):
        run(Blind(steps=1), tmp_path)


def test_an_unknown_optimizer_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"lora\.optimizer must be one of .*adamw_torch.*, got 'adamm'"):
        run(Lora(optimizer="adamm"), tmp_path)


def context(tmp_path: Path, method: str, dtype: str = "float32", **settings: Any) -> TaskContext:
    """A task `train` on a stored base; the progress it makes is kept in `seen`."""
    base, tokens, out = tmp_path / "base", tmp_path / "tokens", tmp_path / "out"
    for directory in (base, tokens, out):
        directory.mkdir()
    llama(torch.bfloat16).save_pretrained(base)
    save_file({"input_ids": SEQUENCES}, tokens / "tokens.safetensors")
    spec = {"method": method, "settings": settings, "seed": 5, "dtype": dtype}
    return TaskContext(
        spec,
        {"model": base, "tokens": tokens},
        out,
        resolve={"the-base": base}.__getitem__,
        fingerprint_of={"model": "the-base"},
    )


def test_qlora_tunes_through_the_codes_of_the_stage_before_and_leaves_them(tmp_path: Path) -> None:
    """As LoRA on the values that they stand for, which needs them dense in memory."""
    pytest.importorskip("bitsandbytes")
    ctx = context(tmp_path, "qlora", steps=4, batch_size=2, rank=2, learning_rate=1e-2, warmup=0)
    coded, places = tmp_path / "coded", {"the-base": tmp_path / "base"}
    coded.mkdir()
    base, grid = ModelArtifact(tmp_path / "base", Path), IntegerGrid(bits=3, group_size=32)
    names = [name for name in base.parameter_names() if "_proj" in name]
    write_formulas(coded, "the-base", {name: Formula([grid.round_to_nearest(base.materialise(name))]) for name in names})
    places["coded"] = ctx.inputs["model"] = coded
    ctx.resolve, ctx.fingerprint_of = places.__getitem__, {"model": "coded"}

    train_task.run(ctx)

    made = ModelArtifact(ctx.out, ctx.resolve)
    assert {formula["op"] for formula in made.table.values()} == {"add"}
    kinds = [part.kind for part in made.effective(names[0]).parts]
    assert kinds == ["codes", "low_rank"]
    method = Lora(steps=4, batch_size=2, rank=2, learning_rate=1e-2, warmup=0)
    dense = method.prepare(load_in_memory(ModelArtifact(coded, ctx.resolve), torch.float32), Context(CPU, 5))
    train(method, dense, DATA, tmp_path, 5, Engine(CPU, torch.float32))
    for name, update in updates(dense).items():
        torch.testing.assert_close(made.formula(name).materialise(), update.materialise(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_task_writes_the_model_that_it_trained(tmp_path: Path, method: str) -> None:
    ctx = context(tmp_path, method, steps=8, batch_size=2, rank=2, learning_rate=1e-2)
    seen: list[tuple[int, int, str]] = []
    ctx.progress = lambda done, total, unit: seen.append((done, total, unit))

    result = train_task.run(ctx)

    artifact = ModelArtifact(ctx.out, ctx.resolve)
    curve = [json.loads(line)["loss"] for line in (ctx.out / "curve.jsonl").read_text().splitlines()]
    assert result["train/loss_first"] == pytest.approx((curve[0] + curve[1]) / 2)
    assert result["train/loss_last"] == pytest.approx((curve[6] + curve[7]) / 2)
    assert result["cost/tokens"] == 8 * 2 * 16
    assert result["train/trainable_parameters"] == 2 * 2 * (2 * 128 + 2 * 96 + 3 * 192)
    assert seen == [(i, 8, "steps") for i in range(1, 9)]
    assert artifact.base_fingerprint == "the-base"
    assert sorted(p.name for p in (ctx.out / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    # The next batch in order would have cost less than it does the base: what was trained is in the artifact.
    tuned, base = load_in_memory(artifact, torch.float32), load_in_memory(artifact.dense, torch.float32)
    assert mean_loss(tuned, SEQUENCES) < mean_loss(base, SEQUENCES) - 0.05
    assert mean_loss(tuned, SEQUENCES) == pytest.approx(result["train/loss_last"], abs=0.1)


def test_the_task_refuses_a_dtype_that_it_cannot_train_in(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"lora trains in float32 or bfloat16, got dtype=float16\. Try: dtype=bfloat16"):
        train_task.run(context(tmp_path, "lora", "float16"))


class Killed(Exception):
    """Stands for the end of the process."""


def attempt(
    method: Lora, out: Path, checkpoint: Checkpoint, killed_after: int | None = None, dtype: torch.dtype = torch.float32
) -> tuple[list[Step], nn.Module, list[int]]:
    """Trains, or dies after a step, before it is saved. Returns what was trained and the numbers of the steps taken."""
    out.mkdir()
    taken: list[int] = []

    def progress(done: int, total: int, unit: str) -> None:
        taken.append(done)
        if done == killed_after:
            raise Killed

    model = method.prepare(llama(dtype), Context(CPU, 3))
    try:
        steps = train(method, model, DATA, out, 3, Engine(CPU, dtype), progress, checkpoint=checkpoint)
    except Killed:
        return [], model, taken
    return steps, model, taken


class Everything(Lora):
    """Draws from every generator and carries a state of its own that reaches into the gradients."""

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        self.mean, self.seen = torch.zeros(()), 0
        self.model = super().prepare(model, context)
        return self.model

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        total, tokens = super().loss(model, batch)
        return total * (0.5 + random.random() + np.random.rand() + torch.rand(())), tokens

    def after_backward(self, step: int) -> None:
        assert step == self.seen + 1
        for p in self.model.parameters():
            if p.requires_grad:
                p.grad += self.mean

    def after_step(self, step: int) -> None:
        self.seen = step
        self.mean = 0.9 * self.mean + 1e-4 * weights(self.model).sum()

    def state(self) -> dict[str, Any]:
        return {"mean": self.mean, "seen": self.seen}

    def load_state(self, state: dict[str, Any]) -> None:
        self.mean, self.seen = state["mean"], state["seen"]


HARD: dict[str, Any] = {
    "steps": 6, "batch_size": 4, "micro_batch_size": 2, "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 0.1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("cls", "dtype", "settings", "deaths"),
    [
        (Lora, torch.float32, {}, [1]),
        (Lora, torch.float32, {}, [2]),
        (Lora, torch.float32, {}, [4]),
        (Lora, torch.float32, {"schedule": "linear", "warmup": 0.5}, [3, 3, 5]),
        (Lora, torch.float32, {"micro_batch_size": 4, "optimizer": "sgd"}, [6]),
        (Lora, torch.bfloat16, {}, [5]),
        (Lora, torch.float32, {"rank": 64, "optimizer": "adamw_8bit"}, [3]),
        (Lora, torch.float32, {"rank": 64, "optimizer": "paged_adamw_8bit"}, [4]),
        (Lora, torch.float32, {"rank": 64, "optimizer": "paged_adamw_32bit"}, [4]),
        (Everything, torch.float32, {}, [3, 5]),
    ],
)
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    tmp_path: Path,
    attempt_checkpoint: Callable[[], Checkpoint],
    cls: type[Lora],
    dtype: torch.dtype,
    settings: dict[str, Any],
    deaths: list[int],
) -> None:
    method = cls(**{**HARD, **settings})
    whole, expected, _ = attempt(method, tmp_path / "whole", NO_CHECKPOINT, dtype=dtype)

    last = 0
    for number, death in enumerate(deaths):
        _, _, taken = attempt(method, tmp_path / f"killed{number}", attempt_checkpoint(), death, dtype)
        assert taken == list(range(last + 1, death + 1))
        last = death - 1
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)
    steps, model, taken = attempt(method, tmp_path / "out", attempt_checkpoint(), dtype=dtype)

    assert taken == list(range(last + 1, 7))
    assert steps == whole
    assert torch.equal(weights(model), weights(expected))
    assert (tmp_path / "out" / "curve.jsonl").read_bytes() == (tmp_path / "whole" / "curve.jsonl").read_bytes()


def test_a_training_goes_on_from_a_checkpoint_some_steps_back(
    tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Lora(**HARD)
    whole, expected, _ = attempt(method, tmp_path / "whole", NO_CHECKPOINT)
    seldom, asked = attempt_checkpoint(), iter(range(1, 100))
    monkeypatch.setattr(seldom, "due", lambda every_s: next(asked) == 2)

    attempt(method, tmp_path / "killed", seldom, killed_after=5)
    steps, model, taken = attempt(method, tmp_path / "out", attempt_checkpoint())

    assert taken == [3, 4, 5, 6]
    assert steps == whole
    assert torch.equal(weights(model), weights(expected))


def test_a_short_training_saves_nothing_and_the_interval_decides(
    tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, asked = attempt_checkpoint(), []
    monkeypatch.setattr(checkpoint, "due", lambda every_s: asked.append(every_s))
    method = Lora(steps=3)
    model = method.prepare(llama(), Context(CPU))

    train(
        method,
        model,
        {"input_ids": SEQUENCES},
        tmp_path,
        0,
        Engine(CPU, torch.float32),
        checkpoint=checkpoint,
        save_every_s=5.0,
    )

    assert asked == [5.0, 5.0]  # not after the last step: there is nothing left to lose
    assert checkpoint.latest() is None


def test_the_task_is_taken_up_and_shows_its_curve_while_it_runs(
    tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint]
) -> None:
    artifacts, points = [], []
    for name, deaths in {"whole": (), "killed": (3, 5)}.items():
        root = tmp_path / name
        root.mkdir()
        ctx = context(root, "lora", steps=6, batch_size=2, dropout=0.2)
        for death in (*deaths, None):
            ctx.checkpoint = attempt_checkpoint() if deaths else NO_CHECKPOINT
            ctx.out = root / f"out-{death}"
            ctx.out.mkdir()
            seen: list[tuple[int, dict[str, float]]] = []

            def point(step: int, values: dict[str, float], seen: list[Any] = seen, death: int | None = death) -> None:
                seen.append((step, values))
                if step == death:
                    raise Killed

            ctx.point = point
            try:
                result = train_task.run(ctx)
            except Killed:
                assert death is not None
        content = {p.relative_to(ctx.out): p.read_bytes() for p in ctx.out.rglob("*") if p.is_file()}
        artifacts.append((result, content))
        points.append(seen)

    assert artifacts[0] == artifacts[1]
    curve = [json.loads(line) for line in (ctx.out / "curve.jsonl").read_text().splitlines()]
    assert [{"step": step, **values} for step, values in points[0]] == curve
    assert points[1] == points[0][4:]
