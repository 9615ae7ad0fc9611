"""What a task has to do, from its settings and the shape of its model, before anything is loaded: operations, bytes, memory.

One function for each task type, and constants with names for what shapes do not say. The constants were read off runs of a
135 M model on one core; the machine's own speed comes in from `machine.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pare.methods.contract import METHODS, MergeMethod
from pare.methods.ops.statistics import Gram
from pare.orchestrator.machine import Machine

Record = dict[str, Any]
"""Pre-image of a fingerprint: `type`, `spec`, `inputs`, ..."""

EFFICIENCY = 0.75
"""Speed of a model's matrix products as a fraction of the probe's."""

PASS_S = 1e-3
"""What Python costs for one block of a model in one pass."""

COLUMN_S = 4e-5
"""What Python costs for one column of a weight in a method that goes column by column."""

IMPORT_S, FRESH_S, TRAINER_S, LM_EVAL_S, CORPUS_S = 3.0, 3.5, 2.5, 2.0, 3.4
"""Importing torch and transformers; the same in a fresh process; the Trainer and peft; lm-eval; reading the corpus."""

TOKENS_PER_S = 2.5e5
"""Speed of a tokenizer on one core."""

DOWNLOAD = 5e7
"""Bytes per second from a hub."""

LIBRARIES = 5e8
"""Bytes of a process that has imported torch and transformers; those of Trainer and peft come to `TRAINER`."""

TRAINER, FRESH, LM_EVAL, CONTEXT = 1.8e8, 4.4e8, 6e7, 3e9
"""Bytes of: Trainer and peft; a fresh process; lm-eval and datasets; the host's side of a GPU's libraries."""

HIDDEN = 4e9
"""Bytes of hidden states that stay in memory, the others lie in files: a quarter of what is free, on a machine of 16 GB."""

SHARD = 64 << 20
"""Bytes of operands that wait in memory to be written."""

LOGITS = 64 << 20
"""Bytes of one slice of logits in an evaluation (`workers/evaluation.py`)."""

TOKENIZER = 3.6e6
"""Bytes of tokenizer and config files beside the weights of an export."""

ROUNDING, SEARCH = 200, 5000
"""Bytes that move per weight while it is rounded to a grid, and while the best range of the grid is searched (`mse`)."""

QUESTION_TOKENS = (55, 11)
"""Tokens of the context of a question, and of one of its choices."""

MADE_OF_TEXT = frozenset({"corpus", "questions", "pairs", "benchmark"})
"""Task types that no model takes part in."""


@dataclass(frozen=True)
class Shape:
    """What a model's parameter table says."""

    parameters: int = 0
    linears: int = 0
    """Weights in the linears of the blocks."""
    spans: int = 0
    """Sum of (in + out) over them: numbers per token that a training step keeps, more or less."""
    gram: int = 0
    """Sum of in^2 over the tensors that they read."""
    cubes: int = 0
    """Sum of in^3 over the tensors that they read."""
    solve: int = 0
    """Sum of out * in^2 over the linears."""
    columns: int = 0
    """Sum of in over the tensors that they read."""
    head: int = 0
    """Weights of the output head."""
    width: int = 0
    vocabulary: int = 0
    blocks: int = 0
    weight_bytes: int = 2
    """Bytes of a weight as it is stored."""

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> Shape:
        """From `workers.sources.describe_model`."""
        linears = description["linears"]
        # Linears that read one tensor stand in the table by their family's names; the first of them is counted.
        read = [columns for name, (_, columns) in linears.items() if not name.endswith(READS_THE_SAME)]
        width, vocabulary = description["width"] or 0, description["vocab_size"] or 0
        return cls(
            parameters=description["n_parameters"],
            linears=sum(rows * columns for rows, columns in linears.values()),
            spans=sum(rows + columns for rows, columns in linears.values()),
            gram=sum(n**2 for n in read),
            cubes=sum(n**3 for n in read),
            solve=sum(rows * columns**2 for rows, columns in linears.values()),
            columns=sum(read),
            head=width * vocabulary,
            width=width,
            vocabulary=vocabulary,
            blocks=description["n_blocks"] or 0,
            weight_bytes=description["dtype_bytes"],
        )


READS_THE_SAME = ("k_proj.weight", "v_proj.weight", "up_proj.weight")
"""Endings of the linears that read what the one before them reads."""


@dataclass(frozen=True)
class Work:
    flops: float = 0.0
    """Of matrix products."""
    moved: float = 0.0
    """Bytes that element-wise operations and copies read and write."""
    passes: float = 0.0
    """Blocks that Python goes through, each pass of each batch counted."""
    fixed_s: float = 0.0
    memory: float = 0.0
    """Bytes at the peak above those of a warm process; on a GPU most of them are there."""
    disk: float = 0.0
    """Bytes of the artifact."""

    def __add__(self, other: Work) -> Work:
        """One after another: times add up, the larger memory stays."""
        return Work(
            self.flops + other.flops,
            self.moved + other.moved,
            self.passes + other.passes,
            self.fixed_s + other.fixed_s,
            max(self.memory, other.memory),
            self.disk + other.disk,
        )

    def times(self, n: float) -> Work:
        return Work(self.flops * n, self.moved * n, self.passes * n, self.fixed_s * n, self.memory, self.disk * n)

    def seconds(self, machine: Machine, dtype: str = "float32") -> float:
        computed = self.flops / (EFFICIENCY * machine.flops(dtype))
        return self.fixed_s + computed + self.moved / machine.bandwidth + self.passes * PASS_S


@dataclass(frozen=True)
class Made:
    """What an input is, seen as a model."""

    operands: float = 0.0
    """Bytes of the operands that stand beside the base."""
    adapter: bool = False
    """Whether it is exported as an adapter, with its base beside it."""


@dataclass(frozen=True)
class Job:
    """A task as the functions below see it."""

    record: Record
    shape: Shape
    inputs: dict[str, Record] = field(default_factory=dict)
    """Role -> record of the task that makes the input."""
    made: Mapping[str, Made] = field(default_factory=dict)
    """Role -> what the input is as a model."""

    @property
    def spec(self) -> dict[str, Any]:
        return dict(self.record["spec"])

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.spec.get("settings") or {})

    @property
    def item(self) -> int:
        """Bytes of a number of the forward pass."""
        return 4 if self.spec.get("dtype", "float32") == "float32" else 2

    def windows(self, role: str = "tokens") -> tuple[int, int]:
        """(sequences, length) of the windows of an input."""
        spec = self.inputs[role]["spec"] if role in self.inputs else {}
        return spec.get("sequences", 0), spec.get("length", 0)

    def models(self, prefix: str) -> list[Made]:
        """The inputs whose role begins so."""
        return [made for role, made in self.made.items() if role.startswith(prefix)]

    # -- pieces that several types have ------------------------------------------------------------------------------

    def loading(self) -> Work:
        """The model from its directory into memory: stored weights are mapped while the working copy is made."""
        n = self.shape.parameters
        return Work(moved=n * 40, memory=n * (self.item + self.shape.weight_bytes))

    def block_by_block(self) -> Work:
        """The same, a block at a time; what belongs to no block is there for the first one's input alone."""
        s = self.shape
        held = max(s.parameters - s.linears, s.linears / max(s.blocks, 1)) * (self.item + s.weight_bytes)
        return Work(moved=s.parameters * 40, memory=held)

    def hidden(self) -> float:
        """Bytes in memory of what a block reads of all windows."""
        sequences, length = self.windows()
        return min(sequences * length * self.shape.width * self.item, HIDDEN)

    def forward(self, sequences: int, length: int, head: int = 0, rows: int = 2048) -> Work:
        """A forward pass in batches of `rows` tokens; `head` output heads with the softmax over each."""
        s, tokens = self.shape, sequences * length
        flops = 2 * tokens * (s.linears + s.blocks * s.width * length + head * s.head)
        moved = tokens * (s.spans * 8 + head * s.vocabulary * 4 * 7)
        return Work(flops, moved, math.ceil(tokens / max(rows, length)) * s.blocks if length else 0)

    def scoring(self, role: str = "tokens", teacher: bool = False) -> Work:
        n = 1 + teacher
        memory = self.loading().memory + n * 3 * LOGITS + (n - 1) * self.shape.head * self.item
        return self.loading() + self.forward(*self.windows(role), head=n) + Work(fixed_s=0.1, memory=memory)


def import_model(job: Job) -> Work:
    s, identity = job.shape, job.spec["identity"]
    stored = s.parameters * s.weight_bytes
    work = Work(moved=s.parameters * 80, fixed_s=IMPORT_S, memory=1e8 + 2 * stored, disk=stored + TOKENIZER)
    if identity["source"] == "tiny":
        steps = identity["settings"]["steps"]
        return work + Work(6 * steps * 8 * 64 * s.parameters, passes=8 * steps * s.blocks, disk=0.5e6 - TOKENIZER)
    return work + Work(fixed_s=stored / DOWNLOAD if "commit" in identity else 0.0)


def corpus(job: Job) -> Work:
    return Work(fixed_s=CORPUS_S, memory=2e7, disk=1.2e6)


def questions(job: Job) -> Work:
    return Work(fixed_s=0.05, memory=1e7, disk=600.0 * job.spec["n"])


def pairs(job: Job) -> Work:
    return Work(fixed_s=0.05, memory=1e7, disk=1e6)


def benchmark(job: Job) -> Work:
    return Work(fixed_s=LM_EVAL_S, memory=LM_EVAL, disk=1e6)


def tokens(job: Job) -> Work:
    n = job.spec["sequences"] * job.spec["length"]
    return Work(fixed_s=0.7 + n / TOKENS_PER_S, memory=5e7 + 60 * n, disk=8 * n)


def score(job: Job) -> Work:
    sequences, length = job.windows()
    kept = sequences * length * job.shape.width * job.item if job.spec.get("keep_hidden") else 0
    return job.scoring(teacher="teacher" in job.record["inputs"]) + Work(disk=kept + 4 * sequences * length)


def calibrate(job: Job) -> Work:
    s, (sequences, length) = job.shape, job.windows()
    tokens = sequences * length
    has_gram = any(statistic["class"] == Gram.__qualname__ for statistic in job.spec["statistics"])
    grams = Work(2 * tokens * s.gram, disk=4.0 * s.gram) if has_gram else Work(disk=4.0 * s.columns)
    held = Work(memory=job.block_by_block().memory + job.hidden() + 2 * grams.disk / max(s.blocks, 1))
    return job.block_by_block() + job.forward(sequences, length, rows=4 * length) + grams + held


def gradients(job: Job) -> Work:
    s, (sequences, length), kinds = job.shape, job.windows(), len(job.spec["statistics"])
    there = job.forward(sequences, length, rows=length)
    and_back = job.forward(sequences, length, head=1, rows=length).times(3)
    summing = Work(moved=12.0 * kinds * sequences * s.linears, disk=4.0 * kinds * s.linears)
    held = 2 * job.hidden() + s.linears / max(s.blocks, 1) * (job.item + 4 * (kinds + 1))
    held += length * max(8 * s.vocabulary, s.spans / max(s.blocks, 1) * 4)
    return job.block_by_block().times(2) + there + and_back + summing + Work(memory=job.block_by_block().memory + held)


def compress(job: Job) -> Work:
    s, settings = job.shape, job.settings
    work = Work(moved=s.linears * (SEARCH if settings.get("mse") else ROUNDING), disk=made_by(job).operands)
    work += Work(memory=2e7 + s.linears / max(s.blocks, 1) * 16 + min(work.disk, SHARD))
    has_gram = Gram in METHODS[job.spec["method"]].needs if job.spec["method"] in METHODS else True
    if has_gram and job.record["inputs"].keys() & {"statistics", "tokens"}:
        solving = Work(2 * s.solve + 3 * s.cubes, fixed_s=s.columns * COLUMN_S)
        work += solving + Work(memory=work.memory + 4 * s.gram / max(s.blocks, 1) * 4)
    if "tokens" in job.record["inputs"]:  # every block sees its compressed predecessors: two passes and the statistics
        sequences, length = job.windows()
        passes = job.forward(sequences, length, rows=4 * length).times(2)
        work += job.block_by_block() + passes + Work(memory=work.memory + job.block_by_block().memory + job.hidden())
        work += Work(2 * sequences * length * s.gram) if has_gram else Work()
    return work


def train(job: Job) -> Work:
    s, settings = job.shape, job.settings
    length = job.windows()[1] + settings.get("virtual_tokens", 0)
    micro = settings.get("micro_batch_size", 1)
    batches = settings.get("steps", 0) * settings.get("batch_size", 1) // micro
    adapter, again = "init_seed" in settings, bool(settings.get("gradient_checkpointing"))
    forward = job.forward(batches * micro, length, head=1, rows=micro * length)
    work = job.loading() + forward.times((2 if adapter else 3) + again) + Work(passes=forward.passes, fixed_s=TRAINER_S)
    if "quant_type" in settings:  # every weight is decoded for each pass
        work += Work(moved=batches * s.linears * 4 * 3 * (2 + again))
    kept = micro * length * (s.blocks * s.width if again else s.spans) * 4.0
    if teachers := len(job.models("teacher.")):
        work += Work(2 * batches * micro * length * s.head * (teachers + 1))
        kept += settings["chunk"] * s.vocabulary * 4 * 5 + teachers * s.head * job.item
    else:
        kept += micro * length * s.vocabulary * 4 * 4
    trained = 0 if adapter else trained_share(settings, s) * s.parameters
    state, disk = 12 * trained, made_by(job).operands
    if "parameters" in settings:
        state += 4 * trained * (job.item < 4)
        disk = max(trained * s.weight_bytes - (s.linears * s.weight_bytes - disk), 0)
    return work + Work(memory=job.loading().memory + kept + state + TRAINER + 2 * disk, disk=disk)


def trained_share(settings: Mapping[str, Any], shape: Shape) -> float:
    """Of a model's parameters the part that is trained, where weights themselves are."""
    linears = shape.linears / max(shape.parameters, 1)
    shares = {"all": 1.0, "norm": 0.0, "bias": 0.0, "embedding": 1 - linears}
    blocks = settings.get("last_blocks", 0) / max(shape.blocks, 1)
    return shares.get(settings.get("parameters", "all"), linears) * (min(blocks, 1.0) or 1.0)


def teach(job: Job) -> Work:
    sequences, length = job.windows()
    rows = max(2048, length) * (job.shape.spans / max(job.shape.blocks, 1)) * job.item
    held = Work(memory=job.loading().memory + rows, disk=sequences * length * job.shape.width * job.item)
    return job.loading() + job.forward(sequences, length) + held


def adopt(job: Job) -> Work:
    stored = job.shape.parameters * job.shape.weight_bytes
    return job.loading() + Work(moved=stored * 10, fixed_s=IMPORT_S, disk=stored + TOKENIZER)


def member(job: Job) -> Work:
    stored = job.shape.parameters * job.shape.weight_bytes
    return Work(moved=stored * 10, fixed_s=IMPORT_S, memory=SHARD + 1e8, disk=made_by(job).operands)


def export(job: Job) -> Work:
    s, model = job.shape, job.made.get("model", Made())
    if model.adapter:
        return Work(fixed_s=0.01, memory=1e7, disk=model.operands / 2 + 2e4)  # the base lies beside it as a link
    operands = 0.0 if job.spec.get("format") == "dense" else model.operands
    disk = (s.parameters - s.linears * bool(operands)) * s.weight_bytes + operands
    return Work(fixed_s=0.05, moved=disk * 80, memory=disk + 1e7, disk=disk + min(TOKENIZER, disk))


def evaluate(job: Job) -> Work:
    work = job.scoring(teacher=True)
    work += Work(fixed_s=FRESH_S, memory=work.memory + FRESH, disk=2e4)
    if "questions" in job.record["inputs"]:
        spec = job.inputs["questions"]["spec"]
        context, choice = QUESTION_TOKENS
        read = context + choice * spec["choices"]
        asked = job.forward(1, read, head=1).times(spec["n"])
        work += asked + Work(passes=asked.passes, fixed_s=LM_EVAL_S, memory=work.memory + LM_EVAL)
    return work


def speed(job: Job) -> Work:
    s, spec = job.shape, job.spec
    one = job.forward(1, spec["prompt_tokens"], head=1)
    written = Work(moved=4 * s.parameters, passes=s.blocks).times(spec["new_tokens"])
    readings = (one + written).times((spec["repeats"] + 0.3) / math.sqrt(spec["threads"]))
    return readings + job.loading() + Work(fixed_s=FRESH_S / 2 + 1, memory=job.loading().memory + FRESH)


def merge(job: Job) -> Work:
    s, (sequences, length), n = job.shape, job.windows(), len(job.models("member."))
    tried = questions_of(job, n)
    disk = made_by(job).operands
    trials = (job.forward(sequences, length, head=1) + Work(moved=40 * s.linears * n)).times(tried)
    gradients = job.item * s.parameters + length * (8 * s.vocabulary + 4 * s.spans) if is_learned(job) else 0
    return job.scoring() + trials + Work(memory=job.scoring().memory + gradients + min(disk, SHARD), disk=disk)


def questions_of(job: Job, members: int) -> float:
    """Passes over the selection windows that a merge takes; a gradient counts for three."""
    known = METHODS.get(job.spec["method"])
    settings: Any = known(**job.settings) if known else None
    asked = settings.questions(members) if isinstance(settings, MergeMethod) else members - 1
    return max(1.0, asked * (3 if is_learned(job) else 1))


def is_learned(job: Job) -> bool:
    """Whether a merge asks for gradients."""
    return job.settings.get("mode") == "learned"


def levels(job: Job) -> Work:
    s, n = job.shape, len(job.models("level."))
    one = Work(2 * s.solve, s.linears * ROUNDING)
    return one.times(n) + Work(fixed_s=0.2, memory=4 * s.gram / max(s.blocks, 1) + 1e8, disk=200.0 * n * s.blocks)


def allocate(job: Job) -> Work:
    """All probes of the search, on one slot."""
    s, settings = job.shape, job.settings
    generations = settings.get("generations", 0)
    measured = s.blocks * settings.get("score_tokens", 0) if settings.get("scores", "measured") == "measured" else 0
    total = measured + generations * generation_tokens(settings)
    length = job.windows()[1] or 1
    work = job.forward(math.ceil(total / length), length, head=2, rows=length)
    held = job.scoring(teacher=True)
    operands = sum(level.operands for level in job.models("level."))
    return held + work + Work(fixed_s=1.0, memory=held.memory + operands, disk=1e5)


def generation_tokens(settings: Mapping[str, Any]) -> float:
    """Tokens that a generation of a search reads: its offspring in the first stage, in each later one those who are left."""
    stages, survivors = settings.get("tokens") or [], settings.get("survivors") or []
    if not isinstance(stages, list):
        return float(settings.get("offspring", 1) * stages)
    left = [settings.get("offspring", 1), *survivors]
    return float(sum(n * t for n, t in zip(left, stages, strict=False)))


def assemble(job: Job) -> Work:
    disk = made_by(job).operands
    return Work(fixed_s=0.2, moved=20 * disk * len(job.models("level.")), memory=2 * disk + 5e7, disk=disk)


WORK: dict[str, Callable[[Job], Work]] = {
    f.__name__: f
    for f in (
        import_model, adopt, member, corpus, questions, pairs, benchmark, tokens, score, calibrate, gradients, compress, teach,
        train, export, evaluate, speed, merge, levels, allocate, assemble,
    )
}  # fmt: skip
"""Task type -> its work."""

UNKNOWN = Work(fixed_s=1.0, memory=1e8, disk=1e6)
"""Of a type that a plugin brings: until one has run, nothing is known of it."""


USUAL_WIDTH = 1024
"""Columns of a weight in a model of which nothing is known."""


def made_by(job: Job) -> Made:
    """What a task's artifact is as a model."""
    shape, settings, kind = job.shape, job.settings, job.record["type"]
    if kind in ("import_model", "export"):
        return job.made.get("model", Made())
    if kind == "assemble":
        levels = job.models("level.")
        return Made(sum(level.operands for level in levels) / max(len(levels), 1))
    if kind == "member":
        adapter = job.spec["identity"]["format"] == "adapter"
        return Made(2 * 4.0 * 8 * shape.spans if adapter else shape.parameters * float(shape.weight_bytes), adapter)
    if kind == "merge":
        members = job.models("member.")
        known = METHODS.get(job.spec["method"])
        adapter = all(member.adapter for member in members) and getattr(known, "keeps_updates", True)
        dense = float(shape.linears * shape.weight_bytes)
        return Made(sum(member.operands for member in members) if adapter else dense, adapter)
    operands = 0.0
    if kind == "train" and "parameters" in settings:  # what was pruned stays so, and takes the bytes that it did
        return Made(job.made.get("model", Made()).operands or shape.linears * float(shape.weight_bytes))
    if kind == "compress" and "ratio" in settings:
        return Made(shape.linears * settings["ratio"] * shape.weight_bytes)
    if kind == "compress" and "rank" in settings:  # a term beside what is there
        return Made(job.made.get("model", Made()).operands + 2.0 * settings["rank"] * shape.spans)
    if "virtual_tokens" in settings:  # at most, for keys may have fewer heads; and once more as the adapter's own file
        layers = 2 * shape.blocks if getattr(METHODS.get(job.spec["method"]), "keeps_keys", False) else 1
        operands += 2 * 4.0 * settings["virtual_tokens"] * layers * (shape.width or USUAL_WIDTH)
    if getattr(METHODS.get(job.spec.get("method", "")), "writes_dense", False):
        operands += 4.0 * shape.linears
    elif "rank" in settings:  # the update as operands, and once more as the adapter's own file
        operands += 2 * 4.0 * settings["rank"] * shape.spans
    beneath = job.made.get("model", Made()).operands
    if "quant_type" in settings and beneath:  # what is there stays as it is
        operands += beneath
    elif "quant_type" in settings:
        operands += shape.linears * (4.13 if settings.get("double_quant", True) else 4.5) / 8
    elif "sparsity" in settings:  # which weights stay, and these
        index = 1 if settings.get("pattern", "unstructured") == "unstructured" else 0.75
        operands += shape.linears * (index / 8 + (1 - settings["sparsity"]) * shape.weight_bytes)
    elif kind == "compress" and hasattr(METHODS.get(job.spec["method"]), "bits_per_weight"):
        method: Any = METHODS[job.spec["method"]](**settings)
        operands += shape.linears * method.bits_per_weight(shape.width or USUAL_WIDTH) / 8
    adapter = kind == "train" and "init_seed" in settings and "quant_type" not in settings
    return Made(operands or shape.linears * float(shape.weight_bytes), adapter)
