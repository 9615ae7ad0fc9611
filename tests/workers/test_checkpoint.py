from __future__ import annotations

import errno
import io
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from torch import Tensor

from pare.workers import checkpoint as module
from pare.workers.blobs import LocalBlobs, StoreError
from pare.workers.checkpoint import NO_CHECKPOINT, Checkpoint, block_piece, resume_blocks, save_blocks
from pare.workers.hidden_states import HiddenStates
from pare.workers.run import classify

PREFIX = "checkpoints/abc"


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path)


def same(one: Any, other: Any) -> bool:
    """Equal in type, structure and every bit."""
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def files(blobs: LocalBlobs) -> list[Path]:
    return sorted(path for path in (blobs.root / PREFIX).rglob("*") if path.is_file())


def test_another_attempt_reads_what_was_saved_last_bit_for_bit(blobs: LocalBlobs) -> None:
    state = {
        "tensors": [torch.randn(3, 4), torch.randn(5).bfloat16(), torch.arange(3, dtype=torch.uint8), torch.tensor(2.5)],
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}, 7: {}}, "groups": [{"betas": (0.9, 0.999), "fused": None}]},
        "numbers": [0.1 + 0.2, 2**70, True, "text"],
    }
    checkpoint = Checkpoint(blobs, PREFIX)
    checkpoint.save({"older": 1})
    checkpoint.save(state)

    found = Checkpoint(blobs, PREFIX).latest()

    assert found is not None
    assert same(found, state)


def test_a_slice_is_saved_without_the_tensor_that_it_is_a_slice_of(blobs: LocalBlobs) -> None:
    Checkpoint(blobs, PREFIX).save({"slice": torch.zeros(1_000_000)[:10]})

    assert files(blobs)[0].stat().st_size < 10_000


def test_nothing_is_found_where_nothing_was_saved_or_only_under_another_prefix(blobs: LocalBlobs) -> None:
    Checkpoint(blobs, PREFIX + "def").save({"number": 1})

    checkpoint = Checkpoint(blobs, PREFIX)
    assert checkpoint.latest() is None
    assert checkpoint.piece("a") is None
    checkpoint.clear()
    assert Checkpoint(blobs, PREFIX + "def").latest() == {"number": 1}


def test_the_last_two_states_are_kept_however_many_there_were(blobs: LocalBlobs) -> None:
    for number in range(12):
        Checkpoint(blobs, PREFIX).save({"number": number})  # each from a new attempt

    assert [path.name[:8] for path in files(blobs)] == ["00000011", "00000012"]
    assert Checkpoint(blobs, PREFIX).latest() == {"number": 11}


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [tear, flip_a_bit, empty])
def test_a_damaged_state_is_left_out_and_the_one_before_is_used(
    blobs: LocalBlobs, damage: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Checkpoint(blobs, PREFIX)
    for number in (1, 2):
        checkpoint.save({"number": number, "tensor": torch.full((1000,), number)})
    newest = files(blobs)[-1]
    damage(newest)

    found = Checkpoint(blobs, PREFIX).latest()

    assert found is not None
    assert found["number"] == 1
    assert f"{newest.name} differs from its digest and is not used" in capfd.readouterr().err
    # The intact one must not make room for the next save.
    Checkpoint(blobs, PREFIX).save({"number": 3})
    damage(files(blobs)[-1])
    assert (Checkpoint(blobs, PREFIX).latest() or {})["number"] == 1


def test_without_an_intact_state_the_task_starts_anew(blobs: LocalBlobs) -> None:
    checkpoint = Checkpoint(blobs, PREFIX)
    for number in (1, 2):
        checkpoint.save({"number": number})
    for path in files(blobs):
        tear(path)

    assert Checkpoint(blobs, PREFIX).latest() is None


def test_a_file_with_code_in_it_is_refused_even_with_the_right_digest(blobs: LocalBlobs, tmp_path: Path) -> None:
    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (tmp_path / "was-run",)

    buffer = io.BytesIO()
    torch.save({"code": Code()}, buffer)
    data = buffer.getvalue()
    blobs.write(f"{PREFIX}/00000001-{blake3(data).hexdigest()}.pt", data)

    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        Checkpoint(blobs, PREFIX).latest()
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("value", [np.float64(1), {1, 2}, Path("a"), torch.float32])
def test_what_could_not_be_read_back_is_refused_when_it_is_saved(blobs: LocalBlobs, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"state\['a'\]\[1\] is a {type(value).__name__}"):
        Checkpoint(blobs, PREFIX).save({"a": [1, value]})
    assert files(blobs) == []


def test_a_piece_is_made_and_written_once_and_damage_to_it_is_seen(blobs: LocalBlobs) -> None:
    made: list[str] = []

    def make(name: str) -> Any:
        return lambda: made.append(name) or {"of": name, "tensor": torch.ones(1000)}

    for names in ("a", "ab", "abc"):
        Checkpoint(blobs, PREFIX).save({"names": names}, {name: make(name) for name in names})

    assert made == ["a", "b", "c"]
    checkpoint = Checkpoint(blobs, PREFIX)
    assert checkpoint.latest() == {"names": "abc"}
    assert [(checkpoint.piece(name) or {})["of"] for name in "abc"] == ["a", "b", "c"]
    flip_a_bit(next(path for path in files(blobs) if path.name.startswith("b-")))
    assert checkpoint.piece("b") is None
    checkpoint.save({"names": "abc"}, {name: make(name) for name in "abc"})
    assert made[3:] == ["b"]
    assert checkpoint.piece("b") is not None


def test_pieces_go_with_the_last_state_that_builds_upon_them(blobs: LocalBlobs) -> None:
    def save(checkpoint: Checkpoint, names: str) -> str:
        checkpoint.save({"names": names}, {name: lambda: {"a": 1} for name in names})
        return "".join(path.name[0] for path in files(blobs) if path.parent.name == "pieces")

    checkpoint = Checkpoint(blobs, PREFIX)
    assert [save(checkpoint, names) for names in ("a", "ab", "bc", "cd")] == ["a", "ab", "abc", "bcd"]
    # A new attempt does not know what the state builds upon that it finds; with its second save that state is gone.
    checkpoint = Checkpoint(blobs, PREFIX)
    assert [save(checkpoint, names) for names in ("d", "de", "ef")] == ["bcd", "de", "def"]
    assert checkpoint.latest() == {"names": "ef"}


def test_a_state_is_written_after_the_pieces_that_it_builds_upon(blobs: LocalBlobs) -> None:
    def fails() -> dict[str, Any]:
        raise RuntimeError("no piece")

    checkpoint = Checkpoint(blobs, PREFIX)
    checkpoint.save({"blocks": 0})
    with pytest.raises(RuntimeError, match="no piece"):
        checkpoint.save({"blocks": 1}, {"a": fails})
    assert checkpoint.latest() == {"blocks": 0}


STATES = [torch.randn(2, 3), torch.randn(2, 3).bfloat16(), torch.randn(1, 3)]


def test_blocks_are_handed_back_in_order_with_what_the_next_one_reads(blobs: LocalBlobs, tmp_path: Path) -> None:
    checkpoint = Checkpoint(blobs, PREFIX)
    for blocks in range(4):
        pieces = {block_piece(i): (lambda i=i: {"block": i}) for i in range(blocks)}
        hidden = HiddenStates(tmp_path, limit=0).extend(x + blocks for x in STATES)
        save_blocks(checkpoint, blocks, hidden, pieces, more="x")
        hidden.clear()
    kept = [path.name.partition("-")[0] for path in files(blobs)]
    states = [f"hidden_{blocks:03d}_{i:04d}" for blocks in (2, 3) for i in range(3)]
    assert kept == ["00000003", "00000004", "block_000", "block_001", "block_002", *states]

    seen: list[Any] = []
    hidden = HiddenStates()
    start, state = resume_blocks(Checkpoint(blobs, PREFIX), lambda index, piece: seen.append((index, piece)), hidden)

    assert (start, state["more"]) == (3, "x")
    assert seen == [(i, {"block": i}) for i in range(3)]
    assert same([*hidden], [x + 3 for x in STATES])


@pytest.mark.parametrize("piece", ["block_001", "hidden_003_0001"])
def test_a_damaged_piece_means_a_start_from_nothing(blobs: LocalBlobs, piece: str) -> None:
    pieces = {block_piece(i): (lambda i=i: {"block": i}) for i in range(3)}
    save_blocks(Checkpoint(blobs, PREFIX), 3, HiddenStates().extend(STATES), pieces)
    tear(next(path for path in files(blobs) if path.name.startswith(piece)))

    hidden = HiddenStates()
    assert resume_blocks(Checkpoint(blobs, PREFIX), lambda index, piece: None, hidden) == (0, {})
    assert len(hidden) == 0
    assert files(blobs) == []
    assert resume_blocks(NO_CHECKPOINT, lambda index, piece: None, hidden) == (0, {})


def test_clear_leaves_nothing_behind(blobs: LocalBlobs) -> None:
    checkpoint = Checkpoint(blobs, PREFIX)
    for number in (1, 2):
        checkpoint.save({"number": number}, {"piece": lambda: {"a": 1}})
    assert len(files(blobs)) == 3

    checkpoint.clear()

    assert files(blobs) == []


def test_a_full_disk_ends_the_task_as_such_and_what_was_saved_before_holds(blobs: LocalBlobs) -> None:
    checkpoint = Checkpoint(blobs, PREFIX)
    checkpoint.save({"number": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StoreError, match=f"store {blobs.root}, writing {PREFIX}/00000002-.*: it is full") as error:
            checkpoint.save({"number": 2, "tensor": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert error.value.errno == errno.EFBIG
    assert [path.name[:8] for path in files(blobs)] == ["00000001"]
    assert Checkpoint(blobs, PREFIX).latest() == {"number": 1}


def test_no_space_left_is_a_failure_of_class_disk_full(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pare.workers.blobs.write_synced", full)
    with pytest.raises(StoreError) as error:
        Checkpoint(blobs, PREFIX).save({"number": 1})
    assert classify(error.value)["failure"] == "disk_full"


def test_a_save_is_due_after_the_interval_and_later_where_saving_is_slow(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    checkpoint = Checkpoint(blobs, PREFIX)
    now = 129.9
    assert not checkpoint.due()
    assert checkpoint.due(every_s=29)
    now = 130.0
    assert checkpoint.due()

    def takes_ten_seconds() -> dict[str, Any]:
        nonlocal now
        now += 10
        return {}

    checkpoint.save({}, {"slow": takes_ten_seconds})
    now += 89
    assert not checkpoint.due()
    now += 1
    assert checkpoint.due()


def test_by_default_a_task_keeps_nothing_and_is_never_asked_to() -> None:
    NO_CHECKPOINT.save({"number": 1})
    assert NO_CHECKPOINT.latest() is None
    assert NO_CHECKPOINT.piece("a") is None
    assert not NO_CHECKPOINT.due(0)
    NO_CHECKPOINT.clear()
