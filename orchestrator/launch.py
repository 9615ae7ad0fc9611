"""Starts the ranks of one task through Ray Train, and stands for all of them before the driver.

The launcher is an actor that holds no core: those are its ranks'. Ray Train places them, sets up torch.distributed and ends
all when one fails. It is given no second try: the driver decides about another attempt, which goes on from the checkpoint.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Mapping
from typing import Any

from pare.orchestrator.pool import Reply, failed
from pare.orchestrator.ray_pool import Worker, first_line

TELL_EVERY_S = 0.5

ENVIRONMENT = {"RAY_CHDIR_TO_TRIAL_DIR": "0", "RAY_TRAIN_METRICS_ENABLED": "0"}
"""What Ray Train reads: ranks stay in their directory, and nobody collects its metrics."""


class Launcher(Worker):
    """Runs one task of several ranks. Its first rank tells it how far they are, and each how it ended."""

    def __init__(self, resources: Mapping[str, float], labels: Mapping[str, str], pending_s: float) -> None:
        """resources: of one rank; pending_s: how long they may take to come up."""
        self._resources, self._labels, self._pending_s = dict(resources), dict(labels), pending_s
        self._ended: dict[int, Reply] = {}

    def run(self, requests: list[dict[str, Any]]) -> tuple[list[Reply], int, str]:
        import ray

        from pare.workers.run import STOP

        STOP.clear()
        os.environ.update(ENVIRONMENT, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S=f"{self._pending_s:g}")
        (request,) = requests
        here = ray.get_runtime_context()
        try:
            with tempfile.TemporaryDirectory() as scratch:
                self._fit(request, here.current_actor, scratch)
        except Exception as e:  # whatever goes wrong around the ranks fails this attempt, and the driver decides
            return [self._cause(e)], 0, here.get_node_id()
        return [self._ended[0]], 0, here.get_node_id()

    def _fit(self, request: dict[str, Any], launcher: Any, scratch: str) -> None:
        from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        TorchTrainer(
            rank,
            train_loop_config={"request": request, "launcher": launcher},
            # Objects and flags go over gloo, on a GPU gradients over nccl.
            torch_config=TorchConfig(backend="gloo" if request["device"] == "cpu" else "cpu:gloo,cuda:nccl"),
            scaling_config=ScalingConfig(
                num_workers=request["ranks"],
                use_gpu=request["device"] == "cuda",
                resources_per_worker=self._resources,
                label_selector=self._labels or None,
            ),
            run_config=RunConfig(
                name=request["fingerprint"][:12],
                storage_path=scratch,
                failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        ).fit()

    def _cause(self, error: Exception) -> Reply:
        """Why the ranks have failed: when one ends, the others fail after it, each for a reason that it does not know."""
        from ray.train import ControllerError, WorkerGroupError
        from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

        told = [reply for reply in self._ended.values() if not reply["ok"]]
        if known := next((reply for reply in told if reply["failure"] != "unknown"), None):
            return known
        if isinstance(error, WorkerGroupError):
            gone = {n: first_line(e) for n, e in error.worker_failures.items() if n not in self._ended}
            if gone or not told:
                return failed("lost_worker", "; ".join(f"rank {n}: {why}" for n, why in gone.items()) or first_line(error))
        if told:
            return told[0]
        cause = error.controller_failure if isinstance(error, ControllerError) else error
        late = isinstance(cause, WorkerGroupStartupTimeoutError)
        return failed("pending" if late else "lost_worker", first_line(cause))

    def heard(self, key: str, live: dict[str, Any]) -> bool:
        """Takes in what the first rank says, for `look`. Whether the ranks are to stop."""
        from pare.workers.run import LIVE, STOP, Live

        known = LIVE.setdefault(key, Live())
        known.beat, known.progress = live["beat"], live["progress"]
        known.points += live["points"]
        return STOP.is_set()

    def ended(self, rank: int, reply: Reply) -> None:
        self._ended[rank] = reply


# As in `ray_pool`: what the driver and the ranks ask is answered while the task runs.
setattr(Launcher.run, "__ray_concurrency_group__", "work")  # noqa: B010
for _method in (Launcher.heard, Launcher.ended):
    setattr(_method, "__ray_concurrency_group__", "watch")  # noqa: B010


def rank(config: dict[str, Any]) -> None:
    """One rank of the task: runs it like any worker, and tells the launcher.

    Raises:
        RuntimeError: the task failed here. That is how Ray Train learns to end the others.
    """
    import ray
    import ray.train

    from pare.workers.run import STOP, run_task

    request, launcher, number = config["request"], config["launcher"], ray.train.get_context().get_world_rank()
    STOP.clear()
    done = threading.Event()
    teller = threading.Thread(target=tell, args=(request["fingerprint"], launcher, done), daemon=True)
    if number == 0:
        teller.start()
    else:
        request = {**request, "keep_log": False}
    reply = run_task(request)
    done.set()
    if number == 0:
        teller.join()
    ray.get(launcher.ended.remote(number, reply))
    if not reply["ok"]:
        raise RuntimeError(reply["message"])


def tell(key: str, launcher: Any, done: threading.Event) -> None:
    """Tells the launcher how far this process is, until it is done, and passes on that it is to stop."""
    import ray

    from pare.workers.run import STOP, look

    seen = 0
    while True:
        is_done = done.wait(TELL_EVERY_S)
        live = look(key, seen)
        seen += len(live["points"])
        if ray.get(launcher.heard.remote(key, live)):
            STOP.set()
        if is_done:
            return
