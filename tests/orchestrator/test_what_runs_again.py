"""What runs again after a change, task by task. Each row changes a copy of Pare, runs a sweep twice, and reads the ledger."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("conf", "methods", "orchestrator", "tracking", "workers")
EXPERIMENT = """
# @package _global_
defaults:
  - override /model: tiny
  - override /data: text
name: three
data: {path: corpus.txt}
evaluation: {questions: {n: 0}}
blocks:
  rtn: {recipe: rtn}
  gptq: {recipe: gptq}
  lora: {recipe: lora}
"""
SWEEP = ["experiment=three"]
DRIVER = """
import json, sys
from pathlib import Path
from tests.orchestrator import pretend
assert pretend.sweep(Path("home"), json.loads(sys.argv[1])) == 0
"""
TRIALS = {"rtn", "gptq", "lora"}
BASE = {"import tiny", "corpus text", "test tokens", "calibration tokens", "train tokens", "score base", "calibrate gram"}


def of(*trials: str, but: str = "") -> set[str]:
    """The tasks of trials that are theirs alone."""
    found = {f"{what} {trial}" for trial in trials for what in (trial, "score", "export", "evaluate")}
    return {label for label in found if not but or not label.startswith(but)}


def edit(file: str) -> Callable[[Path], list[str]]:
    """A line of code more."""

    def change(tree: Path) -> list[str]:
        with (tree / "pare" / file).open("a") as f:
            f.write("\nONE_LINE_MORE = 1\n")
        return []

    return change


def comment(tree: Path) -> list[str]:
    for file in ("methods/quantize/gptq.py", "workers/calibration.py", "workers/tasks/export.py", "workers/run.py"):
        path = tree / "pare" / file
        path.write_text(path.read_text() + "\n# a comment\n")
    return []


def setting(tree: Path) -> list[str]:
    return ["blocks.gptq.recipe.quantize.damping=0.02"]


def data(tree: Path) -> list[str]:
    with (tree / "corpus.txt").open("a") as f:
        f.write("\n\n" + "One more document, which nobody has read before. " * 40)
    return []


def nothing(tree: Path) -> list[str]:
    return []


ROWS: dict[str, tuple[Callable[[Path], list[str]], set[str]]] = {
    "nothing": (nothing, set()),
    "a comment": (comment, set()),
    "one setting": (setting, of("gptq")),
    "the body of a method": (edit("methods/quantize/gptq.py"), of("gptq")),
    "a line of calibration": (edit("workers/calibration.py"), {"calibrate gram"} | of("gptq", "rtn")),
    "a line of export": (edit("workers/tasks/export.py"), {f"{w} {t}" for t in TRIALS for w in ("export", "evaluate")}),
    "the data": (data, (BASE - {"import tiny"}) | of("gptq", "lora") | {"score rtn", "evaluate rtn"}),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of Pare, and a home in which the sweep has run with it."""
    tree = tmp_path_factory.mktemp("tree")
    (tree / "pare").mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, tree / "pare" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (ROOT / "pare").glob("*.py"):
        shutil.copy(file, tree / "pare")
    shutil.copytree(ROOT / "tests", tree / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "pare" / "conf" / "experiment" / "three.yaml").write_text(EXPERIMENT)
    text = (" ".join(f"Of document {i} sentence {j} says that {j + 1} follows." for j in range(40)) for i in range(60))
    (tree / "corpus.txt").write_text("\n\n".join(text))
    assert executed(tree, SWEEP) == BASE | of(*TRIALS)
    return tree


def executed(tree: Path, overrides: list[str]) -> set[str]:
    """Labels of the tasks that a further driver runs."""
    count = len(read(tree))
    command = [sys.executable, "-c", DRIVER, json.dumps(overrides)]
    done = subprocess.run(command, cwd=tree, env={"PYTHONPATH": str(tree), "PATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(read(tree)[count:])


def read(tree: Path) -> list[str]:
    from tests.orchestrator import pretend

    return [label for label, _ in pretend.attempts(tree / "home")] if (tree / "home").exists() else []


@pytest.mark.parametrize("row", ROWS)
def test_exactly_what_depends_on_a_change_runs_again(ran: Path, tmp_path: Path, row: str) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(ran, tree)
    change, expected = ROWS[row]

    overrides = SWEEP + change(tree)

    assert executed(tree, overrides) == expected
    assert executed(tree, overrides) == set()
