"""Evaluation in a fresh process: it agrees with the model in memory, notices when it must not, and dies loudly."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from pare.workers.export.files import digests
from pare.workers.fresh import FreshProcess
from pare.workers.lm_tasks import resolve_benchmark
from pare.workers.metric_function import resolve_metric
from pare.workers.pairs import resolve_pairs
from pare.workers.probe import ExportUnderTest
from pare.workers.task import TaskError
from pare.workers.tasks import benchmark, evaluate, export, pairs, score

QUESTIONS = [{"context": f"line {i}: one", "choices": ["two", "three four"], "label": i % 2, "document": "d"} for i in range(4)]
SPEC = {"dtype": "float32", "tolerance": 0.005, "task": "made_up"}


@pytest.fixture
def inputs(workshop: Any, codes: Callable[..., Any]) -> dict[str, Path]:
    """Inputs of an evaluate task of a 3-bit model."""
    tokens = workshop.tokens()
    teacher, _ = workshop.run(score, "teacher", {"dtype": "float32", "keep_hidden": True}, model=workshop.base, tokens=tokens)
    artifact = workshop.artifact("rtn", lambda name, weight: codes(weight, 3, 32))
    memory, _ = workshop.run(
        score, "score", {"dtype": "float32", "keep_hidden": False}, model=artifact, tokens=tokens, teacher=teacher
    )
    exported, _ = workshop.run(export, "export", {"card": {}}, model=artifact)
    questions = workshop.root / "questions"
    questions.mkdir()
    (questions / "questions.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return {"export": exported, "tokens": tokens, "teacher": teacher, "score": memory, "questions": questions}


def tamper(directory: Path) -> None:
    """Makes the weights of one linear twenty times as large, as an export that is wrong from the beginning has them."""
    weights = load_file(directory / "model.safetensors")
    weights["model.layers.0.mlp.down_proj.weight_scale"] *= 20
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((directory / "export.json").read_text())
    (directory / "export.json").write_text(json.dumps({**said, "digests": digests(directory)}))


def in_this_process(inputs: dict[str, Path], base: Path) -> dict[str, Any]:
    """What the probe finds, without a process of its own."""
    probe = ExportUnderTest(str(inputs["export"]), "float32", "cpu")
    found = probe.predict(str(inputs["tokens"]), str(inputs["teacher"]), {"fingerprint-of-the-base": str(base)})
    return {**found["metrics"], **probe.answer(str(inputs["questions"] / "questions.jsonl"), "made_up")["metrics"]}


def test_an_export_has_the_perplexity_and_kl_of_its_parts_in_memory(inputs: dict[str, Path], workshop: Any) -> None:
    memory = json.loads((inputs["score"] / "score.json").read_text())["result"]

    found = in_this_process(inputs, workshop.base)

    assert found["quality/ppl"] == pytest.approx(memory["quality/ppl"], rel=1e-6)
    assert found["quality/kl"] == pytest.approx(memory["quality/kl"], rel=1e-5)
    assert found["quality/kl"] > 0
    assert 0 <= found["quality/acc/made_up"] <= 1


def test_another_model_in_the_export_is_a_mismatch_that_states_both_perplexities(
    inputs: dict[str, Path], workshop: Any
) -> None:
    tamper(inputs["export"])
    found = in_this_process(inputs, workshop.base)

    with pytest.raises(TaskError) as error:
        evaluate.compare(found, inputs["score"], 0.005)

    memory = json.loads((inputs["score"] / "score.json").read_text())["result"]["quality/ppl"]
    assert error.value.failure == "export_mismatch"
    assert f"{memory:.6g}" in str(error.value)
    assert f"{found['quality/ppl']:.6g}" in str(error.value)
    assert evaluate.compare(found, inputs["score"], 1000)["quality/ppl_in_memory"] == memory


@pytest.mark.slow
def test_the_task_measures_in_a_process_that_knows_neither_ray_nor_mlflow(
    inputs: dict[str, Path], workshop: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")

    out, result = workshop.run(evaluate, "evaluate", SPEC, **inputs)

    expected = in_this_process(inputs, workshop.base)
    assert {name: result[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-7)
    assert result["eval/tokens"] == 4 * 31
    assert json.loads((out / "evaluation.json").read_text())["windows"]["tokens"] == [31] * 4
    assert [file.name for file in out.iterdir()] == ["evaluation.json"]
    imported = {
        line.rsplit("|", 1)[1].strip() for line in capfd.readouterr().err.splitlines() if line.startswith("import time:")
    }
    assert "pare.workers.export.reader" in imported
    assert not {"ray", "mlflow", "hydra"} & imported


@pytest.mark.slow
def test_the_task_fails_on_a_tampered_export_and_on_a_damaged_one(inputs: dict[str, Path], workshop: Any) -> None:
    tamper(inputs["export"])
    with pytest.raises(TaskError, match=r"allowed are 0[.]500%") as error:
        workshop.run(evaluate, "tampered", SPEC, **inputs)
    assert error.value.failure == "export_mismatch"

    (inputs["export"] / "model.safetensors").unlink()
    with pytest.raises(TaskError, match=r"lacks the weight file model[.]safetensors") as error:
        workshop.run(evaluate, "damaged", SPEC, **inputs)
    assert "Traceback" in str(error.value)


@pytest.mark.slow
def test_the_export_is_all_that_is_read_of_the_model(inputs: dict[str, Path], workshop: Any, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    shutil.move(inputs["export"], moved)
    shutil.rmtree(workshop.root / "rtn")

    _, result = workshop.run(evaluate, "evaluate", SPEC, **{**inputs, "export": moved})

    assert result["quality/ppl"] == pytest.approx(result["quality/ppl_in_memory"], rel=1e-6)


@pytest.mark.slow
def test_an_export_is_asked_the_users_tasks_pairs_and_functions(inputs: dict[str, Path], workshop: Any, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    (own / "task.yaml").write_text(
        "task: mine\ndataset_path: json\ndataset_kwargs: {data_files: {test: data.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: context\ndoc_to_choice: choices\ndoc_to_target: label\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    (own / "data.jsonl").write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    where = {"name": "mine", "include_path": str(own), "start": "."}
    tasks, _ = workshop.run(benchmark, "benchmark", {"identity": resolve_benchmark(where), "where": where})
    (own / "pairs.jsonl").write_text('{"good": "a cat sleeps", "bad": "a cat sleep"}\n{"good": "b", "bad": "b"}\n')
    columns = {"good": "good", "bad": "bad", "group": None}
    place = {"path": str(own / "pairs.jsonl")}
    minimal, _ = workshop.run(
        pairs, "pairs", {"columns": columns, "identity": resolve_pairs({**columns, **place}), "where": place}
    )
    (own / "f.py").write_text("def f(model, tokenizer, windows):\n    return {'n': len(windows)}\n")
    metric = {"name": "own", "function": f"{own}/f.py:f", "direction": "lower"}
    spec = {**SPEC, "num_fewshot": None, "limit": 3, "metrics": [{**metric, "identity": resolve_metric(metric)}]}
    spec["where"] = {"metrics": {"own": str(own / "f.py")}}

    out, result = workshop.run(evaluate, "evaluate", spec, **{**inputs, "benchmark.mine": tasks, "pairs": minimal})

    kept = json.loads((out / "evaluation.json").read_text())
    assert result["eval/questions/mine"] == 3
    assert result["quality/own/n"] == 4
    assert result["eval/ties/pairs"] == 1
    assert result["directions"] == {
        **dict.fromkeys(("quality/acc/made_up", "quality/acc_norm/made_up", "quality/acc/mine", "quality/acc/pairs"), "higher"),
        "quality/own/n": "lower",
    }
    assert {name: len(digits) for name, digits in kept["answers"].items()} == {
        "quality/acc/made_up": 4,
        "quality/acc_norm/made_up": 4,
        "quality/acc/mine": 3,
        "quality/acc/pairs": 2,
    }
    (own / "f.py").write_text("def f(model, tokenizer, windows):\n    return model.nothing\n")
    spec["metrics"][0]["identity"] = resolve_metric(metric)
    with pytest.raises(TaskError, match=r"own failed at .*f.py:2, in f: AttributeError"):
        workshop.run(evaluate, "broken", spec, **inputs)


@pytest.mark.slow
def test_an_export_above_the_memory_it_may_take_is_measured_alike_and_says_so(inputs: dict[str, Path], workshop: Any) -> None:
    _, whole = workshop.run(evaluate, "whole", SPEC, **inputs)
    _, small = workshop.run(evaluate, "small", {**SPEC, "where": {"memory_bytes": 1}}, **inputs)

    assert whole.pop("notes") == []
    assert [note.split(":")[0] for note in small.pop("notes")] == ["streamed for its evaluation"]
    assert small.pop("directions") == whole.pop("directions")
    assert small == pytest.approx(whole, rel=1e-5, abs=1e-6)
    metric = {"name": "own", "function": f"{__file__}:tamper", "direction": "lower", "identity": {}}
    spec = {**SPEC, "metrics": [metric], "where": {"memory_bytes": 1, "metrics": {"own": __file__}}}
    with pytest.raises(TaskError, match="own is given the model, for which it has to be in memory as a whole"):
        workshop.run(evaluate, "function", spec, **inputs)


@pytest.mark.parametrize(("sent", "failure"), [(signal.SIGKILL, "oom_host"), (signal.SIGTERM, "lost_worker")])
def test_a_killed_process_is_an_error_that_says_what_killed_it(sent: signal.Signals, failure: str) -> None:
    with FreshProcess(Counter, threads=1) as process:
        os.kill(process.process.pid, sent)

        with pytest.raises(TaskError, match=sent.name) as error:
            process.ask("total")

    assert error.value.failure == failure


def test_a_process_that_ends_by_itself_shows_the_last_it_said() -> None:
    with FreshProcess(Counter, threads=0) as process, pytest.raises(TaskError, match="ended with status 1") as error:
        process.ask("total")

    assert "set_num_threads" in str(error.value)
    assert error.value.failure == "lost_worker"


def test_an_error_in_the_process_comes_with_its_traceback_and_the_process_lives_on() -> None:
    with FreshProcess(Counter, threads=1, a=2, b=3) as process:
        with pytest.raises(TaskError, match="elements_of") as error:
            process.ask("elements_of", kind="unknown")

        assert "Traceback" in str(error.value)
        assert process.ask("total") == 5


def test_an_object_that_cannot_be_made_is_an_error_of_the_first_question(tmp_path: Path) -> None:
    with (
        FreshProcess(ExportUnderTest, threads=1, directory=str(tmp_path), dtype="float32", device="cpu") as process,
        pytest.raises(TaskError, match=r"export[.]json"),
    ):
        process.ask("ready")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_the_process_dies_with_its_parent() -> None:
    program = (
        "import time\n"
        "from collections import Counter\n"
        "from pare.workers.fresh import FreshProcess\n"
        "p = FreshProcess(Counter, threads=1)\n"
        "p.ask('total')\n"
        "print(p.process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))

    parent.kill()
    parent.wait()

    deadline = time.monotonic() + 5
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
