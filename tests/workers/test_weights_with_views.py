"""Model artifacts and tasks over weights that are not plain (out, in) matrices: experts, Conv1D, what is fused, vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pare.methods.anatomy.describe import describe
from pare.methods.anatomy.views import weight_of
from pare.methods.parts.formula import Dense, Formula
from pare.workers.models import ModelArtifact, load_in_memory, load_skeleton, write_formulas
from pare.workers.task import TaskContext
from pare.workers.tasks import calibrate, compress, import_model
from tests.methods.anatomy.tiny_models import TOKENS, tiny

FAMILIES = [
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "GPT2LMHeadModel", "Phi3ForCausalLM", "Gemma2ForCausalLM", "MambaForCausalLM",
]  # fmt: skip
SETTINGS = {"bits": 4, "group_size": -1}


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a tiny model, as the import leaves it."""
    made: dict[str, Path] = {}

    def of(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = tmp_path_factory.mktemp(architecture)
            tiny(architecture).save_pretrained(made[architecture], save_original_format=False)
        return made[architecture]

    return of


def opened(directory: Path, **beneath: Path) -> ModelArtifact:
    return ModelArtifact(directory, lambda fingerprint: beneath[fingerprint])


def add(*names: str, to: ModelArtifact, amount: float) -> dict[str, Formula]:
    return {name: Formula([Dense(torch.full(to.stored(name).shape, amount))], op="add") for name in names}


def written(directory: Path, base: str, formulas: dict[str, Formula]) -> Path:
    directory.mkdir()
    write_formulas(directory, base, formulas)
    return directory


def test_an_artifact_is_read_through_views_and_put_together_from_them(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    root = base_of("MixtralForCausalLM")
    stack = "model.layers.1.mlp.experts.down_proj"
    base = opened(root)
    whole = base.stored(stack)
    assert torch.equal(base.stored(f"{stack}[2]"), whole[2])
    new = torch.randn(whole[2].shape, generator=torch.Generator().manual_seed(5))
    one = written(tmp_path / "one", "base", {f"{stack}[2]": Formula([Dense(new)])})
    two = written(tmp_path / "two", "one", add(f"{stack}[2]", f"{stack}[3]", to=base, amount=0.5))
    artifact = opened(two, one=one, base=root)
    assert torch.equal(artifact.materialise(f"{stack}[2]"), new + 0.5)
    assert torch.equal(artifact.materialise(f"{stack}[3]"), whole[3] + 0.5)
    assert torch.equal(artifact.materialise(f"{stack}[1]"), whole[1])
    assert torch.equal(artifact.materialise(stack), torch.stack([whole[0], whole[1], new + 0.5, whole[3] + 0.5]))
    assert torch.equal(artifact.effective(f"{stack}[2]").materialise(), new + 0.5)
    assert artifact.compressed_names() == [f"{stack}[2]", f"{stack}[3]"]
    model = load_in_memory(artifact, torch.float32)
    assert torch.equal(model.get_parameter(stack), artifact.materialise(stack))


def test_a_conv1d_is_read_and_written_as_out_by_in(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = base_of("GPT2LMHeadModel"), "transformer.h.0.attn.c_attn.weight"
    base = opened(root)
    assert base.materialise(f"{name}^T").shape == (120, 40)
    new = torch.randn(120, 40, generator=torch.Generator().manual_seed(5))
    artifact = opened(written(tmp_path / "one", "base", {f"{name}^T": Formula([Dense(new)])}), base=root)
    assert torch.equal(artifact.materialise(name), new.T)
    assert torch.equal(load_in_memory(artifact, torch.float32).get_parameter(name), new.T)
    plain = opened(written(tmp_path / "two", "base", {name: Formula([Dense(new.T)])}), base=root)
    assert torch.equal(plain.materialise(f"{name}^T"), new)


def test_a_vector_has_a_formula_of_one_row(base_of: Callable[[str], Path], tmp_path: Path) -> None:
    root, name = base_of("Gemma2ForCausalLM"), "model.layers.0.input_layernorm.weight"
    base = opened(root)
    one = written(tmp_path / "one", "base", {name: Formula([Dense(torch.arange(40.0)[None])])})
    two = written(tmp_path / "two", "one", {name: Formula([Dense(torch.ones(1, 40))], op="add")})
    artifact = opened(two, one=one, base=root)
    assert torch.equal(artifact.materialise(name), torch.arange(1.0, 41.0))
    assert artifact.effective(name).shape == (1, 40)
    assert torch.equal(load_in_memory(artifact, torch.float32).get_parameter(name), torch.arange(1.0, 41.0))
    assert base.effective(name).shape == (1, 40)


def test_a_parameter_and_a_view_of_it_cannot_both_have_a_formula(tmp_path: Path) -> None:
    formula = Formula([Dense(torch.ones(2, 2))])
    with pytest.raises(ValueError, match=r"a\.weight\^T has a formula, and so has the parameter"):
        write_formulas(tmp_path, "base", {"a.weight": formula, "a.weight^T": formula})


def task(run: Any, out: Path, spec: dict[str, Any], base: Path, **inputs: Path) -> dict[str, Any]:
    out.mkdir()
    fingerprints = {"model": "base", **{role: role for role in inputs}}
    ctx = TaskContext(spec, {"model": base, **inputs}, out, resolve=lambda fp: {"base": base}[fp], fingerprint_of=fingerprints)
    result: dict[str, Any] = run(ctx)
    return result


@pytest.mark.parametrize("architecture", FAMILIES)
def test_calibrated_compression_covers_every_family(architecture: str, base_of: Callable[[str], Path], tmp_path: Path) -> None:
    root = base_of(architecture)
    (tmp_path / "tokens").mkdir()
    save_file({"input_ids": TOKENS}, tmp_path / "tokens" / "tokens.safetensors")
    need = [{"module": "pare.methods.ops.statistics", "class": "Gram"}]
    task(calibrate.run, tmp_path / "s", {"statistics": need, "dtype": "float32"}, root, tokens=tmp_path / "tokens")
    spec = {"method": "gptq", "settings": SETTINGS, "seed": 0, "dtype": "float32"}
    result = task(compress.run, tmp_path / "dense", spec, root, statistics=tmp_path / "s")
    assert result["notes"]["gptq/output_error"] > 0
    spec["settings"] = {**SETTINGS, "inputs": "compressed"}
    task(compress.run, tmp_path / "own", spec, root, tokens=tmp_path / "tokens")
    anatomy = describe(load_skeleton(root))
    plain = load_in_memory(opened(root), torch.float32)
    for directory in (tmp_path / "dense", tmp_path / "own"):
        artifact = opened(directory, base=root)
        assert sorted(artifact.table) == sorted(anatomy.widths)
        model = load_in_memory(artifact, torch.float32)
        for name in anatomy.widths:
            weight = weight_of(model, name)
            assert torch.equal(weight, artifact.formula(name).materialise())
            assert 0 < relative(weight, weight_of(plain, name)) < 0.5, name
        logits = [m(input_ids=TOKENS, use_cache=False).logits for m in (model, plain)]
        assert 0 < relative(*logits) < 0.9


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def test_experts_are_stacked_in_the_base_however_the_source_stores_them(tmp_path: Path) -> None:
    from pare.workers.model_files import digest_directory, model_files
    from pare.workers.tiny import tiny_tokenizer

    source = tmp_path / "source"
    tiny("MixtralForCausalLM", vocab_size=258).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    assert any(".w1." in name for name in opened(source).parameter_names())
    out = tmp_path / "out"
    out.mkdir()
    identity = {"source": "hf", "digest": digest_directory(source, model_files(source))}
    spec = {"model": {"dtype": "float32"}, "identity": identity, "where": {"path": str(source)}}
    import_model.run(TaskContext(json.loads(json.dumps(spec)), {}, out))
    names = opened(out).parameter_names()
    assert set(names) == {name for name, _ in load_skeleton(out).named_parameters()}
    assert opened(out).stored("model.layers.0.mlp.experts.down_proj[1]").shape == (40, 56)
