"""Fingerprints: equal for equal work in every process, different for anything that can change a number."""

import subprocess
import sys
from pathlib import Path

from pare.orchestrator import fingerprint as fp


def test_layout_comments_and_docstrings_do_not_count_but_code_does(tmp_path: Path) -> None:
    one = tmp_path / "one.py"
    two = tmp_path / "two.py"
    three = tmp_path / "three.py"
    one.write_text('"""Doc."""\n\n\ndef f(x):\n    """Doc."""\n    return x + 1\n')
    two.write_text("# a comment\ndef f(x):\n    return (x +\n            1)\n")
    three.write_text("def f(x):\n    return x + 2\n")

    assert fp.tree_digest(one) == fp.tree_digest(two)
    assert fp.tree_digest(one) != fp.tree_digest(three)


def test_the_code_of_a_task_covers_what_its_entry_module_imports() -> None:
    found = fp.closure(["pare.workers.tasks.score"])

    assert "pare.workers.models" in found
    assert "pare.methods.parts.codes" in found, "parts are imported by a computed name"
    assert not found & fp.CANNOT_CHANGE_A_NUMBER
    assert not any(name.startswith(("pare.orchestrator", "pare.tracking")) for name in found)


def test_the_evaluation_covers_the_program_that_it_starts() -> None:
    assert "pare.workers.fresh" in fp.closure(["pare.workers.tasks.evaluate"])


def test_a_change_of_any_ingredient_changes_the_fingerprint() -> None:
    base = fp.task_record("compress", {"bits": 3}, {"model": "a"}, "cpu")
    others = [
        fp.task_record("compress", {"bits": 4}, {"model": "a"}, "cpu"),
        fp.task_record("compress", {"bits": 3}, {"model": "b"}, "cpu"),
        fp.task_record("compress", {"bits": 3}, {"model": "a"}, "cuda"),
        fp.task_record("compress", {"bits": 3}, {"model": "a"}, "cpu", ("pare.methods.quantize.rtn",)),
        fp.task_record("score", {"bits": 3}, {"model": "a"}, "cpu"),
    ]

    assert len({fp.digest(r) for r in [base, *others]}) == 6


def test_the_device_does_not_count_where_it_changes_no_number() -> None:
    assert fp.task_record("corpus", {}, {}, "cpu") == fp.task_record("corpus", {}, {}, "cuda")


def test_another_process_with_another_hash_seed_finds_the_same_fingerprint() -> None:
    program = (
        "from pare.orchestrator import fingerprint as fp;"
        "print(fp.digest(fp.task_record('evaluate', {'b': 1, 'a': [2.5, None]}, {'x': 'y', 'a': 'b'}, 'cpu')))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    }

    assert len(found) == 1
    assert found.pop() == fp.digest(fp.task_record("evaluate", {"a": [2.5, None], "b": 1}, {"a": "b", "x": "y"}, "cpu"))
