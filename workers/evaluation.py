"""How good a model is at predicting text: perplexity, KL to the base, top-1 agreement, minimal pairs.

All of it is next-token prediction over fixed windows that do not overlap: in a window of `length` tokens every token but
the first is predicted from those before it in the same window; no context is carried over from one window to the next.
Logits are made and logarithms taken in float32 whatever the model's dtype. The base is not run again for each trial: its
final hidden states are stored once (the *teacher*), and its logits are made from them, a slice of positions at a time, by
its own output head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pare.methods.ops.heads import Head, Project, head_of, in_float32
from pare.workers.models import ModelArtifact
from pare.workers.task import TaskError

LOGIT_BYTES = 64 << 20
"""Logits over the vocabulary are made for so many positions at a time that one float32 matrix of them has this size."""

FORWARD_TOKENS = 2048
"""Tokens of one forward pass, at least one window."""

DRAWS = 1000
"""Bootstrap draws behind an interval."""


def body_and_head(model: nn.Module) -> tuple[Callable[..., Tensor], Head]:
    """(input ids (sequences, length) -> final hidden states (sequences, length, width), hidden states -> logits).

    The first also takes what else the body reads, such as `position_ids`.

    Raises:
        TaskError: the two together do not give the logits of the model, so its family ends in a way not known here; or the
            logits are not numbers (`nonfinite`).
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    body: nn.Module = model.base_model
    head = head_of(model)

    def hidden_states(ids: Tensor, **more: Tensor) -> Tensor:
        return body(input_ids=ids, use_cache=False, **more).last_hidden_state

    probe = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.vocab_size
    with torch.inference_mode():
        # Comes first: a checkpoint of compressed-tensors decompresses itself when the whole model is called, not its body.
        whole = model(input_ids=probe, use_cache=False).logits.float()
        parts = head(hidden_states(probe)[0].to(whole.device))
    if whole.isnan().any():
        raise TaskError("the model's logits are not numbers", "nonfinite")
    if not torch.allclose(whole[0], parts, rtol=1e-2, atol=1e-2 * whole.abs().max().item()):
        raise TaskError(
            f"{type(model).__name__} does more between its hidden states and its logits than a head, a cap and a factor; "
            "extend `Head` in pare/workers/evaluation.py",
        )
    return hidden_states, head


class Reader(Protocol):
    """A model as evaluation reads it, however much of it is in memory at a time."""

    model: nn.Module
    """What there is of it in memory."""
    head: Head
    device: torch.device
    """Where final hidden states come out, and where the head is."""

    def hidden(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Final hidden states (sequences, length, width) of each batch of ids (sequences, length), in order."""


class Whole:
    """A model that is in memory as a whole, on one device or spread over several."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.body, self.head = body_and_head(model)
        self.entry = next(model.parameters()).device
        self.device = next(model.get_output_embeddings().parameters(), next(model.parameters())).device

    def hidden(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return (self.body(ids.to(self.entry)).to(self.device) for ids in batches)


def reader_of(model: nn.Module | Reader) -> Reader:
    return Whole(model) if isinstance(model, nn.Module) else model


@dataclass
class Teacher:
    """The base as it is remembered for comparison."""

    hidden: Tensor
    """Final hidden states (sequences, length, width) on the windows that it was shown."""
    head: Head
    model: ModelArtifact | None = None
    """What it is."""


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
    model: nn.Module | Reader,
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
    read = reader_of(model)
    n, length = ids.shape
    rows = max(1, FORWARD_TOKENS // length)
    nll, kl, agree, kept = [], [], [], []
    batches = ids.split(rows)
    for i, (batch, hidden) in enumerate(zip(batches, read.hidden(batches), strict=True)):
        if keep_hidden:
            kept.append(hidden.cpu())
        student, targets = hidden[:, :-1].flatten(0, 1), batch[:, 1:].flatten().to(read.device)
        start = i * rows
        base = teacher.hidden[start : start + rows, :-1].flatten(0, 1).to(read.device) if teacher else None
        for positions in slices(len(student), read.head.vocabulary):
            log_q = read.head(student[positions]).log_softmax(-1)
            nll.append(-log_q.gather(1, targets[positions, None])[:, 0].cpu())
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


@torch.inference_mode()
def row_likelihoods(model: nn.Module | Reader, rows: Sequence[Sequence[int]]) -> list[tuple[Tensor, Tensor]]:
    """For each row of ids, of every token but the first: its log-likelihood in nats, float64, and whether it is the likeliest.

    Rows of any lengths, each of two tokens or more. Equal rows get the same numbers, to the last bit; which rows run together
    does not depend on the model.
    """
    distinct = sorted(dict.fromkeys(tuple(row) for row in rows), key=len)
    batches: list[list[tuple[int, ...]]] = []
    for row in distinct:
        if not batches or (len(batches[-1]) + 1) * len(row) > FORWARD_TOKENS:
            batches.append([])
        batches[-1].append(row)
    # Padding stands behind a row, where causal attention keeps it out of sight; the last token is predicted, not read.
    longest = [len(batch[-1]) for batch in batches]
    ids = [torch.tensor([[*row, *[row[0]] * (n - len(row))] for row in b]) for b, n in zip(batches, longest, strict=True)]
    read = reader_of(model)
    found: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for batch, tokens, hidden in zip(batches, ids, read.hidden([x[:, :-1] for x in ids]), strict=True):
        before, targets = hidden.flatten(0, 1), tokens[:, 1:].flatten().to(read.device)
        likelihood, greedy = [], []
        for positions in slices(len(before), read.head.vocabulary):
            log_p = read.head(before[positions]).log_softmax(-1)
            likelihood.append(log_p.gather(1, targets[positions, None])[:, 0].double().cpu())
            greedy.append((log_p.argmax(-1) == targets[positions]).cpu())
        whole = [torch.cat(pieces).view(len(batch), -1) for pieces in (likelihood, greedy)]
        found |= {row: (whole[0][i, : len(row) - 1], whole[1][i, : len(row) - 1]) for i, row in enumerate(batch)}
    return [found[tuple(row)] for row in rows]


def sentence_likelihoods(model: nn.Module | Reader, tokenizer: Any, sentences: Sequence[str]) -> list[float]:
    """Log-likelihood in nats of all tokens of each sentence, the first of them after the beginning-of-text token, or the
    end-of-text token where there is none."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise TaskError("pairs: the tokenizer has neither a beginning- nor an end-of-text token for a sentence to stand behind")
    rows = [[start, *tokenizer(s, add_special_tokens=False, verbose=False).input_ids] for s in sentences]
    if empty := [s for s, row in zip(sentences, rows, strict=True) if len(row) < 2]:
        raise TaskError(f"pairs: {empty[0]!r} has no token")
    found = [likelihood.sum().item() for likelihood, _ in row_likelihoods(model, rows)]
    if broken := [s for s, value in zip(sentences, found, strict=True) if not math.isfinite(value)]:
        raise TaskError(f"pairs: the model gives {broken[0]!r} no finite likelihood", "nonfinite")
    return found


def prefers_good(model: nn.Module | Reader, tokenizer: Any, pairs: Sequence[Mapping[str, str]]) -> list[float]:
    """For each minimal pair 1 where the model finds the good sentence likelier than the bad one, 0 where it does not, and
    1/2 where both are equally likely."""
    likelihoods = sentence_likelihoods(model, tokenizer, [pair[side] for pair in pairs for side in ("good", "bad")])
    return [0.5 if a == b else float(a > b) for a, b in zip(likelihoods[::2], likelihoods[1::2], strict=True)]


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
        "eval/windows": len(predictions.nll),
        "eval/window_length": predictions.nll.shape[1] + 1,
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
    """Keeps the hidden states, and says where the head lies."""
    save_file({"hidden": hidden.contiguous(), "nll": nll.contiguous()}, directory / "hidden.safetensors")
    (directory / "hidden.safetensors").chmod(0o644)  # safetensors writes 0600
    write_head(directory, model, fingerprint)


def write_head(directory: Path, model: nn.Module, fingerprint: str) -> None:
    """Says where the head of a teacher lies: in the artifact of that fingerprint, by the names of its parameters."""
    wanted = dict(model.get_output_embeddings().named_parameters())
    head = {role: name for role, own in wanted.items() for name, p in model.named_parameters() if p is own}
    (directory / "teacher.json").write_text(json.dumps({"model": fingerprint, "head": head}, indent=1))


def open_teacher(
    directory: Path,
    resolve: Callable[[str], Path],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    project: Callable[..., Project] = in_float32,
) -> Teacher:
    """The inverse of `write_teacher`; the head is read from the artifact it names. Hidden states of `dtype` stay in the file.

    project: how the head computes, made of its weight and bias.
    """
    content = json.loads((directory / "teacher.json").read_text())
    model = ModelArtifact(resolve(content["model"]), resolve)
    head = {role: model.materialise(name).to(device, dtype) for role, name in content["head"].items()}
    config = json.loads((model.dense.directory / "config.json").read_text())
    hidden = load_file(directory / "hidden.safetensors")["hidden"].to(dtype)
    return Teacher(hidden, Head(project(**head), config), model)


def read_windows(directory: Path) -> Tensor:
    """The windows of a `tokens` artifact, int64 (sequences, length)."""
    return load_file(directory / "tokens.safetensors")["input_ids"]
