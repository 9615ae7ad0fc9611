"""What every tuner keeps, asked of it or not."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from pare.methods.contract import METHODS, Context, TrainMethod, load_all
from pare.methods.ops.tuner_kinds import KINDS
from pare.methods.parts.formula import Formula, LowRank
from pare.methods.settings import SettingsError
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint
from pare.workers.training import Engine, train
from pare.workers.zero import Zero

CPU = torch.device("cpu")
IDS = torch.arange(32).view(2, 16)
DATA = {"input_ids": torch.randint(96, (6, 16), generator=torch.Generator().manual_seed(3))}
TUNERS = [name for name, cls in load_all().items() if name in KINDS]
every = pytest.mark.parametrize("name", TUNERS)
SMALL = {
    "vera": 16,
    "pvera": 16,
    "miss": 16,
    "adamss": 8,
    "hira": 4,
    "gralora": 4,
    "randlora": 8,
    "shira": 4,
    "psoft": 8,
    "peanut": 4,
}
"""Ranks that fit a small model, where the usual one does not."""
KEYS = {"c3a": {"block_size": 16}, "road": {"group_size": 16}, "vblora": {"vector_length": 16},
        "fourierft": {"n_frequency": 50}, "waveft": {"n_frequency": 50}, "adamss": {"num_subspaces": 2}}  # fmt: skip


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def tuner(name: str, **settings: Any) -> Any:
    cls: Any = METHODS[name]
    usual: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0, "config": KEYS.get(name, {})}
    usual |= {"rank": SMALL[name]} if name in SMALL else {}
    usual |= {"start_sequences": 2} if hasattr(cls, "start_sequences") else {}
    return cls(**{**usual, **settings})


def context(seed: int = 0) -> Context:
    return Context(CPU, seed, data=DATA)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Imports what training imports; then a collection of garbage need not walk all that each time."""
    trained("rslora", tmp_path_factory.mktemp("warm"), steps=1)
    gc.freeze()
    yield
    gc.unfreeze()


def trained(name: str, out: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> tuple[TrainMethod, nn.Module]:
    method = tuner(name, **{"steps": 3, **settings})
    model = method.prepare(llama(dtype), context())
    train(method, model, DATA, out, 0, Engine(CPU, dtype))
    return method, model


def with_formulas(formulas: dict[str, Formula]) -> nn.Module:
    model = llama()
    with torch.no_grad():
        for name, formula in formulas.items():
            weight = model.get_parameter(name)
            added = formula.materialise().view(weight.shape)
            weight.copy_(weight + added if formula.op == "add" else added)
    return model


@every
def test_before_the_first_step_the_model_is_the_base(name: str) -> None:
    method = tuner(name)

    difference = (logits(method.prepare(llama(), context())) - logits(llama())).abs().max()

    assert difference < 1e-5 if KINDS[name].is_no_op else 1e-5 < difference < 3


@every
def test_what_was_trained_is_what_the_formulas_say_and_what_peft_reloads(name: str, tmp_path: Path) -> None:
    method, model = trained(name, tmp_path)
    expected = logits(model)

    formulas = method.finish(model, tmp_path)

    assert (expected - logits(llama())).abs().max() > 1e-3
    assert all(formula.op == "add" for formula in formulas.values())
    torch.testing.assert_close(logits(with_formulas(formulas)), expected, atol=1e-5, rtol=0)
    torch.manual_seed(99)
    reloaded = PeftModel.from_pretrained(llama(), tmp_path / "adapter")
    torch.testing.assert_close(logits(reloaded), expected, atol=1e-5, rtol=0)


@every
def test_it_starts_from_its_own_seed_and_no_other_and_writes_the_same_bytes(name: str, tmp_path: Path) -> None:
    def made(where: str, outside: int, **settings: Any) -> tuple[dict[str, Tensor], bytes]:
        (tmp_path / where).mkdir()
        method = tuner(name, **settings)
        torch.manual_seed(outside)
        model = method.prepare(llama(), context(outside))
        torch.manual_seed(outside)
        start = {n: p.detach().clone() for n, p in model.named_parameters()}
        start |= {n: b.clone() for n, b in model.named_buffers()}
        method.finish(model, tmp_path / where)
        files = sorted((tmp_path / where / "adapter").iterdir())
        assert [f.name for f in files] == ["adapter_config.json", "adapter_model.safetensors"]
        return start, b"".join(f.read_bytes() for f in files)

    first, again = made("first", 1), made("again", 2)

    assert first[0].keys() == again[0].keys()
    assert all(torch.equal(t, again[0][n]) for n, t in first[0].items())
    assert first[1] == again[1]


@every
def test_a_training_that_was_killed_goes_on_to_the_same_bits(
    name: str, tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint]
) -> None:
    settings = {"steps": 4, "weight_decay": 0.1}

    def attempt(checkpoint: Checkpoint, death: int | None = None) -> tuple[TrainMethod, nn.Module]:
        method = tuner(name, **settings)
        model = method.prepare(llama(), context())

        def progress(done: int, total: int, unit: str) -> None:
            if done == death:
                raise KeyboardInterrupt

        train(method, model, DATA, tmp_path, 3, Engine(CPU, torch.float32), progress, checkpoint=checkpoint)
        return method, model

    whole, expected = attempt(NO_CHECKPOINT)
    with pytest.raises(KeyboardInterrupt):
        attempt(attempt_checkpoint(), death=3)
    resumed, model = attempt(attempt_checkpoint())

    values = dict(model.named_parameters())
    assert all(torch.equal(p, values[n]) for n, p in expected.named_parameters())
    assert json.dumps(plain(resumed.state())) == json.dumps(plain(whole.state()))


def plain(state: Any) -> Any:
    """With lists in place of tensors."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@every
def test_in_bfloat16_what_is_trained_stays_float32_and_the_export_computes_close_to_it(name: str, tmp_path: Path) -> None:
    method, model = trained(name, tmp_path, torch.bfloat16)
    values = [p for p in model.parameters() if p.requires_grad]
    assert values
    assert {p.dtype for p in values} == {torch.float32}
    method.finish(model, tmp_path)

    opened = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "adapter")
    exact = PeftModel.from_pretrained(llama(torch.bfloat16).float(), tmp_path / "adapter")

    assert opened(input_ids=IDS).logits.dtype == torch.bfloat16
    assert (logits(opened) - logits(exact)).abs().max() < 0.05


@pytest.mark.parametrize("name", ["dora", "vera", "ia3", "oft", "ln_tuning"])
def test_recomputing_activations_changes_memory_and_not_what_is_learnt(name: str, tmp_path: Path) -> None:
    one, other = (trained(name, tmp_path, steps=2, gradient_checkpointing=again)[1] for again in (False, True))

    values = dict(other.named_parameters())
    assert all(torch.allclose(p, values[n], atol=1e-5) for n, p in one.named_parameters())


@pytest.mark.parametrize("name", [name for name in TUNERS if KINDS[name].family.startswith("lora")])
def test_a_start_of_lora_trains_rank_numbers_for_each_input_and_output_of_a_target(name: str) -> None:
    model = tuner(name, rank=4, targets="q_v").prepare(llama(), context())

    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    outputs = 2 * (64 + 32)
    both = 4 * (2 * (64 + 64) + 2 * (64 + 32))
    assert count == {"dora": both + outputs, "mica": 4 * 4 * 64}.get(name, both)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_a_start_that_takes_from_the_base_is_published_as_plain_lora_on_the_base_as_it_was(tmp_path: Path, init: str) -> None:
    """As peft saves it the random one draws another start when it is loaded, and is wrong by a tenth and more."""
    method, model = trained("pissa", tmp_path, config={"init_lora_weights": init}, rank=4, targets="q_v")
    expected = logits(model)
    assert not torch.equal(
        model.get_base_model().model.layers[0].self_attn.q_proj.weight, llama().model.layers[0].self_attn.q_proj.weight
    )
    model.save_pretrained(tmp_path / "theirs")

    formulas = method.finish(model, tmp_path)

    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["init_lora_weights"], said["r"], said["lora_alpha"]) == (True, 8, 32)
    assert {part.a.shape[0] for f in formulas.values() for part in f.parts if isinstance(part, LowRank)} == {8}
    torch.manual_seed(12)
    assert (logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")) - expected).abs().max() < 1e-5
    torch.manual_seed(12)
    theirs = (logits(PeftModel.from_pretrained(llama(), tmp_path / "theirs")) - expected).abs().max()
    assert theirs > 1e-2 if "niter" in init else theirs < 1e-4


def test_adalora_ends_with_the_rank_that_was_asked_for_and_gives_it_unevenly(tmp_path: Path) -> None:
    method, model = trained("adalora", tmp_path, steps=12, batch_size=2, rank=2, config={"init_r": 6, "tinit": 2, "tfinal": 3})

    found = method.finish(model, tmp_path)

    ranks = [part.a.shape[0] for formula in found.values() for part in formula.parts if isinstance(part, LowRank)]
    assert len(ranks) == 14
    assert sum(ranks) <= 14 * 2 + 14  # one of zeros stands where nothing is left
    assert len(set(ranks)) > 2
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_adalora_asks_for_singular_vectors_that_are_orthonormal() -> None:
    method = tuner("adalora", config={"orth_reg_weight": 0.5})
    model = method.prepare(llama(), context())

    total, tokens = method.loss(model, DATA)

    def distance(p: Tensor) -> Tensor:
        gram = p @ p.T if len(p) < p.shape[1] else p.T @ p
        return (gram - torch.eye(len(gram))).pow(2).sum().sqrt()

    vectors = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    expected = 0.5 * torch.stack([distance(p) for p in vectors]).mean()
    ids = DATA["input_ids"]
    nll = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(total / tokens, nll + expected)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("oft", {"config": {"oft_blok_size": 8}}, r"oft\.config must be made of keys of peft's OFTConfig"),
        ("oft", {"config": {"oft_blok_size": 8}}, r"\(nearest: 'oft_block_size'; all: .*got 'oft_blok_size'"),
        ("ia3", {"config": {"rank": 8}}, r"ia3\.config must be made of keys of peft's IA3Config"),
        ("dora", {"config": {"use_dora": False}}, r"dora\.config must be made of keys of peft's LoraConfig"),
        ("vera", {"config": {"r": 8}}, r"vera\.config must be"),
        ("vera", {"config": {"modules_to_save": ["lm_head"]}}, r"vera\.config must be"),
        ("adalora", {"config": {"tinit": 90, "tfinal": 50}}, r"adalora\.config must be what peft's AdaLoraConfig takes \("),
        ("loha", {"rank": 0}, r"loha\.rank must be in \[1, inf\), got 0"),
        ("dora", {"dropout": 1.0}, r"dora\.dropout must be in \[0, 1\), got 1"),
        ("orthogonal", {"rank": 3}, r"orthogonal\.rank must be even, got 3"),
        ("dora", {"targets": "q-v"}, r"dora\.targets must be"),
        ("eva", {"start_sequences": 0}, r"eva\.start_sequences must be in \[1"),
    ],
)  # fmt: skip
def test_a_setting_out_of_its_range_is_refused_while_planning(name: str, settings: dict[str, Any], message: str) -> None:
    cls: Any = METHODS[name]
    with pytest.raises(SettingsError, match=message):
        cls(**settings)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("oft", (64, 80), r"oft_block_size must be a divisor of 80, a width of model\.layers\.0\.mlp\.up_proj, got 32"),
        ("c3a", (96, 64), r"c3a\.config\.block_size must be a divisor of 96"),
        ("road", (96, 64), r"road\.config\.group_size must be a divisor of 96"),
    ],
)  # fmt: skip
def test_a_block_that_does_not_divide_a_width_is_refused_while_planning(
    name: str, shape: tuple[int, int], message: str
) -> None:
    cls: Any = METHODS[name]
    widths = {"model.layers.0.mlp.up_proj.weight": shape, "model.layers.0.self_attn.q_proj.weight": (64, 64)}

    cls(targets="q_v").check_shapes(widths)
    with pytest.raises(SettingsError, match=message):
        cls().check_shapes(widths)


def test_a_start_from_data_without_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="corda starts from training data, and was given none"):
        tuner("corda").prepare(llama(), Context(CPU))


def test_low_rank_updates_are_kept_as_factors_and_others_whole(tmp_path: Path) -> None:
    def kinds(name: str, **settings: Any) -> set[str]:
        (out := tmp_path / name).mkdir()
        method, model = trained(name, out, steps=1, **settings)
        return {part.kind for formula in method.finish(model, out).values() for part in formula.parts}

    assert kinds("hra", rank=2) == kinds("vera", rank=2) == kinds("loha", rank=2) == {"low_rank"}
    assert kinds("oft") == kinds("dora") == {"dense"}


def test_planning_without_a_config_of_ones_own_does_not_import_peft() -> None:
    program = (
        "import sys\n"
        "from pare.methods.contract import load_all\n"
        "for cls in load_all().values(): cls()\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_settings_travel_between_processes() -> None:
    for name in TUNERS:
        method = tuner(name)
        assert pickle.loads(pickle.dumps(method)) == method


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TUNERS if KINDS[name].shards == "zero3"])
def test_what_says_that_it_can_be_sharded_learns_the_same_from_shards_of_weights(name: str, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    found = []
    for zero in (None, Zero(3)):
        (out := tmp_path / str(zero)).mkdir()
        method = tuner(name, steps=3, batch_size=2, rank=4)
        model = method.prepare(llama(), context())
        train(method, model, DATA, out, 0, Engine(CPU, torch.float32, zero))
        found.append(logits(with_formulas(method.finish(model, out))))

    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)
