"""Prompts as artifacts: the tasks that honour one, from training to the evaluation of the export, and those that refuse it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.contract import load_all
from pare.methods.ops.prompts import write_prompt
from pare.methods.ops.tuner_kinds import PROMPTS
from pare.workers import large
from pare.workers.export.adapter import open_adapter
from pare.workers.models import ModelArtifact, load_dense, load_in_memory, write_formulas
from pare.workers.probe import ExportUnderTest
from pare.workers.search import open_levels
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import calibrate, compress, evaluate, export, merge, score, teach, train
from tests.workers.conftest import BASE, Workshop

load_all()
P = 3
IDS = torch.arange(32).view(2, 16)
STEPS = {"steps": 8, "batch_size": 4, "learning_rate": 1e-2, "virtual_tokens": P}
each_form = pytest.mark.parametrize("form", ["embeddings", "keys and values"])


@pytest.fixture
def prompted(workshop: Workshop) -> Callable[..., Path]:
    """Makes a model artifact with a drawn prompt on the base, or on another artifact."""

    def make(form: str = "embeddings", beneath: Path | None = None) -> Path:
        directory = workshop.root / "prompted"
        directory.mkdir()
        shape = (P, 64) if form == "embeddings" else (2, 2, 2, P, 16)
        write_prompt(torch.randn(shape, generator=torch.Generator().manual_seed(4)), directory)
        write_formulas(directory, "beneath" if beneath else BASE, {})
        return directory

    return make


def opened(workshop: Workshop, directory: Path, beneath: Path | None = None) -> ModelArtifact:
    places = {BASE: workshop.base, "beneath": beneath or workshop.base}
    return ModelArtifact(directory, places.__getitem__)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", PROMPTS)
def test_a_prompt_is_trained_scored_exported_and_evaluated(workshop: Workshop, name: str) -> None:
    spec: dict[str, Any] = {"dtype": "float32", "keep_hidden": False}
    tokens = workshop.tokens()
    tuned, said = workshop.run(
        train, "tuned", {"method": name, "settings": STEPS, "seed": 0, "dtype": "float32"}, model=workshop.base, tokens=tokens
    )
    teacher, _ = workshop.run(score, "teacher", spec | {"keep_hidden": True}, model=workshop.base, tokens=tokens)
    in_memory, own = workshop.run(score, "score", spec, model=tuned, tokens=tokens, teacher=teacher)
    exported, facts = workshop.run(export, "export", {"card": {}}, model=tuned)

    probe = ExportUnderTest(str(exported), "float32", "cpu")
    read = probe.prepare()
    found = probe.predict(str(tokens), str(teacher), {BASE: str(workshop.base)})["metrics"]
    compared = evaluate.compare(found, in_memory, 1e-5)

    assert sorted(file.name for file in tuned.iterdir()) == [
        "adapter", "curve.jsonl", "prompt.safetensors", "tensors.json", "weights.safetensors"
    ]  # fmt: skip
    assert said["train/loss_last"] < said["train/loss_first"]
    assert own["quality/kl"] > 1e-3
    assert (facts["format"], facts["opens_with"], read["way"]) == ("adapter", "transformers + peft", "whole")
    assert compared["quality/ppl_in_memory"] == pytest.approx(own["quality/ppl"])
    assert found["quality/kl"] == pytest.approx(own["quality/kl"], rel=1e-4)
    files = [exported / "adapter_model.safetensors", exported / "base" / "model.safetensors"]
    assert facts["size/bytes"] == sum(file.stat().st_size for file in files)
    numbers = {"prefix_tuning": 2 * 2 * 2 * P * 16}.get(name, P * 64)
    assert load_file(files[0])["prompt_embeddings"].numel() == numbers
    assert (f"model(input_ids).logits[:, {P}:]" in (exported / "README.md").read_text()) == (name != "prefix_tuning")
    assert probe.speed(8, 2)["decode_tok_s"] > 0


@each_form
@pytest.mark.parametrize("on", ["base", "codes"])
def test_the_opened_export_is_the_in_memory_model(
    prompted: Callable[..., Path], workshop: Workshop, codes: Callable[..., Any], form: str, on: str
) -> None:
    beneath = workshop.artifact("codes", lambda module, weight: codes(weight, 4, 32)) if on == "codes" else None
    directory = prompted(form, beneath)
    artifact, out = opened(workshop, directory, beneath), workshop.root / "export"
    out.mkdir()
    ctx = TaskContext(
        {"card": {}}, {"model": directory}, out, resolve=lambda fp: {BASE: workshop.base, "beneath": beneath or Path()}[fp]
    )
    said = export.run(ctx)

    expected = logits(load_in_memory(artifact, torch.float32))

    assert ("compressed-tensors" in said["opens_with"]) == (on == "codes")
    torch.testing.assert_close(logits(open_adapter(out, torch.float32, "cpu", export_how(out))), expected, atol=1e-5, rtol=0)
    without = load_in_memory(artifact.base, torch.float32) if artifact.base else load_dense(workshop.base, torch.float32)
    assert (expected - logits(without)).abs().max() > 1e-2


def export_how(out: Path) -> str:
    return str(json.loads((out / "export.json").read_text())["open"])


def test_an_adapter_of_another_kind_of_prompt_is_refused(workshop: Workshop, prompted: Callable[..., Path]) -> None:
    exported, _ = workshop.run(export, "export", {"card": {}}, model=prompted())
    file = exported / "adapter_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps({**said, "peft_type": "CPT", "cpt_token_ids": [1] * P, "cpt_mask": [1] * P,
                                "cpt_tokens_type_mask": [1] * P}))  # fmt: skip

    with pytest.raises(ValueError, match="an adapter of type CPT does more than to stand before the input"):
        open_adapter(exported, torch.float32)


def test_a_prompted_model_may_teach(workshop: Workshop, prompted: Callable[..., Path]) -> None:
    directory = prompted()
    out, said = workshop.run(teach, "taught", {"dtype": "float32"}, model=directory, tokens=workshop.tokens())

    model = load_in_memory(opened(workshop, directory), torch.float32)
    with torch.no_grad():
        ids = load_file(workshop.tokens() / "tokens.safetensors")["input_ids"]
        expected = model.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(load_file(out / "hidden.safetensors")["hidden"], expected, atol=1e-4, rtol=0)
    assert said["width"] == 64


LAST = "a prompt is learnt against the model as it is, so make it the last stage of the recipe"


@pytest.mark.parametrize(
    ("task", "spec", "what"),
    [
        (compress, {"method": "rtn", "settings": {}}, "rtn"),
        (calibrate, {"dtype": "float32", "statistics": []}, "a model that is read block by block"),
        (train, {"method": "lora", "settings": {}, "seed": 0, "dtype": "float32"}, "lora"),
        (train, {"method": "prompt_tuning", "settings": {}, "seed": 0, "dtype": "float32"}, "prompt_tuning"),
    ],
)
def test_a_stage_behind_a_prompt_is_refused(
    workshop: Workshop, prompted: Callable[..., Path], task: Any, spec: dict[str, Any], what: str
) -> None:
    with pytest.raises(TaskError, match=f"^{what} sees weights alone, and .* has a prompt beside them: {LAST}"):
        workshop.run(task, "out", spec, model=prompted(), tokens=workshop.tokens())


def test_merges_searches_and_models_beneath_others_are_refused(workshop: Workshop, prompted: Callable[..., Path]) -> None:
    directory = prompted()
    spec = {"method": "model_soups", "settings": {}, "dtype": "float32", "members": [{"name": "a", "score": 1.0}]}
    ctx = workshop.context("merged", spec, model=workshop.base, tokens=workshop.tokens())
    ctx.inputs["member.000"], ctx.fingerprint_of["member.000"] = directory, "prompted"
    with pytest.raises(TaskError, match=f"^a merge, of which a is a member, sees weights alone.*{LAST}"):
        merge.run(ctx)
    with pytest.raises(TaskError, match=f"^a search sees weights alone.*{LAST}"):
        open_levels(workshop.context("search", {}, model=directory, **{"level.2": directory}), [2])
    above = workshop.root / "above"
    above.mkdir()
    write_formulas(above, "prompted", {})
    with pytest.raises(TaskError, match=r"^what is made of a model sees weights alone"):
        ModelArtifact(above, {"prompted": directory, BASE: workshop.base}.__getitem__)


@pytest.mark.parametrize("task", [score, teach])
def test_a_prompted_model_is_not_read_block_by_block(workshop: Workshop, prompted: Callable[..., Path], task: Any) -> None:
    spec = {"dtype": "float32", "keep_hidden": False, "where": {"memory_bytes": 1}}
    with pytest.raises(TaskError, match=r"one with a prompt cannot be read block by block.*evaluation\.memory_gb") as error:
        workshop.run(task, "out", spec, model=prompted(), tokens=workshop.tokens())
    assert error.value.failure == "infeasible"


def test_an_export_with_a_prompt_is_not_read_block_by_block(workshop: Workshop, prompted: Callable[..., Path]) -> None:
    exported, _ = workshop.run(export, "export", {"card": {}}, model=prompted())
    with pytest.raises(TaskError, match="one of format adapter is only opened as a whole"):
        large.stream_export(exported, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("form", ["dense", "gguf", "pare", "compressed-tensors"])
def test_forms_that_hold_weights_alone_are_refused(workshop: Workshop, prompted: Callable[..., Path], form: str) -> None:
    message = f"export.format={form} cannot say what this model is: weights cannot say that a prompt stands before every input"
    with pytest.raises(TaskError, match=message):
        workshop.run(export, "export", {"card": {}, "format": form}, model=prompted())


def test_documents_that_share_a_row_are_refused_before_the_training(workshop: Workshop) -> None:
    packed = workshop.root / "packed"
    packed.mkdir()
    columns = {"input_ids": IDS.clone(), "position_ids": torch.arange(8).repeat(2, 2)}
    save_file(columns, packed / "tokens.safetensors")
    spec = {"method": "prefix_tuning", "settings": STEPS, "seed": 0, "dtype": "float32"}
    with pytest.raises(
        TaskError, match=r"only the first would see the prompt of prefix_tuning.*Try: data\.train\.packing=padded"
    ):
        workshop.run(train, "out", spec, model=workshop.base, tokens=packed)
