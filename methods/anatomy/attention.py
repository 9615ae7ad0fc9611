"""Decoders whose blocks are attention and an MLP, or a mixture of MLPs, each behind a norm: what their modules are called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from pare.methods.anatomy.types import Anatomy, Block, Fold, Group, Side, Tie, UnknownModel, family, parameters_of
from pare.methods.anatomy.views import name_of, weight_of

ROUTER = "decides which experts a token goes to, and is small"

Part = tuple[str, int]
"""A linear as a module and the row at which it begins there; not 0 where several are fused into one module."""


class Writer:
    """Writes the anatomy of one model down, block by block."""

    def __init__(self, model: Any, norm: str) -> None:
        """norm: kind of the model's norms, see `Block.norm`."""
        self.model, self.norm = model, norm
        self.residual: list[Side] = []

    def weight(self, module: str) -> str:
        """Name of a linear's weight as (out, in): nn.Linear stores it so, Conv1D the other way round."""
        return name_of(f"{module}.weight", turned=not isinstance(self.model.get_submodule(module), nn.Linear))

    def writes(self, module: str, start: int = 0, width: int = 1) -> tuple[Side, ...]:
        bias = [Side(f"{module}.bias", "writes", 0, start, width)] if self.has_bias(module) else []
        return (Side(self.weight(module), "writes", 0, start, width), *bias)

    def reads(self, module: str, width: int = 1) -> Side:
        return Side(self.weight(module), "reads", 1, 0, width)

    def has_bias(self, module: str) -> bool:
        return getattr(self.model.get_submodule(module), "bias", None) is not None

    def behind(self, norm: str) -> Fold | None:
        """The fold into a norm, which is noted as part of the residual stream."""
        names = tuple(parameters_of(self.model, norm))
        self.residual += [Side(name, "scales", 0) for name in names]
        return Fold("norm_plus_one" if self.norm == "rms_plus_one" else "norm", names) if names else None

    def rows(self, part: Part, repeat: int = 1, head: int = 1) -> Fold:
        """The fold into the rows of a linear."""
        module, start = part
        bias = (f"{module}.bias",) if self.has_bias(module) else ()
        return Fold("linear", (self.weight(module), *bias), repeat, head, start)

    def attention(
        self, name: str, fold: Fold | None, qkv: tuple[Part, Part, Part], o: str, head: int
    ) -> tuple[list[Group], Tie]:
        """head: features of a head."""
        heads = self.width(o) // head
        kv = heads // self.repeat
        q, k, v = qkv
        modules = tuple(dict.fromkeys(module for module, _ in qkv))
        groups = [
            Group(f"{name}.qkv", tuple(map(self.weight, modules)), fold),
            Group(f"{name}.o", (self.weight(o),), self.rows(v, self.repeat, head)),
        ]
        self.residual += [*map(self.reads, modules), *self.writes(o)]
        wide = self.repeat * head
        sides = (*self.writes(*q, wide), *self.writes(*k, head), *self.writes(*v, head), self.reads(o, wide))
        return groups, Tie("kv", kv, sides)

    @property
    def repeat(self) -> int:
        """Heads of q for each head of k and v."""
        config = self.model.config
        return int(config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads))

    def width(self, module: str) -> int:
        """Input features of a linear."""
        return int(weight_of(self.model, self.weight(module)).shape[1])

    def mlp(
        self, name: str, fold: Fold | None, gate: Part | None, up: Part, down: str, linear: bool
    ) -> tuple[list[Group], Tie]:
        """linear: whether what `down` reads is proportional to what `up` puts out, feature by feature."""
        parts = (gate, up) if gate else (up,)
        modules = tuple(dict.fromkeys(module for module, _ in parts))
        groups = [
            Group(f"{name}.{'gate_up' if gate else 'up'}", tuple(map(self.weight, modules)), fold),
            Group(f"{name}.down", (self.weight(down),), self.rows(up) if linear else None),
        ]
        self.residual += [*map(self.reads, modules), *self.writes(down)]
        sides = tuple(side for part in parts for side in self.writes(*part))
        return groups, Tie("ffn", self.width(down), (*sides, self.reads(down)))

    def experts(self, name: str) -> tuple[list[Group], list[Tie]]:
        """Experts whose matrices are stacked: gate_up_proj (experts, 2 * inner, hidden), down_proj (experts, hidden, inner)."""
        groups, ties = [], []
        stack = self.model.get_parameter(f"{name}.down_proj")
        for e in range(len(stack)):
            both, down = name_of(f"{name}.gate_up_proj", e), name_of(f"{name}.down_proj", e)
            inner = stack.shape[-1]
            groups += [
                Group(f"{name}.gate_up[{e}]", (both,), routed=True),
                Group(f"{name}.down[{e}]", (down,), Fold("linear", (both,), start=inner), routed=True),
            ]
            ties.append(Tie("ffn", inner, (Side(both, "writes", 0), Side(both, "writes", 0, inner), Side(down, "reads", 1))))
            self.residual += [Side(both, "reads", 1), Side(down, "writes", 0)]
        return groups, ties

    def anatomy(self, blocks: list[Block], embedding: str, norm: str, head: str, *also: Side) -> Anatomy:
        """also: what else writes to the residual stream."""
        self.residual += [Side(f"{embedding}.weight", "writes", 1), *also]
        self.behind(norm)
        if self.model.get_submodule(head).weight is not self.model.get_submodule(embedding).weight:
            self.residual.append(self.reads(head))
        hidden = Tie("hidden", self.model.get_submodule(embedding).weight.shape[1], tuple(self.residual))
        return Anatomy.of(self.model, blocks, embedding, norm, head, hidden)


def layers(model: Any, name: str) -> list[str]:
    """Names of the blocks in a module list."""
    return [f"{name}.{i}" for i in range(len(model.get_submodule(name)))]


@family(
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM",
)  # fmt: skip
def llama(model: Any) -> Anatomy:
    """Attention and a gated MLP, or experts of that form with or without one that is shared, each behind an RMS norm."""
    writer = Writer(model, "rms")

    def block(name: str) -> Block:
        mlp = f"{name}.mlp"
        attention, kv = separate(writer, name, "input_layernorm", "o_proj")
        fold = writer.behind(f"{name}.post_attention_layernorm")
        if not hasattr(model.get_submodule(mlp), "experts"):
            groups, ffn = gated(writer, mlp, fold)
            return Block(name, (*attention, *groups), ties=(kv, ffn), norm="rms")
        left_out = {f"{mlp}.gate.weight": ROUTER}
        groups, ties = [], []
        if hasattr(model.get_submodule(mlp), "shared_expert"):
            groups, ffn = gated(writer, f"{mlp}.shared_expert", None)
            ties = [ffn]
            left_out[f"{mlp}.shared_expert_gate.weight"] = "one number for each token: how much the shared expert counts"
        writer.residual += [Side(parameter, "reads", 1) for parameter in left_out]
        routed, of_experts = writer.experts(f"{mlp}.experts")
        return Block(name, (*attention, *groups, *routed), left_out, (kv, *ties, *of_experts), "rms")

    return plain(writer, block)


def separate(writer: Writer, block: str, norm: str, o: str) -> tuple[list[Group], Tie]:
    """self_attn of a block, behind its norm, with q_proj, k_proj and v_proj each a linear of its own."""
    name = f"{block}.self_attn"
    fold, head = writer.behind(f"{block}.{norm}"), writer.model.get_submodule(name).head_dim
    return writer.attention(
        name, fold, ((f"{name}.q_proj", 0), (f"{name}.k_proj", 0), (f"{name}.v_proj", 0)), f"{name}.{o}", head
    )


def plain(writer: Writer, block: Callable[[str], Block]) -> Anatomy:
    """The anatomy of a model that calls its parts what Llama does."""
    blocks = [block(name) for name in layers(writer.model, "model.layers")]
    return writer.anatomy(blocks, "model.embed_tokens", "model.norm", "lm_head")


def gated(writer: Writer, name: str, fold: Fold | None) -> tuple[list[Group], Tie]:
    """gate_proj, up_proj and down_proj."""
    return writer.mlp(name, fold, (f"{name}.gate_proj", 0), (f"{name}.up_proj", 0), f"{name}.down_proj", linear=True)


@family("Gemma2ForCausalLM", "Gemma3ForCausalLM")
def gemma(model: Any) -> Anatomy:
    """As Llama, with norms that multiply by 1 + weight, and further norms behind attention and MLP."""
    writer = Writer(model, "rms_plus_one")

    def block(name: str) -> Block:
        attention, kv = separate(writer, name, "input_layernorm", "o_proj")
        writer.behind(f"{name}.post_attention_layernorm")
        groups, ffn = gated(writer, f"{name}.mlp", writer.behind(f"{name}.pre_feedforward_layernorm"))
        writer.behind(f"{name}.post_feedforward_layernorm")
        return Block(name, (*attention, *groups), ties=(kv, ffn), norm="rms_plus_one")

    return plain(writer, block)


@family("Phi3ForCausalLM")
def phi3(model: Any) -> Anatomy:
    """As Llama, with q, k and v in one linear, and gate and up in one."""
    writer = Writer(model, "rms")

    def block(name: str) -> Block:
        self_attn, mlp = f"{name}.self_attn", f"{name}.mlp"
        module, fused = model.get_submodule(self_attn), f"{self_attn}.qkv_proj"
        queries = module.config.num_attention_heads * module.head_dim
        keys = module.num_key_value_heads * module.head_dim
        attention, kv = writer.attention(
            self_attn,
            writer.behind(f"{name}.input_layernorm"),
            ((fused, 0), (fused, queries), (fused, queries + keys)),
            f"{self_attn}.o_proj",
            module.head_dim,
        )
        both, down = f"{mlp}.gate_up_proj", f"{mlp}.down_proj"
        up = (both, writer.width(down))
        groups, ffn = writer.mlp(mlp, writer.behind(f"{name}.post_attention_layernorm"), (both, 0), up, down, linear=True)
        return Block(name, (*attention, *groups), ties=(kv, ffn), norm="rms")

    return plain(writer, block)


@family("GPT2LMHeadModel")
def gpt2(model: Any) -> Anatomy:
    """Attention with q, k and v in one Conv1D, and an MLP of two, each behind a layer norm; learned positions."""
    writer = Writer(model, "layer")

    def block(name: str) -> Block:
        attn, mlp = f"{name}.attn", f"{name}.mlp"
        fused, split, head = f"{attn}.c_attn", model.get_submodule(attn).split_size, model.get_submodule(attn).head_dim
        attention, kv = writer.attention(
            attn,
            writer.behind(f"{name}.ln_1"),
            ((fused, 0), (fused, split), (fused, 2 * split)),
            f"{attn}.c_proj",
            head,
        )
        fold = writer.behind(f"{name}.ln_2")
        groups, ffn = writer.mlp(mlp, fold, None, (f"{mlp}.c_fc", 0), f"{mlp}.c_proj", is_linear(model.get_submodule(mlp).act))
        return Block(name, (*attention, *groups), ties=(kv, ffn), norm="layer")

    blocks = [block(name) for name in layers(model, "transformer.h")]
    positions = Side("transformer.wpe.weight", "writes", 1)
    return writer.anatomy(blocks, "transformer.wte", "transformer.ln_f", "lm_head", positions)


def is_linear(activation: nn.Module) -> bool:
    """Whether f(x / s) = f(x) / s for every positive s."""
    return isinstance(activation, nn.ReLU)


@family("OPTForCausalLM")
def opt(model: Any) -> Anatomy:
    """Attention and an MLP of two linears with ReLU, each behind a layer norm; learned positions."""
    decoder = model.model.decoder
    if decoder.final_layer_norm is None or decoder.project_in is not None:
        raise UnknownModel(
            "this OPT normalises after its linears or projects its embedding, as opt-350m does, alone of its family; only "
            "those that normalise before are described. Try another size"
        )
    writer = Writer(model, "layer")

    def block(name: str) -> Block:
        attention, kv = separate(writer, name, "self_attn_layer_norm", "out_proj")
        fold, linear = writer.behind(f"{name}.final_layer_norm"), is_linear(model.get_submodule(name).activation_fn)
        groups, ffn = writer.mlp(name, fold, None, (f"{name}.fc1", 0), f"{name}.fc2", linear)
        return Block(name, (*attention, *groups), ties=(kv, ffn), norm="layer")

    blocks = [block(name) for name in layers(model, "model.decoder.layers")]
    positions = Side("model.decoder.embed_positions.weight", "writes", 1)
    return writer.anatomy(blocks, "model.decoder.embed_tokens", "model.decoder.final_layer_norm", "lm_head", positions)
