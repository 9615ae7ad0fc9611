"""Homes in which a real configuration has been run by workers that make up their results: everything but the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pare.orchestrator import commands, config, drive
from pare.orchestrator.fingerprint import digest
from pare.orchestrator.pool import InlinePool
from pare.tracking import plots
from pare.workers.store import ArtifactError, Store

TINY = ["model=tiny", "evaluation.questions.n=4", "evaluation.speed.repeats=0", "tracking.enabled=false"]


class Worker:
    """Publishes for every task a file, and figures that follow from its label and spec: the same whatever code changes.

    fail: label of a task -> failure classes to give, one for each attempt.
    """

    score: float | None = None
    """What every model scores in memory; None: by its fingerprint."""

    def __init__(self, store: Store, log: Path, fail: dict[str, list[str]] | None = None) -> None:
        self.store, self.log, self.fail = store, log, fail or {}
        self.ran: list[str] = []

    def __call__(self, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [self.one(request) for request in requests]

    def one(self, request: dict[str, Any]) -> dict[str, Any]:
        fingerprint, label = request["fingerprint"], request["label"]
        self.ran.append(label)
        self.log.mkdir(parents=True, exist_ok=True)
        with (self.log / f"{fingerprint[:12]}.log").open("a") as log:
            print(f"working on {label}", file=log)
        cost = {"wall_s": 2.0, "cpu_s": 1.5, "memory_start_bytes": 4e8, "peak_rss_bytes": 6e8, "disk_bytes": 4096.0}
        if self.fail.get(label):
            return {"ok": False, "failure": self.fail[label].pop(0), "message": "as told", "cost": cost}
        try:
            for needed in request["inputs"].values():
                self.store.open(needed)
        except ArtifactError as e:
            return {"ok": False, "failure": "corrupt_input", "message": str(e), "artifact": e.fingerprint, "cost": {}}
        draw = int(digest([label, request["spec"]])[:6], 16) / 16**6
        result = {
            "score": {"quality/ppl": self.score or 20 + draw, "tokens": 100},
            "export": {"format": "dense", "opens_with": "transformers", "size/bytes": 1e6 * (1 + draw)},
            "evaluate": {"quality/ppl": 20 + draw, "quality/ppl_low": 19.0, "quality/ppl_high": 22.0, "quality/kl": draw},
            "train": {"cost/tokens": 1000},
        }.get(request["type"], {})
        with self.store.attempt() as out:
            (out / "content.bin").write_bytes(fingerprint.encode() * 64)
            if request["type"] == "export":
                (out / "README.md").write_text("# card\n")
                (out / "export.json").write_text(json.dumps({"format": "dense", "opens_with": "transformers"}))
            manifest, _ = self.store.publish(out, fingerprint, request["type"], result, cost)
        return {"ok": True, "digest": manifest["digest"], "result": manifest["result"], "cost": cost}


def ran(home: Path, *overrides: str, fail: dict[str, list[str]] | None = None, config_dir: Path | None = None) -> Worker:
    """Runs a sweep in `home`; what its worker was asked to do."""
    experiment = config.load([*TINY, *overrides], str(config_dir) if config_dir else None)
    graph, device = commands.planned(experiment, home)
    worker = Worker(Store(Path(experiment.store.url or home / "store")), home / "logs", fail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "draw", lambda record: {})  # pictures take seconds
        drive.run(experiment, graph, device, home, f"pare run {' '.join(overrides)}", pool=InlinePool(worker))
    return worker


def by_hand(monkeypatch: pytest.MonkeyPatch, store: Path, fail: dict[str, list[str]] | None = None) -> Worker:
    """From now on, verbs that run something have it done by this worker instead of Ray."""
    worker = Worker(Store(store), store.parent / "logs", fail)
    real = drive.run
    monkeypatch.setattr(plots, "draw", lambda record: {})
    monkeypatch.setattr(drive, "run", lambda *given, **options: real(*given, pool=InlinePool(worker), **options))
    return worker
