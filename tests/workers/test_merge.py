"""The task `merge` on adapters that were trained on a small random Llama."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from pare.methods.contract import METHODS, load_all
from pare.methods.finetune.lora import Lora
from pare.methods.finetune.qlora import Qlora
from pare.methods.parts.activations import ActivationQuantiser
from pare.methods.parts.formula import Dense, Formula, LowRank
from pare.workers.blobs import LocalBlobs
from pare.workers.checkpoint import Checkpoint
from pare.workers.export.adapter import open_adapter, relocate, write_adapter
from pare.workers.models import load_dense, load_skeleton
from pare.workers.task import TaskError
from pare.workers.tasks import compress, merge
from tests.workers.merging import Sweep, in_memory, logits

load_all()

# --- scores -------------------------------------------------------------------------------------------------------------


def test_the_evaluator_scores_a_member_just_as_the_task_score_does_whatever_it_scored_before(sweep: Sweep) -> None:
    spec = sweep.merge_spec(("a", "b", "c"))
    ctx = sweep.context(spec, sweep.root, **sweep.inputs(spec))
    evaluator = merge.Candidates(ctx, sweep.open("base"), most=6)

    def asked(name: str) -> float:
        artifact = sweep.open(name)
        return evaluator((weight, artifact.formula(weight)) for weight in artifact.table)  # type: ignore[misc]

    expected = {member["name"]: member["score"] for member in spec["members"]}
    assert [asked(name) for name in ("a", "c", "b", "c", "a")] == [expected[name] for name in ("a", "c", "b", "c", "a")]
    assert evaluator([]) == sweep.score("base")
    assert len(set(expected.values())) == 3


def test_the_greedy_soup_is_no_worse_than_its_best_member_and_scores_what_it_says(sweep: Sweep) -> None:
    result = sweep.merge(("a", "b", "c", "wild"))

    best = min(sweep.score(name) for name in ("a", "b", "c", "wild"))
    assert result["merge/best_member_nll"] == best
    assert result["merge/selection_nll"] <= best
    assert sweep.score("soup") == pytest.approx(result["merge/selection_nll"], abs=1e-12)
    assert result["merge/members"] == 4
    assert result["merge/evaluations"] == 3
    assert result["cost/tokens"] == 3 * 8 * 16
    assert result["merge/selection_nll"] < best - 0.02
    soup = sweep.soup()
    assert 2 <= len(soup["members"]) == result["merge/accepted"]
    assert "wild" not in {member["name"] for member in soup["members"]}
    assert sum(member["weight"] for member in soup["members"]) == pytest.approx(1)
    assert [d["member"] for d in soup["decisions"]] == [m["name"] for m in sweep.merge_spec(("a", "b", "c", "wild"))["members"]]
    assert sum(d["accepted"] for d in soup["decisions"]) == result["merge/accepted"]


def test_the_uniform_soup_takes_all_and_says_what_it_scores(sweep: Sweep) -> None:
    result = sweep.merge(("a", "b", "wild"), mode="uniform")

    assert (result["merge/accepted"], result["merge/evaluations"]) == (3, 1)
    assert result["merge/selection_nll"] > result["merge/best_member_nll"]
    assert sweep.score("soup") == pytest.approx(result["merge/selection_nll"], abs=1e-12)
    assert {member["weight"] for member in sweep.soup()["members"]} == {1 / 3}


def test_members_that_are_equal_make_the_member_bit_for_bit(sweep: Sweep) -> None:
    sweep.places |= {"twin": sweep.places["b"], "triplet": sweep.places["b"]}

    sweep.merge(("b", "twin", "triplet"), mode="uniform")

    soup, member = sweep.open("soup"), sweep.open("b")
    assert soup.base_fingerprint == "base"
    assert list(soup.table) == list(member.table)
    for name in member.table:
        assert torch.equal(soup.materialise(name), member.materialise(name)), name
    ours, theirs = (load_file(sweep.places[n] / "adapter" / "adapter_model.safetensors") for n in ("soup", "b"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_a_merge_that_is_cut_short_goes_on_with_what_it_knows_and_ends_the_same(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("a", "b", "c", "wild")
    spec = sweep.merge_spec(names)
    undisturbed = sweep.run(merge, "undisturbed", spec, **sweep.inputs(spec))
    measured: list[int] = []
    measure = merge.Candidates.measure

    def counted(self: merge.Candidates, candidate: Any) -> float:
        measured.append(self.asked)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(self, candidate)

    monkeypatch.setattr(merge.Candidates, "measure", counted)
    blobs = LocalBlobs(sweep.root / "blobs")
    with pytest.raises(KeyboardInterrupt):
        sweep.run(merge, "resumed", spec, Checkpoint(blobs, "checkpoints/m"), **sweep.inputs(spec))
    resumed = sweep.run(merge, "resumed", spec, Checkpoint(blobs, "checkpoints/m"), **sweep.inputs(spec))

    assert measured == [1, 2, 3, 3]
    assert resumed == undisturbed
    for file in ("soup.json", "tensors.json", "weights.safetensors", "adapter/adapter_config.json"):
        one, other = (sweep.places[name] / file for name in ("resumed", "undisturbed"))
        assert one.read_bytes() == other.read_bytes(), file


# --- what comes out -----------------------------------------------------------------------------------------------------


def test_a_soup_of_adapters_ships_as_one_adapter_that_peft_and_transformers_open(sweep: Sweep) -> None:
    sweep.merge(("a", "b", "c"), mode="uniform")
    out, result = sweep.export()

    assert (result["format"], result["opens_with"]) == ("adapter", "transformers + peft")
    expected = in_memory(sweep)
    assert (expected - logits(load_dense(sweep.places["base"], torch.float32))).abs().max() > 0.1
    base = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    assert torch.allclose(logits(PeftModel.from_pretrained(base, out)), expected, atol=1e-5)
    assert torch.allclose(logits(open_adapter(out, torch.float32)), expected, atol=1e-5)
    relocate(out)
    assert torch.allclose(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), expected, atol=1e-5)


def test_the_adapter_has_the_ranks_of_its_members_side_by_side_and_the_numbers_of_the_formulas(sweep: Sweep) -> None:
    sweep.merge(("a", "b", "c"), mode="uniform")

    config = json.loads((sweep.places["soup"] / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(sweep.places["soup"] / "adapter" / "adapter_model.safetensors")
    # a has 4 and b 2 in every linear, c has 4 more in two of them.
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    assert set(config["rank_pattern"].values()) == set(config["alpha_pattern"].values()) == {10}
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 4
    assert config["base_model_name_or_path"] == "base"
    assert config["target_modules"] == sorted({name.split(".")[-3] for name in tensors})
    assert len(tensors) == 2 * 14
    artifact = sweep.open("soup")
    for name in artifact.table:
        prefix = "base_model.model." + name.removesuffix(".weight")
        operands = artifact.formula(name).tensors()  # type: ignore[union-attr]
        assert torch.equal(tensors[f"{prefix}.lora_A.weight"], operands["0.a"])
        assert torch.equal(tensors[f"{prefix}.lora_B.weight"], operands["0.b"])


@pytest.mark.parametrize("other", [Lora(rank=4, init_seed=1), METHODS["pissa"](rank=2)], ids=["lora", "pissa"])  # type: ignore[call-arg]
def test_a_soup_of_adapters_is_the_mean_of_the_weights_which_peft_makes_of_them_by_concatenation_alone(
    sweep: Sweep, other: Any
) -> None:
    """What peft calls linear, ties and so on works on A and on B. If that changes here, docs/merging.md may say so."""
    sweep.train("d", other)
    sweep.merge(("a", "d"), mode="uniform")
    sweep.merge(("a", "d"), out="elected", method="ties", density=0.5)
    soup, a, d, elected = (sweep.open(name) for name in ("soup", "a", "d", "elected"))
    base = load_dense(sweep.places["base"], torch.float32)
    mean = {name: (a.materialise(name) + d.materialise(name)) / 2 for name in soup.table}
    assert len(mean) == 14
    for name, weight in mean.items():
        torch.testing.assert_close(soup.materialise(name), weight, atol=1e-5, rtol=0)
    assert json.loads((sweep.places["soup"] / "adapter" / "adapter_config.json").read_text())["r"] == 4 + 4
    reopened = PeftModel.from_pretrained(load_dense(sweep.places["base"], torch.float32), sweep.places["soup"] / "adapter")
    torch.testing.assert_close(logits(reopened), in_memory(sweep), atol=1e-5, rtol=0)

    joint = PeftModel.from_pretrained(base, sweep.places["a"] / "adapter", adapter_name="a")
    joint.load_adapter(sweep.places["d"] / "adapter", "d")

    def error(how: str, expected: Callable[[str], Tensor], share: float, **settings: Any) -> float:
        """Of peft's combination: its distance from what it should add to all weights, relative to that."""
        joint.add_weighted_adapter(["a", "d"], [share, share], how, combination_type=how, **settings)
        layers = {name: joint.get_submodule(f"base_model.model.{name.removesuffix('.weight')}") for name in mean}
        added = {name: expected(name) - layer.get_base_layer().weight for name, layer in layers.items()}
        missed = {name: layer.get_delta_weight(how) - added[name] for name, layer in layers.items()}
        return norm(missed) / norm(added)

    assert error("cat", mean.__getitem__, 0.5) < 1e-5
    assert error("linear", mean.__getitem__, 0.5) > 0.5
    assert error("dare_linear", mean.__getitem__, 0.5, density=1.0) > 0.5
    assert error("magnitude_prune", mean.__getitem__, 0.5, density=1.0) > 0.5
    assert error("ties", elected.materialise, 1.0, density=0.5) > 0.5


def norm(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(t.double().square().sum().item() for t in tensors.values()))


def test_two_merges_of_the_same_members_write_the_same_bytes(sweep: Sweep) -> None:
    for name in ("one", "two"):
        sweep.merge(("a", "b", "c"), out=name)

    files = [sorted(p.relative_to(sweep.places[n]) for p in sweep.places[n].rglob("*") if p.is_file()) for n in ("one", "two")]
    assert files[0] == files[1]
    assert len(files[0]) == 5
    for file in files[0]:
        assert (sweep.places["one"] / file).read_bytes() == (sweep.places["two"] / file).read_bytes(), file


def test_a_scale_that_is_no_multiple_of_the_rank_survives_in_an_adapter(sweep: Sweep) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    update = LowRank(torch.randn(3, 64) / 8, torch.randn(128, 3) / 8, 16 / math.sqrt(3))
    sweep.write("own", {name: Formula([update], "add")})
    write_adapter({name: update}, load_skeleton(sweep.places["base"]), sweep.places["own"] / "adapter")

    opened = logits(PeftModel.from_pretrained(load_dense(sweep.places["base"], torch.float32), sweep.places["own"] / "adapter"))

    assert torch.allclose(opened, in_memory(sweep, "own"), atol=1e-6)


def test_adapters_on_a_compressed_model_make_a_soup_on_that_model(sweep: Sweep) -> None:
    settings = {"bits": 4, "group_size": 32}
    sweep.run(compress, "rtn", {"method": "rtn", "settings": settings, "dtype": "float32"}, model="base")
    sweep.train("p", on="rtn", steps=6)
    sweep.train("q", Lora(rank=4, init_seed=3, targets="attention"), on="rtn", steps=6)

    sweep.merge(("p", "q"), mode="uniform")

    soup = sweep.open("soup")
    assert soup.base_fingerprint == "rtn"
    assert {spec["op"] for spec in soup.table.values()} == {"add"}
    out, result = sweep.export()
    assert result["format"] == "adapter"
    # The written-out weights beneath the adapter are rounded to the base's bfloat16.
    assert torch.allclose(logits(open_adapter(out, torch.float32)), in_memory(sweep), atol=0.05)


def test_a_stage_on_top_of_a_member_counts_into_it(sweep: Sweep) -> None:
    sweep.train("a2", Lora(rank=3, init_seed=4), on="a", steps=4)

    sweep.merge(("a2", "b"), mode="uniform")

    soup, two, b = sweep.open("soup"), sweep.open("a2"), sweep.open("b")
    assert soup.base_fingerprint == "base"
    for name in soup.table:
        assert soup.formula(name).tensors()["0.a"].shape[0] == 4 + 3 + 2  # type: ignore[union-attr]
        assert torch.allclose(soup.materialise(name), (two.materialise(name) + b.materialise(name)) / 2, atol=1e-5)


def test_4bit_adapters_make_a_soup_on_the_codes_that_they_share(sweep: Sweep) -> None:
    pytest.importorskip("bitsandbytes")
    sweep.train("q1", Qlora(rank=4), steps=6)
    sweep.train("q2", Qlora(rank=2, init_seed=1, targets="attention"), steps=6)

    result = sweep.merge(("q1", "q2"))

    soup, member = sweep.open("soup"), sweep.open("q1")
    assert result["merge/selection_nll"] <= result["merge/best_member_nll"]
    for name in member.table:
        ours, theirs = (artifact.formula(name).parts[0].tensors() for artifact in (soup, member))  # type: ignore[union-attr]
        assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items()), name
    out, exported = sweep.export()
    assert exported["opens_with"] == "transformers + peft + bitsandbytes"
    assert torch.allclose(logits(open_adapter(out, torch.float32)), in_memory(sweep), atol=1e-5)


def test_4bit_members_and_plain_ones_are_refused_for_their_codes(sweep: Sweep) -> None:
    pytest.importorskip("bitsandbytes")
    sweep.train("q1", Qlora(), steps=1)

    with pytest.raises(ValueError, match=r"made of codes that differ between .* Try: merge first and quantise the soup"):
        sweep.merge(("a", "q1"), mode="uniform")


def test_dense_members_make_a_dense_model(sweep: Sweep) -> None:
    base = sweep.open("base")
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"]
    torch.manual_seed(1)
    for member in ("x", "y", "z"):
        moved = {n: (base.materialise(n) + 0.01 * torch.randn_like(base.materialise(n))).bfloat16() for n in names}
        sweep.write(member, {n: Formula([Dense(weight)]) for n, weight in moved.items()})

    sweep.merge(("x", "y", "z"), mode="uniform")

    soup = sweep.open("soup")
    for n in names:
        mean = torch.stack([sweep.open(member).materialise(n) for member in ("x", "y", "z")]).mean(0)
        assert torch.allclose(soup.materialise(n), mean, rtol=2**-8)
        assert soup.formula(n).tensors()["0.weight"].dtype == torch.bfloat16  # type: ignore[union-attr]
    assert sweep.export()[1]["format"] == "dense"


def test_the_base_itself_may_be_a_member(sweep: Sweep) -> None:
    sweep.merge(("a", "base"), mode="uniform")

    soup, a, base = (sweep.open(name) for name in ("soup", "a", "base"))
    for name in a.table:
        assert torch.allclose(soup.materialise(name), (a.materialise(name) + base.materialise(name)) / 2, atol=1e-6)
    assert sweep.export()[1]["format"] == "adapter"


# --- what is refused ----------------------------------------------------------------------------------------------------


def test_a_member_of_another_base_is_refused_by_name(sweep: Sweep) -> None:
    sweep.train("foreign", on="stranger", steps=1)

    with pytest.raises(TaskError, match=r"member foreign stands on stranger, and the merge on base: .* Try: members\.blocks"):
        sweep.merge(("a", "foreign"), mode="uniform")


def test_members_on_scales_of_their_own_are_refused(sweep: Sweep) -> None:
    """Factors folded into them, which each member has others of; those of a model that all stand on do no harm."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = sweep.open("base").materialise(name)
    scaled = {"fold.in:" + name: torch.full((weight.shape[1],), 2.0)}
    sweep.write("folded", {name: Formula([Dense(weight * 2)])}, factors=scaled)
    sweep.write("other", {name: Formula([Dense(weight)])})
    for member in ("on_it", "on_it_too"):
        sweep.write(member, {name: Formula([LowRank(torch.ones(1, 64), torch.zeros(128, 1))], "add")}, base="folded")

    with pytest.raises(TaskError, match=rf"member folded has factors of its own folded into {name}"):
        sweep.merge(("folded", "other"), mode="uniform")
    assert sweep.merge(("on_it", "on_it_too"), mode="uniform")["merge/accepted"] == 2


@pytest.mark.parametrize(
    "more",
    [{"activation": ActivationQuantiser.of("int8")}, {"right": Dense(torch.eye(64))}, {"left": Dense(torch.eye(128))}],
    ids=lambda more: next(iter(more)),
)
def test_members_that_are_more_than_a_sum_of_parts_are_refused(sweep: Sweep, more: dict[str, Any]) -> None:
    """Also where another level stands on top of it."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight = Dense(sweep.open("base").materialise(name))
    sweep.write("plain", {name: Formula([weight])})
    sweep.write("rounding", {name: Formula([weight], **more)})
    sweep.write("above", {name: Formula([LowRank(torch.ones(1, 64), torch.zeros(128, 1))], "add")}, base="rounding")

    for member in ("rounding", "above"):
        with pytest.raises(TaskError, match=rf"{name} of member {member} has transforms or a quantised input.*Merge first"):
            sweep.merge(("plain", member), mode="uniform")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_member_whose_score_is_no_number_is_refused(sweep: Sweep, value: float) -> None:
    spec = sweep.merge_spec(("a", "b"), scores={"b": value})

    with pytest.raises(TaskError, match=f"member b has the selection score {value}") as error:
        sweep.run(merge, "soup", spec, **sweep.inputs(spec))
    assert error.value.failure == "nonfinite"


def test_a_member_whose_weights_are_no_numbers_is_refused(sweep: Sweep) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    update = LowRank(torch.full((1, 64), math.nan), torch.ones(128, 1))
    sweep.write("broken", {name: Formula([update], "add")})
    spec = sweep.merge_spec(("a", "broken"), scores={"broken": 9.0})

    with pytest.raises(TaskError, match=rf"{name} of member broken is not finite") as error:
        sweep.run(merge, "soup", spec, **sweep.inputs(spec))
    assert error.value.failure == "nonfinite"


def test_a_merge_that_gives_no_finite_likelihood_fails(sweep: Sweep) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    for member, size in (("huge", 3e38), ("vast", 2e38)):
        update = LowRank(torch.full((1, 64), size), torch.full((128, 1), 1e38))
        sweep.write(member, {name: Formula([update], "add")})
    spec = sweep.merge_spec(("huge", "vast"), scores={"huge": 5.0, "vast": 6.0}, mode="uniform")

    with pytest.raises(TaskError, match="gives a token of the selection windows no finite likelihood") as error:
        sweep.run(merge, "soup", spec, **sweep.inputs(spec))
    assert error.value.failure == "nonfinite"


def test_a_method_of_another_kind_is_refused(sweep: Sweep) -> None:
    spec = {**sweep.merge_spec(("a",), scores={"a": 1.0}), "method": "rtn"}

    with pytest.raises(TaskError, match="merge takes a method of kind merge; rtn is of kind layer"):
        sweep.run(merge, "soup", spec, **sweep.inputs(spec))
