"""Decoders whose blocks are one state-space mixer behind a norm."""

from __future__ import annotations

from typing import Any

from pare.methods.anatomy.attention import Writer, layers
from pare.methods.anatomy.types import Anatomy, Block, Fold, Group, Side, Tie, family, parameters_of

CONVOLUTION = "a convolution of a few taps for each channel by itself: no linear"
STATE = "how fast each state decays: no linear"
STEP = "multiplied without its module being called, so that nothing can stand in its place; a few per cent of the mixer"


@family("MambaForCausalLM")
def mamba(model: Any) -> Anatomy:
    """in_proj makes channels and their gates, x_proj what the scan depends on, out_proj leads back."""
    writer = Writer(model, "rms")

    def block(name: str) -> Block:
        mixer = f"{name}.mixer"
        into, x, dt, out = (f"{mixer}.{n}_proj" for n in ("in", "x", "dt", "out"))
        channels = writer.width(out)
        groups = (
            Group(f"{mixer}.in", (writer.weight(into),), writer.behind(f"{name}.norm")),
            Group(f"{mixer}.x", (writer.weight(x),)),
            Group(f"{mixer}.out", (writer.weight(out),)),
        )
        left_out = {f"{mixer}.conv1d.weight": CONVOLUTION, f"{dt}.weight": STEP, f"{mixer}.A_log": STATE}
        writer.residual += [writer.reads(into), *writer.writes(out)]
        by_channel = [*parameters_of(model, f"{mixer}.conv1d"), f"{mixer}.A_log", f"{mixer}.D"]
        sides = (
            *writer.writes(into),
            *writer.writes(into, channels),
            *(Side(parameter, "scales", 0) for parameter in by_channel),
            writer.reads(x),
            *writer.writes(dt),
            writer.reads(out),
        )
        return Block(name, groups, left_out, (Tie("channel", channels, sides),), "rms")

    return ending(model, writer, [block(name) for name in layers(model, "backbone.layers")])


@family("Mamba2ForCausalLM")
def mamba2(model: Any) -> Anatomy:
    """in_proj makes gates, channels, states and steps; out_proj leads back from behind a norm with gates. That norm runs over
    many heads at once, so that no head can be taken out exactly: there are no ties."""
    writer = Writer(model, "rms")

    def block(name: str) -> Block:
        mixer = f"{name}.mixer"
        into, out = f"{mixer}.in_proj", f"{mixer}.out_proj"
        groups = (
            Group(f"{mixer}.in", (writer.weight(into),), writer.behind(f"{name}.norm")),
            Group(f"{mixer}.out", (writer.weight(out),), Fold("norm", (f"{mixer}.norm.weight",))),
        )
        writer.residual += [writer.reads(into), *writer.writes(out)]
        return Block(name, groups, {f"{mixer}.conv1d.weight": CONVOLUTION}, (), "rms")

    return ending(model, writer, [block(name) for name in layers(model, "backbone.layers")])


def ending(model: Any, writer: Writer, blocks: list[Block]) -> Anatomy:
    return writer.anatomy(blocks, "backbone.embeddings", "backbone.norm_f", "lm_head")
