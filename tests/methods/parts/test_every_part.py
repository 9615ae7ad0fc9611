"""What every registered part keeps, asked of it or not. A part joins by one line in `EXAMPLES`."""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pare.methods.ops.normal_float import nf4
from pare.methods.parts.codebooks import Integer, Table
from pare.methods.parts.codes import Codes, Flat, Rows
from pare.methods.parts.formula import PARTS, Dense, Formula, LowRank, Part, load_parts, read_part
from pare.methods.parts.masked import Masked

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32 - 1)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@st.composite
def grouped_codes(draw: st.DrawFn) -> Codes:
    shape, seed, bits = draw(SHAPES), draw(SEEDS), draw(st.integers(1, 8))
    group = draw(st.sampled_from([-1, 1, 16, 64]))
    groups = 1 if group == -1 else ceil(shape[1] / group)
    g_idx = None
    if group != -1 and draw(st.booleans()):
        g_idx = (torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)) // group).int()
    book = draw(st.sampled_from([Integer(bits, True), Integer(bits, False), Table(random((2**bits,), seed).sort().values)]))
    zero = random_codes(bits, (shape[0], groups), seed) if draw(st.booleans()) else None
    scale = random((shape[0], groups), seed, draw(FLOATS))
    return Codes.of(random_codes(bits, shape, seed), book, Rows(group, g_idx), scale, zero)


@st.composite
def flat_codes(draw: st.DrawFn) -> Codes:
    shape, seed = draw(SHAPES), draw(SEEDS)
    if draw(st.booleans()):
        return nf4(random(shape, seed), draw(st.sampled_from([4, 32, 64])), draw(st.booleans()))
    scale = random((ceil(shape[0] * shape[1] / 32),), seed, draw(FLOATS))
    return Codes.of(random_codes(2, shape, seed), Integer(2, True), Flat(32), scale, offset=torch.tensor(0.5))


@st.composite
def masked(draw: st.DrawFn) -> Masked:
    shape, seed = draw(SHAPES), draw(SEEDS)
    keep = random(shape, seed) > draw(st.sampled_from([-9.0, -0.5, 0.0, 1.0]))
    keep[0, 0] = True  # a part of no weights has no shape
    kept = int(keep.sum())
    if draw(st.booleans()):
        return Masked.of(keep, random((kept,), seed, draw(FLOATS)))
    scale = random((ceil(kept / 32),), seed, draw(FLOATS))
    return Masked.of(keep, Codes.of(random_codes(4, (1, kept), seed), Integer(4, True), Flat(32), scale))


EXAMPLES: dict[str, st.SearchStrategy[Part]] = {
    "dense": st.builds(lambda shape, seed, dtype: Dense(random(shape, seed, dtype)), SHAPES, SEEDS, FLOATS),
    "low_rank": st.builds(
        lambda shape, rank, seed, dtype: LowRank(
            random((rank, shape[1]), seed, dtype), random((shape[0], rank), seed + 1, dtype), scale=2.0
        ),
        SHAPES,
        st.integers(1, 5),
        SEEDS,
        FLOATS,
    ),
    "codes": grouped_codes() | flat_codes(),
    "masked": masked(),
}


def every_part(test: Callable[[Part], None]) -> Callable[..., None]:
    """Runs `test` over examples of each kind; a kind that has none fails."""

    @pytest.mark.parametrize("kind", sorted(load_parts()))
    def run(kind: str) -> None:
        assert kind in EXAMPLES, f"part {kind!r} ({PARTS[kind].__module__}) has no strategy: add one to EXAMPLES"

        @settings(max_examples=100, deadline=None)
        @given(EXAMPLES[kind])
        def over_examples(part: Part) -> None:
            assert part.kind == kind
            test(part)

        over_examples()

    return run


def check_same(a: Part, b: Part) -> None:
    """Equal to the last bit in all that is stored. A matrix product of it may round by where its factors lie in memory."""
    assert a.shape == b.shape
    assert a.spec() == b.spec()
    assert a.tensors().keys() == b.tensors().keys()
    for name, t in a.tensors().items():
        assert t.dtype == b.tensors()[name].dtype
        assert torch.equal(t, b.tensors()[name])
    torch.testing.assert_close(a.materialise(), b.materialise(), rtol=1e-6, atol=1e-6)


def check_product(y: torch.Tensor, x: torch.Tensor, dense: torch.Tensor) -> None:
    """y is x @ dense.T up to the rounding of its terms, which may be far larger than their sum."""
    terms = float((x.abs() @ dense.abs().T).max())
    torch.testing.assert_close(y, x @ dense.T, rtol=1e-5, atol=1e-6 * (terms + 1))


@every_part
def test_applying_is_multiplying_with_the_dense_weight(part: Part) -> None:
    x = random((2, 3, part.shape[1]), 7)
    dense = part.materialise()
    assert dense.dtype == torch.float32
    assert tuple(dense.shape) == part.shape
    check_product(part.apply(x), x, dense)


@every_part
def test_a_file_brings_it_back_bit_for_bit_and_holds_exactly_its_bytes(part: Part) -> None:
    with TemporaryDirectory() as directory:
        file = Path(directory) / "part.safetensors"
        save_file(part.tensors(), file)
        again = read_part(part.spec(), load_file(file))
        with safe_open(file, framework="pt") as opened:
            header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
            assert set(opened.keys()) == set(part.tensors())
        assert file.stat().st_size - header == part.nbytes
    check_same(part, again)


@every_part
def test_logical_bits_are_the_bytes_less_some_padding(part: Part) -> None:
    padding = part.nbytes * 8 - part.logical_bits
    assert 0 <= padding < 32 * sum(part.shape) * 70


@every_part
def test_moving_it_to_a_device_keeps_it(part: Part) -> None:
    check_same(part, part.to("cpu"))


@every_part
def test_a_formula_adds_its_parts(part: Part) -> None:
    formula = Formula([part, Dense(torch.ones(part.shape))], "add")
    x = random((3, part.shape[1]), 1)
    assert torch.equal(formula.materialise(), part.materialise() + 1)
    check_product(formula.apply(x), x, formula.materialise())
    again = Formula.from_tensors(formula.spec(), formula.tensors())
    assert again.op == "add"
    assert torch.equal(again.materialise(), formula.materialise())
    assert formula.nbytes == part.nbytes + 4 * part.shape[0] * part.shape[1]


def test_a_part_without_examples_makes_the_suite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "forgotten", Dense)
    with pytest.raises(AssertionError, match=r"'forgotten' .* has no strategy"):
        test_moving_it_to_a_device_keeps_it("forgotten")  # type: ignore[arg-type]
