"""Code from outside: loaded by a driver, and by a worker that has no such file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pare.methods.contract import METHODS
from pare.workers import plugins
from pare.workers.plugins import PluginError, load_plugin, pack_plugins, take_plugins

FILE = """
from dataclasses import dataclass
from pare.methods.contract import LayerMethod, method

@method("from_outside", source="nobody (2026), eq. 1")
@dataclass
class FromOutside(LayerMethod):
    pass
"""


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """What a test has loaded is not there afterwards."""
    before = dict(plugins.SOURCES)
    yield
    for module in plugins.SOURCES.keys() - before.keys():
        sys.modules.pop(module, None)
    plugins.SOURCES.clear()
    plugins.SOURCES.update(before)
    METHODS.pop("from_outside", None)


def forget(module: str) -> None:
    """Makes this process one that has not loaded it."""
    plugins.SOURCES.pop(module)
    sys.modules.pop(module, None)
    METHODS.pop("from_outside", None)


def test_a_worker_without_the_file_loads_the_same_code(tmp_path: Path) -> None:
    file = tmp_path / "outside.py"
    file.write_text(FILE)
    load_plugin(str(file))
    packed = pack_plugins()
    file.unlink()
    forget("pare_plugin_outside")

    take_plugins(packed)

    assert METHODS["from_outside"].__module__ == "pare_plugin_outside"
    own = sys.modules["pare_plugin_outside"].__file__
    assert own is not None
    assert Path(own).read_text() == FILE
    assert pack_plugins() == packed
    take_plugins(packed)  # a second task of the same sweep


def test_a_module_travels_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside_module.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    load_plugin("outside_module")
    packed = pack_plugins()
    assert {"module": "outside_module", "source": None} in packed
    forget("outside_module")

    take_plugins(packed)

    assert "from_outside" in METHODS


def test_two_files_of_one_name_with_unlike_code_are_refused(tmp_path: Path) -> None:
    for folder, text in (("a", FILE), ("b", FILE), ("c", FILE + "\nMORE = 1\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "outside.py").write_text(text)
    load_plugin(str(tmp_path / "a" / "outside.py"))
    load_plugin(str(tmp_path / "b" / "outside.py"))
    with pytest.raises(
        PluginError, match="other code has been loaded as pare_plugin_outside; give one of the files another name"
    ):
        load_plugin(str(tmp_path / "c" / "outside.py"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_code_that_cannot_be_loaded_leaves_nothing_and_says_why(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(PluginError, match=message):
        load_plugin(str(file))
    assert "pare_plugin_broken" not in sys.modules
    with pytest.raises(PluginError, match=r"there is no file 'absent\.py'"):
        load_plugin("absent.py")
    with pytest.raises(PluginError, match=r"cannot import 'no\.such\.module'"):
        load_plugin("no.such.module")
