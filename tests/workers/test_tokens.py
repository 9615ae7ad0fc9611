import json
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
