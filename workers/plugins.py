"""Code from outside that registers methods or model families: a module by its name, or a file.

A driver loads what its config names. It sends a file's text with every request, so that a worker on another node, which has
no such file, loads the same code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from blake3 import blake3

SOURCES: dict[str, str | None] = {}
"""Name of each loaded module -> its text where it came as a file."""

Packed = dict[str, str | None]
"""`module` and `source` of a plugin, as plain JSON."""


class PluginError(ValueError):
    """Code from outside cannot be loaded; the message names it."""


def load_plugin(plugin: str) -> None:
    """plugin: the name of a module, or the path of a file, which becomes the module `pare_plugin_<name of the file>`."""
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except Exception as e:
            raise PluginError(f"cannot import {plugin!r}: {type(e).__name__}: {e}") from e
        SOURCES[plugin] = None
        return
    path = Path(plugin).resolve()
    try:
        source = path.read_text()
    except OSError as e:
        raise PluginError(f"there is no file {plugin!r} ({e.strerror})") from None
    load_file(f"pare_plugin_{path.stem}", source, path)


def load_file(module: str, source: str, path: Path) -> None:
    if module in SOURCES:
        if SOURCES[module] != source:
            raise PluginError(f"{path}: other code has been loaded as {module}; give one of the files another name")
        return
    spec = importlib.util.spec_from_file_location(module, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"{path} cannot be imported")
    made = importlib.util.module_from_spec(spec)
    sys.modules[module] = made
    try:
        spec.loader.exec_module(made)
    except Exception as e:
        del sys.modules[module]
        raise PluginError(f"{path} cannot be imported: {type(e).__name__}: {e}") from e
    SOURCES[module] = source


def pack_plugins() -> list[Packed]:
    """What this process has loaded."""
    return [{"module": module, "source": source} for module, source in SOURCES.items()]


def take_plugins(packed: Iterable[Packed]) -> None:
    """Loads what another process has loaded and this one has not."""
    for plugin in packed:
        module, source = str(plugin["module"]), plugin["source"]
        if SOURCES.get(module, "") == source:
            continue
        if source is None:
            load_plugin(module)
            continue
        folder = Path(tempfile.gettempdir()) / f"pare-plugins-{os.getuid()}" / blake3(source.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{module.removeprefix('pare_plugin_')}.py"
        fresh = folder / f"{os.getpid()}.new"
        fresh.write_text(source)
        fresh.replace(path)
        load_file(module, source, path)
