"""The store: published whole or not at all, verified on read."""

import contextlib
import errno
import json
import multiprocessing
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator.housekeeping import Known, fsck
from pare.workers import files
from pare.workers import store as store_module
from pare.workers.manifest import FORMAT, sealed, text_of
from pare.workers.store import ArtifactError, Store, StoreError, open_store


def publish(store: Store, fingerprint: str = "ab" * 32, text: str = "hello") -> bool:
    with store.attempt() as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.txt").write_text(text)
        (out / "empty").touch()
        return store.publish(out, fingerprint, "test", {"n": 1}, {"wall_s": 1.0})[1]


def test_what_is_published_can_be_opened_and_carries_its_result(tmp_path: Path) -> None:
    store = Store(tmp_path)

    assert publish(store)
    directory = store.open("ab" * 32)

    assert (directory / "sub" / "a.txt").read_text() == "hello"
    assert store.manifest("ab" * 32)["result"] == {"n": 1}
    assert not list((tmp_path / "attempts").iterdir())


def test_the_second_publication_is_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path)

    assert publish(store)
    assert not publish(store, text="other")
    assert (store.open("ab" * 32) / "sub" / "a.txt").read_text() == "hello"


def test_an_abandoned_attempt_leaves_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)

    def fail() -> None:
        with store.attempt() as out:
            (out / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()

    assert not store.has("ab" * 32)
    assert not list((tmp_path / "attempts").iterdir())


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_found_on_read_and_quarantined(tmp_path: Path, damage: str) -> None:
    publish(Store(tmp_path))
    file = Store(tmp_path).path("ab" * 32) / "sub" / "a.txt"
    if damage == "flip":
        file.write_bytes(b"hellp")
    elif damage == "truncate":
        file.write_bytes(b"hel")
    else:
        file.unlink()

    with pytest.raises(ArtifactError, match="differs from its digest"):
        Store(tmp_path).open("ab" * 32)

    assert not Store(tmp_path).has("ab" * 32)
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def test_a_torn_manifest_is_an_artifact_error(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    (store.path("ab" * 32) / "manifest.json").write_text('{"format": 1, "fi')

    with pytest.raises(ArtifactError, match="manifest is damaged"):
        store.open("ab" * 32)


def test_a_crash_before_any_step_of_publishing_leaves_nothing_or_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dies before the k-th fsync, write or rename for every k; the reader then sees nothing, or a verified artifact."""

    class Death(BaseException):
        pass

    complete = False
    for k in range(100):
        if complete:
            break
        store = Store(tmp_path / str(k))
        countdown = [k]

        def step(function, countdown=countdown):
            def wrapped(*args, **kwargs):
                if countdown[0] == 0:
                    raise Death
                countdown[0] -= 1
                return function(*args, **kwargs)

            return wrapped

        with monkeypatch.context() as patch:
            patch.setattr(store_module, "fsync", step(store_module.fsync))
            patch.setattr(store_module, "digest_file", step(store_module.digest_file))
            patch.setattr(os, "rename", step(os.rename))
            patch.setattr(Path, "write_text", step(Path.write_text))
            try:
                with store.attempt() as out:
                    (out / "a.txt").write_bytes(b"hello")
                    store.publish(out, "cd" * 32, "test", {}, {})
                complete = True
            except Death:
                pass

        if store.has("cd" * 32):
            assert (Store(store.root).open("cd" * 32) / "a.txt").read_bytes() == b"hello"

    assert complete
    assert k > 5, "the steps were not met"


def test_attempts_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "attempts" / "999999999-x").mkdir(parents=True)
    (tmp_path / "attempts" / f"{os.getpid()}-y").mkdir()

    assert store.remove_dead_attempts() == 1
    assert [p.name for p in (tmp_path / "attempts").iterdir()] == [f"{os.getpid()}-y"]


def test_a_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    file = store.path("ab" * 32) / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))

    with pytest.raises(ArtifactError, match="format 99"):
        store.open("ab" * 32)


FP = "ab" * 32


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing files are missing at once, and nothing waits for the disk: no power is cut here."""
    monkeypatch.setattr(files, "PAUSES_S", ())
    monkeypatch.setattr(os, "fsync", lambda handle: None)


STEPS = ("open", "write", "fsync", "rename", "replace", "link", "mkdir", "unlink", "fchmod")


def dies_before_step(k: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a child that ceases to exist before its k-th call that touches the disk. Whether it got that far."""
    child = os.fork()
    if child == 0:
        left = [k]

        def dying(call: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    os._exit(137)
                left[0] -= 1
                return call(*args, **kwargs)

            return wrapped

        for name in STEPS:
            setattr(os, name, dying(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 137), "the work itself failed"
    return code == 137


def publish_two_files(store: Store) -> None:
    with store.attempt() as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.bin").write_bytes(b"x" * 1000)
        (out / "b.json").write_bytes(b"{}")
        (out / "b.json").chmod(0o600)
        store.publish(out, FP, "test", {"n": 1}, {})


def test_a_process_killed_before_any_call_of_publishing_leaves_nothing_or_the_whole(tmp_path: Path, hasty: None) -> None:
    outcomes = []
    for k in range(100):
        root = tmp_path / str(k)
        died = dies_before_step(k, lambda root=root: publish_two_files(Store(root)))
        store = Store(root)
        outcomes.append(store.has(FP))
        if store.has(FP):
            assert (store.open(FP) / "sub" / "a.bin").read_bytes() == b"x" * 1000
        findings = fsck(store, Known())
        assert {f["kind"] for f in findings} <= {"leftover"}
        store.remove_dead_attempts()
        assert fsck(store, Known()) == []
        publish_two_files(store)
        assert store.open(FP)
        if not died:
            break

    assert not died
    assert len(outcomes) > 15
    assert outcomes == sorted(outcomes), "once there, it stays"


def test_a_process_killed_while_files_are_dropped_leaves_an_artifact_that_is_held_or_dropped(
    tmp_path: Path, hasty: None
) -> None:
    for k in range(100):
        store = Store(tmp_path / str(k))
        publish_two_files(store)
        died = dies_before_step(k, lambda store=store: store.drop_files(FP))

        store = Store(store.root)
        assert store.has(FP)
        if store.held(FP):
            assert store.open(FP)
        else:
            with pytest.raises(ArtifactError, match="dropped"):
                store.open(FP)
        store.remove_dead_attempts()
        assert {f["kind"] for f in fsck(store, Known(), repair=True)} <= {"unfinished"}
        assert fsck(store, Known()) == []
        if not died:
            break

    assert not died
    assert k > 5
    assert not store.held(FP)


def test_a_process_killed_while_a_dropped_artifact_is_made_anew_leaves_it_dropped_gone_or_whole(
    tmp_path: Path, hasty: None
) -> None:
    states = set()
    for k in range(100):
        store = Store(tmp_path / str(k))
        publish_two_files(store)
        store.drop_files(FP)
        died = dies_before_step(k, lambda store=store: publish_two_files(store))

        store = Store(store.root)
        states.add((store.has(FP), store.held(FP)))
        if store.held(FP):
            assert store.open(FP)
        store.remove_dead_attempts()
        assert fsck(store, Known()) == []
        if not died:
            break

    assert states == {(True, False), (False, False), (True, True)}
    assert store.held(FP)


def damage_files(directory: Path, draw: random.Random) -> str:
    """Does one random harm to an artifact; says which."""
    files = [directory / f"{i}.bin" for i in range(3)]
    file, other = draw.sample(files, 2)
    kind = draw.choice(["truncate", "flip", "remove", "swap", "empty", "manifest"])
    if kind == "truncate":
        os.truncate(file, draw.randrange(file.stat().st_size))
    elif kind == "remove":
        file.unlink()
    elif kind == "swap":
        file.rename(directory / "aside")
        other.rename(file)
        (directory / "aside").rename(other)
    elif kind == "empty":
        file.write_bytes(b"")
    else:
        victim = file if kind == "flip" else directory / "manifest.json"
        content = bytearray(victim.read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        victim.write_bytes(content)
    return kind


def test_of_two_hundred_random_harms_none_is_accepted(tmp_path: Path, hasty: None) -> None:
    draw, met = random.Random(0), set()
    contents = [draw.randbytes(300) for _ in range(3)]  # of equal size, so that swapped ones are not told by it
    for case in range(200):
        store, fingerprint = Store(tmp_path), f"{case:064x}"
        with store.attempt() as out:
            for i, content in enumerate(contents):
                (out / f"{i}.bin").write_bytes(content)
            manifest, _ = store.publish(out, fingerprint, "test", {"quality/ppl": 12.5}, {"wall_s": 1.0})
        reader = store if case % 2 else Store(tmp_path)  # one that has verified it, and one that has not
        reader.open(fingerprint)
        met.add(damage_files(store.path(fingerprint), draw))
        try:
            directory = reader.open(fingerprint)
        except ArtifactError:
            assert not reader.has(fingerprint), "not quarantined"
            continue
        # A flipped bit of JSON need not change what it says.
        assert reader.manifest(fingerprint) == manifest
        assert [(directory / f"{i}.bin").read_bytes() for i in range(3)] == contents

    assert met == {"truncate", "flip", "remove", "swap", "empty", "manifest"}
    assert len(list((tmp_path / "quarantine").iterdir())) > 195


@pytest.mark.parametrize("key", ["fingerprint", "type", "digest", "files", "result", "cost", "published", "seal"])
def test_a_change_to_any_part_of_a_manifest_is_found(tmp_path: Path, key: str, hasty: None) -> None:
    store = Store(tmp_path)
    publish(store)
    file = store.path(FP) / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest[key] = manifest[key][:1] if isinstance(manifest[key], list) else {"n": 2}
    file.write_text(json.dumps(manifest))

    with pytest.raises(ArtifactError, match="manifest is damaged"):
        store.open(FP)
    assert not store.has(FP)


@pytest.mark.parametrize("name", ["../../../secret", "/etc/passwd", "a/../../b", "nul\0"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path: Path, name: str, hasty: None) -> None:
    store = Store(tmp_path)
    publish(store)
    manifest = store.manifest(FP)
    manifest["files"][0]["path"] = name
    (store.path(FP) / "manifest.json").write_bytes(text_of(sealed(manifest)))

    with pytest.raises(ArtifactError, match="names the file"):
        store.open(FP)


def test_an_artifact_under_the_wrong_name_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    store.path("cd" * 32).parent.mkdir()
    store.path(FP).rename(store.path("cd" * 32))

    with pytest.raises(ArtifactError, match="it is that of abababababab"):
        store.open("cd" * 32)


def test_a_damaged_artifact_in_the_way_is_moved_aside_by_the_attempt_that_makes_it_anew(tmp_path: Path, hasty: None) -> None:
    store = Store(tmp_path)
    publish(store)
    (store.path(FP) / "manifest.json").unlink()

    assert publish(store, text="anew")
    assert (store.open(FP) / "sub" / "a.txt").read_text() == "anew"
    assert len(list((tmp_path / "quarantine").iterdir())) == 1


def contender(root: str, name: str, start: Any, said: Any) -> None:
    store = Store(Path(root))
    for round_ in range(10):
        with store.attempt() as out:
            (out / "who").write_text(name)
            start.wait()
            manifest, mine = store.publish(out, f"{round_:064x}", "test", {}, {})
            said.put((round_, name, mine, manifest["digest"]))


def test_of_three_processes_that_publish_the_same_artifact_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, said = context.Barrier(3), context.Queue()
    processes = [context.Process(target=contender, args=(str(tmp_path), f"p{i}", start, said)) for i in range(3)]
    for process in processes:
        process.start()
    heard = [said.get(timeout=20) for _ in range(30)]
    for process in processes:
        process.join()

    store = Store(tmp_path)
    for round_ in range(10):
        winners = [name for r, name, mine, _ in heard if r == round_ and mine]
        assert len(winners) == 1
        assert (store.open(f"{round_:064x}") / "who").read_text() == winners[0]
        assert len({digest for r, _, _, digest in heard if r == round_}) == 1, "the losers were told what is in force"
        assert len(store.blobs.list(f"nondeterminism/{round_:064x}")) == 2


def test_an_attempt_that_came_to_something_else_is_told_and_noted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    with store.attempt() as out:
        (out / "sub").mkdir()
        (out / "sub" / "a.txt").write_text("hello")
        (out / "empty").touch()
        manifest, mine = store.publish(out, FP, "test", {"n": 2}, {})

    assert not mine
    note = manifest["nondeterminism"]
    assert (note["files"], note["results"]) == ([], [{"n": 1}, {"n": 2}])
    assert json.loads(store.blobs.read(f"nondeterminism/{FP}/0.json")) == note
    assert "nondeterminism" not in store.manifest(FP)
    assert [f["kind"] for f in fsck(store, Known())] == ["nondeterministic"]


def test_an_equal_second_attempt_is_no_nondeterminism(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    publish(store)

    assert store.blobs.list("nondeterminism") == []


def test_dropped_files_go_and_small_json_stays_and_the_artifact_counts_as_done(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.attempt() as out:
        (out / "model.bin").write_bytes(b"x" * 100)
        (out / "curve.jsonl").write_text('{"step": 1}')
        (out / "big.json").write_bytes(b" " * ((1 << 20) + 1))
        store.publish(out, FP, "train", {"n": 1}, {})
    assert store.held(FP)

    store.drop_files(FP)

    assert store.has(FP)
    assert not store.held(FP)
    assert store.manifest(FP)["result"] == {"n": 1}
    assert sorted(p.name for p in store.path(FP).iterdir()) == ["curve.jsonl", "manifest.json"]
    assert store.read_file(FP, "curve.jsonl") == b'{"step": 1}'
    assert store.read_file(FP, "model.bin") is None
    with pytest.raises(ArtifactError, match=r"\(train\): its files were dropped to save room"):
        store.open(FP)
    assert store.has(FP), "it was not taken for damage"
    store.drop_files(FP)


def test_files_that_are_dropped_while_they_are_opened_are_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(Store(tmp_path))
    store = Store(tmp_path)
    check = store._damaged

    def late(*args: Any) -> str | None:
        Store(tmp_path).drop_files(FP)
        return check(*args)

    monkeypatch.setattr(store, "_damaged", late)
    with pytest.raises(ArtifactError, match="were dropped"):
        store.open(FP)

    assert store.has(FP)
    assert not (tmp_path / "quarantine").exists()


def test_a_dropped_artifact_is_put_back_by_the_attempt_that_makes_it_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)
    store.drop_files(FP)

    assert publish(store)
    assert store.held(FP)
    assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello"
    assert store.blobs.list("nondeterminism") == []

    store.drop_files(FP)
    with store.attempt() as out:
        (out / "other").touch()
        manifest, mine = store.publish(out, FP, "test", {"n": 1}, {})
    assert mine
    assert manifest["nondeterminism"]["files"] == ["empty", "other", "sub/a.txt"]
    assert "dropped" not in manifest
    assert store.held(FP)


def test_what_is_present_of_many_is_what_is_there_one_by_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    many = [f"{i % 3:02x}{i:062x}" for i in range(30)]
    for fingerprint in many[::2]:
        publish(store, fingerprint)

    assert store.present([*many, "ff" * 32]) == set(many[::2]) == {fp for fp in many if store.has(fp)}
    assert sorted(store.artifacts()) == sorted(many[::2])


def test_a_small_file_is_read_verified(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store)

    assert store.read_file(FP, "sub/a.txt") == b"hello"
    assert store.read_file(FP, "none.json") is None
    assert store.read_file("cd" * 32, "sub/a.txt") is None
    (store.path(FP) / "sub" / "a.txt").write_text("hellp")
    with pytest.raises(ArtifactError, match="differs from its digest"):
        store.read_file(FP, "sub/a.txt")


def test_a_file_that_shows_up_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may show a publication to other hosts a moment after it was made."""
    publish(Store(tmp_path))
    store, waits = Store(tmp_path), []
    late = store.path(FP) / "sub"
    late.rename(tmp_path / "elsewhere")

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            (tmp_path / "elsewhere").rename(late)

    monkeypatch.setattr(files.time, "sleep", sleep)

    assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello"
    assert len(waits) == 2
    with pytest.raises(ArtifactError, match="is not in the store"):
        store.manifest("cd" * 32)
    assert sum(waits) < 1.5


def test_opening_a_place_without_a_store_leaves_no_trace(tmp_path: Path) -> None:
    store = open_store(tmp_path / "none")

    assert not store.has(FP)
    assert store.present([FP]) == set()
    assert list(store.artifacts()) == []
    assert not (tmp_path / "none").exists()
    publish(store)
    assert json.loads((tmp_path / "none" / "format").read_text()) == {"format": FORMAT}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"format": 99}', "has format 99, this Pare reads format 2. Use the Pare that wrote it"),
        (b'{"format": 1}', "has format 1, this Pare reads format 2. Move it away"),
        (b"garbage", "`format` is damaged"),
    ],
)
def test_a_store_of_another_format_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "format").write_bytes(content)

    for use in (lambda: open_store(tmp_path), lambda: publish(Store(tmp_path))):
        with pytest.raises(StoreError, match=f"store {tmp_path}.*{says}"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["format"]


def test_artifacts_from_before_formats_were_marked_are_refused(tmp_path: Path) -> None:
    (tmp_path / "objects" / "ab" / FP).mkdir(parents=True)

    with pytest.raises(StoreError, match="has format 1"):
        open_store(tmp_path)


def test_a_location_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(StoreError, match=r"not a directory.*store.url="):
        open_store(tmp_path / "file")


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    publish(store)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refused)
    with pytest.raises(StoreError, match=f"store {tmp_path}.*may not write") as caught:
        publish(store, "cd" * 32)
    assert caught.value.errno == errno.EROFS

    assert (store.open(FP) / "sub" / "a.txt").read_text() == "hello", "reading goes on"


def test_damage_in_a_store_that_cannot_be_written_is_refused_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(Store(tmp_path))
    (Store(tmp_path).path(FP) / "sub" / "a.txt").write_text("hellp")

    def refused(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(ArtifactError, match="differs from its digest; it could not be moved to the quarantine"):
        Store(tmp_path).open(FP)


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[None]:
    """A file system of 256 KiB; skips the test where none may be mounted."""
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_told_and_leaves_no_part_of_an_artifact(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk"):
        store = Store(tmp_path / "disk")
        publish(store)
        with store.attempt() as out:
            (out / "a.bin").write_bytes(b"x" * 1000)
            with contextlib.suppress(OSError), (tmp_path / "disk" / "filler").open("wb", buffering=0) as filler:
                while filler.write(b"x" * 4096):
                    pass
            with pytest.raises(StoreError, match=r"full.*pare gc") as caught:
                store.publish(out, "cd" * 32, "test", {}, {})

        assert caught.value.errno == errno.ENOSPC
        assert not store.has("cd" * 32)
        (tmp_path / "disk" / "filler").unlink()
        assert fsck(store, Known()) == []
        assert publish(store, "cd" * 32)


def test_files_written_for_their_owner_alone_are_published_for_who_may_read_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.attempt() as out:
        (out / "weights.safetensors").write_bytes(b"x")
        (out / "weights.safetensors").chmod(0o600)
        store.publish(out, FP, "test", {}, {})
        readable = store.path(FP).stat().st_mode & 0o666

    assert (store.path(FP) / "weights.safetensors").stat().st_mode & 0o666 == readable


def test_a_symbolic_link_is_not_published(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.attempt() as out:
        (out / "link").symlink_to("/etc/hostname")
        with pytest.raises(ValueError, match="no plain file"):
            store.publish(out, FP, "test", {}, {})
    assert not store.has(FP)


def test_attempts_on_other_hosts_are_not_judged_by_process_ids_of_this_one(tmp_path: Path) -> None:
    store = Store(tmp_path)
    (tmp_path / "attempts" / "999999999-x@elsewhere").mkdir(parents=True)
    (tmp_path / "attempts" / f"999999999-x@{files.host_tag()}").mkdir()

    assert store.remove_dead_attempts() == 1
    assert [x.kind for x in store.leftovers()] == ["unknown"]


def test_results_with_keys_that_json_changes_are_read_back_under_an_unbroken_seal(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.attempt() as out:
        manifest, _ = store.publish(out, FP, "test", {10: (1, 2), 9: float("inf")}, {})

    assert store.manifest(FP) == manifest
    assert manifest["result"] == {"10": [1, 2], "9": float("inf")}
