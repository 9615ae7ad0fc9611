"""Named blobs: whole or not there, created by one caller only."""

from __future__ import annotations

import errno
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from pare.workers import blobs as blobs_module
from pare.workers.blobs import FsspecBlobs, LocalBlobs, StoreError, explained, open_blobs


def test_a_blob_is_read_as_it_was_written_and_replaced(tmp_path: Path) -> None:
    blobs = open_blobs(tmp_path)

    blobs.write("a/b/one", b"1")
    blobs.write("a/b/one", b"2")

    assert blobs.read("a/b/one") == b"2"
    assert blobs.list("a") == ["a/b/one"]
    assert blobs.list("elsewhere") == []


def test_deleting_takes_a_blob_away_and_is_harmless_where_there_is_none(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.write("x", b"1")

    blobs.delete("x")
    blobs.delete("x")

    with pytest.raises(FileNotFoundError):
        blobs.read("x")


def claim(root: str, name: str, start: Any, won: Any) -> None:
    start.wait()
    for i in range(30):
        if LocalBlobs(Path(root)).create(f"leases/{i}", name.encode()):
            won.put((i, name))


def test_of_three_processes_that_create_the_same_blobs_each_is_won_by_one(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, won = context.Barrier(3), context.Queue()
    processes = [context.Process(target=claim, args=(str(tmp_path), f"p{i}", start, won)) for i in range(3)]
    for process in processes:
        process.start()
    winners = dict(won.get(timeout=20) for _ in range(30))
    for process in processes:
        process.join()

    assert won.empty()
    assert {i: LocalBlobs(tmp_path).read(f"leases/{i}").decode() for i in range(30)} == winners


def test_a_write_that_fails_leaves_what_was_there_and_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = LocalBlobs(tmp_path)
    blobs.write("k", b"old")

    def full(handle: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match=f"{tmp_path}.*writing k.*full.*pare gc") as caught:
        blobs.write("k", b"new")

    assert caught.value.errno == errno.ENOSPC
    assert blobs.read("k") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_a_place_beneath_a_file_is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match="not a directory"):
        LocalBlobs(tmp_path / "file").read("k")


def test_a_url_without_conditional_creation_is_refused_and_what_is_allowed_is_named() -> None:
    for url in ("memory://x", "sftp://host/x", "ftp://host/x", "nonsense://x"):
        with pytest.raises(StoreError, match=r"exactly one of several writers.*Allowed: a directory, file://, s3://"):
            open_blobs(url)


def test_credentials_in_a_url_are_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as caught:
        open_blobs("s3://key:geheim@bucket/x")

    assert "geheim" not in str(caught.value)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    def missing(scheme: str, **options: Any) -> None:
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(StoreError, match="pip install gcsfs"):
        open_blobs("gs://bucket/x")


def test_a_file_url_is_a_directory(tmp_path: Path) -> None:
    open_blobs(f"file://{tmp_path}").write("k", b"1")

    assert (tmp_path / "k").read_bytes() == b"1"


class Conflict(Exception):
    """What gcsfs raises: the status as `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(str(code))
        self.code = code


class Flaky:
    """A file system whose conditional writes answer as told."""

    def __init__(self, answers: list[int]) -> None:
        self.answers, self.calls = answers, 0

    def _strip_protocol(self, url: str) -> str:
        return url.split("://")[1]

    def pipe_file(self, path: str, data: bytes, mode: str = "overwrite") -> None:
        self.calls += 1
        answer = self.answers.pop(0)
        if answer:
            raise Conflict(answer)


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [([0], True), ([412], False), ([409, 0], True), ([409, 409, 412], False), ([409] * 4, StoreError), ([500], StoreError)],
)
def test_a_conflict_of_conditional_writes_is_tried_again_and_a_refusal_is_an_answer(
    monkeypatch: pytest.MonkeyPatch, answers: list[int], outcome: Any
) -> None:
    flaky = Flaky(list(answers))
    monkeypatch.setattr(FsspecBlobs, "_fs", flaky)
    monkeypatch.setattr(blobs_module.time, "sleep", lambda s: None)
    blobs = FsspecBlobs("gs://bucket/x")

    if outcome is StoreError:
        with pytest.raises(StoreError, match="creating k"):
            blobs.create("k", b"")
    else:
        assert blobs.create("k", b"") is outcome
    assert flaky.calls == len(answers)


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOSPC, "full"),
        (errno.EDQUOT, "full"),
        (errno.EROFS, "may not write"),
        (errno.EACCES, "may not write"),
        (errno.ENOTDIR, "a file, not a directory"),
        (errno.EIO, "reachable"),
    ],
)
def test_trouble_is_told_with_place_action_and_advice(number: int, says: str) -> None:
    with pytest.raises(StoreError, match=f"store /there, doing it: .*{says}") as caught, explained("/there", "doing it"):
        raise OSError(number, os.strerror(number))

    assert caught.value.errno == number
