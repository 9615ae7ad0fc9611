"""The tasks `calibrate` and `compress` on a small random Llama. `workshop` is a fixture of conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from pare.methods.anatomy.describe import describe
from pare.methods.contract import METHODS, Context, InputGroup, LayerMethod, load_all, method
from pare.methods.ops.statistics import Gram
from pare.methods.parts.formula import Dense, Formula
from pare.methods.quantize.gptq import Gptq
from pare.methods.quantize.rtn import Rtn
from pare.methods.settings import SettingsError
from pare.workers import hidden_states, models
from pare.workers.calibration import stream
from pare.workers.checkpoint import Checkpoint
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import calibrate, compress

GRAM = {"statistics": [{"module": "pare.methods.ops.statistics", "class": "Gram"}], "dtype": "float32"}
SMALL = {"group_size": 32}
CPU = torch.device("cpu")


@pytest.fixture
def gram(workshop: Any) -> Path:
    directory, _ = workshop.run(calibrate, "gram", GRAM, model=workshop.base, tokens=workshop.tokens())
    return directory


def spec(method: str, **settings: Any) -> dict[str, Any]:
    return {"method": method, "settings": {**SMALL, **settings}, "dtype": "float32"}


def linears(artifact: ModelArtifact) -> list[str]:
    return [name for name in artifact.parameter_names() if "_proj" in name]


def test_calibration_writes_one_file_for_each_block_with_the_statistics_of_its_groups(workshop: Any, gram: Path) -> None:
    assert sorted(file.name for file in gram.iterdir()) == ["block_000.safetensors", "block_001.safetensors"]
    stored = load_file(gram / "block_001.safetensors")
    groups = ("self_attn.qkv", "self_attn.o", "mlp.gate_up", "mlp.down")
    assert set(stored) == {f"model.layers.1.{group}:gram" for group in groups}
    model = load_in_memory(workshop.open(workshop.base), torch.float32)
    tokens = load_file(workshop.tokens() / "tokens.safetensors")["input_ids"]
    _, second = stream(model, describe(model), tokens, [Gram], CPU)
    for group, values in second.statistics.items():
        assert torch.equal(stored[f"{group}:gram"], values["gram"])


def test_calibration_says_what_it_read_and_how_far_it_is(workshop: Any) -> None:
    seen: list[tuple[int, int, str]] = []
    out = workshop.root / "gram"
    out.mkdir()
    inputs = {"model": workshop.base, "tokens": workshop.tokens(4, 32)}
    ctx = TaskContext(GRAM, inputs, out, progress=lambda *step: seen.append(step))
    assert calibrate.run(ctx) == {"blocks": 2, "tokens": 128}
    assert seen == [(1, 2, "blocks"), (2, 2, "blocks")]


def test_calibration_refuses_activations_that_are_not_finite(workshop: Any, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in workshop.base.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = torch.inf
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TaskError, match=r"model\.layers\.1\.self_attn\.qkv:gram is not finite: in float32"):
        workshop.run(calibrate, "gram", GRAM, model=broken, tokens=workshop.tokens())


def test_rounding_touches_every_linear_of_the_blocks_and_nothing_else(workshop: Any) -> None:
    directory, result = workshop.run(compress, "rtn", spec("rtn", bits=3), model=workshop.base)
    artifact, base = workshop.open(directory), workshop.open(workshop.base)
    assert sorted(artifact.table) == sorted(linears(base))
    weights = 0
    for name in linears(base):
        expected = Rtn(bits=3, **SMALL).round_to_nearest(base.materialise(name))
        assert torch.equal(artifact.materialise(name), expected.materialise())
        weights += expected.shape[0] * expected.shape[1]
    assert result["size/linear_bits_per_weight"] == 3 + 16 / 32
    assert result["size/linear_bytes"] == weights * 3.5 / 8
    assert result["notes"] == {}
    model, dense = (load_in_memory(a, torch.float32) for a in (artifact, base))
    untouched = [name for name, _ in dense.named_parameters() if "_proj" not in name]
    assert untouched
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in untouched)


def test_dense_statistics_make_what_the_method_makes_of_each_group(workshop: Any, gram: Path) -> None:
    directory, result = workshop.run(compress, "gptq", spec("gptq", bits=3), model=workshop.base, statistics=gram)
    artifact, base = workshop.open(directory), workshop.open(workshop.base)
    group = describe(load_in_memory(base, torch.float32)).blocks[1].groups[0]
    statistic = load_file(gram / "block_001.safetensors")[f"{group.name}:gram"]
    weights = {name: base.materialise(name) for name in group.weights}
    expected = Gptq(bits=3, **SMALL).compress(InputGroup(group.name, weights, statistics={"gram": statistic}), Context(CPU))
    for name, formula in expected.items():
        assert torch.equal(artifact.materialise(name), formula.materialise())
    assert result["notes"]["gptq/fallbacks"] == 0
    assert result["notes"]["gptq/output_error"] > 0


def output_error(directory: Path, workshop: Any) -> float:
    """Mean squared difference of the last hidden state from the base's."""
    tokens = load_file(workshop.tokens() / "tokens.safetensors")["input_ids"]
    with torch.no_grad():
        got, wanted = (load_in_memory(workshop.open(d), torch.float32).model(tokens)[0] for d in (directory, workshop.base))
    return (got - wanted).square().mean().item()


def test_gptq_is_closer_to_the_base_than_rounding_with_inputs_of_either_kind(workshop: Any, gram: Path) -> None:
    rtn, _ = workshop.run(compress, "rtn", spec("rtn", bits=3), model=workshop.base)
    dense, _ = workshop.run(compress, "dense", spec("gptq", bits=3), model=workshop.base, statistics=gram)
    own, _ = workshop.run(
        compress, "own", spec("gptq", bits=3, inputs="compressed"), model=workshop.base, tokens=workshop.tokens()
    )
    errors = [output_error(directory, workshop) for directory in (rtn, dense, own)]
    assert errors[1] < 0.9 * errors[0]
    assert errors[2] < 0.9 * errors[0]


def test_with_compressed_inputs_a_block_is_calibrated_on_what_its_compressed_predecessors_put_out(
    workshop: Any, gram: Path
) -> None:
    settings = {"bits": 2, "inputs": "compressed"}
    directory, _ = workshop.run(compress, "own", spec("gptq", **settings), model=workshop.base, tokens=workshop.tokens())
    artifact, base = workshop.open(directory), workshop.open(workshop.base)
    tokens = load_file(workshop.tokens() / "tokens.safetensors")["input_ids"]
    # Statistics of the second block over the finished model, whose first block is the compressed one.
    model = load_in_memory(artifact, torch.float32)
    for name in [n for n in linears(base) if "layers.1." in n]:
        model.get_parameter(name).data.copy_(base.materialise(name))
    _, second = stream(model, describe(model), tokens, [Gram], CPU)
    for group in second.block.groups:
        weights = {name: base.materialise(name) for name in group.weights}
        statistics = second.statistics[group.name]
        expected = Gptq(bits=2, **SMALL).compress(InputGroup(group.name, weights, statistics=statistics), Context(CPU))
        for name, formula in expected.items():
            assert torch.equal(artifact.materialise(name), formula.materialise())


def test_a_compressed_model_can_be_compressed_again_on_top(workshop: Any, tmp_path: Path) -> None:
    first, _ = workshop.run(compress, "first", spec("rtn", bits=4), model=workshop.base)
    second = tmp_path / "second"
    second.mkdir()
    places: dict[str, Path] = {"first": first}

    def resolve(fingerprint: str) -> Path:
        return places.get(fingerprint) or Path(workshop.resolve(fingerprint))

    ctx = TaskContext(spec("rtn", bits=2), {"model": first}, second, resolve=resolve, fingerprint_of={"model": "first"})
    compress.run(ctx)
    artifact, before = ModelArtifact(second, resolve), workshop.open(first)
    assert artifact.base_fingerprint == "first"
    name = "model.layers.0.mlp.down_proj.weight"
    expected = Rtn(bits=2, **SMALL).round_to_nearest(before.materialise(name))
    assert torch.equal(artifact.materialise(name), expected.materialise())
    assert torch.equal(load_in_memory(artifact, torch.float32).get_parameter(name), expected.materialise())


@pytest.fixture
def registered() -> Any:
    """Registers methods for the length of a test."""
    before = dict(load_all())

    def register(compressing: Callable[[LayerMethod, InputGroup, Context], dict[str, Formula]]) -> None:
        @method("test_only", source="this file (2026)")
        @dataclass
        class TestOnly(LayerMethod):
            def compress(self, group: InputGroup, context: Context) -> dict[str, Formula]:
                return compressing(self, group, context)

    yield register
    METHODS.clear()
    METHODS.update(before)


def run_test_only(workshop: Any, out: str, base: Path, **more: Any) -> dict[str, Any]:
    _, result = workshop.run(compress, out, {"method": "test_only", "settings": {}, **more}, model=base)
    return dict(result)


def test_what_a_method_reports_under_one_name_is_added_up_and_it_gets_seed_and_earlier_formulas(
    workshop: Any, registered: Any
) -> None:
    seen: list[tuple[str, int, set[str]]] = []

    def look(self: LayerMethod, group: InputGroup, context: Context) -> dict[str, Formula]:
        seen.append((group.name, context.seed, set(group.formulas)))
        context.report("test/groups", 1)
        context.report(f"test/{group.name}", 2)
        return {name: Formula([Dense(weight)]) for name, weight in group.weights.items()}

    registered(look)
    result = run_test_only(workshop, "a", workshop.base, seed=7)
    assert result["notes"]["test/groups"] == 8
    assert result["notes"]["test/model.layers.0.mlp.down"] == 2
    assert result["size/linear_bits_per_weight"] == 32
    assert seen[2] == ("model.layers.0.mlp.gate_up", 7, set())
    seen.clear()
    coded = workshop.artifact("coded", lambda name, w: Dense(w) if name.endswith("up_proj") else None)
    run_test_only(workshop, "b", coded)
    assert seen[2] == ("model.layers.0.mlp.gate_up", 0, {"model.layers.0.mlp.up_proj.weight"})


def test_a_method_that_leaves_a_weight_out_or_changes_its_shape_is_an_error(workshop: Any, registered: Any) -> None:
    def transposed(self: LayerMethod, group: InputGroup, context: Context) -> dict[str, Formula]:
        return {name: Formula([Dense(weight.T)]) for name, weight in group.weights.items()}

    registered(transposed)
    with pytest.raises(TaskError, match=r"test_only made formulas of shapes .*\(64, 32\)"):
        run_test_only(workshop, "a", workshop.base)
    registered(lambda self, group, context: {})
    with pytest.raises(TaskError, match=r"test_only made formulas of shapes \{\} for weights of shapes"):
        run_test_only(workshop, "b", workshop.base)


def test_what_does_not_fit_is_refused_before_any_work(workshop: Any) -> None:
    with pytest.raises(
        SettingsError, match=r"rtn\.group_size must be -1 or a divisor of 64, the input width of model\.layers\.0"
    ):
        workshop.run(compress, "a", spec("rtn", group_size=48), model=workshop.base)
    with pytest.raises(TaskError, match="compress takes a method of kind layer; lora is of kind train"):
        workshop.run(compress, "b", {"method": "lora", "settings": {}}, model=workshop.base)


def test_a_tiny_model_with_an_own_head_keeps_it(workshop: Any, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    base = tmp_path / "untied"
    LlamaForCausalLM(config).save_pretrained(base)
    out = tmp_path / "out"
    out.mkdir()
    ctx = TaskContext(spec("rtn"), {"model": base}, out, resolve=lambda f: base, fingerprint_of={"model": "base"})
    compress.run(ctx)
    artifact = ModelArtifact(out, lambda f: base)
    head: Tensor = load_in_memory(artifact, torch.float32).get_parameter("lm_head.weight")
    assert torch.equal(head, load_file(base / "model.safetensors")["lm_head.weight"])


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="session")
def four_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    directory = tmp_path_factory.mktemp("four_blocks")
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def killed_after(block: int) -> Callable[[int, int, str], None]:
    def progress(done: int, total: int, unit: str) -> None:
        if done == block:
            raise Killed

    return progress


CASES: dict[str, tuple[Any, dict[str, Any], tuple[str, ...]]] = {
    "calibrate": (calibrate, {**GRAM, "dtype": "bfloat16"}, ("tokens",)),
    "rtn": (compress, spec("rtn", bits=3, symmetric=False), ()),
    "gptq": (compress, spec("gptq", bits=3, act_order="group"), ("gram",)),
    "gptq-compressed": (compress, {**spec("gptq", bits=2, inputs="compressed"), "dtype": "bfloat16"}, ("tokens",)),
    "gptq-compressed-float32": (compress, spec("gptq", bits=2, inputs="compressed"), ("tokens",)),
}


@pytest.fixture(params=[False, True], ids=["in-memory", "in-files"])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether there is next to no memory, for hidden states and for what goes into a shard."""
    if request.param:
        monkeypatch.setattr(hidden_states, "free_memory", lambda: 0)
        monkeypatch.setattr(models, "SHARD_BYTES", 2000)
    return bool(request.param)


@pytest.mark.parametrize("case", CASES)
def test_a_task_that_was_killed_between_blocks_goes_on_to_the_same_bytes(
    workshop: Any, four_blocks: Path, attempt_checkpoint: Callable[[], Checkpoint], case: str, narrow: bool
) -> None:
    task, specification, roles = CASES[case]
    workshop.base = four_blocks
    inputs = {"model": four_blocks}
    if "tokens" in roles:
        inputs["tokens"] = workshop.tokens(sequences=6)
    if "gram" in roles:
        inputs["statistics"], _ = workshop.run(calibrate, "gram", GRAM, model=four_blocks, tokens=workshop.tokens())
    whole, expected = workshop.run(task, "whole", specification, **inputs)
    assert len([*whole.glob("weights-*")]) > 4 or not narrow or task is calibrate

    # Killed while nothing is kept, with one block kept, with two.
    for number, block in enumerate((1, 2, 3)):
        ctx = workshop.context(f"killed{number}", specification, **inputs)
        ctx.checkpoint, ctx.progress = attempt_checkpoint(), killed_after(block)
        with pytest.raises(Killed):
            task.run(ctx)
    ctx, seen = workshop.context("resumed", specification, **inputs), []
    ctx.checkpoint = attempt_checkpoint()
    ctx.progress = lambda done, total, unit: seen.append(done)
    result = task.run(ctx)

    assert seen == [3, 4]
    assert result == expected
    assert contents(ctx.out) == contents(whole)


@pytest.mark.parametrize("case", ["calibrate", "gptq-compressed"])
def test_finished_blocks_are_kept_once_and_a_damaged_one_costs_a_start_from_nothing(
    workshop: Any, four_blocks: Path, attempt_checkpoint: Callable[[], Checkpoint], case: str, tmp_path: Path
) -> None:
    task, specification, _ = CASES[case]
    workshop.base = four_blocks
    inputs = {"model": four_blocks, "tokens": workshop.tokens(sequences=6)}
    whole, expected = workshop.run(task, "whole", specification, **inputs)
    ctx = workshop.context("killed", specification, **inputs)
    ctx.checkpoint, ctx.progress = attempt_checkpoint(), killed_after(4)
    with pytest.raises(Killed):
        task.run(ctx)

    kept = sorted((tmp_path / "kept").rglob("*.pt"))
    states = [f"hidden_{blocks:03d}_{i:04d}" for blocks in (2, 3) for i in range(2)]
    names = ["00000002", "00000003", "block_000", "block_001", "block_002", *states]
    assert [path.name.partition("-")[0] for path in kept] == names
    damaged = bytearray(kept[3].read_bytes())
    damaged[-100] ^= 4
    kept[3].write_bytes(damaged)
    ctx, seen = workshop.context("resumed", specification, **inputs), []
    ctx.checkpoint = attempt_checkpoint()
    ctx.progress = lambda done, total, unit: seen.append(done)
    result = task.run(ctx)

    assert seen == [1, 2, 3, 4]
    assert result == expected
    assert contents(ctx.out) == contents(whole)


@pytest.mark.parametrize("case", CASES)
def test_with_next_to_no_memory_a_task_makes_the_same_to_the_bit(
    workshop: Any, gram: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    task, specification, roles = CASES[case]
    inputs = {"model": workshop.base} | ({"tokens": workshop.tokens()} if "tokens" in roles else {})
    inputs |= {"statistics": gram} if "gram" in roles else {}
    plain, expected = workshop.run(task, "plain", specification, **inputs)
    monkeypatch.setattr(hidden_states, "free_memory", lambda: 0)
    monkeypatch.setattr(models, "SHARD_BYTES", 2000)
    seen: list[int] = []
    ctx = workshop.context("narrow", specification, **inputs)
    ctx.progress = lambda done, total, unit: seen.append(len([*ctx.out.rglob("hidden-states-*/*")]))
    assert task.run(ctx) == expected
    assert seen == ([1, 1] if "tokens" in roles else [0, 0])
    if task is calibrate:
        assert contents(ctx.out) == contents(plain)
        return
    shards = {path.name: load_file(path) for path in ctx.out.glob("weights-*.safetensors")}
    assert len(shards) > 4
    sizes = [sum(t.nbytes for t in shard.values()) for shard in shards.values() if len(shard) > 1]
    assert all(size <= 2000 for size in sizes), "closed before it grows too large"
    assert {path.name for path in ctx.out.iterdir()} == {*shards, "tensors.json", "weights.safetensors.index.json"}
    assert (ctx.out / "tensors.json").read_text() == (plain / "tensors.json").read_text()
    together = {name: t for shard in shards.values() for name, t in shard.items()}
    whole = load_file(plain / "weights.safetensors")
    assert together.keys() == whole.keys()
    assert all(torch.equal(t, whole[name]) for name, t in together.items())
    one, other = (load_in_memory(workshop.open(directory), torch.float32) for directory in (ctx.out, plain))
    assert all(torch.equal(p, other.get_parameter(name)) for name, p in one.named_parameters())
