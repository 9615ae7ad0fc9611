import pytest
import torch
from torch import nn

from pare.methods.anatomy.views import View, name_of, parse, view, weight_of


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.weight", ("a.weight", None, False)),
        ("a.experts[12]", ("a.experts", 12, False)),
        ("a.weight^T", ("a.weight", None, True)),
        ("a.experts[0]^T", ("a.experts", 0, True)),
    ],
)
def test_a_name_says_which_parameter_and_which_view_of_it(name: str, said: tuple[str, int | None, bool]) -> None:
    assert parse(name) == View(*said)
    assert name_of(*said) == name
    assert parse(name).is_plain == (name == "a.weight")


@pytest.mark.parametrize("name", ["", "a^T[3]", "a[]", "a[-1]", "a[x]", "a[1][2]", "a^Tb", "a:0"])
def test_other_names_are_refused_with_what_is_allowed(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no name of a weight. Allowed: PARAM, PARAM\[3\]"):
        parse(name)


def test_what_is_written_to_a_view_is_written_to_the_parameter() -> None:
    model = nn.Module()
    model.stack = nn.Parameter(torch.zeros(3, 2, 4))
    turned = weight_of(model, "stack[1]^T")
    assert turned.shape == (4, 2)
    with torch.no_grad():
        turned[3, 0] = 5.0
    assert model.stack[1, 0, 3] == 5.0
    assert model.stack.sum() == 5.0


def test_a_matrix_that_is_not_there_is_refused() -> None:
    for shape in [(3, 2, 4), (8, 4)]:
        with pytest.raises(ValueError, match=r"x\[3\]: there is no matrix 3 in a tensor of shape"):
            view(torch.zeros(shape), "x[3]")
