import pytest
import torch

from pare.methods.parts.formula import Dense, Formula, LowRank, reading
from pare.methods.parts.transforms import Diagonal, Hadamard, Kronecker, Permutation, Product


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("n", [1, 2, 12, 64, 576])
def test_a_hadamard_transform_is_orthogonal_and_its_transpose_brings_back_what_it_was_given(n: int) -> None:
    part, x = Hadamard.of(n, seed=5), normal(3, n)
    torch.testing.assert_close(part.materialise() @ part.materialise().T, torch.eye(n))
    torch.testing.assert_close(part.transpose().apply(part.apply(x)), x)
    torch.testing.assert_close(part.transpose().materialise(), part.materialise().T)
    assert part.nbytes == -(-n // 8)
    assert not torch.equal(Hadamard.of(64, 1).materialise(), Hadamard.of(64, 2).materialise())


def test_without_signs_it_is_the_matrix_of_walsh_and_hadamard_down_the_diagonal() -> None:
    four = torch.tensor([[1.0, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    plus = torch.full((2,), 255, dtype=torch.uint8)
    assert torch.equal(Hadamard(12, plus).materialise(), torch.block_diag(four, four, four))
    assert Hadamard(12, plus).macs == 12 * 2


def test_a_dense_matrix_beside_a_hadamard_one_mixes_all_features() -> None:
    orthogonal = torch.linalg.qr(normal(9, 9)).Q
    part, x = Kronecker(Dense(orthogonal), Hadamard.of(64, 0)), normal(2, 576)
    torch.testing.assert_close(part.apply(x), x @ part.materialise().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(part.apply(x).norm(dim=1), x.norm(dim=1))
    assert part.macs == 9 * 64 * 6 + 81 * 64


def test_small_ones_have_the_expected_numbers() -> None:
    assert Diagonal(torch.tensor([2.0, 3.0])).apply(torch.tensor([1.0, 1.0])).tolist() == [2, 3]
    order = Permutation(torch.tensor([2, 0, 1], dtype=torch.int32))
    assert order.apply(torch.tensor([10.0, 20, 30])).tolist() == [30, 10, 20]
    assert order.materialise().tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert order.macs == 0
    a, b = Dense(torch.tensor([[1.0, 2.0]])), Dense(torch.tensor([[3.0], [4.0]]))
    assert Kronecker(a, b).materialise().tolist() == [[3, 6], [4, 8]]
    assert Product([a, b]).materialise().tolist() == [[11]]
    with pytest.raises(ValueError, match=r"shapes \(1, 2\) and \(1, 2\) do not fit"):
        Product([a, a])


def test_a_rotated_weight_behind_its_rotation_is_the_weight() -> None:
    weight, left, right = normal(16, 24), Hadamard.of(16, 1), Hadamard.of(24, 2)
    rotated = left.materialise().T @ weight @ right.materialise().T
    formula = Formula([Dense(rotated)], left=left, right=right)
    torch.testing.assert_close(formula.materialise(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(formula.apply(normal(3, 24)), normal(3, 24) @ weight.T, rtol=1e-4, atol=1e-5)
    assert formula.shape == (16, 24)
    assert formula.nbytes == 4 * 16 * 24 + 2 + 3
    assert formula.macs == 16 * 24 + 16 * 4 + 24 * 3


def test_transforms_may_change_the_width() -> None:
    down = Dense(normal(4, 24))
    formula = Formula([Dense(normal(16, 4, seed=1))], right=down)
    assert formula.shape == (16, 24)
    torch.testing.assert_close(formula.apply(normal(3, 24)), normal(3, 24) @ formula.materialise().T)
    with pytest.raises(ValueError, match="does not fit parts of shape"):
        Formula([Dense(normal(16, 5))], right=down)


def test_what_is_added_to_a_weight_with_transforms_stands_beside_them() -> None:
    base = Formula([Dense(normal(8, 6))], left=Diagonal(torch.arange(1.0, 9)), right=Hadamard.of(6, 0))
    repair = LowRank(normal(2, 6, seed=1), normal(8, 2, seed=2))
    whole = base.plus(Formula([repair], "add"))
    assert [part.reads for part in whole.parts] == ["q", "x"]
    assert repair.reads == "q"
    torch.testing.assert_close(whole.materialise(), base.materialise() + repair.materialise())
    plain = Formula([Dense(normal(8, 6))]).plus(Formula([repair], "add"))
    assert [part.reads for part in plain.parts] == ["q", "q"]
    assert whole.to("cpu").parts[1].reads == "x"


def test_malformed_formulas_are_refused() -> None:
    dense = Dense(normal(4, 6))
    with pytest.raises(ValueError, match="reads q or x, got 'y'"):
        reading(dense, "y")
    with pytest.raises(ValueError, match=r"parts that read x must have the shape of the weight, \(4, 8\)"):
        Formula([dense, reading(Dense(normal(4, 6)), "x")], right=Dense(normal(6, 8)))
    with pytest.raises(ValueError, match="must have one shape"):
        Formula([dense, Dense(normal(4, 5))])
    with pytest.raises(ValueError, match="must have one shape"):
        Formula([])
    with pytest.raises(ValueError, match="make it dense first"):
        Formula([dense]).plus(Formula([dense], "add", left=Hadamard.of(4, 0)))
