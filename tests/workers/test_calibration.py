from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from pare.methods.anatomy.describe import describe
from pare.methods.ops.statistics import Gram, Statistic
from pare.workers.calibration import stream
from pare.workers.hidden_states import HiddenStates

CPU = torch.device("cpu")
TOKENS = torch.randint(96, (5, 24), generator=torch.Generator().manual_seed(1))
SIZE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip


def llama(attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM._from_config(LlamaConfig(**SIZE), attn_implementation=attention).eval()


def qwen_with_a_sliding_window_in_some_blocks() -> nn.Module:
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    return Qwen2ForCausalLM(Qwen2Config(**SIZE, use_sliding_window=True, sliding_window=4, layer_types=kinds)).eval()


class Everything(Statistic):
    """Every input, as it comes."""

    name: ClassVar[str] = "everything"

    def start(self, n_features: int, device: torch.device) -> None:
        self.seen: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        self.seen.append(x)

    def finish(self) -> Tensor:
        return torch.cat(self.seen)


@torch.no_grad()
def read_in_one_pass(model: nn.Module) -> dict[str, Tensor]:
    """Input group -> (tokens, in) of all that its linears read when the whole model runs."""
    read: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(group.weights[-1].removesuffix(".weight")).register_forward_pre_hook(
            lambda module, args, name=group.name: read.update({name: args[0].flatten(0, 1)})
        )
        for group in describe(model).groups
    ]
    model(input_ids=TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    return read


def streamed(model: nn.Module, need: type[Statistic], **options: Any) -> dict[str, Tensor]:
    passing = stream(model, describe(model), TOKENS, [need], CPU, batch_size=2, **options)
    return {group: values[need.name] for p in passing for group, values in p.statistics.items()}


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
@pytest.mark.parametrize(
    "model",
    [llama(), llama("eager"), qwen_with_a_sliding_window_in_some_blocks()],
    ids=["llama", "llama-eager", "qwen2-sliding"],
)
def test_every_linear_reads_in_the_stream_what_it_reads_when_the_whole_model_runs(model: nn.Module, inputs: str) -> None:
    expected, got = read_in_one_pass(model), streamed(model, Everything, inputs=inputs)
    assert list(got) == [group.name for group in describe(model).groups]
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=1e-4, atol=1e-5)


def test_the_gram_matrix_is_the_one_of_all_inputs() -> None:
    model = llama()
    got = streamed(model, Gram)
    for name, x in read_in_one_pass(model).items():
        torch.testing.assert_close(got[name], 2 * x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_statistics_are_float32_when_the_forward_pass_is_bfloat16() -> None:
    model = llama().bfloat16()
    got = streamed(model, Gram)
    assert {g.dtype for g in got.values()} == {torch.float32}
    x = read_in_one_pass(model)["model.layers.0.self_attn.qkv"]
    assert x.dtype == torch.bfloat16
    torch.testing.assert_close(got["model.layers.0.self_attn.qkv"], 2 * x.float().T @ x.float() / len(x), rtol=1e-3, atol=1e-3)


def halved(model: nn.Module, inputs: str) -> dict[str, Tensor]:
    """Streams the model while its consumer halves all linears of each block that has passed."""
    got = {}
    for passing in stream(model, describe(model), TOKENS, [Everything], CPU, inputs, batch_size=2):
        got |= {group: values["everything"] for group, values in passing.statistics.items()}
        halve(passing.module)
    return got


@torch.no_grad()
def halve(module: nn.Module) -> None:
    for linear in module.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.mul_(0.5)


def test_compressed_inputs_come_from_the_weights_that_the_consumer_left_and_dense_ones_do_not() -> None:
    dense = read_in_one_pass(llama())
    changed = llama()
    for block in list(changed.model.layers)[:2]:
        halve(block)
    compressed = read_in_one_pass(changed)
    first, third = "model.layers.0.mlp.down", "model.layers.2.mlp.down"
    assert (compressed[third] - dense[third]).abs().max() > 1e-3

    for inputs, expected in {"dense": dense, "compressed": compressed}.items():
        got = halved(llama(), inputs)
        torch.testing.assert_close(got[third], expected[third], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[first], dense[first], rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was() -> None:
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    streamed(model, Gram)
    next(stream(model, describe(model), TOKENS, [Gram], CPU)).module.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(module._forward_pre_hooks or "forward" in module.__dict__ for module in model.modules())


def test_a_model_that_ends_before_its_last_block_is_an_error() -> None:
    model = llama()
    anatomy = describe(model)
    model.model.config.num_hidden_layers = 2  # the forward pass of transformers stops there
    with pytest.raises(ValueError, match=r"model\.layers\.2 was not reached"):
        next(stream(model, anatomy, TOKENS, [Gram], CPU))
    assert not any("forward" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
def test_the_stream_goes_on_from_where_it_was_reached(inputs: str) -> None:
    reached: list[tuple[int, list[Tensor]]] = []
    events: list[str] = []

    def note(index: int, hidden: HiddenStates) -> None:
        reached.append((index, [x.clone() for x in hidden]))
        events.append(f"reached {index}")

    whole = {}
    model = llama()
    for passing in stream(model, describe(model), TOKENS, [Everything], CPU, inputs, 2, reached=note):
        events.append(f"passed {passing.block.name[-1]}")
        whole |= {group: values["everything"] for group, values in passing.statistics.items()}
        halve(passing.module)
    assert events == ["passed 0", "reached 1", "passed 1", "reached 2", "passed 2"]

    for start, hidden in reached:
        fresh = llama()  # none of its blocks halved: those before `start` are not read again
        got = {}
        states = HiddenStates().extend(hidden)
        for passing in stream(fresh, describe(fresh), TOKENS, [Everything], CPU, inputs, 2, start=start, hidden=states):
            got |= {group: values["everything"] for group, values in passing.statistics.items()}
            halve(passing.module)
        assert list(got) == list(whole)[4 * start :]
        assert all(torch.equal(values, whole[group]) for group, values in got.items())


@pytest.mark.parametrize("inputs", ["dense", "compressed"])
@pytest.mark.parametrize("limit", [0, 2 * 24 * 32 * 4])
def test_hidden_states_in_files_make_the_same_statistics_to_the_bit(limit: int, inputs: str, tmp_path: Path) -> None:
    expected = halved(llama(), inputs)
    got, seen = {}, set()
    model = llama()
    with HiddenStates(tmp_path, limit) as hidden:
        for passing in stream(model, describe(model), TOKENS, [Everything], CPU, inputs, batch_size=2, hidden=hidden):
            got |= {group: values["everything"] for group, values in passing.statistics.items()}
            seen.add((hidden.held, sum(path.is_file() for path in tmp_path.rglob("*"))))
            halve(passing.module)
    # Batches of 2, 2 and 1 sequences.
    assert seen == {(limit, 2 if limit else 3)}
    assert list(got) == list(expected)
    assert all(torch.equal(values, expected[group]) for group, values in got.items())
