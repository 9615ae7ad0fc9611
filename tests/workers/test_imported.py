"""Checkpoints made elsewhere: every form is taken, opened and measured; what cannot be is refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pare.methods.parts.codes import Codes
from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan
from pare.workers import imported
from pare.workers.corpus import SourceError
from pare.workers.imported import locate_import, resolve_import
from pare.workers.probe import ExportUnderTest
from pare.workers.task import TaskError
from pare.workers.tasks import adopt, evaluate, export, score
from tests.workers.conftest import BASE, Workshop

MakeCodes = Callable[..., Codes]


def spec_of(path: Path) -> dict[str, Any]:
    return {"identity": resolve_import({"path": str(path)}), "where": locate_import({"path": str(path)})}


def measured(workshop: Workshop, checkpoint: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """(what taking the checkpoint says, metrics of what was taken beside the base)."""
    out, facts = workshop.run(adopt, "taken", spec_of(checkpoint), model=workshop.base)
    keep = {"dtype": "float32", "keep_hidden": True}
    teacher, _ = workshop.run(score, "teacher", keep, model=workshop.base, tokens=workshop.tokens())
    opened = ExportUnderTest(str(out), "float32", "cpu")
    return facts, opened.predict(str(workshop.tokens()), str(teacher), {BASE: str(workshop.base)})["metrics"]


def exported(workshop: Workshop, codes: MakeCodes, **how: Any) -> Path:
    """A checkpoint that somebody made with another Pare: without what only exports of this one's store carry."""
    artifact = workshop.artifact("made", lambda name, w: codes(w, how.get("bits", 4), 32, how.get("symmetric", True)))
    out, _ = workshop.run(export, "elsewhere", {"format": how.get("format", "auto")}, model=artifact)
    for name in ("export.json", "README.md"):
        (out / name).unlink()
    return out


# --- forms ---


def test_a_dense_checkpoint_of_the_base_itself_measures_as_the_base_in_a_fresh_process(workshop: Workshop) -> None:
    out, facts = workshop.run(adopt, "taken", spec_of(workshop.base), model=workshop.base)
    keep = {"dtype": "float32", "keep_hidden": True}
    teacher, _ = workshop.run(score, "teacher", keep, model=workshop.base, tokens=workshop.tokens())
    spec = {"dtype": "float32", "tolerance": 0.005, "task": "x"}

    _, metrics = workshop.run(evaluate, "evaluated", spec, export=out, tokens=workshop.tokens(), teacher=teacher)

    assert metrics["quality/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["quality/top1_agreement"] == 1
    assert "quality/ppl_in_memory" not in metrics
    assert facts["notes"] == ["made elsewhere: there is no score in memory to hold its perplexity against"]
    assert facts["size/bytes"] == (workshop.base / "model.safetensors").stat().st_size
    assert (facts["format"], facts["opens_with"]) == ("dense", "transformers")


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_of_compressed_tensors_measure_as_what_they_were_made_from(
    workshop: Workshop, codes: MakeCodes, symmetric: bool
) -> None:
    checkpoint = exported(workshop, codes, symmetric=symmetric)
    keep = {"dtype": "float32", "keep_hidden": False}
    in_memory = workshop.run(score, "scored", keep, model=workshop.root / "made", tokens=workshop.tokens())[1]

    facts, metrics = measured(workshop, checkpoint)

    assert metrics["quality/ppl"] == pytest.approx(in_memory["quality/ppl"], rel=5e-3)
    assert metrics["quality/kl"] > 1e-5
    assert facts["format"] == "compressed-tensors"
    assert facts["opens_with"] == "transformers + compressed-tensors" + ("" if symmetric else ", dequantize=True")
    assert facts["size/bytes"] == (checkpoint / "model.safetensors").stat().st_size


def test_a_gguf_file_is_measured_with_the_tokenizer_that_is_in_it(workshop: Workshop, codes: MakeCodes, tmp_path: Path) -> None:
    artifact = workshop.artifact("made", lambda name, w: codes(w, 8, 32))
    written, _ = workshop.run(export, "elsewhere", {"format": "gguf"}, model=artifact)
    file = Path(shutil.copy(written / "model.gguf", tmp_path / "small.Q8_0.gguf"))

    facts, metrics = measured(workshop, file)

    assert facts["format"] == "gguf"
    assert 0 < metrics["quality/kl"] < 1e-3
    assert facts["size/bytes"] == file.stat().st_size


def test_a_peft_adapter_is_measured_on_the_base(workshop: Workshop) -> None:
    directory = adapter(workshop, scale=0.05)

    facts, metrics = measured(workshop, directory)

    assert (facts["format"], facts["opens_with"]) == ("adapter", "transformers + peft")
    assert metrics["quality/kl"] > 1e-5
    both = (workshop.base / "model.safetensors", directory / "adapter_model.safetensors")
    assert facts["size/bytes"] == sum(file.stat().st_size for file in both)


def adapter(workshop: Workshop, scale: float) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workshop.base)
    torch.manual_seed(0)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale)
    tuned.save_pretrained(workshop.root / "adapter")
    return workshop.root / "adapter"


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="the package bitsandbytes is not installed")
def test_four_bits_of_bitsandbytes_are_measured(workshop: Workshop) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        llm_int8_skip_modules=["lm_head", "down_proj"],
    )
    model = AutoModelForCausalLM.from_pretrained(workshop.base, quantization_config=quantised)
    model.save_pretrained(workshop.root / "bnb")
    AutoTokenizer.from_pretrained(workshop.base).save_pretrained(workshop.root / "bnb")

    facts, metrics = measured(workshop, workshop.root / "bnb")

    assert (facts["format"], facts["opens_with"]) == ("bitsandbytes", "transformers + bitsandbytes")
    assert metrics["quality/kl"] > 1e-5


def test_a_checkpoint_without_a_tokenizer_takes_that_of_the_base_and_says_so(workshop: Workshop) -> None:
    bare = Path(shutil.copytree(workshop.base, workshop.root / "bare", ignore=shutil.ignore_patterns("token*", "special*")))

    facts, metrics = measured(workshop, bare)

    assert facts["notes"][1:] == ["brings no tokenizer; the base's was taken"]
    assert metrics["quality/kl"] == pytest.approx(0, abs=1e-6)


# --- what is refused while planning ---


@pytest.fixture
def foreign(workshop: Workshop) -> Path:
    """A copy of the base that a test may damage."""
    return Path(shutil.copytree(workshop.base, workshop.root / "foreign"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def cut_short(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def own_code(directory: Path) -> None:
    edit_json(
        directory / "config.json", auto_map={"AutoConfig": "mine.Own"}, model_type="mine", architectures=["MyForCausalLM"]
    )


def not_there(directory: Path) -> None:
    shutil.rmtree(directory)


def an_encoder(directory: Path) -> None:
    edit_json(directory / "config.json", architectures=["BertModel"])


def pickled_adapter(directory: Path) -> None:
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (directory / "adapter_model.bin").write_bytes(b"\x80")


def no_kind(directory: Path) -> None:
    (directory / "adapter_config.json").write_text("{}")


def two_ggufs(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "a.gguf").write_bytes(b"GGUF")
    (directory / "b.gguf").write_bytes(b"GGUF")


def no_gguf(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "a.gguf").write_bytes(b"GGML" + bytes(60))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_there, "there is no such file or directory"),
        (cut_short, r"model.safetensors is cut short: \d+ bytes expected"),
        (pickled, r"only in pytorch_model.bin, a pickle"),
        (own_code, r"its own code \(auto_map\), which is never run"),
        (an_encoder, "BertModel is no causal language model"),
        (pickled_adapter, "only in adapter_model.bin, a pickle, .*Pare reads adapter_model.safetensors"),
        (no_kind, "names no `peft_type`"),
        (two_ggufs, r"holds 2 GGUF files. Name one of them: recipe.import.path=.*a.gguf"),
        (no_gguf, r"a.gguf: cannot be read: .*is not a GGUF file of version 2 or 3"),
    ],
)
def test_a_checkpoint_that_cannot_be_used_is_refused(foreign: Path, damage: Any, message: str) -> None:
    damage(foreign)

    with pytest.raises(SourceError, match=message) as caught:
        resolve_import({"path": str(foreign)})

    assert caught.value.setting == "recipe.import.path"
    assert str(caught.value).startswith(f"recipe.import.path={foreign}")


@pytest.mark.parametrize(("method", "package"), [("gptq", "optimum"), ("awq", "gptqmodel"), ("quanto", "optimum-quanto")])
def test_a_format_whose_library_is_not_installed_names_it(
    foreign: Path, method: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit_json(foreign / "config.json", quantization_config={"quant_method": method, "bits": 4})
    absent = {"optimum", "optimum.quanto", "gptqmodel"}
    real = importlib.util.find_spec
    monkeypatch.setattr(imported.importlib.util, "find_spec", lambda name: None if name in absent else real(name))

    with pytest.raises(SourceError, match=rf"{method} checkpoints are opened by the package {package}, which is not installed"):
        resolve_import({"path": str(foreign)})


@pytest.mark.parametrize(
    ("groups", "how"),
    [
        ({"weights": {"num_bits": 4, "symmetric": True}}, "plain"),
        ({"weights": {"num_bits": 4, "symmetric": False}}, "dequantize"),
        ({"weights": {"num_bits": 4, "symmetric": True}, "format": "nvfp4-pack-quantized"}, "bfloat16"),
        ({"weights": {"num_bits": 8, "symmetric": True}, "format": "float-quantized"}, "plain"),
    ],
)
def test_the_way_of_opening_follows_from_the_config(groups: dict[str, Any], how: str) -> None:
    said = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": groups}}

    assert imported.way_of_opening(said) == how


def test_the_identity_is_the_content_wherever_it_lies(foreign: Path, workshop: Workshop) -> None:
    first = resolve_import({"path": str(foreign)})

    assert first == resolve_import({"path": str(workshop.base)})
    assert str(foreign) not in json.dumps(first)
    edit_json(foreign / "config.json", rope_scaling=None)
    assert first != resolve_import({"path": str(foreign)})


# --- what is refused when it is opened ---


def test_another_tokenizer_is_refused(foreign: Path, workshop: Workshop) -> None:
    file = foreign / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))

    with pytest.raises(TaskError, match=r"its tokenizer is not that of the base: .* model.path=BASE"):
        workshop.run(adopt, "taken", spec_of(foreign), model=workshop.base)


def test_weights_that_do_not_fill_the_model_are_refused(foreign: Path, workshop: Workshop) -> None:
    weights = load_file(foreign / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, foreign / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(TaskError, match=r"do not fill LlamaForCausalLM: model.layers.1.mlp.up_proj.weight and 0 more"):
        workshop.run(adopt, "taken", spec_of(foreign), model=workshop.base)


@pytest.mark.parametrize("change", ["another width", "another module"])
def test_an_adapter_of_another_model_is_refused(workshop: Workshop, change: str) -> None:
    directory = adapter(workshop, scale=0.05)
    file = directory / "adapter_model.safetensors"
    weights = load_file(file)
    if change == "another width":
        weights = {name: torch.cat([w, w]) if "lora_B" in name else w for name, w in weights.items()}
    else:
        weights = {name.replace("layers.1.", "layers.7."): w for name, w in weights.items()}
    save_file(weights, file)

    with pytest.raises(TaskError, match=r"peft cannot put it on this base|has no place for \S*layers.7\S* and 3 more"):
        workshop.run(adopt, "taken", spec_of(directory), model=workshop.base)


@pytest.mark.parametrize("keep", [0, 100, 20000, -1])
def test_a_gguf_file_that_is_cut_short_is_refused(workshop: Workshop, codes: MakeCodes, tmp_path: Path, keep: int) -> None:
    artifact = workshop.artifact("made", lambda name, w: codes(w, 8, 32))
    written, _ = workshop.run(export, "elsewhere", {"format": "gguf"}, model=artifact)
    (tmp_path / "cut.gguf").write_bytes((written / "model.gguf").read_bytes()[:keep])

    with pytest.raises(
        SourceError, match=r"cut.gguf: (cannot be read: .*|is cut short: \d+ bytes expected, .*)download it again"
    ):
        resolve_import({"path": str(tmp_path / "cut.gguf")})


def test_a_checkpoint_that_changed_after_the_plan_fails_the_task(foreign: Path, workshop: Workshop) -> None:
    spec = spec_of(foreign)
    edit_json(foreign / "config.json", rope_scaling=None)

    with pytest.raises(TaskError, match="is not what it was when the plan was made"):
        workshop.run(adopt, "taken", spec, model=workshop.base)


# --- in a plan ---


def plan_of(workshop: Workshop, *words: str) -> Plan:
    base = ["model=hf", f"model.path={workshop.base}", "evaluation.questions.n=4"]
    return build_plan(config.load([*base, *words]), "cpu", 1)


def test_an_import_is_an_export_without_a_score_of_its_own(workshop: Workshop) -> None:
    plan = plan_of(workshop, "recipe=base,imported", f"recipe.import.path={workshop.base}")
    goals = plan.goals["imported"]
    tasks = [plan.tasks[fp] for fp in goals.tasks]

    assert plan.tasks[goals.export].type == "adopt"
    assert goals.export == goals.artifact
    assert [task.type for task in tasks if task.type in ("export", "compress")] == []
    assert plan.tasks[goals.evaluate].inputs["export"] == goals.export
    assert "score" not in plan.tasks[goals.evaluate].inputs
    assert plan.tasks[goals.evaluate].inputs["teacher"] == plan.tasks[plan.goals["base"].evaluate].inputs["teacher"]
    assert str(workshop.base) not in json.dumps(plan.tasks[goals.export].record)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=imported"], "recipe.import.path has to be given"),
        (["recipe=imported", "recipe.import.path=nowhere"], "there is no such file or directory"),
        (["recipe=imported", "+method@recipe.again=rtn"], "no other stage can stand beside it. Drop recipe.again"),
        (["recipe=imported,soup", "recipe.merge.members.blocks=[imported]"], "'imported' was made elsewhere"),
    ],
)
def test_an_import_that_makes_no_sense_is_refused_by_the_plan(workshop: Workshop, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(workshop, *words)
