"""What teachers make of the training data, and students that learn from it: the tasks `teach` and `train` on real artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.ops.heads import as_stored
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.masked import Kept, Masked
from pare.workers import evaluation
from pare.workers.export.adapter import export_adapter, open_adapter
from pare.workers.models import ModelArtifact, load_dense, load_in_memory, write_formulas
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import teach, train
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer
from tests.methods.anatomy.tiny_models import tiny

STEPS: dict[str, Any] = {"steps": 6, "batch_size": 4, "micro_batch_size": 4, "learning_rate": 3e-3}


def run(task: Any, out: Path, spec: dict[str, Any], **inputs: Path) -> dict[str, Any]:
    """Runs a task; the fingerprint of an artifact is where it lies."""
    out.mkdir()
    roles = {role.replace("_", "."): path for role, path in inputs.items()}
    ctx = TaskContext(spec, roles, out, resolve=Path, fingerprint_of={role: str(path) for role, path in roles.items()})
    result: dict[str, Any] = task.run(ctx)
    return result


def training(
    out: Path, method: str, dtype: str = "float32", teachers: list[float] | None = None, **given: Any
) -> dict[str, Any]:
    """given: inputs, which are paths, and settings."""
    inputs = {name: value for name, value in given.items() if isinstance(value, Path)}
    settings = STEPS | {name: value for name, value in given.items() if name not in inputs}
    spec = {"method": method, "settings": settings, "seed": 0, "dtype": dtype}
    return run(train, out, spec | ({"teachers": teachers} if teachers else {}), **inputs)


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("train_tokens")
    ids = torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(1))
    save_file({"input_ids": ids}, directory / "tokens.safetensors")
    return directory


@pytest.fixture(scope="session")
def taught(random_llama: Path, tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the base makes of the tokens."""
    out = tmp_path_factory.mktemp("teachers") / "base"
    assert run(teach, out, {"dtype": "float32"}, model=random_llama, tokens=tokens) == {"tokens": 144, "width": 64}
    return out


def artifact_of(base: Path, out: Path, change: Any) -> Path:
    """A *formulas* artifact on `base`, with `change(weight)` in place of every linear of a block."""
    out.mkdir()
    dense = ModelArtifact(base, Path)
    names = [name for name in dense.parameter_names() if "_proj" in name]
    write_formulas(out, str(base), {name: Formula([change(dense.stored(name))]) for name in names})
    return out


def pruned(weight: Tensor) -> Masked:
    keep = weight.abs() > weight.abs().float().median()
    return Masked.of(keep, weight[keep])


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits.float()
    return found


def opened(directory: Path) -> nn.Module:
    return load_in_memory(ModelArtifact(directory, Path), torch.float32)


def ids_of(tokens: Path) -> Tensor:
    return load_file(tokens / "tokens.safetensors")["input_ids"]


def test_a_teacher_s_stored_states_and_head_give_its_logits(random_llama: Path, tokens: Path, taught: Path) -> None:
    teacher = evaluation.open_teacher(taught, Path, torch.float32, project=as_stored)

    whole = logits(load_dense(random_llama, torch.float32), ids_of(tokens))

    torch.testing.assert_close(teacher.head(teacher.hidden), whole, atol=1e-5, rtol=1e-5)
    assert (taught / "hidden.safetensors").stat().st_size == 6 * 24 * 64 * 4 + 8 + 80


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_states_are_stored_in_the_dtype_of_the_training(random_llama: Path, tokens: Path, tmp_path: Path, dtype: str) -> None:
    run(teach, tmp_path / "out", {"dtype": dtype}, model=random_llama, tokens=tokens)

    assert load_file(tmp_path / "out" / "hidden.safetensors")["hidden"].dtype == getattr(torch, dtype)


def test_a_teacher_sees_the_documents_of_a_row_apart(random_llama: Path, tokens: Path, taught: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    packed.mkdir()
    positions = torch.cat([torch.arange(10), torch.arange(14)]).repeat(6, 1)
    save_file({"input_ids": ids_of(tokens), "position_ids": positions}, packed / "tokens.safetensors")

    run(teach, tmp_path / "out", {"dtype": "float32"}, model=random_llama, tokens=packed)

    apart, plain = (load_file(where / "hidden.safetensors")["hidden"] for where in (tmp_path / "out", taught))
    alone = evaluation.Whole(load_dense(random_llama, torch.float32)).body(ids_of(tokens)[:, 10:])
    assert torch.equal(apart[:, :10], plain[:, :10])
    torch.testing.assert_close(apart[:, 10:], alone.detach(), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain[:, 10:], apart[:, 10:], atol=1e-3)


def test_a_sparse_student_is_healed_and_keeps_its_zeros_and_its_bytes(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path
) -> None:
    sparse = artifact_of(random_llama, tmp_path / "sparse", pruned)
    inputs = {"model": sparse, "tokens": tokens, "teacher_0": taught}

    result = training(tmp_path / "healed", "distill", teachers=[1.0], **inputs)

    assert 0 < result["train/loss_last"] < 0.7 * result["train/loss_first"]
    before, after = ModelArtifact(sparse, Path), ModelArtifact(tmp_path / "healed", Path)
    for name in before.compressed_names():
        was, now = before.formula(name), after.formula(name)
        assert was is not None
        assert now is not None
        assert isinstance(now.parts[0], Kept)
        assert torch.equal(now.materialise() == 0, was.materialise() == 0)
        assert now.nbytes == was.nbytes
    ids = ids_of(tokens)
    base = logits(load_dense(random_llama, torch.float32), ids)
    harm = [(logits(opened(model), ids) - base).square().mean() for model in (sparse, tmp_path / "healed")]
    assert harm[1] < 0.8 * harm[0]


def test_codes_stay_codes_while_adapters_learn_beside_them(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path, codes: Any
) -> None:
    quantised = artifact_of(random_llama, tmp_path / "codes", lambda weight: codes(weight, 2, 32))
    inputs = {"model": quantised, "tokens": tokens, "teacher_0": taught}

    result = training(tmp_path / "healed", "distill_lora", teachers=[1.0], rank=8, **inputs)

    assert 0 < result["train/loss_last"] < 0.9 * result["train/loss_first"]
    healed = ModelArtifact(tmp_path / "healed", Path)
    assert {spec["op"] for spec in healed.table.values()} == {"add"}
    assert [p.kind for p in healed.effective("model.layers.0.mlp.up_proj.weight").parts] == ["codes", "low_rank"]


@pytest.mark.parametrize("method", ["lora", "distill_lora"])
def test_an_adapter_on_codes_opens_from_its_export_with_the_logits_that_it_was_trained_to(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path, codes: Any, method: str
) -> None:
    quantised = artifact_of(random_llama, tmp_path / "codes", lambda weight: codes(weight, 4, 32))
    teacher: dict[str, Any] = {"teacher_0": taught, "teachers": [1.0]} if method == "distill_lora" else {}
    training(tmp_path / "healed", method, model=quantised, tokens=tokens, **teacher)
    (tmp_path / "export").mkdir()

    written = export_adapter(ModelArtifact(tmp_path / "healed", Path), tmp_path / "export")

    config = json.loads((tmp_path / "export" / "base" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    again = open_adapter(tmp_path / "export", torch.float32, how=written.how)
    ids = ids_of(tokens)
    torch.testing.assert_close(logits(again, ids), logits(opened(tmp_path / "healed"), ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(opened(quantised), ids), logits(again, ids), atol=1e-2)


def test_the_micro_batch_changes_memory_and_not_what_a_student_learns(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path
) -> None:
    sparse = artifact_of(random_llama, tmp_path / "sparse", pruned)
    inputs = {"model": sparse, "tokens": tokens, "teacher_0": taught}
    size = {"batch_size": 8, "steps": 2, "w_ce": 0.2, "w_hidden": 0.2, "store": "float32"}

    results = [
        training(tmp_path / f"by {m}", "distill", teachers=[1.0], **inputs, **size, micro_batch_size=m) for m in (8, 4, 1)
    ]

    whole, *others = (opened(tmp_path / f"by {m}").state_dict() for m in (8, 4, 1))
    for result, other in zip(results[1:], others, strict=True):
        assert result["train/loss_last"] == pytest.approx(results[0]["train/loss_last"], rel=1e-4)
        for name, value in other.items():
            torch.testing.assert_close(value, whole[name], atol=1e-4, rtol=1e-3)


def test_teachers_count_by_their_shares_whatever_these_sum_to(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path
) -> None:
    """Two teachers that are one: what is learnt is what it teaches."""
    sparse = artifact_of(random_llama, tmp_path / "sparse", pruned)
    inputs = {"model": sparse, "tokens": tokens, "teacher_0": taught}

    one = training(tmp_path / "one", "distill", teachers=[2.0], **inputs)
    two = training(tmp_path / "two", "distill", teachers=[3.0, 1.0], teacher_1=taught, **inputs)

    assert two["train/loss_last"] == pytest.approx(one["train/loss_last"], rel=1e-4)


def test_in_bfloat16_a_student_learns_too(random_llama: Path, tokens: Path, tmp_path: Path) -> None:
    sparse = artifact_of(random_llama, tmp_path / "sparse", pruned)
    run(teach, tmp_path / "taught", {"dtype": "bfloat16"}, model=random_llama, tokens=tokens)
    inputs = {"model": sparse, "tokens": tokens, "teacher_0": tmp_path / "taught"}

    result = training(tmp_path / "healed", "distill", "bfloat16", [1.0], **inputs)

    assert result["train/loss_last"] < 0.8 * result["train/loss_first"]


def test_what_is_stored_is_measured(random_llama: Path, tokens: Path, tmp_path: Path) -> None:
    """All weights trained; the artifact alone is the model, in the base's dtype."""
    training(tmp_path / "full", "full", model=random_llama, tokens=tokens)

    artifact, base = ModelArtifact(tmp_path / "full", Path), ModelArtifact(random_llama, Path)
    assert artifact.compressed_names() == sorted(base.parameter_names())
    for name in artifact.compressed_names():
        (part,) = artifact.formula(name).parts  # type: ignore[union-attr]
        assert isinstance(part, Dense)
        assert part.weight.dtype == base.stored(name).dtype == torch.bfloat16
        assert artifact.materialise(name).shape == base.stored(name).shape
    model = opened(tmp_path / "full")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert nn.functional.cross_entropy(logits(model, ids_of(tokens))[:, :-1].flatten(0, 1), ids_of(tokens)[:, 1:].flatten()) < 5


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "MambaForCausalLM", "GPT2LMHeadModel"])
def test_weights_of_any_shape_can_be_trained_and_stored(architecture: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny(architecture).save_pretrained(base)
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    save_file({"input_ids": torch.randint(96, (4, 12))}, tokens / "tokens.safetensors")

    training(tmp_path / "full", "full", model=base, tokens=tokens, steps=2, store="float32")
    training(tmp_path / "again", "full", model=tmp_path / "full", tokens=tokens, steps=2, store="float32")

    trained, again = opened(tmp_path / "full").state_dict(), opened(tmp_path / "again").state_dict()
    changed = [
        name for name, value in load_dense(base, torch.float32).named_parameters() if not torch.equal(value, trained[name])
    ]
    assert len(changed) >= 0.8 * len(dict(load_dense(base, torch.float32).named_parameters()))
    assert any(not torch.equal(value, again[name]) for name, value in trained.items())


def test_a_teacher_with_another_tokenizer_or_other_windows_is_refused(
    random_llama: Path, tokens: Path, taught: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    other, fewer = tmp_path / "other", tmp_path / "fewer"
    LlamaForCausalLM(LlamaConfig(**tiny_config(TinySettings(layers=1, width=32, ffn=32)))).save_pretrained(other)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(other)
    fewer.mkdir()
    save_file({"input_ids": ids_of(tokens)[:4]}, fewer / "tokens.safetensors")
    run(teach, tmp_path / "strange", {"dtype": "float32"}, model=other, tokens=tokens)

    with pytest.raises(TaskError, match=r"teacher\.0 has another tokenizer than the student"):
        training(tmp_path / "a", "distill", teachers=[1.0], model=random_llama, tokens=tokens, teacher_0=tmp_path / "strange")
    with pytest.raises(TaskError, match=r"teacher\.0 has seen windows of \(6, 24\), and there are \(4, 24\) to learn from"):
        training(tmp_path / "b", "distill", teachers=[1.0], model=random_llama, tokens=fewer, teacher_0=taught)


def test_a_teacher_whose_states_overflow_is_refused(random_llama: Path, tokens: Path, tmp_path: Path) -> None:
    broken = artifact_of(random_llama, tmp_path / "broken", lambda weight: Dense(weight * torch.nan))

    with pytest.raises(TaskError) as caught:
        run(teach, tmp_path / "out", {"dtype": "float32"}, model=broken, tokens=tokens)

    assert caught.value.failure == "nonfinite"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("stage", [2, 3])
def test_zeros_stay_zero_under_deepspeed_and_the_weights_are_those_of_plain_torch(
    random_llama: Path, tokens: Path, tmp_path: Path, stage: int
) -> None:
    pytest.importorskip("deepspeed")
    sparse = artifact_of(random_llama, tmp_path / "sparse", pruned)
    settings = STEPS | {"weight_decay": 0.1, "store": "float32"}
    spec = {"method": "full", "settings": settings, "seed": 0, "dtype": "float32"}
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"

    run(train, plain, spec, model=sparse, tokens=tokens)
    run(train, sharded, spec | {"zero": {"stage": stage, "offload": False, "config": {}}}, model=sparse, tokens=tokens)

    before, one, other = (ModelArtifact(where, Path) for where in (sparse, plain, sharded))
    for name in one.compressed_names():
        torch.testing.assert_close(other.materialise(name), one.materialise(name), atol=1e-4, rtol=1e-3)
    for name in before.compressed_names():
        assert torch.equal(other.materialise(name) == 0, before.materialise(name) == 0)
