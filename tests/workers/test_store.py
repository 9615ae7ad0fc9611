"""The store: published whole or not at all, verified on read."""

import json
import os
from pathlib import Path

import pytest

from pare.workers import store as store_module
from pare.workers.store import ArtifactError, Store


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
