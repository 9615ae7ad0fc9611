from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from pare.methods.contract import METHODS, Context, load_all
from pare.methods.finetune.lora import Lora
from pare.methods.finetune.qlora import Qlora
from pare.methods.ops.bnb4bit import QUANT_TYPES
from pare.methods.ops.tuner_kinds import KINDS as KINDS_OF_TUNERS
from pare.methods.parts.codes import Codes
from pare.workers.export.adapter import export_adapter, open_adapter, relocate
from pare.workers.export.schemes import Inexpressible
from pare.workers.models import ModelArtifact, load_dense, load_in_memory, write_formulas
from pare.workers.tiny import TinySettings, tiny_config, tiny_tokenizer
from tests.workers.conftest import Workshop

bnb = pytest.importorskip("bitsandbytes")
load_all()

CPU = torch.device("cpu")
IDS = torch.arange(32).view(2, 16)
BASE = "fingerprint-of-the-base"
KINDS = [(quant_type, double) for quant_type in QUANT_TYPES for double in (True, False)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of random bf16 weights whose linears all read a multiple of 64 features, with its tokenizer."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(**tiny_config(TinySettings(layers=2, width=128, ffn=192)))
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@dataclasses.dataclass
class Made:
    artifact: ModelArtifact
    out: Path
    """Directory of the export."""
    opens_with: str


@pytest.fixture
def make(base: Path, tmp_path: Path) -> Callable[..., Made]:
    """Makes a model artifact by a method, with adapters as training would have left them, and exports it."""

    def made(method: Any, beneath: Path | None = None) -> Made:
        places = {BASE: base, "beneath": beneath or base}
        directory, out = tmp_path / "artifact", tmp_path / "export"
        directory.mkdir()
        out.mkdir()
        start = load_in_memory(ModelArtifact(places["beneath"], places.__getitem__), torch.float32)
        model = method.prepare(start, Context(CPU))
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
            elif parameter.requires_grad and method.name in KINDS_OF_TUNERS:
                parameter.data += 0.05 * torch.randn_like(parameter)
        formulas = method.finish(model, directory)
        write_formulas(directory, "beneath" if beneath else BASE, formulas)
        artifact = ModelArtifact(directory, places.__getitem__)
        return Made(artifact, out, export_adapter(artifact, out).libraries)

    return made


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits.float()  # type: ignore[no-any-return]


def in_memory(made: Made) -> Tensor:
    return logits(load_in_memory(made.artifact, torch.float32))


@pytest.mark.parametrize("method", [Lora(), Lora(rank=4, rslora=True, targets="q_v"), Qlora(), Qlora(targets="attention")])
def test_the_opened_export_is_the_in_memory_model(make: Callable[..., Made], base: Path, method: Any) -> None:
    made = make(method)

    opened = logits(open_adapter(made.out, torch.float32, CPU))

    assert torch.allclose(opened, in_memory(made), atol=1e-5)
    assert not torch.allclose(opened, logits(load_dense(base, torch.float32)), atol=1e-2)


@pytest.mark.parametrize(
    "name", ["dora", "pissa", "adalora", "vera", "loha", "ia3", "oft", "boft", "miss", "shira", "ln_tuning"]
)
@pytest.mark.parametrize("on_codes", [False, True])
def test_the_export_of_any_tuner_is_the_in_memory_model_on_a_dense_and_on_a_compressed_base(
    make: Callable[..., Made], workshop: Workshop, codes: Callable[..., Codes], base: Path, name: str, on_codes: bool
) -> None:
    """Codes that compressed-tensors has words for: they ship as such, and peft wraps what comes out of them."""
    artifact = Workshop(base, workshop.root).artifact
    beneath = artifact("codes", lambda module, weight: codes(weight, 4, 32)) if on_codes else None

    made = make(METHODS[name](), beneath=beneath)  # type: ignore[call-arg]

    opened = logits(open_adapter(made.out, torch.float32, CPU))
    assert ("compressed-tensors" in made.opens_with) == on_codes
    assert torch.allclose(opened, in_memory(made), atol=1e-4)
    untuned = load_in_memory(ModelArtifact(beneath or base, {BASE: base}.__getitem__), torch.float32)
    assert (opened - logits(untuned)).abs().max() > 1e-2


@pytest.mark.parametrize(("quant_type", "double"), KINDS)
def test_the_4bit_base_has_the_layout_that_transformers_writes_itself(
    make: Callable[..., Made], base: Path, tmp_path: Path, quant_type: str, double: bool
) -> None:
    made = make(Qlora(quant_type=quant_type, double_quant=double))
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head"],
    )
    AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    ).save_pretrained(tmp_path / "theirs")

    ours, theirs = (load_file(d / "model.safetensors") for d in (made.out / "base", tmp_path / "theirs"))

    assert ours.keys() == theirs.keys()
    assert sum(".quant_state." in name for name in ours) == 14
    for name, tensor in theirs.items():
        if ".quant_state." in name:
            said, wanted = (json.loads(bytes(t.tolist())) for t in (ours[name], tensor))
            assert said == wanted | {"dtype": "float32"}, name
        else:
            assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(ours[name], tensor), name
    written = json.loads((made.out / "base" / "config.json").read_text())["quantization_config"]
    assert BitsAndBytesConfig.from_dict(written).to_dict() == config.to_dict()


def test_the_4bit_base_opens_plainly_and_holds_the_codes_of_the_artifact(make: Callable[..., Made]) -> None:
    made = make(Qlora())

    opened = AutoModelForCausalLM.from_pretrained(made.out / "base", dtype=torch.float32)

    for name in made.artifact.table:
        weight = opened.get_parameter(name)
        codes = made.artifact.formula(name).parts[0]  # type: ignore[union-attr]
        assert torch.equal(bnb.functional.dequantize_4bit(weight.data, weight.quant_state), codes.materialise()), name


def test_evaluating_an_opened_4bit_export_leaves_its_weights_as_stored(make: Callable[..., Made]) -> None:
    model = open_adapter(make(Qlora()).out, torch.bfloat16, CPU)
    stored = {n: m.weight.data.clone() for n, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)}

    first, second = logits(model), logits(model)

    assert len(stored) == 14
    assert torch.equal(first, second)
    for name, data in stored.items():
        assert torch.equal(model.get_submodule(name).weight.data, data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", [Lora(), Qlora()])
def test_an_export_computes_in_the_dtype_that_was_asked_for(make: Callable[..., Made], method: Any, dtype: torch.dtype) -> None:
    model = open_adapter(make(method).out, dtype, CPU)

    dtypes = {p.dtype for name, p in model.named_parameters() if p.is_floating_point() and "lora_" not in name}
    assert dtypes == {dtype}
    assert model(input_ids=IDS).logits.dtype == dtype
    assert {m.compute_dtype for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)} <= {dtype}


def test_a_dense_base_is_linked_and_not_copied(make: Callable[..., Made], base: Path) -> None:
    made = make(Lora())

    assert made.opens_with == "transformers + peft"
    assert (made.out / "base" / "model.safetensors").samefile(base / "model.safetensors")
    assert (made.out / "adapter_model.safetensors").samefile(made.artifact.directory / "adapter" / "adapter_model.safetensors")


def test_where_the_file_system_has_no_links_the_files_are_copied(
    make: Callable[..., Made], base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", refuse)
    copy = make(Lora()).out / "base" / "model.safetensors"

    assert not copy.samefile(base / "model.safetensors")
    assert copy.read_bytes() == (base / "model.safetensors").read_bytes()


def test_codes_make_the_base_small(make: Callable[..., Made], base: Path) -> None:
    made = make(Qlora())

    assert made.opens_with == "transformers + peft + bitsandbytes"
    stored = load_file(made.out / "base" / "model.safetensors")
    numbers = sum(formula["shape"][0] * formula["shape"][1] for formula in made.artifact.table.values())
    of_codes = [t.nbytes for name, t in stored.items() if name in made.artifact.table]
    assert sum(of_codes) * 8 == 4 * numbers
    assert (made.out / "base" / "model.safetensors").stat().st_size < 0.6 * (base / "model.safetensors").stat().st_size


@pytest.mark.parametrize("method", [Lora(), Qlora()])
def test_a_moved_export_opens_by_itself_from_any_directory(
    make: Callable[..., Made], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: Any
) -> None:
    made = make(method)
    expected = logits(open_adapter(made.out, torch.float32, CPU))
    shutil.copytree(made.out, tmp_path / "elsewhere" / "mine")
    shutil.rmtree(made.out)
    monkeypatch.chdir(tmp_path / "elsewhere")

    relocate(Path("mine"))
    monkeypatch.chdir("/")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "elsewhere" / "mine", dtype=torch.float32)
    ours = open_adapter(tmp_path / "elsewhere" / "mine", torch.float32, CPU)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "elsewhere" / "mine")

    assert torch.equal(logits(ours), expected)
    # Opened plainly, a 4-bit base computes in bfloat16.
    assert torch.allclose(logits(plain), expected, atol=1e-5 if isinstance(method, Lora) else 0.1)
    assert tokenizer("abc")["input_ids"] == tiny_tokenizer()("abc")["input_ids"]


def test_relocating_leaves_the_artifact_that_the_files_are_linked_to_alone(make: Callable[..., Made]) -> None:
    made = make(Lora())
    source = made.artifact.directory / "adapter" / "adapter_config.json"
    before = source.read_bytes()

    relocate(made.out)

    assert source.read_bytes() == before
    assert json.loads(before)["base_model_name_or_path"] == "base"
    assert json.loads((made.out / "adapter_config.json").read_text())["base_model_name_or_path"] == str(made.out / "base")


def test_an_adapter_on_a_compressed_model_ships_that_model_written_out(
    make: Callable[..., Made], base: Path, tmp_path: Path
) -> None:
    beneath = tmp_path / "beneath"
    beneath.mkdir()
    quantised = Qlora().prepare(load_dense(base, torch.float32), Context(CPU))
    (tmp_path / "unused").mkdir()
    write_formulas(beneath, BASE, Qlora().finish(quantised, tmp_path / "unused"))

    made = make(Lora(), beneath=beneath)
    opened = logits(open_adapter(made.out, torch.float32, CPU))

    # The written-out weights are rounded to the base's bfloat16.
    assert torch.allclose(opened, in_memory(made), atol=0.02)
    assert "quantization_config" not in json.loads((made.out / "base" / "config.json").read_text())


def test_a_dense_model_is_no_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(Inexpressible, match="no weight has a low-rank term"):
        export_adapter(ModelArtifact(base, Path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", [Lora(), Qlora()])
def test_a_fresh_process_needs_nothing_but_the_directory(make: Callable[..., Made], base: Path, method: Any) -> None:
    made = make(method)
    expected = in_memory(made)
    hidden = base.with_name("hidden")
    base.rename(hidden)
    shutil.rmtree(made.artifact.directory)
    try:
        script = (
            "import sys, torch; from pathlib import Path; from pare.workers.export.adapter import open_adapter\n"
            "model = open_adapter(Path(sys.argv[1]), torch.float32, torch.device('cpu'))\n"
            "ids = torch.arange(32).view(2, 16)\n"
            "with torch.no_grad(): torch.save(model(input_ids=ids).logits, sys.argv[2])"
        )
        result = made.out.parent / "logits.pt"
        subprocess.run([sys.executable, "-c", script, str(made.out), str(result)], check=True, cwd="/")
    finally:
        hidden.rename(base)

    assert torch.allclose(torch.load(result), expected, atol=1e-5)
