"""What every registered part keeps, asked of it or not. A part joins by one line in `EXAMPLES`."""

import json
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
from pare.methods.parts.blocks import Blocks
from pare.methods.parts.codebooks import Integer, Minifloat, PowerOfTwo, Table, Ternary, Vectors, binary, fp4
from pare.methods.parts.codebooks import nf4 as nf4_table
from pare.methods.parts.codes import Codes, Flat, Rows, Tiles
from pare.methods.parts.formula import PARTS, Dense, Formula, LowRank, Part, load_parts, read_part, reading
from pare.methods.parts.linear import FormulaLinear
from pare.methods.parts.masked import Indexed, Masked, NofM
from pare.methods.parts.references import Reference
from pare.methods.parts.transforms import Diagonal, Hadamard, Kronecker, Permutation, Product

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 70))
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32 - 1)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


@st.composite
def codes(draw: st.DrawFn) -> Codes:
    """Codes of numbers, of every codebook, under every index map and kind of scale."""
    shape, seed, bits = draw(SHAPES), draw(SEEDS), draw(st.integers(1, 8))
    index = draw(st.sampled_from([Rows(-1), Rows(1), Rows(16), Rows(64), Tiles(2, 16), Tiles(-1, 1), Tiles(-1, -1), Flat(32)]))
    if isinstance(index, Rows) and index.group != -1 and draw(st.booleans()):
        g_idx = (torch.randperm(shape[1], generator=torch.Generator().manual_seed(seed)) // index.group).int()
        index = Rows(index.group, g_idx)
    books = [Integer(bits, True), Integer(bits, False), Table(random((2**bits,), seed, draw(FLOATS))), Ternary()]
    books += [
        Table(random((shape[0], 2**bits), seed, draw(FLOATS))),
        PowerOfTwo(),
        Minifloat(4, 3, "nan"),
        Minifloat(1, 1, "none"),
    ]
    book = draw(st.sampled_from(books))
    if isinstance(index, Flat):
        book = draw(st.sampled_from([Integer(2, True), nf4_table(), fp4(), binary(), Ternary(), Minifloat(2, 1, "none")]))
    groups = index.scale_shape(shape)
    takes_zero = not isinstance(index, Flat) and isinstance(book, Integer)
    zero = random_codes(book.bits, groups, seed) if takes_zero and draw(st.booleans()) else None
    scale: torch.Tensor | Part = random(groups, seed, draw(FLOATS))
    if draw(st.booleans()):
        scale = torch.tensor(0.5)
    elif draw(st.booleans()) and len(groups) == 2:
        levels = Minifloat(4, 3, "nan").nearest(random(groups, seed))
        scale = Codes.of(levels, Minifloat(4, 3, "nan"), Rows(-1), torch.tensor(0.25))
    offset = torch.tensor(0.5) if draw(st.booleans()) else None
    made = Ternary().nearest(random(shape, seed)) if isinstance(book, Ternary) else random_codes(book.bits, shape, seed) & 125
    return Codes.of(made, book, index, scale, zero, offset)


@st.composite
def codes_of_vectors(draw: st.DrawFn) -> Codes:
    shape, seed, bits, d = draw(SHAPES), draw(SEEDS), draw(st.sampled_from([1, 3, 8, 9, 10])), draw(st.integers(1, 5))
    values = random(draw(st.sampled_from([(2**bits, d), (2, 2**bits, d)])), seed, draw(FLOATS))
    book = Vectors(values, draw(st.sampled_from(["row", "column"])))
    index = draw(st.sampled_from([Rows(-1), Rows(16), Tiles(-1, 1)]))
    made = torch.randint(0, 2**bits, book.code_shape(shape), generator=torch.Generator().manual_seed(seed))
    return Codes.of(made, book, index, random(index.scale_shape(shape), seed, draw(FLOATS)), shape=shape)


@st.composite
def normal_floats(draw: st.DrawFn) -> Codes:
    return nf4(random(draw(SHAPES), draw(SEEDS)), draw(st.sampled_from([4, 32, 64])), draw(st.booleans()))


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


@st.composite
def indexed(draw: st.DrawFn) -> Indexed:
    like = draw(masked())
    return Indexed.of(like.keep(), like.values)


@st.composite
def n_of_m(draw: st.DrawFn) -> NofM:
    n, m = draw(st.sampled_from([(2, 4), (4, 8), (1, 4), (2, 16), (8, 16), (1, 2)]))
    (out, groups), seed = draw(st.tuples(st.integers(1, 9), st.integers(1, 9))), draw(SEEDS)
    order = random((out, groups, m), seed).argsort(-1).argsort(-1)
    shape = (out, groups * n)
    scale = random((out, 1), seed, draw(FLOATS))
    values = Codes.of(random_codes(4, shape, seed), Integer(4, True), Rows(-1), scale)
    return NofM.of((order < n).flatten(1), values if draw(st.booleans()) else random((shape[0] * shape[1],), seed), n, m)


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    rows, columns, r, c, seed = *(draw(st.integers(1, 5)) for _ in range(4)), draw(SEEDS)
    pattern = draw(st.sampled_from(["diagonal", "lower", "upper", "any"]))
    stays = random((rows, columns), seed) > 0
    stays[0, 0] = True
    count = {"diagonal": rows, "any": int(stays.sum())}.get(pattern, rows * (rows + 1) // 2)
    values = random((count * r, c), seed, draw(FLOATS))
    operand = Codes.of(random_codes(3, (count * r, c), seed), Integer(3, True), Rows(-1), random((count * r, 1), seed))
    shape = (rows * r, (columns if pattern == "any" else rows) * c)
    return Blocks.of(shape, draw(st.sampled_from([values, operand])), stays if pattern == "any" else pattern, rows)


OTHERS = {"other.weight": Formula([Dense(random((9, 70), 5)), LowRank(random((2, 70), 6), random((9, 2), 7))])}
"""Where the references of examples lead."""


@st.composite
def references(draw: st.DrawFn) -> Part:
    if draw(st.booleans()):
        part: Part = Reference("other.weight", (9, 70))
    else:
        (out, columns), top, left = draw(SHAPES), draw(st.integers(0, 8)), draw(st.integers(0, 69))
        rows, across = (
            (min(top, 9 - out), min(top, 9 - out) + out),
            (min(left, 70 - columns), min(left, 70 - columns) + columns),
        )
        part = Reference("other.weight", (out, columns), rows, across)
    part.resolve(OTHERS.__getitem__)
    return part


def permutation(n: int, seed: int) -> Permutation:
    return Permutation(torch.randperm(n, generator=torch.Generator().manual_seed(seed)).int())


SIZES = st.integers(1, 70)
DENSE = st.builds(lambda shape, seed, dtype: Dense(random(shape, seed, dtype)), SHAPES, SEEDS, FLOATS)


@st.composite
def products(draw: st.DrawFn) -> Product:
    """With a reference within it: a rotation that weights share."""
    middle, seed = draw(DENSE), draw(SEEDS)
    columns = middle.shape[1]
    shared = Reference("other.weight", (columns, 70), (0, columns), None) if columns <= 9 else permutation(columns, seed)
    product = Product([Diagonal(random((middle.shape[0],), seed)), middle, permutation(columns, seed), shared])
    product.resolve(OTHERS.__getitem__)
    return product


EXAMPLES: dict[str, st.SearchStrategy[Part]] = {
    "dense": DENSE,
    "low_rank": st.builds(
        lambda shape, rank, seed, dtype: LowRank(
            random((rank, shape[1]), seed, dtype), random((shape[0], rank), seed + 1, dtype), scale=2.0
        ),
        SHAPES,
        st.integers(1, 5),
        SEEDS,
        FLOATS,
    ),
    "codes": codes() | codes_of_vectors() | normal_floats(),
    "masked": masked(),
    "indexed": indexed(),
    "n_of_m": n_of_m(),
    "blocks": blocks(),
    "reference": references(),
    "diagonal": st.builds(lambda n, seed, dtype: Diagonal(random((n,), seed, dtype)), SIZES, SEEDS, FLOATS),
    "permutation": st.builds(permutation, SIZES, SEEDS),
    "hadamard": st.builds(Hadamard.of, SIZES, st.integers(0, 99), st.booleans()),
    "kronecker": st.builds(Kronecker, DENSE, st.builds(Hadamard.of, st.integers(1, 8), st.integers(0, 9))),
    "product": products(),
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
        again = read_part(json.loads(json.dumps(part.spec())), load_file(file))
        again.resolve(OTHERS.__getitem__)
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
    again = Formula.from_tensors(formula.spec(), formula.tensors()).resolve(OTHERS.__getitem__)
    assert again.op == "add"
    assert torch.equal(again.materialise(), formula.materialise())
    assert formula.nbytes == part.nbytes + 4 * part.shape[0] * part.shape[1]


@every_part
def test_a_formula_puts_it_between_transforms_and_keeps_it_in_a_file(part: Part) -> None:
    out, columns = part.shape
    added = reading(LowRank(random((1, columns), 3), random((out, 1), 4)), "x")
    formula = Formula([part, added], left=Hadamard.of(out, 1), right=Diagonal(random((columns,), 2)))
    assert formula.right is not None
    assert formula.left is not None
    dense = formula.left.materialise() @ part.materialise() @ formula.right.materialise() + added.materialise()
    torch.testing.assert_close(formula.materialise(), dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max() + 1))
    x = random((3, columns), 1)
    terms = float((x.abs() @ formula.right.values.abs().diag() @ part.materialise().abs().T).sum(-1).max())  # type: ignore
    torch.testing.assert_close(formula.apply(x), x @ dense.T, rtol=1e-5, atol=1e-6 * (terms + 10))
    again = Formula.from_tensors(json.loads(json.dumps(formula.spec())), formula.tensors()).resolve(OTHERS.__getitem__)
    assert torch.equal(again.materialise(), formula.materialise())
    assert again.to("cpu").spec() == formula.spec()
    assert formula.nbytes == sum(p.nbytes for p in formula.everything())
    assert formula.logical_bits == sum(p.logical_bits for p in formula.everything())


@every_part
def test_training_it_in_a_linear_layer_gives_the_gradients_of_the_dense_weight(part: Part) -> None:
    layer = FormulaLinear(Formula([part]))
    x, onto = random((3, part.shape[1]), 1).requires_grad_(), random((3, part.shape[0]), 2)
    through, of_dense = ((y * onto).sum() for y in (layer(x), x @ layer.formula().materialise().T))
    wanted = [x, *layer.parameters()]
    one, two = (torch.autograd.grad(loss, wanted, allow_unused=True) for loss in (through, of_dense))
    for a, b in zip(one, two, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(
                a, b, rtol=2e-2 if a.dtype != torch.float32 else 1e-4, atol=1e-3 * float(b.abs().max() + 1)
            )
    check_same(Formula([part]).parts[0], layer.written().resolve(OTHERS.__getitem__).parts[0])


def test_a_part_without_examples_makes_the_suite_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "forgotten", Dense)
    with pytest.raises(AssertionError, match=r"'forgotten' .* has no strategy"):
        test_moving_it_to_a_device_keeps_it("forgotten")  # type: ignore[arg-type]
