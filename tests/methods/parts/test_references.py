import pytest
import torch

from pare.methods.parts.codebooks import Integer
from pare.methods.parts.codes import Codes, Rows
from pare.methods.parts.formula import Dense, Formula
from pare.methods.parts.references import Reference
from pare.methods.parts.transforms import Product

PARENT = Formula([Dense(torch.arange(12.0).view(3, 4))])


def test_a_tie_costs_no_bytes_and_is_the_other_weight() -> None:
    tied = Formula([Reference("parent", (3, 4))]).resolve({"parent": PARENT}.__getitem__)
    assert torch.equal(tied.materialise(), PARENT.materialise())
    assert torch.equal(tied.apply(torch.ones(4)), PARENT.apply(torch.ones(4)))
    assert (tied.nbytes, tied.logical_bits) == (0, 0)
    assert tied.macs == 12


def test_a_child_views_rows_and_columns_of_its_parent() -> None:
    child = Reference("parent", (2, 2), rows=(1, 3), columns=(0, 2))
    child.resolve({"parent": PARENT}.__getitem__)
    assert child.materialise().tolist() == [[4, 5], [8, 9]]
    rows = Reference("parent", (1, 4), rows=(2, 3))
    rows.resolve({"parent": PARENT}.__getitem__)
    assert rows.materialise().tolist() == [[8, 9, 10, 11]]


def test_references_may_stand_anywhere_in_a_formula_and_follow_it_to_a_device() -> None:
    scales = Reference("parent", (3, 1), rows=(0, 3), columns=(1, 2))
    codes = Product([Reference("square", (3, 3)), Reference("parent", (3, 4))])
    formula = Formula([Codes.of(torch.full((3, 4), 3), Integer(2, True), Rows(-1), resolved(scales)), codes])
    formula.resolve({"parent": PARENT, "square": Formula([Dense(torch.eye(3))])}.__getitem__)
    expected = PARENT.materialise() + PARENT.materialise()[:, 1:2]
    assert torch.equal(formula.materialise(), expected)
    assert set(formula.references()) == {"parent", "square"}
    assert torch.equal(formula.to("cpu").materialise(), expected)


def resolved(part: Reference) -> Reference:
    part.resolve({"parent": PARENT}.__getitem__)
    return part


def test_a_reference_that_leads_nowhere_says_so() -> None:
    with pytest.raises(RuntimeError, match="the reference to parent has not been resolved"):
        Reference("parent", (3, 4)).materialise()
    for wrong in (
        Reference("parent", (3, 5)),
        Reference("parent", (2, 4), rows=(2, 4)),
        Reference("parent", (2, 3), rows=(0, 2)),
    ):
        with pytest.raises(ValueError, match=r"does not fit its shape, \(3, 4\)"):
            wrong.resolve({"parent": PARENT}.__getitem__)
    with pytest.raises(ValueError, match=r"\[0, 3\) is not 2 rows or columns"):
        Reference("parent", (2, 4), rows=(0, 3))
