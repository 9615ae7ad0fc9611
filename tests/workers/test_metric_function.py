"""A metric of the user's own: checked without being run, called on the model, and its failures told with their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pare.workers import metric_function
from pare.workers.corpus import SourceError
from pare.workers.metric_function import resolve_metric
from pare.workers.models import load_dense, load_tokenizer
from pare.workers.task import TaskError

SOURCE = """
raise_at_import = False

def loss(model, tokenizer, windows):
    assert not model.training
    return model(input_ids=windows, labels=windows).loss

def several(model, tokenizer, windows, scale=2):
    return {"windows": len(windows) * scale, "vocabulary": float(len(tokenizer))}

def broken(model, tokenizer, windows):
    return deeper(windows)

def deeper(windows):
    return windows["x y"]

def words(model, tokenizer, windows):
    return "good"

def nothing(*args):
    return float("nan")

def two(model, tokenizer):
    return 1.0

def keyword(model, tokenizer, windows, *, key):
    return 1.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path / "mine.py"


def measure(file: Path, function: str, random_llama: Path) -> dict[str, float]:
    spec: dict[str, Any] = {"name": "my-loss", "function": f"{file}:{function}", "direction": "lower"}
    spec["identity"] = resolve_metric(spec)
    windows = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
    return metric_function.call(
        spec,
        metric_function.source_of_metric(spec),
        load_dense(random_llama, torch.float32),
        load_tokenizer(random_llama),
        windows,
    )


def test_a_function_gives_a_number_or_several_by_name(file: Path, random_llama: Path) -> None:
    windows = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        loss = load_dense(random_llama, torch.float32)(input_ids=windows, labels=windows).loss.item()

    assert measure(file, "loss", random_llama) == {"quality/my-loss": pytest.approx(loss)}
    assert measure(file, "several", random_llama) == {
        "quality/my-loss/windows": 6.0,
        "quality/my-loss/vocabulary": len(load_tokenizer(random_llama)),
    }


def test_a_failure_names_the_line_in_the_users_file(file: Path, random_llama: Path) -> None:
    line = SOURCE.splitlines().index('    return windows["x y"]') + 1

    with pytest.raises(TaskError, match=rf"my-loss failed at .*mine.py:{line}, in deeper: \w+Error"):
        measure(file, "broken", random_llama)


def test_what_is_no_finite_number_is_refused(file: Path, random_llama: Path) -> None:
    with pytest.raises(TaskError, match=r"must be a number, or a dict of names and numbers, got 'good'"):
        measure(file, "words", random_llama)
    with pytest.raises(TaskError, match=r"my-loss is nan") as error:
        measure(file, "nothing", random_llama)
    assert error.value.failure == "nonfinite"


def test_a_file_that_changed_since_the_plan_is_not_run(file: Path, random_llama: Path) -> None:
    spec: dict[str, Any] = {"name": "m", "function": f"{file}:loss", "direction": "lower"}
    spec["identity"] = resolve_metric(spec)
    file.write_text(SOURCE + "\n")

    with pytest.raises(TaskError, match="has changed since the plan was made"):
        metric_function.call(spec, file, None, None, None)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("{file}:los", r"defines no function 'los' at its top level; it has: loss, several"),
        ("{file}:two", r"two\(model, tokenizer\) is called as two\(model, tokenizer, windows\)"),
        ("{file}:keyword", r"is called as keyword\(model, tokenizer, windows\)"),
        ("nowhere.py:loss", r"there is no file nowhere.py"),
        ("no_such_module_of_mine:loss", r"there is no module 'no_such_module_of_mine'. Give FILE.py:FUNCTION"),
        ("no_such_package.part:loss", r"no module 'no_such_package.part'"),
    ],
)
def test_what_cannot_be_called_is_refused_without_running_it(file: Path, function: str, said: str) -> None:
    file.write_text(SOURCE.replace("raise_at_import = False", "raise RuntimeError"))

    with pytest.raises(SourceError, match=said):
        resolve_metric({"name": "m", "function": function.format(file=file), "direction": "lower"})


def test_a_file_that_is_no_python_names_its_line(file: Path) -> None:
    file.write_text("x = 1\ndef f(:\n")

    with pytest.raises(SourceError, match=r"mine.py:2: "):
        resolve_metric({"name": "m", "function": f"{file}:f", "direction": "lower"})


def test_a_function_of_a_module_is_found_by_its_name() -> None:
    found = resolve_metric({"name": "m", "function": "pare.workers.evaluation:predict", "direction": "lower"})

    assert len(found["digest"]) == 64
    with pytest.raises(SourceError, match=r"is called as share\(model, tokenizer, windows\)"):
        resolve_metric({"name": "m", "function": "pare.workers.pairs:share", "direction": "lower"})
