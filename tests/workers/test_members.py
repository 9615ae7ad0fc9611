"""Members of a merge that lie in directories: taken as what they add to the base, or refused while planning."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from pare.methods.finetune.lora import Lora
from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import Plan, build_plan
from pare.workers.corpus import SourceError
from pare.workers.members import locate_member, resolve_member, tokens_of, tokens_of_base
from pare.workers.models import load_dense
from pare.workers.task import TaskError
from pare.workers.tasks import member
from tests.workers.merging import Sweep, in_memory, logits

KEY = "recipe.merge.members.paths"


def asked(sweep: Sweep, path: Path) -> dict[str, Any]:
    model = {"source": "hf", "path": str(sweep.places["base"]), "name": None, "revision": None, "dtype": "bfloat16"}
    return {"path": str(path), "key": KEY, "model": model}


def spec_of(sweep: Sweep, path: Path) -> dict[str, Any]:
    spec = asked(sweep, path)
    return {"identity": resolve_member(spec), "where": locate_member(spec)}


def take(sweep: Sweep, name: str, path: Path) -> dict[str, Any]:
    result: dict[str, Any] = sweep.run(member, name, spec_of(sweep, path), model="base")
    return result


@pytest.fixture
def adapter(sweep: Sweep, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sweep.places["a"] / "adapter", tmp_path / "adapter elsewhere"))


@pytest.fixture
def full(sweep: Sweep, tmp_path: Path) -> Path:
    """A model in which two weights and a vector are others than in the base."""
    directory = Path(shutil.copytree(sweep.places["base"], tmp_path / "full elsewhere"))
    rewrite(directory / "model.safetensors", lambda name, t: t + 0.01 if name in CHANGED else t)
    return directory


CHANGED = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"}


def rewrite(file: Path, change: Callable[[str, Tensor], Tensor | None]) -> None:
    tensors = {name: change(name, t) for name, t in load_file(file).items()}
    save_file({name: t.contiguous() for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- taken --------------------------------------------------------------------------------------------------------------


def test_an_adapter_becomes_the_updates_that_it_was_saved_from(sweep: Sweep, adapter: Path) -> None:
    result = take(sweep, "elsewhere", adapter)

    ours, theirs = sweep.open("elsewhere"), sweep.open("a")
    assert result == {"format": "adapter", "weights": 14}
    assert sorted(ours.table) == sorted(theirs.table)
    for name in theirs.table:
        one, other = ours.formula(name), theirs.formula(name)
        assert one is not None
        assert other is not None
        assert one.spec() == other.spec()
        assert all(torch.equal(t, other.tensors()[key]) for key, t in one.tensors().items())


def test_ranks_and_scales_of_each_module_are_read_as_peft_reads_them(sweep: Sweep) -> None:
    sweep.train("of its own", Lora(rank=2, alpha=3, rslora=True, targets="q_v"))
    sweep.merge(("a", "b", "c"), mode="uniform")
    for name in ("of its own", "soup"):
        directory = sweep.places[name] / "adapter"
        take(sweep, "elsewhere", directory)

        opened = PeftModel.from_pretrained(load_dense(sweep.places["base"], torch.float32), directory)

        assert torch.allclose(in_memory(sweep, "elsewhere"), logits(opened), atol=1e-5), name


def test_a_full_model_becomes_the_weights_in_which_it_differs(sweep: Sweep, full: Path) -> None:
    result = take(sweep, "elsewhere", full)

    assert result == {"format": "dense", "weights": 3}
    assert sweep.open("elsewhere").table.keys() == CHANGED
    assert torch.equal(in_memory(sweep, "elsewhere"), logits(load_dense(full, torch.float32)))


def test_members_from_directories_are_merged_with_those_of_the_sweep(
    sweep: Sweep,
    full: Path,
    adapter: Path,
) -> None:
    take(sweep, "path0", full)
    take(sweep, "path1", adapter)

    sweep.merge(("b", "path0", "path1"), mode="uniform")
    mixed = {name: sweep.open("soup").materialise(name) for name in sweep.open("soup").table}
    sweep.merge(("b", "path1"), out="two", mode="uniform")

    for name, weight in mixed.items():
        mean = sum(sweep.open(m).materialise(name) for m in ("b", "path0", "path1")) / 3
        assert torch.allclose(weight, mean, rtol=2**-8, atol=1e-5), name
    assert sweep.export("two")[1]["format"] == "adapter"


def with_a_head(directory: Path, factor: float) -> None:
    """Stores the head beside the embedding that it was tied to, so many times as large."""
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * factor
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    edit(directory / "config.json", tie_word_embeddings=False)


def test_a_head_that_is_stored_beside_the_embedding_may_be_a_copy_of_it_and_nothing_else(sweep: Sweep, full: Path) -> None:
    with_a_head(full, 1.0)
    assert take(sweep, "copied", full)["weights"] == 3

    with_a_head(full, 2.0)
    with pytest.raises(TaskError, match=r"lm_head\.weight is not its embedding, and in the base they are one weight"):
        take(sweep, "moved", full)


def test_a_member_whose_head_is_its_embedding_is_refused_where_the_base_has_a_head_of_its_own(
    sweep: Sweep, full: Path, tmp_path: Path
) -> None:
    untied = Path(shutil.copytree(sweep.places["base"], tmp_path / "untied"))
    with_a_head(untied, 2.0)
    spec = asked(sweep, full)

    with pytest.raises(SourceError, match=r"here lm_head\.weight is not there, in the base is of shape \[300, 64\]"):
        resolve_member(spec | {"model": spec["model"] | {"path": str(untied)}})


# --- refused ------------------------------------------------------------------------------------------------------------


def more_tokens(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda n, t: torch.cat([t, t[:1]]) if "embed" in n else t)


def without_a_weight(directory: Path) -> None:
    rewrite(directory / "model.safetensors", lambda n, t: None if n == "model.norm.weight" else t)


def narrower(directory: Path) -> None:
    rewrite(directory / "adapter_model.safetensors", lambda n, t: t[:, :-1] if "lora_A" in n else t)


def other_numbers(directory: Path) -> None:
    said = json.loads((directory / "tokenizer.json").read_text())
    vocabulary = said["model"]["vocab"]
    (a, i), (b, j) = list(vocabulary.items())[5:7]
    said["model"]["vocab"] = vocabulary | {a: j, b: i}
    (directory / "tokenizer.json").write_text(json.dumps(said))


def other_merges(directory: Path) -> None:
    said = json.loads((directory / "tokenizer.json").read_text())
    said["model"]["merges"] = [*said["model"].get("merges", []), ["a", "b"]]
    (directory / "tokenizer.json").write_text(json.dumps(said))


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (more_tokens, r"was not made of the base: here model.embed_tokens.weight is of shape \[301, 64\]"),
        (without_a_weight, "here model.norm.weight is not there, in the base is of shape"),
        (other_numbers, "its tokenizer is not that of the base: they differ in the number of"),
        (other_merges, "its tokenizer is not that of the base: they cut words in other places, from merge 0 on"),
        (lambda d: edit(d / "config.json", architectures=["MistralForCausalLM"]), "is a MistralForCausalLM, and the base"),
        (lambda d: edit(d / "config.json", quantization_config={"quant_method": "gptq"}), r"is quantised \(gptq\)"),
        (lambda d: (d / "config.json").unlink(), "no config.json there"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_a_member_is_refused_while_planning(
    sweep: Sweep,
    full: Path,
    break_it: Callable[[Path], Any],
    message: str,
) -> None:
    break_it(full)
    with pytest.raises(SourceError, match=message) as error:
        resolve_member(asked(sweep, full))
    assert str(error.value).startswith(f"{KEY}={full}")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: edit(d / "adapter_config.json", use_dora=True), r"updates of weights \(use_dora\).*unload"),
        (lambda d: edit(d / "adapter_config.json", bias="all"), r"updates of weights \(bias\)"),
        (lambda d: edit(d / "adapter_config.json", alora_invocation_tokens=[1, 2]), r"\(alora_invocation_tokens\)"),
        (lambda d: edit(d / "adapter_config.json", modules_to_save=["lm_head"]), r"\(modules_to_save\)"),
        (lambda d: edit(d / "adapter_config.json", peft_type="IA3"), r"\(peft_type=IA3\)"),
        (lambda d: edit(d / "adapter_config.json", init_lora_weights="pissa"), "changes the base beneath it.*_conversion"),
        (narrower, "was not trained on the base"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "holds no adapter"),
        (lambda d: save_file({"base_model.model.lm_tail.lora_A.weight": torch.ones(1, 2)}, d / "adapter_model.safetensors"),
         "lm_tail.lora_A.weight has no place in the base"),
    ],
)  # fmt: skip
def test_an_adapter_that_cannot_be_a_member_is_refused_while_planning(
    sweep: Sweep,
    adapter: Path,
    break_it: Callable[[Path], Any],
    message: str,
) -> None:
    break_it(adapter)
    with pytest.raises(SourceError, match=message) as error:
        resolve_member(asked(sweep, adapter))
    assert str(error.value).startswith(f"{KEY}={adapter}")


def test_a_path_that_is_no_directory_is_refused(sweep: Sweep, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there is no such directory"):
        resolve_member(asked(sweep, tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(SourceError, match="is a file"):
        resolve_member(asked(sweep, tmp_path / "file"))


def test_a_member_that_changed_after_the_plan_fails_the_task(sweep: Sweep, adapter: Path) -> None:
    spec = spec_of(sweep, adapter)
    edit(adapter / "adapter_config.json", lora_alpha=99)

    with pytest.raises(TaskError, match="is not what it was when the plan was made"):
        sweep.run(member, "elsewhere", spec, model="base")


def test_the_task_refuses_another_tokenizer_where_the_plan_could_not(sweep: Sweep, full: Path) -> None:
    """Of a base of the hub the plan knows no tokenizer."""
    other_numbers(full)
    spec = {"identity": {"format": "dense"}, "where": {"path": str(full)}}
    from pare.workers.model_files import digest_directory, model_files

    spec["identity"]["digest"] = digest_directory(full, model_files(full))
    with pytest.raises(TaskError, match="its tokenizer is not that of the base"):
        sweep.run(member, "elsewhere", spec, model="base")


def test_the_tokens_of_the_shipped_model_are_those_that_its_import_writes(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from pare.workers.gguf_file import Gguf
    from pare.workers.sources import smollm2_file

    Gguf(smollm2_file()).tokenizer().save_pretrained(tmp_path)

    assert tokens_of(tmp_path) == tokens_of_base({"source": "smollm2"})


# --- in a plan ----------------------------------------------------------------------------------------------------------


def plan_of(sweep: Sweep, *words: str) -> Plan:
    base = ["model=hf", f"model.path={sweep.places['base']}", "evaluation.questions.n=0", "evaluation.speed.repeats=0"]
    return build_plan(config.load([*base, *words]), "cpu", 1)


def test_directories_are_candidates_beside_trials_and_their_places_leave_no_trace(
    sweep: Sweep,
    full: Path,
    adapter: Path,
) -> None:
    plan = plan_of(sweep, "recipe=lora,merge", f"recipe.merge.members={{blocks: [lora], paths: ['{full}', '{adapter}']}}")

    late = plan.late["merge"]
    assert list(late.candidates) == ["lora", "path0", "path1"]
    (merge,) = (task for task in plan.tasks.values() if task.type == "merge")
    members = [task for task in plan.tasks.values() if task.type == "member"]
    assert [merge.inputs[f"member.{i:03d}"] for i in (1, 2)] == [task.fingerprint for task in members]
    assert not any(str(full.parent) in json.dumps(task.record) for task in plan.tasks.values())
    scores = {late.candidates[name]: {"quality/ppl": ppl} for name, ppl in {"lora": 9.0, "path0": 7.0, "path1": 8.0}.items()}
    plan.resolve("merge", scores)
    assert plan.goals["merge"].members == ["path0", "path1", "lora"]


def test_directories_alone_make_a_merge_and_are_checked_by_the_plan(sweep: Sweep, full: Path, adapter: Path) -> None:
    alone = f"recipe.merge.members={{blocks: [], paths: ['{full}', '{adapter}']}}"
    assert list(plan_of(sweep, "recipe=soup", alone).late["soup"].candidates) == ["path0", "path1"]
    assert plan_of(sweep, "recipe=merge", alone, "method@recipe.merge=slerp").late
    weights = "recipe.merge.weights={path0: 0.3}"
    assert plan_of(sweep, "recipe=merge", alone, weights).late

    other_merges(full)
    with pytest.raises(ConfigError, match=rf"{KEY}={full}: its tokenizer is not that of the base"):
        plan_of(sweep, "recipe=soup", alone)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=soup", "recipe.merge.members.blocks=[]"], "members.blocks must be a list of blocks of the sweep, unless"),
        (["recipe=soup"], r"there is no block 'lora' in this sweep.* or directories: recipe.merge.members="),
        (["recipe=lora,merge", "recipe.tune.rank=2,4,8", "method@recipe.merge=slerp"], "members must be exactly 2, got 3"),
        (["recipe=lora,merge", "method@recipe.merge=model_stock"], "recipe.merge.members must be at least 2, got 1"),
        (["recipe=lora,merge", "recipe.merge.weights={lara: 1}"], "weights must be named after members: lora, got"),
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_before_anything_runs(
    sweep: Sweep,
    words: list[str],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(sweep, *words)


def chains(tmp_path: Path, first: str, sweep_of: str, second: str = "") -> list[str]:
    """An experiment whose block `both` has a stage of compression before training, and a soup of it."""
    (tmp_path / "recipe").mkdir()
    (tmp_path / "experiment").mkdir()
    train = "\n  - /method@tune: lora" if second else ""
    (tmp_path / "recipe" / "both.yaml").write_text(f"defaults:\n  - /method@first: {first}{train}\n  - _self_\n")
    soup = "soup: {recipe: soup, sweep: {recipe.merge.members.blocks: '[both]'}}"
    blocks = f"{{both: {{recipe: both, sweep: {{{sweep_of}}}}}, {soup}}}"
    (tmp_path / "experiment" / "chained.yaml").write_text(f"# @package _global_\nname: chained\nblocks: {blocks}\n")
    return ["experiment=chained"]


@pytest.mark.parametrize(
    ("first", "sweep_of", "second", "message"),
    [
        ("rtn", "recipe.first.bits: '3,4', recipe.first.group_size: 32", "lora", "rtn leaves codes or zeros of its own in it"),
        ("wanda", "recipe.first.sparsity: '0.3,0.5'", "", "wanda leaves codes or zeros of its own in it"),
        ("awq", "recipe.first.bits: '3,4', recipe.first.group_size: 32", "lora", "awq folds factors into its weights"),
        ("rtn", "recipe.first.group_size: 32, recipe.tune.rank: '2,4'", "lora", None),
        ("awq", "recipe.first.group_size: 32, recipe.tune.rank: '2,4'", "lora", None),
    ],
)
def test_members_that_were_compressed_each_for_itself_are_refused_and_those_on_one_compressed_model_are_not(
    sweep: Sweep,
    tmp_path: Path,
    first: str,
    sweep_of: str,
    second: str,
    message: str | None,
) -> None:
    words = ["model=tiny", "evaluation.questions.n=0", "evaluation.speed.repeats=0", *chains(tmp_path, first, sweep_of, second)]
    experiment = config.load(words, str(tmp_path))
    if message is None:
        assert build_plan(experiment, "cpu", 1).late
        return
    with pytest.raises(ConfigError, match=rf"recipe.merge.members: 'both.*' cannot be merged: {message}.*Merge first"):
        build_plan(experiment, "cpu", 1)
