"""Of what a result was measured: the commit, the command, the machine, the versions."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pare.orchestrator import hardware

ROOT = Path(__file__).resolve().parents[1]


def provenance(module: str, *packages: str) -> dict[str, Any]:
    """module: of the benchmark, as after `python -m`; packages: whose versions decide its figures."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", module, *sys.argv[1:]]),
        "commit": git("rev-parse", "HEAD"),
        "changed_since": bool(git("status", "--porcelain", "--untracked-files=no")),
        "hardware": {**hardware.describe(), "system": platform.system(), "release": platform.release()},
        "versions": {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}},
    }
