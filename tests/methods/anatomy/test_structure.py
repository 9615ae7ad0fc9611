"""Decoders that no family is written for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

from pare.methods.anatomy.describe import FAMILIES, UnknownModel, describe, verify
from pare.methods.ops.statistics import MeanSquare
from pare.workers.calibration import stream
from tests.methods.anatomy.tiny_models import CONFIGS, TOKENS, logits, stirred, tiny


def config() -> LlamaConfig:
    return LlamaConfig(**CONFIGS["LlamaForCausalLM"])


class Renamed(LlamaForCausalLM):
    """A Llama under another name."""


class OddBlock(nn.Module):
    """Mixing along the text and an MLP side by side, on one norm; returns the hidden state and something else."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mix, self.gate, self.back = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.wide, self.narrow = Conv1D(3 * width, width), Conv1D(width, 3 * width)

    def forward(self, hidden_states: Tensor, decay: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.norm(hidden_states)
        mixed = self.mix(x).cumsum(1) * decay
        if first is not None:
            mixed = mixed + first
        out = self.back(mixed * self.gate(x).sigmoid()) + self.narrow(self.wide(x).relu())
        return hidden_states + out, mixed


class Odd(PreTrainedModel):
    """A decoder that resembles none of transformers; gives its blocks the hidden state by name."""

    config_class = LlamaConfig
    passes_on = False
    """Whether blocks get what the first one has mixed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, width)
        self.stack = nn.ModuleList(OddBlock(width) for _ in range(config.num_hidden_layers))
        self.last_norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def get_output_embeddings(self) -> nn.Module:
        return self.project

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        x = self.words(input_ids)
        decay = 1 / torch.arange(1, x.shape[1] + 1, device=x.device)[None, :, None]
        first = None
        for block in self.stack:
            x, mixed = block(hidden_states=x, decay=decay, first=first)
            first = mixed if self.passes_on and first is None else first
        return CausalLMOutput(logits=self.project(self.last_norm(x)))


class PassesOn(Odd):
    passes_on = True


class Twice(Odd):
    """Runs its blocks two times over."""

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
        x = self.words(input_ids)
        for block in [*self.stack, *self.stack]:
            x, _ = block(hidden_states=x, decay=torch.ones(1))
        return CausalLMOutput(logits=self.project(self.last_norm(x)))


def made(cls: Any) -> Any:
    torch.manual_seed(0)
    return stirred(cls(config()).eval())


def test_a_class_that_inherits_from_a_known_one_is_described_as_that_with_folds_and_ties() -> None:
    model = made(Renamed)
    assert describe(model) == describe(tiny("LlamaForCausalLM"))


def test_a_decoder_is_described_by_what_runs_in_it_and_what_reads_what() -> None:
    model = made(Odd)
    anatomy = describe(model)
    verify(model, anatomy)
    assert [block.name for block in anatomy.blocks] == ["stack.0", "stack.1", "stack.2"]
    assert (anatomy.embedding, anatomy.norm, anatomy.head, anatomy.returns) == ("words", "last_norm", "project", 2)
    groups = {group.name: group.weights for group in anatomy.blocks[1].groups}
    assert groups == {
        "stack.1.mix_gate_wide": ("stack.1.mix.weight", "stack.1.gate.weight", "stack.1.wide.weight^T"),
        "stack.1.back": ("stack.1.back.weight",),
        "stack.1.narrow": ("stack.1.narrow.weight^T",),
    }
    assert anatomy.widths["stack.1.narrow.weight^T"] == (40, 120)
    assert all(group.fold is None for group in anatomy.groups)


def test_it_is_described_without_weights_too() -> None:
    with torch.device("meta"):
        skeleton = Odd(config()).eval()
    assert describe(skeleton) == describe(made(Odd))
    assert all(p.is_meta for p in skeleton.parameters())


@torch.no_grad()
def test_it_streams_block_by_block() -> None:
    model = made(Odd)
    read: dict[str, Tensor] = {}
    hook = model.stack[2].narrow.register_forward_pre_hook(lambda module, args: read.update({"x": args[0]}))
    logits(model)
    hook.remove()
    *_, last = stream(model, describe(model), TOKENS, [MeanSquare], torch.device("cpu"), batch_size=2)
    expected = read["x"].flatten(0, 1).square().mean(0)
    torch.testing.assert_close(last.statistics["stack.2.narrow"]["mean_square"], expected, rtol=1e-4, atol=1e-6)


def test_a_class_of_transformers_without_a_family_is_found_out_by_running_it() -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    torch.manual_seed(0)
    model = StableLmForCausalLM(StableLmConfig(**CONFIGS["LlamaForCausalLM"])).eval()
    anatomy = describe(model)
    assert [len(group.weights) for group in anatomy.blocks[0].groups] == [3, 1, 2, 1]


@pytest.fixture
def families() -> Iterator[None]:
    """Takes out what a test registers."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_blocks_that_pass_something_on_beside_the_hidden_state_are_refused() -> None:
    with pytest.raises(UnknownModel, match=r"anatomy of PassesOn is not known.*besides the hidden state"):
        describe(made(PassesOn))


def test_blocks_that_run_twice_are_refused() -> None:
    with pytest.raises(UnknownModel, match="no list of modules of which each reads what the one before it returns"):
        describe(made(Twice))


def test_a_model_that_fails_when_it_is_tried_is_refused_with_its_error() -> None:
    class Broken(Odd):
        def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> CausalLMOutput:
            raise RuntimeError("no such kernel")

    with pytest.raises(UnknownModel, match=r"its trial failed: RuntimeError.'no such kernel'"):
        describe(made(Broken))


@pytest.mark.usefixtures("families")
def test_a_refusal_carries_a_file_that_needs_little_more_to_describe_the_model() -> None:
    model = made(Twice)
    with pytest.raises(UnknownModel) as refused:
        describe(model)
    text = str(refused.value).split("\n\n", 1)[1]
    assert 10 <= len(text.splitlines()) <= 30
    assert '@family("Twice")' in text
    assert "?" not in text
    exec(compile(text.replace('"Twice"', '"Odd"').replace("mix_gate_wide", "all"), "anatomy.py", "exec"), {})
    verify(made(Odd), describe(made(Odd)))
    assert describe(made(Odd)).blocks[0].groups[0].name == "stack.0.all"
