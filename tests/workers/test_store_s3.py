"""The store in an object store: S3 as moto's server speaks it."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("s3fs")
server_module = pytest.importorskip("moto.server")

from pare.workers.blobs import FsspecBlobs, StoreError  # noqa: E402
from pare.workers.remote_store import RemoteStore  # noqa: E402
from pare.workers.store import ArtifactError, open_store  # noqa: E402

FP = "ab" * 32


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The address of a fresh S3, known to every client by the environment alone."""
    import boto3
    import s3fs

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem.clear_instance_cache()
        boto3.client("s3").create_bucket(Bucket="pare")
        yield f"http://{host}:{port}"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def url(endpoint: str) -> str:
    return f"s3://pare/{uuid.uuid4().hex}"


def publish(
    store: RemoteStore | Any, fingerprint: str = FP, text: str = "hello", result: Any = None
) -> tuple[dict[str, Any], bool]:
    with store.attempt() as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.txt").write_text(text)
        (out / "b.json").write_text('{"n": 1}')
        (out / "empty").touch()
        manifest, mine = store.publish(out, fingerprint, "test", result or {"n": 1}, {"wall_s": 1.0})
        return manifest, mine


def key_of(store: RemoteStore, name: str, fingerprint: str = FP) -> str:
    return f"{store.manifest(fingerprint)['prefix']}/{name}"


def objects(url: str) -> list[str]:
    return FsspecBlobs(url).list("objects")


def test_blobs_are_created_once_listed_read_replaced_and_deleted(url: str) -> None:
    blobs = FsspecBlobs(url)

    assert blobs.create("leases/x", b"me")
    assert not blobs.create("leases/x", b"you")
    assert blobs.read("leases/x") == b"me"
    blobs.write("leases/x", b"anew")
    blobs.write("leases2/y", b"")
    assert blobs.read("leases/x") == b"anew"
    assert blobs.list("leases") == ["leases/x"]
    blobs.delete("leases/x")
    blobs.delete("leases/x")
    assert blobs.list("leases") == []
    with pytest.raises(FileNotFoundError):
        blobs.read("leases/x")


def test_what_one_machine_publishes_another_opens(url: str, tmp_path: Path) -> None:
    here, there = open_store(url, tmp_path / "here"), open_store(url, tmp_path / "there")

    assert publish(here)[1]

    assert there.has(FP)
    assert there.held(FP)
    assert not there.path(FP).exists()
    directory = there.open(FP)
    assert directory == there.path(FP)
    assert (directory / "sub" / "a.txt").read_text() == "hello"
    assert (directory / "empty").read_bytes() == b""
    assert there.manifest(FP)["result"] == {"n": 1}
    assert list(there.artifacts()) == [FP]
    assert not list((there.root / "attempts").iterdir())


def test_the_publishing_machine_does_not_fetch_what_it_made(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url, tmp_path)
    publish(store)
    monkeypatch.setattr(FsspecBlobs, "download", lambda *a: pytest.fail("fetched"))

    assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello"


def test_the_second_of_two_different_attempts_is_dropped_and_noted(url: str, tmp_path: Path) -> None:
    first, second = open_store(url, tmp_path / "1"), open_store(url, tmp_path / "2")
    publish(first)
    before = objects(url)

    manifest, mine = publish(second, text="other")

    assert not mine
    assert manifest["nondeterminism"]["files"] == ["sub/a.txt"]
    assert json.loads(first.blobs.read(f"nondeterminism/{FP}/0.json"))["dropped"] != manifest["digest"]
    assert objects(url) == before
    assert (second.open(FP) / "sub" / "a.txt").read_text() == "hello"


def test_an_attempt_that_loses_the_race_at_the_last_step_takes_its_objects_away(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = open_store(url, tmp_path / "1"), open_store(url, tmp_path / "2")
    upload = FsspecBlobs.upload

    def overtaken(blobs: FsspecBlobs, files: Any) -> None:
        upload(blobs, files)
        monkeypatch.setattr(FsspecBlobs, "upload", upload)
        assert publish(second)[1]

    monkeypatch.setattr(FsspecBlobs, "upload", overtaken)
    manifest, mine = publish(first)

    assert not mine
    assert "nondeterminism" not in manifest
    assert sorted(objects(url)) == sorted(key_of(first, e["path"]) for e in manifest["files"])


def test_a_publication_whose_answer_was_lost_is_ones_own(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url, tmp_path)
    create = FsspecBlobs.create

    def deaf(blobs: FsspecBlobs, key: str, data: bytes) -> bool:
        return create(blobs, key, data) and not key.startswith("manifests/")

    monkeypatch.setattr(FsspecBlobs, "create", deaf)

    assert publish(store)[1]
    assert (open_store(url, tmp_path / "other").open(FP) / "b.json").exists()


def publisher(url: str, cache: str, name: str, start: Any, said: Any) -> None:
    store = open_store(url, Path(cache))
    with store.attempt() as out:
        (out / "who").write_text(name)
        start.wait()
        said.put((name, store.publish(out, FP, "test", {}, {})[1]))


def test_of_three_processes_that_publish_one_artifact_one_wins_and_all_read_its(url: str, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=publisher, args=(url, str(tmp_path / "cache"), f"p{i}", start, said)) for i in range(3)]
    for process in processes:
        process.start()
    outcomes = dict(said.get(timeout=50) for _ in processes)
    for process in processes:
        process.join()

    assert sorted(outcomes.values()) == [False, False, True]
    winner = next(name for name, mine in outcomes.items() if mine)
    assert (open_store(url, tmp_path / "cache").open(FP) / "who").read_text() == winner
    assert (open_store(url, tmp_path / "fresh").open(FP) / "who").read_text() == winner
    assert len(objects(url)) == 1
    assert len(open_store(url, tmp_path).blobs.list("nondeterminism")) == 2


def reader(url: str, cache: str, start: Any, said: Any) -> None:
    store = open_store(url, Path(cache))
    fetched: list[int] = []
    download = FsspecBlobs.download
    FsspecBlobs.download = lambda *a: (fetched.append(1), download(*a))[1]  # type: ignore[method-assign]
    start.wait()
    said.put(((store.open(FP) / "sub" / "a.txt").read_text(), len(fetched)))


def test_readers_of_one_cache_fetch_an_artifact_once(url: str, tmp_path: Path) -> None:
    publish(open_store(url, tmp_path / "author"))
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=reader, args=(url, str(tmp_path / "cache"), start, said)) for _ in range(3)]
    for process in processes:
        process.start()
    heard = [said.get(timeout=50) for _ in processes]
    for process in processes:
        process.join()

    assert [text for text, _ in heard] == ["hello"] * 3
    assert sum(n for _, n in heard) == 1


def test_a_damaged_cache_is_fetched_anew(url: str, tmp_path: Path) -> None:
    publish(open_store(url, tmp_path))
    for damage in (
        lambda f: f.write_text("hellp"),
        lambda f: f.unlink(),
        lambda f: (f.parent.parent / "manifest.json").unlink(),
    ):
        store = open_store(url, tmp_path)
        damage(store.path(FP) / "sub" / "a.txt")

        assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello"
    assert open_store(url, tmp_path).has(FP)


def test_a_cached_artifact_that_is_not_the_one_in_force_is_replaced(url: str, tmp_path: Path) -> None:
    old = open_store(url, tmp_path / "old")
    publish(old)
    other = open_store(url, tmp_path / "other")
    other.quarantine(FP)
    with other.attempt() as out:
        (out / "b.json").write_text('{"n": 1}')
        other.publish(out, FP, "test", {}, {})

    directory = open_store(url, tmp_path / "old").open(FP)

    assert sorted(p.name for p in directory.iterdir()) == ["b.json", "manifest.json"], "files of another result stayed"


@pytest.mark.parametrize("seed", range(6))
def test_no_damage_to_objects_or_manifest_is_ever_accepted(url: str, tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    store = open_store(url, tmp_path / "author")
    assert isinstance(store, RemoteStore)
    publish(store)
    kind = ["flip", "truncate", "missing", "swap", "manifest", "cost"][seed]
    victim = key_of(store, "sub/a.txt")
    content = store.blobs.read(victim)
    if kind == "flip":
        at = draw.randrange(len(content))
        store.blobs.write(victim, content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "truncate":
        store.blobs.write(victim, content[:-1])
    elif kind == "missing":
        store.blobs.delete(victim)
    elif kind == "swap":
        other = key_of(store, "b.json")
        store.blobs.write(victim, store.blobs.read(other))
    else:
        key = f"manifests/ab/{FP}.json"
        text = store.blobs.read(key)
        store.blobs.write(key, text.replace(b'"n": 1', b'"n": 2') if kind == "manifest" else text.replace(b"1.0", b"9.0"))
    reading = open_store(url, tmp_path / "reader")

    assert reading.problems(FP)
    with pytest.raises(ArtifactError, match=r"differs from its digest|was changed") as caught:
        reading.open(FP)

    assert caught.value.fingerprint == FP
    assert not open_store(url, tmp_path / "third").has(FP)
    assert publish(store, text="made anew")[1]
    assert (open_store(url, tmp_path / "third").open(FP) / "sub" / "a.txt").read_text() == "made anew"


def test_a_transfer_that_breaks_once_is_repeated_and_nothing_is_quarantined(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(open_store(url, tmp_path / "author"))
    download, calls = FsspecBlobs.download, []

    def cut(blobs: FsspecBlobs, files: Any) -> None:
        download(blobs, files)
        calls.append(1)
        if len(calls) == 1:
            os.truncate(files[-1][1], 1)

    monkeypatch.setattr(FsspecBlobs, "download", cut)
    store = open_store(url, tmp_path / "reader")

    assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello"
    assert len(calls) == 2
    assert store.blobs.list("quarantine") == []


def test_a_crash_during_upload_leaves_nothing_visible(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Death(BaseException):
        pass

    upload = FsspecBlobs.upload

    def die(blobs: FsspecBlobs, files: Any) -> None:
        upload(blobs, files[:2])
        raise Death

    store = open_store(url, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(FsspecBlobs, "upload", die)
        with pytest.raises(Death):
            publish(store)

    assert not store.has(FP)
    assert list(store.artifacts()) == []
    left = store.leftovers()
    assert sorted(x.kind for x in left) == ["unknown", "unknown"]
    assert all(0 <= x.age_s < 60 for x in left)
    for leftover in left:
        store.discard(leftover)
    assert objects(url) == []
    assert publish(store)[1]
    assert store.leftovers() == []


def test_an_upload_that_fails_takes_back_what_it_put(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = FsspecBlobs.upload

    def fail(blobs: FsspecBlobs, files: Any) -> None:
        upload(blobs, files[:2])
        raise StoreError(5, "the line is cut")

    store = open_store(url, tmp_path)
    monkeypatch.setattr(FsspecBlobs, "upload", fail)

    with pytest.raises(StoreError, match="the line is cut"):
        publish(store)

    assert objects(url) == []


def test_dropped_files_go_the_manifest_and_small_json_stay_and_they_can_be_made_anew(url: str, tmp_path: Path) -> None:
    store, other = open_store(url, tmp_path / "1"), open_store(url, tmp_path / "2")
    publish(store)
    full = store.stored(store.manifest(FP))

    store.drop_files(FP)

    assert store.has(FP)
    assert not store.held(FP)
    assert [(file.bytes, file.light) for file in store.stored(store.manifest(FP))] == [(8, True)]
    assert len(full) == 3
    assert other.read_file(FP, "b.json") == b'{"n": 1}'
    assert other.read_file(FP, "sub/a.txt") is None
    with pytest.raises(ArtifactError, match="dropped"):
        other.open(FP)
    assert store.problems(FP) == []

    assert publish(other)[1]
    assert (other.open(FP) / "sub" / "a.txt").read_text() == "hello"
    assert store.held(FP)


def test_small_files_are_read_without_fetching_the_artifact(url: str, tmp_path: Path) -> None:
    publish(open_store(url, tmp_path / "1"))
    store = open_store(url, tmp_path / "2")

    assert store.read_file(FP, "b.json") == b'{"n": 1}'
    assert store.read_file(FP, "curve.jsonl") is None
    assert store.read_file("cd" * 32, "b.json") is None
    assert not store.path(FP).exists()


def test_presence_of_many_is_found_by_listing(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(url, tmp_path)
    for i in range(3):
        publish(store, f"{i:064x}")
    wanted = {f"{i:064x}" for i in range(40)}
    monkeypatch.setattr(RemoteStore, "has", lambda *a: pytest.fail("asked one by one"))

    assert store.present(wanted) == {f"{i:064x}" for i in range(3)}


def test_a_removed_artifact_leaves_no_object(url: str, tmp_path: Path) -> None:
    store = open_store(url, tmp_path)
    publish(store)

    store.remove(FP)

    assert not store.has(FP)
    assert objects(url) == []


def test_the_quarantine_keeps_the_objects_until_it_is_discarded(url: str, tmp_path: Path) -> None:
    store = open_store(url, tmp_path)
    publish(store)
    store.quarantine(FP)

    (leftover,) = store.leftovers()
    assert leftover.kind == "quarantine"
    assert len(objects(url)) == 3
    store.discard(leftover)
    assert store.leftovers() == []
    assert objects(url) == []


def test_a_newer_format_is_refused_on_opening(url: str, tmp_path: Path) -> None:
    FsspecBlobs(url).write("format", b'{"format": 99}')

    with pytest.raises(StoreError, match=f"{url} has format 99, this Pare reads format 2.*store.url"):
        open_store(url, tmp_path)


def test_an_endpoint_that_ignores_the_condition_is_refused_before_anything_is_published(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overwrites(blobs: FsspecBlobs, key: str, data: bytes) -> bool:
        blobs.write(key, data)
        return True

    monkeypatch.setattr(FsspecBlobs, "create", overwrites)

    with pytest.raises(StoreError, match="does not honour conditional writes"):
        publish(open_store(url, tmp_path))


def test_a_missing_bucket_and_refused_credentials_are_told(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StoreError, match="no such bucket"):
        publish(open_store("s3://nowhere/x", tmp_path))

    class Refusing:
        def _strip_protocol(self, url: str) -> str:
            return url

        def cat_file(self, path: str) -> bytes:
            raise PermissionError("Access Denied")

    monkeypatch.setattr(FsspecBlobs, "_fs", Refusing())
    with pytest.raises(StoreError, match=r"may not write or read.*Access Denied"):
        open_store("s3://pare/y", tmp_path)


def test_a_cache_of_another_user_is_refused(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)

    with pytest.raises(StoreError, match="another user's"):
        publish(open_store(url, tmp_path))


# --- a driver on S3 ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sweep_on_s3_is_finished_by_a_machine_that_knows_only_the_url(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pare.orchestrator import cli
    from tests.orchestrator import pretend

    words = ("recipe=rtn", "model=tiny", "evaluation.questions.n=0")
    assert pretend.sweep(tmp_path / "first", (*words, f"store.url={url}")) == 0
    assert pretend.sweep(tmp_path / "local", words) == 0
    shutil.rmtree(tmp_path / "first")
    store = open_store(url, tmp_path / "cache")
    lost = next(fp for fp in store.artifacts() if store.manifest(fp)["type"] == "evaluate")
    store.remove(lost)
    capsys.readouterr()

    monkeypatch.setenv("PARE_HOME", str(tmp_path / "second"))
    assert cli.main(["status", "--store", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    with pretend.pretending():
        assert cli.main(["resume", "--store", url, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tasks"]["executed"] == 1
    here, local = (json.loads(pretend.table(tmp_path / home)) for home in ("second", "local"))
    assert [trial["metrics"] for trial in here] == [trial["metrics"] for trial in local]
    assert not FsspecBlobs(url).list("leases")
