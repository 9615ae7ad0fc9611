"""What the benchmark of training makes of its readings, and that both sides are given the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.readings import Reading, figures
from benchmarks.tuning.figures import quality, speed
from benchmarks.tuning.inputs import Asked, Clock
from benchmarks.tuning.legs import base_bytes
from benchmarks.tuning.quality import EXPERIMENTS
from pare.methods.contract import Context
from pare.methods.finetune.qlora import Qlora
from pare.orchestrator import config
from pare.orchestrator.plan import build_plan

ARGUMENT = "bfloat16,6"


def reading(name: str, argument: str, **values: float) -> Reading:
    return Reading(name, argument, 0, values, 1.0, 1.0)


def test_a_method_is_set_beside_the_script_by_speed_memory_and_what_it_learnt() -> None:
    ours = {"tokens_s": 96.0, "peak_growth_bytes": 1.1e9, "last_loss": 2.0}
    theirs = {"tokens_s": 100.0, "peak_growth_bytes": 1.0e9, "last_loss": 2.01}
    readings = [reading("lora", ARGUMENT, **ours), reading("peer_lora", ARGUMENT, **theirs)]

    found = {f["name"]: (f["value"], f["reached"]) for f in figures(speed(ARGUMENT), readings)}

    assert found["lora, as fast as the bare script"] == (0.96, True)
    assert found["lora, growth of its peak memory"] == (pytest.approx(1.1), False)
    assert found["lora, last loss apart from the script's"] == (pytest.approx(0.01), True)
    assert found["qlora, as fast as the bare script"] == (None, None)


def test_healing_counts_where_all_of_the_interval_is_below_zero() -> None:
    values = {f"{kind}{bits}_ppl": 20.0 for kind in ("gptq", "healed") for bits in (3, 2)}
    for bits, ends in ((3, (-5.0, -6.0, -4.0)), (2, (-1.0, -3.0, 1.0))):
        values |= {f"healed{bits}_to_gptq{end}": x for end, x in zip(("", "_low", "_high"), ends, strict=True)}

    found = {f["name"]: f["reached"] for f in figures(quality("60"), [reading("heal", "60", **values)])}

    assert found["healed 3 bits, all of the interval below"] is True
    assert found["healed 2 bits, all of the interval below"] is False
    assert found["greedy soup, perplexity"] is None


def test_the_clock_counts_the_tokens_behind_the_first_step() -> None:
    clock = Clock(times=[10.0, 12.0, 14.0])

    assert clock.tokens_s == 2 * 4 * 512 / 4.0
    assert Asked.of("float32,20").settings["steps"] == 20
    assert Asked.of("float32,21").warmup_steps == 3


def test_the_bytes_of_a_4_bit_base_are_counted_once_with_all_that_stands_beside_the_codes() -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).bfloat16()
    linears = sum(p.numel() for name, p in model.named_parameters() if "_proj" in name)
    rest = sum(p.numel() for p in model.parameters()) - linears

    counted = base_bytes(Qlora(rank=2).prepare(model, Context(torch.device("cpu"))))

    codes, scales, scales_of_scales = linears / 2, linears / 64, 4 * linears / 64 / 256
    beside = counted - (codes + scales + scales_of_scales + 2 * rest)
    assert 0 <= beside < 14 * 2000 + 2000, "offsets, tables of values and the rotary buffers; no more"


@pytest.mark.parametrize(("experiment", "trials"), [("tuning_soup", 9), ("tuning_heal", 5)])
def test_the_sweeps_behind_the_quality_figures_plan(experiment: str, trials: int) -> None:
    words = [f"experiment={experiment}", "model=tiny", "recipe.tune.steps=2" if "soup" in experiment else "recipe.heal.steps=2"]
    found = config.load(words, config_dir=str(EXPERIMENTS))

    assert len(found.trials) == trials
    assert build_plan(found, "cpu", 1).goals
    assert Path(EXPERIMENTS, "experiment", f"{experiment}.yaml").is_file()
