"""The user's tasks through lm-eval: found by name, brought into the store, asked; and questions against slow computations."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pare.workers import harness, lm_tasks
from pare.workers.corpus import SourceError
from pare.workers.lm_tasks import find, identity_of, resolve_benchmark
from pare.workers.models import load_dense, load_tokenizer
from pare.workers.task import TaskError
from pare.workers.tasks import benchmark

YAML = """
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl, train: more.jsonl}}
test_split: test
training_split: train
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{options}}"
doc_to_target: label
process_docs: !function prepare.shout
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
ROWS = [{"q": f"line {i}: the sky is", "options": ["blue", "green", "as it was"], "label": i % 3} for i in range(7)]
PREPARE = "def shout(docs):\n    return docs.map(lambda doc: {**doc, 'q': doc['q'].upper()})\n"


@pytest.fixture
def model(random_llama: Path) -> nn.Module:
    return noisy(load_dense(random_llama, torch.float32))


def noisy(model: nn.Module) -> nn.Module:
    """The same model with other weights."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def slow_log_probabilities(model: nn.Module, ids: Tensor) -> list[float]:
    """Log-likelihood of each token but the first, in Python floats, one prefix at a time."""
    out = []
    for end in range(1, len(ids)):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :end]).logits[0, -1].tolist()
        top = max(logits)
        out.append(logits[ids[end]] - top - math.log(sum(math.exp(x - top) for x in logits)))
    return out


def slow_choice(model: nn.Module, tokenizer: Any, context: str, choices: list[str]) -> int:
    """The likeliest of the choices."""
    sums = []
    for choice in choices:
        start = len(tokenizer(context).input_ids)
        sums.append(sum(slow_log_probabilities(model, torch.tensor(tokenizer(f"{context} {choice}").input_ids))[start - 1 :]))
    return sums.index(max(sums))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with one task, a group around it, and its data beside it."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "colours.yaml").write_text(YAML)
    (own / "prepare.py").write_text(PREPARE)
    (own / "group.yaml").write_text("group: mine\ntask: [colours]\nnum_fewshot: 1\n")
    (own / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (own / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    return own


def request(name: str, folder: Path | None) -> dict[str, Any]:
    return {"name": name, "include_path": str(folder) if folder else None, "start": "."}


def bring(run_task: Any, name: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    where = request(name, folder)
    out, result = run_task(benchmark, {"identity": resolve_benchmark(where), "where": where})
    return out, result


def test_a_task_of_the_users_own_over_a_local_file_is_answered_as_by_a_slow_computation(
    run_task: Any, folder: Path, model: nn.Module, random_llama: Path
) -> None:
    tokenizer = load_tokenizer(random_llama)
    out, result = bring(run_task, "colours", folder)
    for file in folder.iterdir():
        file.unlink()  # what was brought is all that is read

    got = harness.benchmark(model, tokenizer, out, None, None)

    right = [slow_choice(model, tokenizer, row["q"].upper(), row["options"]) == row["label"] for row in ROWS]  # type: ignore[attr-defined, arg-type]
    p, n = sum(right) / 7, 7
    assert result == {"tasks": 1, "documents": 9}
    assert got["answers"]["quality/acc/colours"] == "".join(str(int(r)) for r in right)
    assert got["metrics"]["quality/acc/colours"] == pytest.approx(p)
    error = 1.959964 * math.sqrt(p * (1 - p) / (n - 1))
    assert got["metrics"]["quality/acc/colours_low"] == pytest.approx(max(0, p - error))
    assert got["metrics"]["quality/acc/colours_high"] == pytest.approx(min(1, p + error))
    assert got["metrics"]["eval/questions/colours"] == 7
    assert got["directions"] == {"quality/acc/colours": "higher", "quality/acc_norm/colours": "higher"}


def test_only_the_first_questions_are_asked_and_examples_stand_before_them(
    run_task: Any, folder: Path, model: nn.Module, random_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = bring(run_task, "colours", folder)
    asked: list[int] = []
    real = harness.continuations

    def counting(model: nn.Module, context: Any, choices: Any) -> Any:
        asked.append(len(context))
        return real(model, context, choices)

    monkeypatch.setattr(harness, "continuations", counting)
    got = harness.benchmark(model, load_tokenizer(random_llama), out, 0, 3)
    plain = list(asked)
    asked.clear()
    harness.benchmark(model, load_tokenizer(random_llama), out, 1, 3)

    assert len(got["answers"]["quality/acc/colours"]) == len(plain) == 3
    assert min(asked) > max(plain), "an example makes the context longer"


def test_a_group_gets_the_share_of_right_answers_to_all_its_questions(
    run_task: Any, folder: Path, model: nn.Module, random_llama: Path
) -> None:
    (folder / "second.yaml").write_text(
        YAML.replace("task: colours", "task: second").replace("target: label", 'target: "{{2 - label}}"')
    )
    (folder / "group.yaml").write_text("group: mine\ntask: [colours, second]\n")
    out, _ = bring(run_task, "mine", folder)

    got = harness.benchmark(model, load_tokenizer(random_llama), out, None, None)

    first, second = (got["answers"][f"quality/acc/{task}"] for task in ("colours", "second"))
    assert got["answers"]["quality/acc/mine"] == first + second
    assert got["metrics"]["quality/acc/mine"] == pytest.approx((first + second).count("1") / 14)
    assert got["metrics"]["eval/questions/mine"] == 14
    assert got["directions"]["quality/acc/mine"] == "higher"


def test_a_group_hands_its_settings_to_its_tasks(folder: Path) -> None:
    (leaf,) = find("mine", str(folder))

    assert (leaf.name, leaf.own, leaf.overrides) == ("colours", True, {"num_fewshot": 1})


def test_tasks_groups_and_tags_of_lm_eval_are_found() -> None:
    (easy,) = find("arc_easy", None)
    both = find("ai2_arc", None)
    blimp = find("blimp", None)

    assert easy.config["dataset_name"] == "ARC-Easy"
    assert not easy.own
    assert [leaf.name for leaf in both] == ["arc_challenge", "arc_easy"]
    assert len(blimp) == 67


def test_a_mistyped_name_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"no task 'arc_esay' in lm-eval.*Did you mean 'arc_easy'"):
        find("arc_esay", None)
    with pytest.raises(SourceError, match=r"Did you mean 'colours'"):
        find("colors", str(folder))
    with pytest.raises(SourceError, match=r"include_path=.*nowhere: no such directory"):
        find("colours", str(folder / "nowhere"))


def test_the_identity_changes_with_the_text_a_function_and_the_data_not_with_the_place(folder: Path, tmp_path: Path) -> None:
    first = resolve_benchmark(request("colours", folder))
    moved = tmp_path / "moved"
    folder.rename(moved)
    assert resolve_benchmark(request("colours", moved)) == first

    seen = [first]
    for name, old, new in (
        ("colours.yaml", "{{q}}", "{{q}}!"),
        ("prepare.py", "upper", "lower"),
        ("colours.jsonl", "line 0", "line A"),
    ):
        text = (moved / name).read_text()
        (moved / name).write_text(text.replace(old, new))
        seen.append(resolve_benchmark(request("colours", moved)))
        (moved / name).write_text(text)

    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_data_that_changed_after_the_plan_are_refused(run_task: Any, folder: Path) -> None:
    where = request("colours", folder)
    identity = resolve_benchmark(where)
    (folder / "colours.jsonl").write_text(json.dumps(ROWS[0]) + "\n")

    with pytest.raises(TaskError, match=r"colours is not what it was when the plan was made"):
        run_task(benchmark, {"identity": identity, "where": where})


def test_data_of_the_hub_that_cannot_be_had_name_the_way_to_fetch_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(spec: Any, kind: str) -> str:
        raise SourceError("no connection", "data.name")

    monkeypatch.setattr(lm_tasks, "hub_commit", offline)
    with pytest.raises(SourceError, match=r"arc_easy reads the data set allenai/ai2_arc.*`pare prefetch`"):
        resolve_benchmark(request("arc_easy", None))


def test_the_commit_of_a_data_set_of_the_hub_is_its_identity(monkeypatch: pytest.MonkeyPatch) -> None:
    (leaf,) = find("arc_easy", None)
    monkeypatch.setattr(lm_tasks, "hub_commit", lambda spec, kind: f"{spec['name']} {kind}")

    assert identity_of(leaf, Path("."))["data"] == "allenai/ai2_arc dataset"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("test: colours.jsonl", "test: nowhere.jsonl", r"reads nowhere.jsonl, which is neither"),
        ("output_type: multiple_choice", "unsafe_code: true", "runs code that the model writes"),
        ("{metric: acc, ", "{metric: acc, hf_evaluate: true, ", "fetches a metric from the hub"),
        ("task: colours", "task: colours\nclass: !function prepare.shout", "is a Python class"),
        ("task: colours", "task: [", r"colours.yaml cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_with_its_reason(folder: Path, old: str, new: str, said: str) -> None:
    (folder / "colours.yaml").write_text(YAML.replace(old, new, 1))

    with pytest.raises(SourceError, match=said):
        resolve_benchmark(request("colours", folder))


def test_a_split_that_the_data_lack_is_named(run_task: Any, folder: Path) -> None:
    (folder / "colours.yaml").write_text(YAML.replace("test_split: test", "test_split: tset"))

    with pytest.raises(TaskError, match=r"reads the split 'tset'; its data have test, train"):
        bring(run_task, "colours", folder)


# --- questions ----------------------------------------------------------------------------------------------------------


def questions() -> list[dict[str, Any]]:
    choices = [["the cat", "a", "some dogs ran", "zq"], ["one two", "three", "four five six", "seven"]]
    return [
        {"context": f"number {i}: it was said that", "choices": choices[i % 2], "label": i % 4, "document": "d"}
        for i in range(6)
    ]


def test_multiple_choice_is_decided_by_the_likelihood_of_the_whole_choice(model: nn.Module, random_llama: Path) -> None:
    tokenizer = load_tokenizer(random_llama)
    right = right_by_length = 0
    for question in questions():
        sums = []
        for choice in question["choices"]:
            start = len(tokenizer(question["context"]).input_ids)
            whole = torch.tensor(tokenizer(question["context"] + " " + choice).input_ids)
            sums.append(sum(slow_log_probabilities(model, whole)[start - 1 :]))
        by_length = [s / len(c) for s, c in zip(sums, question["choices"], strict=True)]
        right += sums.index(max(sums)) == question["label"]
        right_by_length += by_length.index(max(by_length)) == question["label"]

    got = harness.multiple_choice(model, tokenizer, questions(), "made_up")["metrics"]

    assert got["quality/acc/made_up"] == pytest.approx(right / 6)
    assert got["quality/acc_norm/made_up"] == pytest.approx(right_by_length / 6)
    p = right / 6
    assert got["quality/acc/made_up_high"] == pytest.approx(min(1, p + 1.959964 * math.sqrt(p * (1 - p) / 5)))


def test_reading_the_shared_context_once_gives_what_lm_eval_gives(model: nn.Module, random_llama: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = load_tokenizer(random_llama)
    requests = [
        Instance("loglikelihood", {}, (q["context"], " " + choice), i)
        for i, q in enumerate(questions())
        for choice in q["choices"]
    ]

    ours = harness.scorer(model, tokenizer).loglikelihood(requests)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4).loglikelihood(requests)

    assert [x for x, _ in ours] == pytest.approx([x for x, _ in theirs], rel=1e-5)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_a_question_longer_than_the_model_reads_is_cut_as_lm_eval_cuts_it(model: nn.Module, random_llama: Path) -> None:
    long = [{**question, "context": "x" * 2040 + question["context"]} for question in questions()[:1]]

    got = harness.multiple_choice(model, load_tokenizer(random_llama), long, "long")

    assert got["metrics"]["quality/acc/long"] in (0.0, 1.0)
