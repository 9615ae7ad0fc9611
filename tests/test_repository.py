"""The repository itself: packages, imports, documentation."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from tests.guide import guide

ROOT = Path(__file__).parent.parent
ROOMS = ("methods", "workers", "orchestrator", "tracking", "conf")


def packages_in_tree() -> set[str]:
    """Every folder with an `__init__.py` below a room, by the name it installs under."""
    found = {"pare"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            found.add(".".join(["pare", *init.parent.relative_to(ROOT).parts]))
    return found


def modules() -> list[str]:
    names = []
    for room in ROOMS[:-1]:
        package = importlib.import_module(f"pare.{room}")
        names += [m.name for m in pkgutil.walk_packages(package.__path__, f"pare.{room}.")]
    return names


def test_the_wheel_lists_every_package_of_the_tree() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]

    assert set(listed) == packages_in_tree()


def test_every_folder_with_python_files_is_a_package() -> None:
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


def test_every_module_can_be_imported_and_its_doctests_hold() -> None:
    found = modules()
    assert len(found) > 30

    for name in found:
        assert doctest.testmod(importlib.import_module(name)).failed == 0, name


def test_methods_and_workers_import_without_ray_mlflow_hydra_and_heavy_extras() -> None:
    names = [m for m in modules() if m.startswith(("pare.methods", "pare.workers"))]
    program = (
        "import importlib, sys\n"
        "for blocked in ('ray', 'mlflow', 'hydra', 'omegaconf', 'deepspeed', 'bitsandbytes'): sys.modules[blocked] = None\n"
        f"for name in {names}: importlib.import_module(name)"
    )

    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_bare_name_methods_is_refused() -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import methods"

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode != 0
    assert "import this package as pare.methods" in done.stderr


def test_the_readmes_links_and_verbs_exist() -> None:
    from pare.orchestrator.cli import parser

    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / target).exists(), target
    verbs = set(re.findall(r"`pare ([a-z-]+)", text))
    known = next(a for a in parser()._actions if a.dest == "verb").choices
    assert verbs <= set(known)
    targets = set(re.findall(r"make ([a-z-]+)", text))
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_method_of_the_guide_passes_its_own_test_and_the_shared_suite(tmp_path: Path) -> None:
    code, test, _ = guide()
    (tmp_path / "sign.py").write_text(code)
    (tmp_path / "conftest.py").write_text("import sign\n")
    (tmp_path / "test_sign.py").write_text(test)
    (tmp_path / "test_suite.py").write_text("from tests.methods.test_every_method import *  # noqa: F403\n")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tmp_path),
        "-k",
        "sign",
        str(tmp_path),
    ]
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) >= 8, done.stdout


def test_no_file_holds_a_path_of_the_machine_it_was_written_on() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    home = str(Path.home())
    for name in listed:
        file = ROOT / name
        if file.is_file() and file.suffix not in (".lock", ".png"):
            text = file.read_text(errors="replace")
            assert f"{ROOT.parent}/" not in text or len(ROOT.parent.parts) <= 2, name  # a clone in /tmp names no one
            assert f"{home}/" not in text, name
