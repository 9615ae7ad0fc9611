"""Prompts that are learnt: virtual tokens before every input, the model itself frozen.

    prompt_tuning     p(y | [P; x])              P (tokens, width) embeddings
    p_tuning          P = network(E)             E (tokens, width), an MLP or an LSTM and an MLP
    prefix_tuning     [K_P; K], [V_P; V]         keys and values in every layer, perhaps K_P, V_P = MLP(E)

What is published is P itself, or the keys and values: what it was a function of while it was trained is worked out. No weight
changes; so a prompt belongs to the model as it is, and has to be the last stage of a recipe.
Cost: a pass over `virtual_tokens` more tokens a sequence, in training and ever after (keys and values are only read), and the
gradients of the activations; optimizer state for the prompt or its network alone.
Source: each method's own.
Differs from the papers: AdamW in place of Adafactor; a prompt of keys and values starts from those of real tokens, with a
network as well, whose output is then added to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pare.methods.contract import Context, TrainMethod, method
from pare.methods.ops.adapters import AdapterFields, drawn_from
from pare.methods.ops.prompts import attach, keys_and_values, unflattened, write_prompt
from pare.methods.ops.tuner_kinds import PROMPTS, Kind
from pare.methods.parts.formula import Formula
from pare.methods.settings import SettingsError, check


class Free(nn.Module):
    """A prompt that is trained itself."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.prompt = nn.Parameter(start.float().clone())

    def forward(self) -> Tensor:
        return self.prompt


class Encoded(nn.Module):
    """A prompt that a network of peft makes, in float32 whatever the precision around it."""

    def __init__(self, network: nn.Module, shaped: Callable[[Tensor], Tensor], start: Tensor | None = None) -> None:
        """shaped: what the network makes (tokens, numbers) -> prompt. start: what that is added to."""
        super().__init__()
        self.network, self.shaped = network.float(), shaped
        self.register_buffer("start", start, persistent=False)

    def forward(self) -> Tensor:
        tokens = torch.arange(self.network.embedding.num_embeddings, device=self.network.embedding.weight.device)
        with torch.autocast(tokens.device.type, enabled=False):
            made = self.shaped(self.network(tokens[None])[0])
        return made if self.start is None else self.start + made


@dataclass
class PromptMethod(TrainMethod, AdapterFields):
    """What they share."""

    of: ClassVar[Kind]
    learns_prompt = True
    keeps_keys: ClassVar[bool] = False
    """Whether the prompt is keys and values of every layer, and no embeddings."""

    virtual_tokens: int = 20
    """Length of the prompt in tokens, >= 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "virtual_tokens", at_least=1)

    def encoder(self, model: Any) -> nn.Module:
        """() -> prompt, at its initial value."""
        raise NotImplementedError

    def prepare(self, model: nn.Module, context: Context) -> nn.Module:
        model = model.to(context.device).requires_grad_(False)
        with drawn_from(self.init_seed, context.device):
            encoder = self.encoder(model.eval()).to(context.device)
        model.prompt_encoder = encoder  # a part of the model, so that its parameters are seen
        attach(model, encoder.eval())
        return model

    @torch.no_grad()
    def finish(self, model: nn.Module, directory: Path) -> dict[str, Formula]:
        write_prompt(model.prompt_encoder.eval()(), directory)
        return {}


@dataclass
class FromTokens(PromptMethod):
    """Those that may start from tokens of the model."""

    inits: ClassVar[tuple[str, ...]] = ("vocabulary", "text", "random")

    init: str = "vocabulary"
    """What the prompt starts as: "vocabulary", tokens drawn from it; "text", those of `init_text`, over and over; "random",
    normal numbers. Of prefix_tuning the keys and values of these tokens; with "zero" they are zeros."""

    init_text: str = ""
    """The text where `init` is "text", e.g. what one would write as the prompt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "init", one_of=self.inits)
        if (self.init == "text") != bool(self.init_text.strip()):
            allowed = "a text where init is text" if self.init == "text" else "empty unless init is text"
            raise SettingsError(self.name, "init_text", self.init_text, allowed)

    def start_tokens(self, model: Any) -> Tensor:
        """Ids (virtual_tokens,) of the tokens that the prompt starts from."""
        embedding = model.get_input_embeddings().weight
        if self.init != "text":
            return torch.randint(len(embedding), (self.virtual_tokens,)).to(embedding.device)
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, local_files_only=True, trust_remote_code=False)
        found = tokenizer(self.init_text, add_special_tokens=False).input_ids
        return torch.tensor((found * self.virtual_tokens)[: self.virtual_tokens], device=embedding.device)


@method("prompt_tuning", source=PROMPTS["prompt_tuning"].source)
@dataclass
class PromptTuning(FromTokens):
    """Trains the embeddings of virtual tokens."""

    of = PROMPTS["prompt_tuning"]

    learning_rate: float = of.rate

    def encoder(self, model: Any) -> nn.Module:
        embedding = model.get_input_embeddings()
        with torch.no_grad():
            start = embedding(self.start_tokens(model)).float()
            if self.init == "random":
                start = embedding.weight.float().std() * torch.randn(start.shape).to(start)
        return Free(start)


@method("p_tuning", source=PROMPTS["p_tuning"].source)
@dataclass
class PTuning(PromptMethod):
    """Trains a network that makes the embeddings of virtual tokens."""

    of = PROMPTS["p_tuning"]

    learning_rate: float = of.rate

    network: str = "mlp"
    """Of three linears, "mlp", or a bidirectional LSTM with two behind it, "lstm"."""

    hidden: int = 0
    """Width of the network, >= 1; 0: that of the model."""

    layers: int = 2
    """Of the LSTM, >= 1."""

    dropout: float = 0.0
    """Between the layers of the LSTM, in [0, 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "network", one_of=("mlp", "lstm"))
        check(self, "hidden", at_least=0)
        check(self, "layers", at_least=1)
        check(self, "dropout", at_least=0, below=1)

    def encoder(self, model: Any) -> nn.Module:
        from peft import PromptEncoder, PromptEncoderConfig

        width = model.get_input_embeddings().weight.shape[1]
        config = PromptEncoderConfig(
            num_virtual_tokens=self.virtual_tokens,
            token_dim=width,
            num_transformer_submodules=1,
            encoder_reparameterization_type=self.network.upper(),
            encoder_hidden_size=self.hidden or width,
            encoder_num_layers=self.layers if self.network == "lstm" else 2,
            encoder_dropout=self.dropout,
        )
        return Encoded(PromptEncoder(config), lambda made: made)


@method("prefix_tuning", source=PROMPTS["prefix_tuning"].source)
@dataclass
class PrefixTuning(FromTokens):
    """Trains keys and values that every layer finds before those of the input."""

    of = PROMPTS["prefix_tuning"]
    inits = (*FromTokens.inits, "zero")
    keeps_keys = True

    learning_rate: float = of.rate

    projection: bool = False
    """Whether a network of two linears makes the keys and values, for training's sake."""

    hidden: int = 0
    """Width of that network, >= 1; 0: that of the keys of a layer."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self, "hidden", at_least=0)

    def encoder(self, model: Any) -> nn.Module:
        from peft import PrefixEncoder, PrefixTuningConfig

        start = keys_and_values(model, self.start_tokens(model)).float()
        if self.init in ("random", "zero"):
            start = torch.randn(start.shape).to(start) if self.init == "random" else torch.zeros_like(start)
        if not self.projection:
            return Free(start)
        layers, _, heads, tokens, width = start.shape
        config = PrefixTuningConfig(
            num_virtual_tokens=tokens,
            token_dim=heads * width,
            num_layers=layers,
            num_attention_heads=heads,
            num_transformer_submodules=1,
            encoder_hidden_size=self.hidden or heads * width,
            prefix_projection=True,
            init_weights=None if self.init == "random" else "zero",
        )
        shaped = partial(unflattened, layers=layers, heads=heads)
        return Encoded(PrefixEncoder(config), shaped, None if self.init == "random" else start)
