import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pare.workers.corpus import Document, read_split, write_split
from pare.workers.models import load_tokenizer
from pare.workers.task import TaskError
from pare.workers.tasks import tokens
from pare.workers.tasks.tokens import ROLES, documents_of

Run = Callable[..., tuple[Path, dict[str, Any]]]
END = 256


@pytest.fixture
def windows(run_task: Run, tiny_model_dir: Path, tiny_corpus_dir: Path) -> Callable[..., Tensor]:
    def make(corpus: Path = tiny_corpus_dir, **spec: Any) -> Tensor:
        spec = {"role": "test", "sequences": 4, "length": 64, "seed": 0, **spec}
        out, result = run_task(tokens, spec, model=tiny_model_dir, corpus=corpus)
        ids = load_file(out / "tokens.safetensors")["input_ids"]
        assert result["tokens"] == ids.numel()
        return ids

    return make


@pytest.mark.parametrize("role", ROLES)
def test_every_role_gives_windows_of_its_own_split(role: str, windows: Callable[..., Tensor], tmp_path: Path) -> None:
    for split in ("train", "validation", "selection", "test"):
        write_split(tmp_path, split, [Document(f"{split}/{i}", split) for i in range(100)])

    ids = windows(tmp_path, role=role, sequences=3, length=20)

    assert ids.shape == (3, 20)
    assert ids.dtype == torch.int64
    expected = "train" if role == "calibration" else role
    assert bytes(i for i in ids.flatten().tolist() if i != END).startswith(expected.encode() * 2)


def test_windows_are_the_documents_in_order_joined_by_the_end_token(
    windows: Callable[..., Tensor], tiny_corpus_dir: Path, tiny_model_dir: Path
) -> None:
    ids = windows(sequences=120, length=64).flatten().tolist()

    texts = {d.text for d in read_split(tiny_corpus_dir, "test")}
    pieces = load_tokenizer(tiny_model_dir).decode(ids).split("<|end|>")
    assert len(pieces) > 2
    assert set(pieces[:-1]) <= texts  # whole documents, each once
    assert len(set(pieces)) == len(pieces)
    assert any(t.startswith(pieces[-1]) for t in texts)  # the last one is cut where the windows end


def test_windows_do_not_overlap_and_more_of_them_begin_alike(windows: Callable[..., Tensor]) -> None:
    few, many = windows(sequences=4), windows(sequences=8)

    assert torch.equal(few, many[:4])
    assert torch.equal(windows(sequences=2, length=128).flatten(), few.flatten())


def test_the_seed_decides_about_the_order_and_nothing_else_does(windows: Callable[..., Tensor], tmp_path: Path) -> None:
    first = windows(role="train", seed=0)

    assert torch.equal(first, windows(role="train", seed=0))
    assert not torch.equal(first, windows(role="train", seed=1))


def test_calibration_and_train_share_no_document(tiny_corpus_dir: Path) -> None:
    documents = [Document(f"d/{i}", "") for i in range(2000)]

    calibration, train = ({d.id for d in documents_of(role, documents)} for role in ("calibration", "train"))

    assert not calibration & train
    assert calibration | train == {d.id for d in documents}
    assert len(calibration) == pytest.approx(0.2 * 2000, abs=72)  # four standard deviations


def test_the_order_of_the_corpus_file_does_not_matter(
    windows: Callable[..., Tensor], tiny_corpus_dir: Path, tmp_path: Path
) -> None:
    write_split(tmp_path, "test", reversed(read_split(tiny_corpus_dir, "test")))

    assert torch.equal(windows(tmp_path), windows(tiny_corpus_dir))


def test_too_few_tokens_say_how_many_there_are_and_what_to_lower(windows: Callable[..., Tensor], tmp_path: Path) -> None:
    write_split(tmp_path, "test", [Document("a", "x" * 99), Document("b", "y" * 99)])
    write_split(tmp_path, "train", [Document(f"{i}", "x" * 9) for i in range(10)])

    with pytest.raises(
        TaskError, match=r"role test: 4 sequences of 64 are 256 tokens, but its 2 documents have only 200"
    ) as caught:
        windows(tmp_path)
    assert "Lower evaluation.windows.sequences or evaluation.windows.length (at most 3 of length 64)" in str(caught.value)
    with pytest.raises(TaskError, match=r"Lower data.calibration.sequences or data.calibration.length"):
        windows(tmp_path, role="calibration")


def test_rows_of_concatenated_documents_have_no_other_columns(
    run_task: Run, tiny_model_dir: Path, tiny_corpus_dir: Path
) -> None:
    spec = {"role": "train", "sequences": 4, "length": 64, "seed": 0}
    out, result = run_task(tokens, spec, model=tiny_model_dir, corpus=tiny_corpus_dir)
    same, _ = run_task(
        tokens, {**spec, "packing": "concatenated", "predict": "all"}, model=tiny_model_dir, corpus=tiny_corpus_dir
    )

    assert load_file(out / "tokens.safetensors").keys() == {"input_ids"}
    assert (out / "tokens.safetensors").read_bytes() == (same / "tokens.safetensors").read_bytes()
    assert result.keys() == {"tokens", "documents", "characters"}


@pytest.mark.parametrize("packing", ["separate", "padded"])
def test_documents_that_share_a_row_stand_apart_and_each_whole_one_is_found_again(
    packing: str, run_task: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    documents = [Document(f"{i}", chr(97 + i % 26) * (5 + i % 30)) for i in range(120)]
    write_split(tmp_path, "train", documents)
    spec = {"role": "train", "sequences": 12, "length": 40, "seed": 0, "packing": packing}
    out, result = run_task(tokens, spec, model=tiny_model_dir, corpus=tmp_path)
    columns = load_file(out / "tokens.safetensors")

    ids, labels = columns["input_ids"], columns["labels"]
    assert columns.keys() == {"input_ids", "labels"} | ({"position_ids"} if packing == "separate" else set())
    assert ids.shape == labels.shape == (12, 40)
    predicted = labels >= 0
    assert torch.equal(labels[predicted], ids[predicted])
    assert result["predicted"] == predicted.sum() < result["tokens"] == ids.numel()
    texts = {d.text for d in documents}
    for row, said in zip(ids.tolist(), predicted.tolist(), strict=True):
        pieces = [piece for piece in load_tokenizer(tiny_model_dir).decode(row).split("<|end|>") if piece]
        ends_behind = next(n for n, i in enumerate(reversed(row)) if i != END)
        assert set(pieces) <= texts
        assert said.count(False) == len(pieces) + ends_behind - 1, "what each begins with, and what fills the row"
    if packing == "separate":
        begins = columns["position_ids"] == 0
        assert not predicted[begins].any()
        assert begins.sum() > 12


def test_too_few_rows_are_told_as_for_windows_and_what_was_left_out_besides(
    run_task: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    write_split(tmp_path, "test", [Document("a", "x" * 10), Document("b", "y" * 6), Document("c", "")])
    spec = {"role": "test", "sequences": 4, "length": 8, "seed": 0, "packing": "padded"}

    with pytest.raises(TaskError, match=r"its 3 documents have only 18 besides 1 in passages .* \(at most 3 of length 8\)"):
        run_task(tokens, spec, model=tiny_model_dir, corpus=tmp_path)


@pytest.mark.parametrize("packing", ["concatenated", "separate", "padded"])
def test_of_conversations_only_the_assistant_is_learnt_and_every_row_learns_something(
    packing: str, run_task: Run, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "q" * 30), ("assistant", "answer"), ("user", "q" * 100), ("assistant", "yes")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    write_split(tmp_path, "train", [Document(f"{i}", "x", messages=messages[: 2 + 2 * (i % 2)]) for i in range(80)])
    spec = {"role": "train", "sequences": 20, "length": 64, "seed": 0, "packing": packing, "predict": "assistant"}
    out, result = run_task(tokens, spec, model=model, corpus=tmp_path)

    labels = load_file(out / "tokens.safetensors")["labels"]
    learnt = labels[labels >= 0].tolist()
    assert set(load_tokenizer(model).decode(learnt).split("<|end|>")) <= {"answer", "yes", ""} or packing == "concatenated"
    assert set(learnt) == {*b"answeryes", END}
    assert bool((labels[:, 1:] >= 0).any(dim=1).all())
    assert result["predicted"] == (labels[:, 1:] >= 0).sum()
    assert result["left_out"] > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"role": "dev"}, "role must be one of calibration, train"),
        ({"sequences": 0}, "sequences must be >= 1"),
        ({"length": 1}, "length >= 2"),
    ],
)
def test_a_spec_out_of_range_is_refused(windows: Callable[..., Tensor], spec: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        windows(**spec)


def test_a_tokenizer_without_an_end_token_is_refused(
    tiny_model_dir: Path, tiny_corpus_dir: Path, run_task: Run, tmp_path: Path
) -> None:
    for file in ("tokenizer.json", "config.json"):
        (tmp_path / file).write_bytes((tiny_model_dir / file).read_bytes())
    config = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(TaskError, match="no end-of-text token"):
        run_task(tokens, {"role": "test", "sequences": 1, "length": 8, "seed": 0}, model=tmp_path, corpus=tiny_corpus_dir)
