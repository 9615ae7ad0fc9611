"""A fresh process: a new interpreter that never held the model which a task compares against.

    with FreshProcess(ExportUnderTest, threads=1, directory=...) as export:
        reply = export.ask("evaluate", ...)

The process makes one object of the given class, and `ask` calls its methods by name with plain JSON both ways, over a
socket of its own: what libraries print goes to the task's log. It imports nothing that the class does not. It dies with
its parent, also when that is killed, and its death is a `TaskError` that shows the last it said.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from types import TracebackType
from typing import Any

from pare.workers.run import Clock, classify, resident_bytes
from pare.workers.task import TaskError

TAIL = 4000
"""Characters of a dead process's last output that an error shows."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "DISABLE_MULTIPROC": "1",
}
"""An export is opened from its directory, never from the network, the log holds no progress bars, and lm-eval draws its
intervals in this process, which has the cores that the task has."""


class FreshProcess:
    """The parent's end. `close`, or leaving the `with`, ends the process and all it started."""

    def __init__(self, cls: type, *, threads: int, **arguments: Any) -> None:
        """Starts the process. It makes `cls(**arguments)`, all plain JSON, meanwhile; if it cannot, the first `ask` raises."""
        self.name = f"{cls.__module__}:{cls.__qualname__}"
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            # -P: the current directory may hold folders named like a library.
            [sys.executable, "-P", "-m", "pare.workers.fresh", str(theirs.fileno()), str(os.getpid()), self.name],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)},
        )
        theirs.close()
        self._socket = ours
        self._stream = ours.makefile("rw", encoding="utf-8", newline="\n")
        self._send({"threads": threads, "arguments": arguments})

    def ask(self, method: str, **arguments: Any) -> Any:
        """Calls a method of the object and returns what it returned.

        Raises:
            TaskError: the method raised (the failure is its own), or the process died (`oom_host` after SIGKILL, which is
                what the kernel does when memory runs out, else `lost_worker`).
        """
        self._send({"method": method, "arguments": arguments})
        try:
            line = self._stream.readline()
        except OSError:
            line = ""
        if not line:
            raise self._death()
        reply = json.loads(line)
        if "failure" in reply:
            raise TaskError(f"{reply['message']}\n{reply['traceback']}".strip(), reply["failure"])
        return reply["value"]

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._stream.write(json.dumps(request) + "\n")
            self._stream.flush()
        except OSError as e:
            raise self._death() from e

    def _death(self) -> TaskError:
        code = self.process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        failure = "oom_host" if code == -signal.SIGKILL else "lost_worker"
        return TaskError(f"the fresh process {self.name} {how}; its last output:\n{self.output()[-TAIL:]}", failure)

    def output(self) -> str:
        """What the process has printed so far."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    def close(self) -> None:
        """Ends the process; what it printed goes to this process's stderr, which is the task's log."""
        if self.process.poll() is None:
            Clock.children.append(resident_bytes("VmHWM", self.process.pid))
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        sys.stderr.write(self.output())
        self._log.close()
        with contextlib.suppress(OSError):  # a request that it did not live to read
            self._stream.close()
        self._socket.close()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def serve(channel: int, parent: int, name: str) -> None:
    """The process's end: makes the object, then answers until the parent hangs up."""
    die_with(parent)
    import torch

    stream = socket.socket(fileno=channel).makefile("rw", encoding="utf-8", newline="\n")
    first = json.loads(stream.readline())
    torch.set_num_threads(first["threads"])
    served, broken = None, None
    try:
        module, _, cls = name.partition(":")
        served = getattr(importlib.import_module(module), cls)(**first["arguments"])
    except Exception as e:
        broken = e
    for line in stream:
        request = json.loads(line)
        try:
            if broken:
                raise broken
            reply = {"value": getattr(served, request["method"])(**request["arguments"])}
        except Exception as e:  # every error becomes a reply, of the class that it would have in the parent
            message = classify(e)
            own = "" if isinstance(e, TaskError) else traceback.format_exc()
            reply = {"failure": message["failure"], "message": message["message"], "traceback": own}
        stream.write(json.dumps(reply) + "\n")
        stream.flush()


def die_with(parent: int) -> None:
    """Asks the kernel to kill this process when the parent's thread that started it ends (Linux)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before it could be asked
        sys.exit(1)


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
