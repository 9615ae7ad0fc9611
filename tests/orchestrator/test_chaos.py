"""Drivers that are killed, and several at once: nothing is lost, doubled or changed. The worker pretends (pretend.py)."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from pare.orchestrator import cli
from tests.orchestrator import pretend

SMOKE = ("experiment=smoke",)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, int]:
    """(the table of the smoke experiment, how often its driver touched a file)."""
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    code, touched = pretend.join(pretend.start(home, SMOKE))
    assert code == 0
    return said_by(home), touched


def said_by(home: Path, store: str = "HOME/store") -> bytes:
    """The table of a sweep wherever its home and its store are."""
    return pretend.table(home).replace(str(home).encode(), b"HOME").replace(store.encode(), b"HOME/store")


@pytest.mark.parametrize("point", range(20))
def test_a_driver_killed_anywhere_leaves_what_the_next_one_makes_the_same_table_of(
    undisturbed: tuple[bytes, int], tmp_path: Path, point: int
) -> None:
    table, touched = undisturbed
    home = tmp_path / "home"
    die_at = random.Random(point).randrange(1, touched)

    code, _ = pretend.join(pretend.start(home, SMOKE, die_at))
    again, _ = pretend.join(pretend.start(home, SMOKE))

    assert (code, again) == (-9, 0)
    assert said_by(home) == table
    done = [label for label, status in pretend.attempts(home) if status == "done"]
    assert len(done) == len(set(done))
    assert not list((home / "store" / "attempts").iterdir())


def test_three_drivers_on_one_store_share_the_work_and_come_to_the_same_table(tmp_path: Path) -> None:
    shared = ("experiment=smoke", f"store.url={tmp_path / 'shared'}")
    pretend.prepared(shared)
    homes = [tmp_path / name for name in "abc"]

    drivers = [pretend.start(home, shared, slow_s=0.02) for home in homes]
    assert [pretend.join(driver)[0] for driver in drivers] == [0, 0, 0]

    assert len({pretend.table(home) for home in homes}) == 1
    done = [label for home in homes for label, status in pretend.attempts(home) if status == "done"]
    assert len(done) == len(set(done))  # by leases: publication alone would also bear double work
    assert all(pretend.attempts(home) for home in homes)
    assert not list((tmp_path / "shared" / "leases").iterdir())


def test_a_second_machine_that_sees_only_the_store_goes_on_with_a_sweep(
    undisturbed: tuple[bytes, int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = ("experiment=smoke", f"store.url={tmp_path / 'shared'}")
    first, second = tmp_path / "first", tmp_path / "second"
    code, _ = pretend.join(pretend.start(first, shared, die_at=undisturbed[1] // 2))
    assert code == -9
    shutil.rmtree(first)
    url = str(tmp_path / "shared")

    monkeypatch.setenv("PARE_HOME", str(second))
    assert cli.main(["status", "--store", url, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["tasks"]["done"] > 5
    assert len(seen["trials"]) == 12
    with pretend.pretending():
        assert cli.main(["resume", "--store", url]) == 0

    assert said_by(second, url) == undisturbed[0]
