"""Healing, for real: what a recipe of two stages makes of the tiny model, through the installed command. `make test-slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_end_to_end import SMALL, pare

pytestmark = pytest.mark.slow

QUICK = ["model=tiny", "data.calibration={sequences: 8, length: 128}", "data.train={sequences: 64, length: 128}"]


@pytest.fixture(scope="module")
def healed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Trial -> what is known of it: pruned and quantised models, and the same healed in every way."""
    home = tmp_path_factory.mktemp("home")
    recipes = "recipe=base,sparsegpt,gptq,full,sparsegpt_distill,gptq_lora,gptq_qlora,gptq_distill"
    steps = ["steps=60", "batch_size=4", "micro_batch_size=4"]
    settings = [f"recipe.{stage}.{step}" for stage in ("heal", "tune") for step in steps]
    settings += ["recipe.prune.sparsity=0.6", "recipe.quantize.bits=2", "recipe.quantize.group_size=32"]
    settings += ["recipe.heal.learning_rate=1e-3", "recipe.tune.learning_rate=1e-4"]
    record = json.loads(pare(home, "run", recipes, *settings, *QUICK, *SMALL, "cluster.slots=1", "--json").stdout)
    return {trial["trial"]: trial for trial in record["trials"]}


@pytest.mark.parametrize(("harmed", "recipe"), [("sparsegpt", "sparsegpt_distill"), ("gptq", "gptq_distill")])
def test_distillation_brings_a_model_nearer_to_its_base(healed: dict[str, Any], harmed: str, recipe: str) -> None:
    before, after = (healed[name]["metrics"]["quality/kl"] for name in (harmed, recipe))

    assert 0 < after < 0.8 * before


@pytest.mark.parametrize("recipe", ["gptq_lora", "gptq_qlora"])
def test_adapters_beside_codes_learn_the_text(healed: dict[str, Any], recipe: str) -> None:
    assert healed[recipe]["metrics"]["quality/ppl"] < healed["gptq"]["metrics"]["quality/ppl"]


@pytest.mark.parametrize("recipe", ["full", "sparsegpt_distill", "gptq_lora", "gptq_qlora", "gptq_distill"])
def test_an_export_is_what_was_trained(healed: dict[str, Any], recipe: str) -> None:
    metrics = healed[recipe]["metrics"]

    assert metrics["quality/ppl"] == pytest.approx(metrics["quality/ppl_in_memory"], rel=0.005)


def test_a_healed_sparse_model_is_as_small_as_it_was(healed: dict[str, Any]) -> None:
    before, after = (healed[name]["metrics"]["size/bytes"] for name in ("sparsegpt", "sparsegpt_distill"))

    assert after == pytest.approx(before, rel=0.01)


@pytest.mark.parametrize("recipe", ["gptq_lora", "gptq_qlora", "gptq_distill"])
def test_an_adapter_lies_beside_codes_that_are_still_codes(healed: dict[str, Any], recipe: str) -> None:
    export = Path(healed[recipe]["export_path"])
    base = json.loads((export / "base" / "config.json").read_text())

    assert base["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (export / "adapter_model.safetensors").is_file()
    weights = sum(file.stat().st_size for file in (export / "base").glob("*.safetensors"))
    assert weights == pytest.approx(healed["gptq"]["metrics"]["size/bytes"], rel=0.01)


def test_full_tuning_learns_the_text(healed: dict[str, Any]) -> None:
    assert healed["full"]["metrics"]["quality/ppl"] < healed["base"]["metrics"]["quality/ppl"]


PLAIN = """
import sys
sys.modules["pare"] = None
DIRECTORY, tokens = sys.argv[1:]
exec(open(DIRECTORY + "/README.md").read().split("```python")[1].split("```")[0])
import torch
from safetensors.torch import load_file
ids = load_file(tokens)["input_ids"].long()
with torch.no_grad():
    print(float(model.eval()(input_ids=ids, labels=ids).loss.exp()))
"""
"""Opens an export as its page says, and measures its perplexity on tokens (n, length)."""


def test_a_soup_of_models_healed_on_the_same_codes_opens_without_pare_with_the_perplexity_that_was_said(tmp_path: Path) -> None:
    members = ["recipe=gptq_qlora,soup", "recipe.merge.members.blocks=[gptq_qlora]", "recipe.heal.learning_rate=1e-3,2e-3"]
    settings = ["recipe.quantize.bits=3", "recipe.quantize.group_size=32", "recipe.heal.steps=20", "recipe.merge.mode=uniform"]
    record = json.loads(pare(tmp_path, "run", *members, *settings, *QUICK, *SMALL, "dtype=float32", "--json").stdout)
    (soup,) = [trial for trial in record["trials"] if trial["block"] == "soup"]
    (task,) = [task["task"] for task in soup["tasks"] if task["label"] == "test tokens"]
    (tokens,) = (tmp_path / "store" / "objects").glob(f"*/{task}*/tokens.safetensors")

    command = [sys.executable, "-c", PLAIN, soup["export_path"], str(tokens)]
    said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout

    assert set(soup["members"]) == {trial["trial"] for trial in record["trials"] if trial["block"] == "gptq_qlora"}
    assert float(said) == pytest.approx(soup["metrics"]["quality/ppl"], rel=1e-4)
