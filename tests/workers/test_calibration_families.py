"""Calibration sees of every family what a whole forward pass shows to hooks on its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pare.methods.anatomy.calls import block_inputs
from pare.methods.anatomy.describe import FAMILIES, describe
from pare.methods.anatomy.reads import one_expert_at_a_time
from pare.methods.anatomy.views import parse
from pare.methods.ops.statistics import Gram, MeanSquare
from pare.workers.calibration import stream
from tests.methods.anatomy.tiny_models import TOKENS, logits, tiny

CPU = torch.device("cpu")
every = pytest.mark.parametrize("architecture", FAMILIES)


@torch.no_grad()
def read_by_modules(model: nn.Module) -> dict[str, Tensor]:
    """Name of a weight -> (tokens, in) of all that it reads when the whole model runs: linears by hooks, and experts worked
    out from what the module that holds them is called with."""
    read: dict[str, Tensor] = {}

    def linear(name: str) -> Callable[..., None]:
        return lambda module, args: read.update({name: args[0].flatten(0, -2)})

    def experts(name: str) -> Callable[..., None]:
        def note(module: Any, args: tuple[Tensor, ...]) -> None:
            x, chosen, _ = args
            for e in range(len(module.down_proj)):
                mine = x[(chosen == e).any(-1)]
                gate, up = (mine @ module.gate_up_proj[e].T).chunk(2, -1)
                read[f"{name}.gate_up_proj[{e}]"] = mine
                read[f"{name}.down_proj[{e}]"] = module.act_fn(gate) * up

        return note

    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            hooks.append(module.register_forward_pre_hook(linear(f"{name}.weight")))
        if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
            hooks.append(module.register_forward_pre_hook(experts(name)))
    logits(model)
    for hook in hooks:
        hook.remove()
    return read


@every
@pytest.mark.parametrize("inputs", ["dense", "compressed"])
def test_gram_matrices_are_those_of_what_each_linear_reads(architecture: str, inputs: str) -> None:
    model = tiny(architecture)
    anatomy = describe(model)
    read = read_by_modules(model)
    got: dict[str, Tensor] = {}
    for passing in stream(model, anatomy, TOKENS, [Gram], CPU, inputs, batch_size=2):
        got |= {group: values["gram"] for group, values in passing.statistics.items()}
    assert list(got) == [group.name for group in anatomy.groups]
    for group in anatomy.groups:
        for name in group.weights:
            x = read[parse(name).parameter if parse(name).index is None else name]
            expected = 2 * x.T @ x / len(x) if len(x) else torch.zeros(x.shape[1], x.shape[1])
            torch.testing.assert_close(got[group.name], expected, rtol=1e-4, atol=1e-5 * float(expected.max()) + 1e-9)


@every
@torch.no_grad()
def test_blocks_run_one_at_a_time_end_in_the_logits_of_the_whole_model(architecture: str) -> None:
    model = tiny(architecture)
    anatomy = describe(model)
    heads: list[Tensor] = []
    model.get_submodule(anatomy.head).register_forward_pre_hook(lambda module, args: heads.append(args[0]))
    whole = logits(model)
    reached: list[list[Tensor]] = []
    with one_expert_at_a_time(model):
        for _ in stream(model, anatomy, TOKENS, [], CPU, batch_size=2, reached=lambda index, x: reached.append(list(x))):
            pass
        hidden, calls = block_inputs(model, anatomy, TOKENS.split(2))
        for i, x in enumerate(hidden):
            for index, block in enumerate(anatomy.blocks):
                if index:
                    torch.testing.assert_close(x, reached[index - 1][i], rtol=1e-5, atol=1e-5)
                x = calls[len(x)][index].run(model.get_submodule(block.name), x)
            final = model.get_submodule(anatomy.norm)(x)
            torch.testing.assert_close(final, heads[0][2 * i : 2 * i + 2], rtol=1e-5, atol=1e-5)
    assert len(reached) == len(anatomy.blocks) - 1
    assert whole.isfinite().all()


@pytest.mark.parametrize("architecture", ["MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"])
def test_an_expert_that_no_token_reaches_has_statistics_of_zeros(architecture: str) -> None:
    model = tiny(architecture)
    unreached = 0
    for passing in stream(model, describe(model), TOKENS[:1, :1], [Gram, MeanSquare], CPU):
        for group in passing.block.groups:
            values = passing.statistics[group.name]
            zeros = [not value.any() for value in values.values()]
            assert all(zeros) or not any(zeros)
            assert group.routed or not any(zeros)
            assert all(value.isfinite().all() for value in values.values())
            unreached += all(zeros)
    assert unreached == 4 * sum(bool(block.left_out) for block in describe(model).blocks)  # one token reaches two of four


def test_a_linear_that_is_never_called_is_an_error_where_it_is_no_expert() -> None:
    model = tiny("LlamaForCausalLM")
    model.model.layers[1].self_attn.o_proj.forward = lambda x: x.repeat(1, 1, 2)[..., :40]
    with pytest.raises(ValueError, match="of no tokens"):
        list(stream(model, describe(model), TOKENS, [Gram], CPU))
