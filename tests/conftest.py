"""A trained tiny model and a small corpus on disk, for every test that needs a real one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pare.workers.corpus import split_documents, topic_documents, write_split
from pare.workers.sources import resolve_model
from pare.workers.task import TaskContext
from pare.workers.tasks import import_model

FRACTIONS = {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}


def pytest_configure() -> None:
    # A shell that starts the tests in the background has Ctrl-C ignored, in their children too; some tests send it.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Processes that test side by side share the cores.
    if (side_by_side := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))) > 1:
        threads = max(1, (os.cpu_count() or 1) // side_by_side)
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense directory as `import_model` writes it: the tiny model (2 blocks, width 64, FFN 128), trained for 20 steps."""
    directory = tmp_path_factory.mktemp("tiny_model")
    model = {"source": "tiny", "dtype": "bfloat16", "tiny": {"layers": 2, "width": 64, "ffn": 128, "steps": 20}}
    import_model.run(TaskContext({"model": model, "identity": resolve_model(model)}, {}, directory))
    return directory


@pytest.fixture(scope="session")
def tiny_corpus_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus artifact of Python's language reference alone, which needs no parsing of the standard library."""
    directory = tmp_path_factory.mktemp("tiny_corpus")
    for split, documents in split_documents(topic_documents(), FRACTIONS, seed=0).items():
        write_split(directory, split, documents)
    return directory


@pytest.fixture
def run_task(tmp_path: Path) -> Callable[..., tuple[Path, dict[str, Any]]]:
    """run_task(module, spec, role=directory, ...) -> (directory of what was written, result)."""
    count = 0

    def run(module: ModuleType, spec: dict[str, Any], **inputs: Path) -> tuple[Path, dict[str, Any]]:
        nonlocal count
        count += 1
        out = tmp_path / f"out{count}"
        out.mkdir()
        return out, module.run(TaskContext(spec, inputs, out))

    return run
