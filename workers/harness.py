"""Multiple choice and the user's tasks through lm-eval.

Nothing is cached: lm-eval's cache does not know one model from another.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pare.workers import lm_tasks
from pare.workers.evaluation import Reader, row_likelihoods
from pare.workers.pairs import Z95, share
from pare.workers.task import TaskError

FEWSHOT_SEED = 1234
"""Which examples stand before a question; lm-eval's own."""

WORTH = {"0": 0.0, "1": 1.0, "5": 0.5}
"""What a character of kept answers stands for."""


def multiple_choice(
    model: nn.Module | Reader, tokenizer: Any, questions: Sequence[Mapping[str, Any]], task: str
) -> dict[str, Any]:
    """Accuracy on questions {"context", "choices", "label"}, zero-shot; see `measured` for what is returned.

    `acc` takes the likeliest choice, `acc_norm` the likeliest one per character.
    """
    import datasets

    config = {
        "task": task,
        "custom_dataset": lambda **kwargs: {"test": datasets.Dataset.from_list([dict(q) for q in questions])},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    return measured(model, tokenizer, [config])


def benchmark(
    model: nn.Module | Reader, tokenizer: Any, directory: Path, num_fewshot: int | None, limit: int | None
) -> dict[str, Any]:
    """All tasks of a `benchmark` artifact; see `measured`. num_fewshot: None leaves it to the task; limit: first documents.

    Where the name stands for several tasks, it gets the share of right answers to all their questions, of every metric that
    all of them have.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    content = json.loads((directory / "tasks.json").read_text())
    configs = []
    with tempfile.TemporaryDirectory() as cache:
        for i, task in enumerate(content["tasks"]):
            root = directory / "definitions" if task["own"] else lm_tasks.shipped()
            config = {**load_yaml(root / task["file"]), **task["overrides"], "task": task["name"]}
            for key in ("tag", "group", "task_list"):
                config.pop(key, None)
            if task["splits"]:
                config["custom_dataset"] = reader(directory / "data" / str(i), list(task["splits"]), cache)
                config.pop("dataset_kwargs", None)
            if num_fewshot is not None:
                config["num_fewshot"] = num_fewshot
            configs.append(config)
        found = measured(model, tokenizer, configs, limit)
    names = [config["task"] for config in configs]
    return found if names == [content["name"]] else pooled(found, content["name"], names)


def pooled(found: dict[str, Any], group: str, tasks: list[str]) -> dict[str, Any]:
    """What was measured, with the group's own metrics."""
    metrics, directions, answers = found["metrics"], found["directions"], found["answers"]
    kinds = [name.removesuffix(f"/{tasks[0]}") for name in answers if name.endswith(f"/{tasks[0]}")]
    for kind in kinds:
        members = [f"{kind}/{task}" for task in tasks]
        if all(name in answers for name in members):
            whole = answers[f"{kind}/{group}"] = "".join(answers[name] for name in members)
            metrics |= share(f"{kind}/{group}", [WORTH[digit] for digit in whole])
            directions[f"{kind}/{group}"] = directions[members[0]]
    metrics[f"eval/questions/{group}"] = sum(metrics[f"eval/questions/{task}"] for task in tasks)
    return found


def reader(directory: Path, splits: list[str], cache: str) -> Any:
    """What lm-eval calls for the data of a task."""
    import datasets

    def read(**metadata: Any) -> Any:
        return {s: datasets.Dataset.from_parquet(str(directory / f"{s}.parquet"), cache_dir=cache) for s in splits}

    return read


def measured(
    model: nn.Module | Reader, tokenizer: Any, configs: list[dict[str, Any]], limit: int | None = None
) -> dict[str, Any]:
    """`metrics`: `quality/METRIC/TASK`, with `_low` and `_high` from lm-eval's standard error where it gives one, and
    `eval/questions/TASK`; `directions`: metric -> "higher" or "lower"; `answers`: metric -> see `as_digits`."""
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant: a model and a data set in memory
    loaded = TaskManager(include_defaults=False).load(list(configs))
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(FEWSHOT_SEED)
    # The standard error of a mean has a formula; for other aggregates lm-eval draws so many times, with a seed of its own.
    outcome = evaluate(lm=scorer(model, tokenizer), task_dict=loaded, bootstrap_iters=1000, limit=limit, log_samples=True)
    found: dict[str, Any] = {"metrics": {}, "directions": {}, "answers": {}}
    for task in loaded["tasks"]:
        result, samples = outcome["results"][task], outcome["samples"][task]
        found["metrics"][f"eval/questions/{task}"] = len({sample["doc_id"] for sample in samples})
        for key, value in result.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            name = f"quality/{metric}/{task}" + ("" if variant == "none" else f".{variant}")
            higher = outcome["higher_is_better"].get(task, {}).get(metric)
            if higher is None:
                raise TaskError(
                    f"the task {task} does not say whether a higher {metric} is better: higher_is_better in its YAML"
                )
            answers = [s.get(metric) for s in samples if s["filter"] == variant]
            digits = as_digits(answers)
            found["metrics"] |= with_interval(name, float(value), result.get(f"{metric}_stderr,{variant}"), digits is not None)
            found["directions"][name] = "higher" if higher else "lower"
            if digits is not None:
                found["answers"][name] = digits
    return found


def with_interval(name: str, value: float, error: Any, is_share: bool) -> dict[str, float]:
    """A metric, and its 95 % interval where there is a standard error; that of a share of right answers stays in [0, 1]."""
    if not isinstance(error, int | float):
        return {name: value}
    low, high = value - Z95 * error, value + Z95 * error
    return {
        name: value,
        f"{name}_low": max(low, 0.0) if is_share else low,
        f"{name}_high": min(high, 1.0) if is_share else high,
    }


def as_digits(answers: Sequence[Any]) -> str | None:
    """Answers as one character each: 1 right, 0 wrong, 5 half; None where they are anything else."""
    digits = {worth: digit for digit, worth in WORTH.items()}
    known = [isinstance(a, int | float) and float(a) in digits for a in answers]
    return "".join(digits[float(a)] for a in answers) if answers and all(known) else None


def scorer(model: nn.Module | Reader, tokenizer: Any) -> Any:
    """lm-eval's language model around `model`, which reads the context that the choices share only once.

    lm-eval runs context and choice together for every choice, and the head over all of it; with four choices and a context
    longer than the choices that is most of the work. Likelihoods are the same up to rounding, and a test holds them to that.
    A model that is not in memory as a whole reads all rows in one pass, and generates nothing.
    """
    from lm_eval.models.huggingface import HFLM

    class SharedContext(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            if not isinstance(model, nn.Module):
                return in_one_pass(model, requests, self.max_length)
            if any(len(context) + len(choice) > self.max_length for _, context, choice in requests):
                return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            by_context: dict[tuple[int, ...], list[int]] = {}
            for i, (_, context, _) in enumerate(requests):
                by_context.setdefault(tuple(context), []).append(i)
            answers: dict[int, tuple[float, bool]] = {}
            for context, members in by_context.items():
                choices = [requests[i][2] for i in members]
                answers |= zip(members, continuations(model, list(context), choices), strict=True)
            return [answers[i] for i in range(len(requests))]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            if not isinstance(model, nn.Module):
                raise TaskError(
                    "a task lets the model write text, for which it has to be in memory as a whole. Give it more: "
                    "evaluation.memory_gb; or leave the task out of evaluation.tasks",
                    "infeasible",
                )
            return super().generate_until(requests, disable_tqdm)

    held = model if isinstance(model, nn.Module) else model.model
    plain = held.get_base_model() if hasattr(held, "get_base_model") else held
    return SharedContext(pretrained=plain, tokenizer=tokenizer, batch_size=1)


def in_one_pass(model: Reader, requests: Sequence[Any], longest: int) -> list[tuple[float, bool]]:
    """Answers requests (_, context, choice) as `continuations` does; of what is longer than the model reads the end."""
    rows = [[*context, *choice][-(longest + 1) :] for _, context, choice in requests]
    found = zip(row_likelihoods(model, rows), requests, strict=True)
    return [(x[-len(choice) :].sum().item(), bool(greedy[-len(choice) :].all())) for (x, greedy), (_, _, choice) in found]


@torch.inference_mode()
def continuations(model: nn.Module, context: Sequence[int], choices: Sequence[Sequence[int]]) -> list[tuple[float, bool]]:
    """For each choice: (log-likelihood of its tokens after the context, whether greedy decoding would give them)."""
    device = next(model.parameters()).device
    first = model(input_ids=torch.tensor([context], device=device), use_cache=True, logits_to_keep=1)
    start = first.logits.float().log_softmax(-1).expand(len(choices), -1, -1)
    longest = max(map(len, choices))
    # Padding stands behind a choice, where causal attention keeps it out of sight.
    tokens = torch.tensor([[*choice, *[0] * (longest - len(choice))] for choice in choices], device=device)
    log_p = start
    if longest > 1:
        cache = first.past_key_values
        cache.batch_repeat_interleave(len(choices))
        rest = model(input_ids=tokens[:, :-1], past_key_values=cache, use_cache=True)
        log_p = torch.cat([start, rest.logits.float().log_softmax(-1)], dim=1)
    likelihood = log_p.gather(2, tokens[..., None])[..., 0]
    greedy = log_p.argmax(-1) == tokens
    return [
        (likelihood[i, : len(choice)].sum().item(), bool(greedy[i, : len(choice)].all())) for i, choice in enumerate(choices)
    ]
