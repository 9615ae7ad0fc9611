"""Decoders that no family is written for, tried by their structure: what runs, in which order, and what reads what.

What is found is verified and says less than a family does: no folds, no ties, no residual stream.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from pare.methods.anatomy.calls import first_of
from pare.methods.anatomy.reads import reading
from pare.methods.anatomy.types import FAMILIES, Anatomy, Block, Group, UnknownModel
from pare.methods.anatomy.verify import tokens_for, verify, which
from pare.methods.anatomy.views import name_of, parse

NOT_READ = "was not seen to be multiplied with anything"


class NotFound(ValueError):
    """Says which part of a decoder its structure does not show."""


@torch.no_grad()
def find(model: nn.Module) -> Anatomy:
    """The anatomy of a model as a class that it inherits from is described, or else as its structure shows it.

    model: a Hugging Face decoder in evaluation mode; on the meta device it is tried with made-up weights.

    Raises:
        UnknownModel: neither holds when the model runs. Carries the anatomy to write.
    """
    tried = hollow(model) if next(model.parameters()).is_meta else model
    reasons = []
    for known in [c.__name__ for c in type(model).__mro__[1:] if c.__name__ in FAMILIES]:
        try:
            anatomy = FAMILIES[known](tried)
            verify(tried, anatomy)
        except (AttributeError, ValueError) as e:
            reasons.append(f"it inherits from {known}, but {e}")
        else:
            return anatomy
    trace = None
    try:
        trace = Trace(tried)
        anatomy = by_structure(tried, trace)
        verify(tried, anatomy)
    except Exception as e:  # a model never seen before may fail in any way, and all that fails here is the trial
        reasons.append(f"tried by its structure, {e}" if isinstance(e, ValueError) else f"its trial failed: {e!r}")
    else:
        return anatomy
    raise UnknownModel(
        f"the anatomy of {type(model).__name__} is not known (known: {', '.join(FAMILIES)}): {'; '.join(reasons)}. "
        f"Write it and name its file in plugins=[...]; from what was found it begins like this:\n\n{to_write(model, trace)}"
    )


def by_structure(model: nn.Module, trace: Trace) -> Anatomy:
    """Raises NotFound for the first part that is not to be seen."""
    chains = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) and trace.is_chain(name, m)]
    if not chains:
        raise NotFound("there is no list of modules of which each reads what the one before it returns")
    name = max(chains, key=lambda name: sum(p.numel() for p in model.get_submodule(name).parameters()))
    blocks = [f"{name}.{i}" for i in range(len(model.get_submodule(name)))]
    embedding, head = ends(model)
    last = which(trace.returned[blocks[-1]])
    after = trace.order[trace.order.index(blocks[-1]) :]
    norms = [n for n in after if n != head and leaf(model, n) and not n.startswith(f"{name}.") and which(trace.read[n]) == last]
    if not norms:
        raise NotFound(f"no module reads what {blocks[-1]} returns")
    found = [block_of(model, trace, name) for name in blocks]
    return Anatomy.of(model, found, embedding, norms[0], head, returns=trace.lengths[blocks[-1]])


class Trace:
    """One run of a few tokens: what each module and each weight read, in order. Everything is kept, so that it stays apart."""

    def __init__(self, model: nn.Module) -> None:
        self.order: list[str] = []
        self.read: dict[str, Tensor] = {}
        self.returned: dict[str, Tensor] = {}
        self.lengths: dict[str, int] = {}
        """Of each module: how many things it returns; 0 where it is no tuple."""
        hooks = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(self.before(name), with_kwargs=True))
            hooks.append(module.register_forward_hook(self.after(name)))
        try:
            with reading(model, list(matrices(model)), self.note):
                model(input_ids=tokens_for(model), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()

    def note(self, name: str, x: Tensor) -> None:
        self.order.append(name)
        self.read[name] = x

    def before(self, name: str) -> Any:
        def noted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if tensors:
                self.note(name, tensors[0])

        return noted

    def after(self, name: str) -> Any:
        def noted(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(first := first_of(output) if not isinstance(output, dict) else None, Tensor):
                self.returned[name] = first
                self.lengths[name] = len(output) if isinstance(output, tuple | list) else 0

        return noted

    def is_chain(self, name: str, modules: nn.ModuleList) -> bool:
        """Whether the modules ran once each, one on what the other returned."""
        names = [f"{name}.{i}" for i in range(len(modules))]
        if [n for n in self.order if n in names] != names or any(n not in self.returned for n in names):
            return False
        return all(which(self.returned[a]) == which(self.read[b]) for a, b in pairwise(names))


def block_of(model: nn.Module, trace: Trace, name: str) -> Block:
    """The weights of one block by what they read."""
    own = [n for n in matrices(model) if n.startswith(f"{name}.")]
    seen = [n for n in trace.order if n in own]
    twice = sorted({n for n in seen if seen.count(n) > 1})
    if twice:
        raise NotFound(f"{twice[0]} is multiplied more than once")
    by_tensor: dict[Any, list[str]] = {}
    for weight in seen:
        by_tensor.setdefault(which(trace.read[weight]), []).append(weight)
    groups = tuple(Group(group_name(weights), tuple(weights)) for weights in by_tensor.values())
    left_out = {}
    for module_name, module in model.get_submodule(name).named_modules(prefix=name):
        for short, parameter in module.named_parameters(recurse=False):
            full = f"{module_name}.{short}"
            if parameter.dim() < 2 or full in seen or name_of(full, turned=True) in seen:
                continue
            if isinstance(module, nn.Linear):
                raise NotFound(f"{module_name} was not run: are there experts?")
            if parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                raise NotFound(f"{full} is a stack of matrices, which experts may be")
            left_out[full] = NOT_READ
    return Block(name, groups, left_out)


def matrices(model: nn.Module) -> Iterator[str]:
    """Names of all two-dimensional parameters as (out, in)."""
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                yield name_of(f"{name}.{short}".lstrip("."), turned=isinstance(module, Conv1D))


def group_name(weights: list[str]) -> str:
    """`a.b.q_proj.weight` and `a.b.k_proj.weight` -> `a.b.q_proj_k_proj`."""
    modules = [weight.removesuffix("^T").removesuffix(".weight").split(".") for weight in weights]
    shared = takewhile(lambda same: len(set(same)) == 1, zip(*(module[:-1] for module in modules), strict=False))
    return ".".join([*(same[0] for same in shared), "_".join(module[-1] for module in modules)])


def ends(model: Any) -> tuple[str, str]:
    """Module names of embedding and head."""
    names = {id(module): name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding is None or head is None:
        raise NotFound(f"get_{'input' if embedding is None else 'output'}_embeddings() of the model says nothing")
    return names[id(embedding)], names[id(head)]


def leaf(model: nn.Module, name: str) -> bool:
    """Whether it is the name of a module with no modules in it."""
    found = dict(model.named_modules()).get(name)
    return found is not None and not any(True for _ in found.children())


def hollow(skeleton: nn.Module) -> nn.Module:
    """A copy of a model on the meta device that runs, with made-up weights: their rows overlap in memory and take little."""
    generator = torch.Generator().manual_seed(0)

    def value(like: Tensor) -> Tensor:
        if not like.is_floating_point():
            return torch.zeros((), dtype=like.dtype).expand(like.shape)
        if like.dim() < 2:
            return (1 + 0.1 * torch.randn(like.shape, generator=generator)).to(like.dtype)
        run = 0.05 * torch.randn(sum(like.shape), generator=generator)
        return run.to(like.dtype).as_strided(like.shape, (1,) * like.dim())

    made: dict[int, Any] = {id(p): nn.Parameter(value(p), requires_grad=False) for p in skeleton.parameters()}
    made |= {id(buffer): value(buffer) for buffer in skeleton.buffers()}
    return copy.deepcopy(skeleton, made).eval()


def to_write(model: nn.Module, trace: Trace | None) -> str:
    """The file to write for this model: what is found is filled in, and what is not has a question mark.

    trace: a run of it, if it runs.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    name, blocks = max(lists, key=lambda pair: sum(p.numel() for p in pair[1].parameters()), default=("?", nn.ModuleList()))
    first = f"{name}.0"
    by_tensor: dict[Any, list[str]] = {}
    for weight in dict.fromkeys([*(trace.order if trace else ()), *matrices(model)]):
        if weight.startswith(f"{first}.") and parse(weight).parameter in dict(model.named_parameters()):
            read = trace.read.get(weight) if trace else None
            by_tensor.setdefault(weight if read is None else which(read), []).append(weight)
    within = len(first) + 1
    lines = []
    for weights in by_tensor.values():
        listed = " ".join(f'f"{{name}}.{weight[within:]}",' for weight in weights)
        lines.append(f'            Group(f"{{name}}.{group_name(weights)[within:]}", ({listed})),')
    others = [n for n, p in model.named_parameters() if n.startswith(f"{first}.") and p.dim() > 2]
    left_out = ", ".join(f'f"{{name}}.{n[within:]}": "why"' for n in others)
    norms = [n for n, m in model.named_modules() if "norm" in type(m).__name__.lower() and not n.startswith(f"{name}.")]
    try:
        embedding, head = ends(model)
    except (NotFound, AttributeError, NotImplementedError):
        embedding = head = "?"
    returns = trace.lengths.get(first, 0) if trace else 0
    end = f'embedding="{embedding}", norm="{(norms or ["?"])[-1]}", head="{head}"' + (f", returns={returns}" if returns else "")
    return "\n".join(
        [
            "from pare.methods.anatomy.types import Anatomy, Block, Group, family",
            "",
            "",
            f'@family("{type(model).__name__}")',
            "def describe_it(model):",
            "    def block(name):",
            "        # One group for all that read one tensor, in the order in which they run.",
            "        groups = (",
            *lines,
            "        )",
            f"        return Block(name, groups, left_out={{{left_out}}})",
            "",
            f'    blocks = [block(f"{name}.{{i}}") for i in range({len(blocks)})]',
            f"    return Anatomy.of(model, blocks, {end})",
        ]
    )
