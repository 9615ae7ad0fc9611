"""From documents to training on rows in which none sees another."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pare.methods.contract import TrainMethod
from pare.workers.corpus import Document, write_split
from pare.workers.models import ModelArtifact, load_in_memory
from pare.workers.task import TaskContext, TaskError
from pare.workers.tasks import tokens, train
from tests.methods.anatomy.tiny_models import tiny

SETTINGS: dict[str, Any] = {"steps": 2, "batch_size": 4, "rank": 2, "warmup": 0.0}
TEXTS = ["Who reads this?", "A short one.", "Of a third document some words.", "The last."]


def training(model: Path, tokens: Path, out: Path) -> TaskContext:
    out.mkdir()
    spec = {"method": "lora", "settings": SETTINGS, "seed": 0, "dtype": "float32"}
    return TaskContext(spec, {"model": model, "tokens": tokens}, out, resolve=lambda _: model, fingerprint_of={"model": "base"})


def test_packed_documents_are_trained_on_as_if_each_stood_alone(random_llama: Path, tmp_path: Path, run_task: Any) -> None:
    write_split(tmp_path, "train", [Document(f"{n}", f"{n} {text}") for n in range(12) for text in TEXTS])
    spec = {"role": "train", "sequences": 4, "length": 64, "seed": 0, "packing": "separate"}
    packed, _ = run_task(tokens, spec, model=random_llama, corpus=tmp_path)

    result = train.run(training(random_llama, packed, tmp_path / "trained"))

    columns = load_file(packed / "tokens.safetensors")
    model = load_in_memory(ModelArtifact(random_llama, Path), torch.float32)
    total, count = 0.0, 0
    for ids, labels, positions in zip(columns["input_ids"], columns["labels"], columns["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, stop in pairwise(starts):
            own = {"input_ids": ids[None, start:stop], "labels": labels[None, start:stop]}
            with torch.no_grad():
                loss, predicted = TrainMethod().loss(model, own)
            total, count = total + float(loss), count + int(predicted)
    assert count > 4
    assert result["train/loss_first"] == pytest.approx(total / count, abs=1e-5)  # the four rows are the first step's batch


def test_a_model_whose_documents_would_see_each_other_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    tiny("OPTForCausalLM").save_pretrained(tmp_path / "model")
    (tmp_path / "tokens").mkdir()
    ids = torch.randint(96, (4, 16))
    positions = torch.arange(8).repeat(4, 2)
    save_file({"input_ids": ids, "labels": ids.clone(), "position_ids": positions}, tmp_path / "tokens" / "tokens.safetensors")

    with pytest.raises(TaskError, match=r"see each other in a OPTForCausalLM.*data.train.packing=padded"):
        train.run(training(tmp_path / "model", tmp_path / "tokens", tmp_path / "out"))
