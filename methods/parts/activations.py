"""Quantisers of a linear's input: what its formula does to x before the weights meet it.

    s = max|x| / largest, as it would be stored            q(x) = s * nearest(x / s)

The rounding is simulated in float32. Scales are worked out anew for each token, or each group of its features ("dynamic"),
or there is one that calibration has found ("static"). The gradient passes through as if nothing had been rounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from pare.methods.parts.codebooks import Codebook, Integer, Minifloat, PowerOfTwo, Vectors, read_codebook
from pare.methods.parts.minifloats import power_above
from pare.methods.parts.part import within

E4M3, E2M1 = Minifloat(4, 3, "nan"), Minifloat(2, 1, "none")


@dataclass(frozen=True, eq=False)
class ActivationQuantiser:
    """Made with `ActivationQuantiser.of`; the fields say what it is made of."""

    codebook: Codebook

    largest: float
    """The number at which the largest magnitude is put: 448 for E4M3, 127 or 127.5 for 8-bit integers."""

    group: int = -1
    """Consecutive features that share a scale, > 0; the last group may be short. -1: all features of a token."""

    scale: Tensor | None = None
    """(), float32. Without `scale_codebook` the static scale, with it the factor over the dynamic ones. None: dynamic."""

    scale_codebook: Codebook | None = None
    """What dynamic scales are rounded to: a minifloat or `PowerOfTwo`; None: nothing."""

    @classmethod
    def of(cls, name: str, scale: Tensor | None = None) -> ActivationQuantiser:
        """name: "int8" or "fp8_e4m3", static with a scale () and else dynamic for each token; "nvfp4", groups of 16, scale
        being the factor over their E4M3 scales; "mxfp4" or "mxfp8", groups of 32.

        Integers reach to 127.5 steps, as in compressed-tensors, so that all 256 codes are used.

        Raises:
            ValueError: the name is unknown, or there must be a scale, or must not.
        """
        forms = {
            "int8": cls(Integer(8, signed=True), 127.5, -1, scale),
            "fp8_e4m3": cls(E4M3, E4M3.largest, -1, scale),
            "nvfp4": cls(E2M1, E2M1.largest, 16, scale, E4M3),
            "mxfp4": cls(E2M1, E2M1.limit, 32, None, PowerOfTwo()),
            "mxfp8": cls(E4M3, E4M3.limit, 32, None, PowerOfTwo()),
        }
        if name not in forms:
            raise ValueError(f"unknown activation quantiser {name!r}; known: {', '.join(forms)}")
        if (name == "nvfp4" and scale is None) or (name.startswith("mx") and scale is not None):
            raise ValueError(f"the activation quantiser {name} {'needs a' if scale is None else 'takes no'} scale")
        if scale is not None and (scale.dtype != torch.float32 or scale.dim() or not scale > 0):
            raise ValueError(f"the scale of an activation quantiser is one float32 > 0, got {scale}")
        return forms[name]

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., features) -> the same shape and dtype, rounded."""
        features, given = x.shape[-1], x.detach().float()
        group = features if self.group == -1 else self.group
        with torch.no_grad():
            groups = pad(given, (0, -features % group)).unflatten(-1, (-1, group))
            scale = self.scales(groups.abs().amax(-1, keepdim=True))
            rounded = self.codebook.lookup(self.codebook.nearest(groups / scale)) * scale
            rounded = rounded.flatten(-2)[..., :features].to(x.dtype)
        # Adding an exact zero that carries the gradient: the rounded values stay what they are (and NaN stays NaN).
        return rounded + (x - x.detach())

    def scales(self, absmax: Tensor) -> Tensor:
        """absmax (...) float32 -> scales > 0, of its shape."""
        if self.scale is not None and self.scale_codebook is None:
            return self.scale.expand(absmax.shape)
        wanted = absmax / self.largest
        if isinstance(self.scale_codebook, PowerOfTwo):
            return power_above(wanted)
        wanted = wanted.masked_fill(wanted == 0, 1)
        if self.scale_codebook is None or self.scale is None:
            return wanted
        codes = self.scale_codebook.nearest(wanted / self.scale).clamp(min=1)  # code 0 is zero
        return self.scale_codebook.lookup(codes) * self.scale

    def tensors(self) -> dict[str, Tensor]:
        scale = {} if self.scale is None else {"scale": self.scale}
        return scale | {f"codebook.{name}": t for name, t in self.codebook.tensors().items()}

    def spec(self) -> dict[str, Any]:
        book = None if self.scale_codebook is None else self.scale_codebook.spec()
        spec = {"codebook": self.codebook.spec(), "largest": self.largest, "group": self.group}
        return spec | {"scale_codebook": book}

    @classmethod
    def from_tensors(cls, spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ActivationQuantiser:
        return cls(
            scalar_codebook(spec["codebook"], within("codebook", tensors)),
            spec["largest"],
            spec["group"],
            tensors.get("scale"),
            None if spec["scale_codebook"] is None else scalar_codebook(spec["scale_codebook"], {}),
        )


def scalar_codebook(spec: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Codebook:
    book = read_codebook(spec, tensors)
    if isinstance(book, Vectors):
        raise ValueError("an activation quantiser rounds single numbers, not vectors")
    return book
