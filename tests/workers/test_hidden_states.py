from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pare.workers import hidden_states
from pare.workers.hidden_states import HiddenStates

BYTES = 4 * 2 * 3 * 5
"""Of one batch."""


def batches(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 5, generator=generator) for _ in range(4)]


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("limit", "in_files"), [(0, 4), (2 * BYTES + 7, 2), (4 * BYTES, 0)])
def test_beyond_the_limit_states_are_in_files_and_the_same_to_the_bit(tmp_path: Path, limit: int, in_files: int) -> None:
    with HiddenStates(tmp_path, limit) as states:
        states.extend(batches())
        assert len(states) == 4
        assert len(files(tmp_path)) == in_files
        assert all(map(torch.equal, states, batches()))
        for i, x in enumerate(batches(1)):
            states[i] = x
        assert len(files(tmp_path)) == in_files
        assert sum(path.stat().st_size for path in files(tmp_path)) == in_files * BYTES
        assert all(map(torch.equal, states, batches(1)))
        assert states.held == (4 - in_files) * BYTES
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [lambda x: x.bfloat16(), lambda x: x.half(), lambda x: x.transpose(0, 2), lambda x: x[:, 1:2], lambda x: x[:0]],
    ids=["bfloat16", "float16", "turned", "a-part", "empty"],
)
def test_type_and_shape_come_back(tmp_path: Path, change: Callable[[Tensor], Tensor]) -> None:
    x = change(batches()[0])
    with HiddenStates(tmp_path, limit=-1).extend([x]) as states:
        assert len(files(tmp_path)) == 1
        assert states[0].dtype == x.dtype
        assert torch.equal(states[0], x)


def test_what_is_read_is_memory_of_its_own(tmp_path: Path) -> None:
    with HiddenStates(tmp_path, limit=0).extend(batches()) as states:
        states[1].zero_()
        assert torch.equal(states[1], batches()[1])


def test_the_limit_is_a_part_of_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hidden_states, "free_memory", lambda: 4 * (3 * BYTES))
    with HiddenStates(tmp_path).extend(batches()) as states:
        assert states.held == 3 * BYTES
        assert len(files(tmp_path)) == 1
    everything = HiddenStates().extend(batches())
    assert everything.held == 4 * BYTES, "without a folder all stay in memory"


def test_files_go_when_the_work_fails_or_starts_over(tmp_path: Path) -> None:
    with pytest.raises(KeyError), HiddenStates(tmp_path, limit=0).extend(batches()):
        raise KeyError
    assert not list(tmp_path.iterdir())
    with HiddenStates(tmp_path, limit=BYTES).extend(batches()) as states:
        states.clear()
        assert not list(tmp_path.iterdir())
        assert (len(states), states.held) == (0, 0)
        states.extend(batches(1))
        assert all(map(torch.equal, states, batches(1)))


def test_a_file_that_was_cut_off_is_an_error(tmp_path: Path) -> None:
    with HiddenStates(tmp_path, limit=0).extend(batches()) as states:
        with files(tmp_path)[2].open("r+b") as file:
            file.truncate(50)
        with pytest.raises(OSError, match=f"/2 is {BYTES - 50} bytes shorter than what was written to it"):
            states[2]
