"""How good a model is at predicting text: perplexity, KL to the base, top-1 agreement, multiple choice.

All of it is next-token prediction over fixed windows that do not overlap: in a window of `length` tokens every token but
the first is predicted from those before it in the same window. Logarithms are taken in float32 whatever the model's
dtype. The base is not run again for each trial: its final hidden states are stored once (the *teacher*), and its logits
are made from them, a slice of positions at a time, by its own output head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.workers.models import ModelArtifact
from pare.workers.task import TaskError

if TYPE_CHECKING:
    from collections.abc import Sequence

LOGIT_BYTES = 64 << 20
"""Logits over the vocabulary are made for so many positions at a time that one float32 matrix of them has this size."""

FORWARD_TOKENS = 2048
"""Tokens of one forward pass, at least one window."""

DRAWS = 1000
"""Bootstrap draws behind an interval."""


class Head:
    """The way from a final hidden state to logits: a matrix, and what some families do to its output."""

    def __init__(self, project: Callable[[Tensor], Tensor], config: Mapping[str, Any]) -> None:
        self.project = project
        self.cap: float | None = config.get("final_logit_softcapping")
        self.factor: float = config.get("logit_scale") or 1 / (config.get("logits_scaling") or 1)

    def __call__(self, hidden: Tensor) -> Tensor:
        """hidden (positions, width) -> logits (positions, vocabulary), float32."""
        logits = self.project(hidden).float() * self.factor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def body_and_head(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Head]:
    """(input ids (sequences, length) -> final hidden states (sequences, length, width), hidden states -> logits).

    Raises:
        TaskError: the two together do not give the logits of the model, so its family ends in a way not known here; or the
            logits are not numbers (`nonfinite`).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = model.base_model
    head = Head(model.get_output_embeddings(), model.config.to_dict())

    def hidden_states(ids: Tensor) -> Tensor:
        return body(input_ids=ids, use_cache=False).last_hidden_state

    probe = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.vocab_size
    with torch.inference_mode():
        # Comes first: a checkpoint of compressed-tensors decompresses itself when the whole model is called, not its body.
        whole = model(input_ids=probe, use_cache=False).logits.float()
        parts = head(hidden_states(probe)[0])
    if whole.isnan().any():
        raise TaskError("the model's logits are not numbers", "nonfinite")
    if not torch.allclose(whole[0], parts, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
        raise TaskError(
            f"{type(model).__name__} does more between its hidden states and its logits than a head, a cap and a factor; "
            "extend `Head` in pare/workers/evaluation.py",
        )
    return hidden_states, head


@dataclass
class Teacher:
    """The base as it is remembered for comparison."""

    hidden: Tensor
    """Final hidden states (sequences, length, width) on the test windows."""
    head: Head


@dataclass
class Predictions:
    """What a model made of every predicted token; each (sequences, length - 1), float32."""

    nll: Tensor
    """Negative log-likelihood of the token that came, in nats."""
    kl: Tensor | None = None
    """KL(base || model) of the distributions before it, in nats."""
    agree: Tensor | None = None
    """1 where base and model think the same token most likely, else 0."""


@torch.inference_mode()
def predict(
    model: nn.Module,
    ids: Tensor,
    teacher: Teacher | None = None,
    keep_hidden: bool = False,
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None,
) -> tuple[Predictions, Tensor | None]:
    """Runs the model over the windows `ids` (sequences, length); returns its hidden states as well if they are to be kept."""
    if ids.ndim != 2 or ids.shape[1] < 2:
        raise ValueError(f"windows must be (sequences, length >= 2), got {tuple(ids.shape)}")
    if teacher and teacher.hidden.shape[:2] != ids.shape:
        raise ValueError(f"the teacher saw windows of {tuple(teacher.hidden.shape[:2])}, not of {tuple(ids.shape)}")
    body, head = body_and_head(model)
    device = next(model.parameters()).device
    n, length = ids.shape
    rows = max(1, FORWARD_TOKENS // length)
    nll, kl, agree, kept = [], [], [], []
    for start in range(0, n, rows):
        batch = ids[start : start + rows].to(device)
        hidden = body(batch)
        if keep_hidden:
            kept.append(hidden.cpu())
        student = hidden[:, :-1].flatten(0, 1)
        base = teacher.hidden[start : start + rows, :-1].flatten(0, 1).to(device) if teacher else None
        for positions in slices(len(student), model.config.vocab_size):
            log_q = head(student[positions]).log_softmax(-1)
            nll.append(-log_q.gather(1, batch[:, 1:].flatten()[positions, None])[:, 0].cpu())
            if base is not None and teacher is not None:
                log_p = teacher.head(base[positions]).log_softmax(-1)
                agree.append((log_p.argmax(-1) == log_q.argmax(-1)).float().cpu())
                kl.append((log_p.exp() * (log_p - log_q)).sum(-1).cpu())
        progress(min(start + rows, n), n, "windows")

    def whole(pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces).view(n, length - 1)

    predictions = Predictions(whole(nll), whole(kl) if kl else None, whole(agree) if agree else None)
    if not torch.isfinite(predictions.nll).all():
        raise TaskError("the model gives a token of the test windows no finite likelihood", "nonfinite")
    return predictions, torch.cat(kept) if kept else None


def slices(positions: int, vocabulary: int) -> list[slice]:
    step = max(1, LOGIT_BYTES // (4 * vocabulary))
    return [slice(i, i + step) for i in range(0, positions, step)]


def summary(predictions: Predictions) -> dict[str, float]:
    """The metrics of a set of predictions."""
    low, high = perplexity_interval(predictions.nll)
    metrics = {
        "quality/ppl": math.exp(predictions.nll.double().mean().item()),
        "quality/ppl_low": low,
        "quality/ppl_high": high,
        "eval/tokens": predictions.nll.numel(),
    }
    if predictions.kl is not None and predictions.agree is not None:
        metrics["quality/kl"] = predictions.kl.double().mean().item()
        metrics["quality/top1_agreement"] = predictions.agree.double().mean().item()
    return metrics


def perplexity_interval(nll: Tensor, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the perplexity over windows; nll (windows, tokens).

    Windows are drawn, not tokens: tokens of one text are far from independent. The same seed draws the same windows for
    every model, so that differences of two models may be taken draw by draw.
    """
    windows = nll.double().mean(1)
    drawn = torch.randint(len(windows), (DRAWS, len(windows)), generator=torch.Generator().manual_seed(seed))
    low, high = torch.quantile(windows[drawn].mean(1), torch.tensor([0.025, 0.975], dtype=torch.float64)).exp().tolist()
    return low, high


def per_window(predictions: Predictions) -> dict[str, list[float]]:
    """Sums over each window, from which intervals of differences between models can be drawn."""
    sums = {"nll": predictions.nll, "kl": predictions.kl, "agree": predictions.agree}
    windows: dict[str, list[float]] = {name: x.double().sum(1).tolist() for name, x in sums.items() if x is not None}
    return windows | {"tokens": [float(predictions.nll.shape[1])] * len(predictions.nll)}


# --- the teacher on disk ----------------------------------------------------------------------------------------------


def write_teacher(directory: Path, model: nn.Module, fingerprint: str, hidden: Tensor, nll: Tensor) -> None:
    """Keeps the hidden states and the words for where the head lies: in the artifact of that fingerprint, by name."""
    save_file({"hidden": hidden.contiguous(), "nll": nll.contiguous()}, directory / "hidden.safetensors")
    (directory / "hidden.safetensors").chmod(0o644)  # safetensors writes 0600
    wanted = dict(model.get_output_embeddings().named_parameters())
    head = {role: name for role, own in wanted.items() for name, p in model.named_parameters() if p is own}
    (directory / "teacher.json").write_text(json.dumps({"model": fingerprint, "head": head}, indent=1))


def open_teacher(
    directory: Path, resolve: Callable[[str], Path], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Teacher:
    """The inverse of `write_teacher`; the head is read from the artifact it names."""
    content = json.loads((directory / "teacher.json").read_text())
    model = ModelArtifact(resolve(content["model"]), resolve)
    head = {role: model.materialise(name).to(device, dtype) for role, name in content["head"].items()}
    config = json.loads((model.dense.directory / "config.json").read_text())
    hidden = load_file(directory / "hidden.safetensors")["hidden"].to(dtype)
    return Teacher(hidden, Head(lambda h: nn.functional.linear(h, **head), config))


def read_windows(directory: Path) -> Tensor:
    """The windows of a `tokens` artifact, int64 (sequences, length)."""
    return load_file(directory / "tokens.safetensors")["input_ids"]


# --- multiple choice --------------------------------------------------------------------------------------------------


def multiple_choice(model: nn.Module, tokenizer: Any, questions: Sequence[Mapping[str, Any]], task: str) -> dict[str, float]:
    """Accuracy on questions {"context", "choices", "label"} through lm-eval, zero-shot.

    `acc` takes the likeliest choice, `acc_norm` the likeliest one per character. Nothing is cached: lm-eval's cache does
    not know one model from another.
    """
    import datasets
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

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
    loaded = TaskManager(include_defaults=False).load([config])
    # The standard error of a mean has a formula, so these iterations are only lm-eval's word for "give it".
    outcome = evaluate(lm=scorer(model, tokenizer), task_dict=loaded, bootstrap_iters=1, log_samples=False)
    result = outcome["results"][task]
    return {
        f"quality/acc/{task}": result["acc,none"],
        f"quality/acc_stderr/{task}": result["acc_stderr,none"],
        f"quality/acc_norm/{task}": result["acc_norm,none"],
        f"quality/acc_norm_stderr/{task}": result["acc_norm_stderr,none"],
    }


def scorer(model: nn.Module, tokenizer: Any) -> Any:
    """lm-eval's language model around `model`, which reads the context that the choices share only once.

    lm-eval runs context and choice together for every choice, and the head over all of it; with four choices and a context
    longer than the choices that is most of the work. Likelihoods are the same up to rounding, and a test holds them to that.
    """
    from lm_eval.models.huggingface import HFLM

    class SharedContext(HFLM):
        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
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

    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    return SharedContext(pretrained=plain, tokenizer=tokenizer, batch_size=1)


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
