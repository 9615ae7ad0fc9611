"""What travels to a cluster: Pare as a wheel, the user's files. The same content always makes the same bytes."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import logging
import os
import stat
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import IO

from pare import __version__
from pare.orchestrator.errors import ConfigError, PareError

ROOMS = ("conf", "methods", "orchestrator", "tracking", "workers")
LIMIT_BYTES = 100 * 1024**2
"""Of the user's directory, compressed. Ray's dashboard takes no larger body."""


class TooLargeError(Exception):
    """An archive outgrew its limit."""


def pack_directory(directory: Path, home: Path, target: Path) -> dict[str, int]:
    """Writes the user's directory, without what need not travel, as a zip. Returns name -> bytes of what is in it.

    Raises:
        ConfigError: it is too large, naming the largest files, or one cannot be read.
    """
    sizes: dict[str, int] = {}
    try:
        files = files_to_send(directory, home)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        pack(files, target, LIMIT_BYTES)
    except TooLargeError:
        raise ConfigError(too_large(directory, sizes)) from None
    except OSError as e:
        raise ConfigError(f"cannot pack {e.filename or directory}: {e.strerror}. Leave it out with .rayignore") from e
    return sizes


def files_to_send(directory: Path, home: Path) -> dict[str, Path]:
    """Name in the archive -> file, by Ray's own rules: .gitignore and .rayignore of every folder, and Ray's defaults.

    Pare's results never travel.
    """
    from ray._private import ray_constants
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    excludes = [*ray_constants.get_runtime_env_default_excludes(), ".pare"]
    if home.absolute().is_relative_to(directory):
        excludes.append(f"/{home.absolute().relative_to(directory)}")
    found: list[Path] = []
    _dir_travel(
        directory,
        [_get_excludes(directory, excludes)],
        found.append,
        include_gitignore=os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1",
        logger=logging.getLogger(__name__),
    )
    return {str(file.relative_to(directory)): file for file in sorted(found) if file.is_file()}


def too_large(directory: Path, sizes: dict[str, int]) -> str:
    """Says which files to leave out."""
    largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
    return (
        f"{directory} is too large to send: {len(sizes)} files of {sum(sizes.values()) / 2**20:.0f} MiB are more than "
        f"{LIMIT_BYTES / 2**20:.0f} MiB compressed. The largest:\n"
        + "".join(f"  {sizes[name] / 2**20:9.1f} MiB  {name}\n" for name in largest)
        + "List what the job does not need in .gitignore or .rayignore, send another directory (--working-dir DIR), or put "
        "large files where the nodes can read them."
    )


def pack(files: Mapping[str, Path | bytes], target: Path, limit: int | None = None) -> None:
    """Writes a zip whose bytes depend on names, contents and modes alone. Raises TooLargeError beyond `limit` bytes."""
    with target.open("wb") as out, zipfile.ZipFile(out, "w") as archive:
        for name, source in files.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            stream: IO[bytes]
            if isinstance(source, bytes):
                mode, info.file_size, stream = 0o644, len(source), io.BytesIO(source)
            else:
                mode, info.file_size, stream = source.stat().st_mode & 0o777, source.stat().st_size, source.open("rb")
            info.external_attr = (stat.S_IFREG | mode) << 16
            with stream, archive.open(info, "w") as sink:
                while chunk := stream.read(1 << 20):
                    sink.write(chunk)
                    if limit is not None and out.tell() > limit:
                        raise TooLargeError
    if limit is not None and target.stat().st_size > limit:
        raise TooLargeError


def build_wheel(directory: Path) -> Path:
    """Pare as it is imported here, from a checkout or an installation, as a wheel.

    Ray knows an uploaded wheel by its name alone, so the version carries a digest of the contents. It names no
    requirements: Ray installs it with `pip install --target`, which would fetch them all again, torch included.
    """
    files: dict[str, bytes] = {}
    for package in ("pare", *(f"pare.{room}" for room in ROOMS)):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PareError(f"the package {package} of this installation cannot be found; install Pare again")
        root = Path(spec.submodule_search_locations[0])
        for file in root.rglob("*"):
            parts = file.relative_to(root).parts
            if file.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in parts):
                files["/".join((*package.split("."), *parts))] = file.read_bytes()
    digest = sha256(json.dumps(sorted((name, sha256(data).hexdigest()) for name, data in files.items())).encode())
    version = f"{__version__}+{digest.hexdigest()[:16]}"
    about = f"pare_lm-{version}.dist-info"
    files = dict(sorted(files.items()))
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: pare-lm\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: pare\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(sha256(data).digest()).rstrip(b'=').decode()},{len(data)}"
        for name, data in files.items()
    ]
    files[f"{about}/RECORD"] = "\n".join([*record, f"{about}/RECORD,,", ""]).encode()
    wheel = directory / f"pare_lm-{version}-py3-none-any.whl"
    pack(files, wheel)
    return wheel
