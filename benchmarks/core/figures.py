"""The figures that are made of the readings of this benchmark."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.readings import Figure, Values, ratio


def of(name: str, argument: str, key: str = "s") -> Callable[[Values], float]:
    return lambda values: values.median(name, argument, key)


def worse(name: str, peer: str, argument: str) -> Callable[[Values], float]:
    """By how many per cent our perplexity is above the peer's; below zero where it is better."""
    return lambda v: 100 * (v.median(name, argument, "ppl") / v.median(peer, argument, "ppl") - 1)


def beside(ours: str, peer: str, argument: str, least: float) -> list[Figure]:
    """How many times as fast, and at what quality."""
    return [
        Figure(f"{ours} {argument}, as fast as the peer", "times", f">= {least}", lambda x: x >= least,
               ratio(of(peer, argument), of(ours, argument))),
        Figure(f"{ours} {argument}, perplexity above the peer's", "%", "<= 0.5", lambda x: x <= 0.5,
               worse(ours, peer, argument)),
        Figure(f"{ours} {argument}", "s", "", None, of(ours, argument)),
        Figure(f"{ours} {argument}, perplexity", "", "", None, of(ours, argument, "ppl")),
    ]  # fmt: skip


FIGURES = (
    *beside("gptq_sequential", "peer_gptq", "3", 1.3),
    *beside("gptq_dense", "peer_gptq", "3", 2.0),
    *beside("sparsegpt", "peer_sparsegpt", "0.5", 1.5),
    *beside("wanda", "peer_wanda", "0.5", 1.5),
    Figure("four widths over one calibration, as long as one", "times", "<= 1.8", lambda x: x <= 1.8,
           ratio(of("gptq_dense", "2,4,8,3"), of("gptq_dense", "3"))),
    Figure("the peer's gptq 3", "s", "", None, of("peer_gptq", "3")),
    Figure("the peer's gptq 3, perplexity", "", "", None, of("peer_gptq", "3", "ppl")),
    Figure("the peer's sparsegpt 0.5", "s", "", None, of("peer_sparsegpt", "0.5")),
    Figure("the peer's sparsegpt 0.5, perplexity", "", "", None, of("peer_sparsegpt", "0.5", "ppl")),
    Figure("the peer's wanda 0.5", "s", "", None, of("peer_wanda", "0.5")),
    Figure("the peer's wanda 0.5, perplexity", "", "", None, of("peer_wanda", "0.5", "ppl")),
)  # fmt: skip
