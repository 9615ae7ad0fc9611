import pytest
import torch

from pare.methods.parts.blocks import Blocks
from pare.methods.parts.transforms import Permutation, Product


def test_blocks_stand_on_the_diagonal_or_on_one_side_of_it() -> None:
    numbers = torch.arange(1.0, 7).unsqueeze(1)
    assert Blocks.of((3, 3), numbers[:3], "diagonal", 3).materialise().tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 3]]
    assert Blocks.of((3, 3), numbers, "lower", 3).materialise().tolist() == [[1, 0, 0], [2, 3, 0], [4, 5, 6]]
    assert Blocks.of((3, 3), numbers, "upper", 3).materialise().tolist() == [[1, 2, 3], [0, 4, 5], [0, 0, 6]]
    wide = Blocks.of((2, 6), torch.tensor([[1.0, 2, 3], [4, 5, 6]]), "diagonal", 2)
    assert wide.materialise().tolist() == [[1, 2, 3, 0, 0, 0], [0, 0, 0, 4, 5, 6]]
    assert wide.nbytes == 24
    assert wide.macs == 6


def test_any_tiles_may_stay_at_a_bit_for_each() -> None:
    stays = torch.tensor([[0, 1, 0], [1, 0, 1]]).bool()
    part = Blocks.of((4, 6), torch.tensor([[1.0, 2], [3, 4], [5, 6], [7, 8], [9, 0], [1, 2]]), stays)
    assert part.materialise().tolist() == [[0, 0, 1, 2, 0, 0], [0, 0, 3, 4, 0, 0], [5, 6, 0, 0, 9, 0], [7, 8, 0, 0, 1, 2]]
    assert part.nbytes == 12 * 4 + 1
    assert part.logical_bits == 12 * 32 + 6
    assert part.apply(torch.ones(6)).tolist() == [3, 7, 20, 18]


def test_two_block_diagonals_with_permutations_are_block_shuffle() -> None:
    """Wei et al. (2024), arXiv:2406.16450: P2 diag(B2) P1 diag(B1), P1 sending entry r nb + l to l R + r, P2 back."""
    nb, width, out, generator = 3, 6, 12, torch.Generator().manual_seed(0)
    inner, s = width // nb, out // nb
    b1, b2 = (torch.randn(nb, rows, inner, generator=generator) for rows in (inner, s))
    split = torch.tensor([r * nb + b for b in range(nb) for r in range(inner)]).int()
    join = torch.tensor([b * s + r for r in range(s) for b in range(nb)]).int()
    first = Blocks.of((width, width), b1.flatten(0, 1), "diagonal", nb)
    second = Blocks.of((out, width), b2.flatten(0, 1), "diagonal", nb)
    part = Product([Permutation(join), second, Permutation(split), first])

    x = torch.randn(5, width, generator=generator)
    middle = torch.einsum("tkc,krc->tkr", x.view(5, nb, inner), b1).flatten(1)
    y = torch.einsum("tlr,lsr->tsl", middle.view(5, inner, nb).transpose(1, 2), b2).flatten(1)
    torch.testing.assert_close(part.apply(x), y)
    torch.testing.assert_close(x @ part.materialise().T, y)
    assert part.macs == b1.numel() + b2.numel()
    assert first.nbytes + second.nbytes == 4 * part.macs


def test_blocks_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 x 2 blocks do not tile a weight of shape \(3, 4\)"):
        Blocks.of((3, 4), torch.zeros(3, 2), "diagonal", 2)
    with pytest.raises(ValueError, match=r"lower of 2 x 2 takes blocks of shape \(6, 2\), got \(4, 2\)"):
        Blocks.of((4, 4), torch.zeros(4, 2), "lower", 2)
    with pytest.raises(ValueError, match="diagonal, lower, upper or a mask, got 'band'"):
        Blocks.of((4, 4), torch.zeros(4, 2), "band", 2)
