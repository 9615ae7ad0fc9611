"""What every tuner keeps, asked of it or not."""

from __future__ import annotations

import gc
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


def llama(dtype: torch.dtype = torch.float32, layers: int = 1) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
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


def trained(
    name: str, out: Path, dtype: torch.dtype = torch.float32, layers: int = 1, **settings: Any
) -> tuple[TrainMethod, nn.Module]:
    method = tuner(name, **{"steps": 3, **settings})
    model = method.prepare(llama(dtype, layers), context())
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


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *model.named_buffers()]}


def files_of(adapter: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in adapter.iterdir()}


@dataclass
class Learnt:
    """What a tuner starts with, learns in four steps and publishes."""

    name: str
    out: Path

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        method, model = self.prepared(seed=1)
        self.start, self.logits_at_start = tensors_of(model), logits(model)
        self.train(method, model)
        self.values, self.state, self.logits = tensors_of(model), json.dumps(plain(method.state())), logits(model)
        self.formulas = method.finish(model, self.out)

    def prepared(self, seed: int) -> tuple[TrainMethod, nn.Module]:
        method = tuner(self.name, steps=4, weight_decay=0.1)
        return method, method.prepare(llama(), context(seed))

    def train(
        self, method: TrainMethod, model: nn.Module, checkpoint: Checkpoint = NO_CHECKPOINT, death: int | None = None
    ) -> None:
        def progress(done: int, total: int, unit: str) -> None:
            if done == death:
                raise KeyboardInterrupt

        train(method, model, DATA, self.out, 3, Engine(CPU, torch.float32), progress, checkpoint=checkpoint)


def plain(state: Any) -> Any:
    """With lists in place of tensors."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, Tensor) else state


@pytest.fixture(scope="module", params=TUNERS)
def learnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Learnt:
    gc.freeze()  # what the tuners before it have imported
    return Learnt(request.param, tmp_path_factory.mktemp(request.param))


def test_before_the_first_step_the_model_is_the_base(learnt: Learnt) -> None:
    difference = (learnt.logits_at_start - logits(llama())).abs().max()

    assert difference < 1e-5 if KINDS[learnt.name].is_no_op else 1e-5 < difference < 3


def test_it_starts_from_its_own_seed_and_no_other(learnt: Learnt) -> None:
    torch.manual_seed(2)
    again = tensors_of(learnt.prepared(seed=2)[1])

    assert again.keys() == learnt.start.keys()
    assert all(torch.equal(t, again[n]) for n, t in learnt.start.items())


def test_what_was_trained_is_what_the_formulas_say_and_what_peft_reloads(learnt: Learnt) -> None:
    assert (learnt.logits - logits(llama())).abs().max() > 1e-3
    assert all(formula.op == "add" for formula in learnt.formulas.values())
    torch.testing.assert_close(logits(with_formulas(learnt.formulas)), learnt.logits, atol=1e-5, rtol=0)
    torch.manual_seed(99)
    reloaded = PeftModel.from_pretrained(llama(), learnt.out / "adapter")
    torch.testing.assert_close(logits(reloaded), learnt.logits, atol=1e-5, rtol=0)


def test_a_training_that_was_killed_goes_on_to_the_same_bits_and_writes_the_same_bytes(
    learnt: Learnt, tmp_path: Path, attempt_checkpoint: Callable[[], Checkpoint]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        learnt.train(*learnt.prepared(seed=3), attempt_checkpoint(), death=3)
    method, model = learnt.prepared(seed=4)
    learnt.train(method, model, attempt_checkpoint())

    values = tensors_of(model)
    assert values.keys() == learnt.values.keys()
    assert all(torch.equal(t, values[n]) for n, t in learnt.values.items())
    assert json.dumps(plain(method.state())) == learnt.state
    method.finish(model, tmp_path)
    expected = files_of(learnt.out / "adapter")
    assert sorted(expected) == ["adapter_config.json", "adapter_model.safetensors"]
    assert files_of(tmp_path / "adapter") == expected


@every
def test_in_bfloat16_what_is_trained_stays_float32_and_the_export_computes_close_to_it(name: str, tmp_path: Path) -> None:
    method, model = trained(name, tmp_path, torch.bfloat16, steps=2)
    values = [p for p in model.parameters() if p.requires_grad]
    assert values
    assert {p.dtype for p in values} == {torch.float32}
    method.finish(model, tmp_path)

    opened = PeftModel.from_pretrained(llama(torch.bfloat16), tmp_path / "adapter")
    exact = PeftModel.from_pretrained(llama(torch.bfloat16).float(), tmp_path / "adapter")

    assert opened(input_ids=IDS).logits.dtype == torch.bfloat16
    allowed = 0.2 if name == "frod" else 0.05  # peft rounds its factors, too, which are badly conditioned
    assert (logits(opened) - logits(exact)).abs().max() < allowed


@pytest.mark.parametrize("name", ["dora", "vera", "ia3", "oft", "ln_tuning"])
def test_recomputing_activations_changes_memory_and_not_what_is_learnt(name: str, tmp_path: Path) -> None:
    one, other = (trained(name, tmp_path, steps=2, gradient_checkpointing=again)[1] for again in (False, True))

    values = dict(other.named_parameters())
    assert all(torch.allclose(p, values[n], atol=1e-5) for n, p in one.named_parameters())


@pytest.mark.parametrize("name", [name for name in TUNERS if KINDS[name].family.startswith("lora")])
def test_a_start_of_lora_trains_rank_numbers_for_each_input_and_output_of_a_target(name: str) -> None:
    model = tuner(name, rank=4, targets="q_v").prepare(llama(), context())

    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    outputs = 64 + 32
    both = 4 * ((64 + 64) + (64 + 32))
    assert count == {"dora": both + outputs, "mica": 2 * 4 * 64}.get(name, both)


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
    config = {"init_r": 6, "tinit": 2, "tfinal": 3}
    method, model = trained("adalora", tmp_path, layers=2, steps=12, batch_size=2, rank=2, config=config)

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
        ("adalora", {"steps": 1}, r"adalora\.steps must be at least 2, as ranks are settled 0 steps before the last, got 1"),
        ("adalora", {"config": {"tinit": 0, "tfinal": 99}}, r"adalora\.steps must be at least 101, as .* 99 steps before"),
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
