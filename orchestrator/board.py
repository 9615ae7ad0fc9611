"""What a person sees while a sweep runs: a live table on a terminal, plain lines elsewhere. All of it on stderr."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pare.orchestrator.plan import Plan, Task
from pare.orchestrator.pool import Reply

MARK = {"done": ("✓", "green"), "failed": ("✗", "red")}


class Board:
    """A listener of the engine (see `engine.Listener`)."""

    def __init__(self, plan: Plan, n_missing: int, console: Console) -> None:
        self.plan, self.total, self.console = plan, n_missing, console
        self.finished = 0
        self.since = time.monotonic()
        self.running: dict[str, tuple[Task, float, dict[str, Any] | None]] = {}
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self.metrics: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Board:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.live:
            self.live.stop()

    def started(self, task: Task, attempt: int) -> None:
        self.running[task.fingerprint] = (task, time.monotonic(), None)
        again = f" (attempt {attempt})" if attempt > 1 else ""
        if not self.live or again:
            self.say(f"start  {task.label}{again}")
        self.draw()

    def progressed(self, running: dict[str, dict[str, Any] | None]) -> None:
        for fingerprint, progress in running.items():
            if fingerprint in self.running:
                task, since, _ = self.running[fingerprint]
                self.running[fingerprint] = (task, since, progress)
        self.draw()

    def points(self, task: Task, points: list[tuple[int, dict[str, float]]]) -> None:
        """Curves are for the tracker."""

    def ended(self, task: Task, reply: Reply, final: bool) -> None:
        _, since, _ = self.running.pop(task.fingerprint, (task, time.monotonic(), None))
        if reply["ok"]:
            self.finished += 1
            if task.type == "evaluate":
                for trial in task.trials:
                    self.metrics[trial] = reply["result"]
            if not self.live:
                self.say(f"done   {task.label}  {time.monotonic() - since:.1f} s")
        else:
            follow = "" if final else "; trying again"
            self.say(f"[red]failed[/red] {task.label}: {reply['failure']}: {reply.get('message', '')}{follow}")
        self.draw()

    def elsewhere(self, task: Task, holder: dict[str, Any]) -> None:
        self.say(f"wait   {task.label}  another driver is at it: process {holder['pid']} on {holder['name']}")

    def trial_ended(self, trial: str, status: str, failure: dict[str, Any] | None) -> None:
        mark, colour = MARK[status]
        ppl = self.metrics.get(trial, {}).get("quality/ppl")
        what = f"ppl {ppl:.2f}" if ppl is not None else (failure or {}).get("failure", "from the store")
        self.say(f"[{colour}]{mark}[/{colour}] trial [bold]{trial}[/bold]  {what}")

    def say(self, line: str) -> None:
        clock = time.strftime("%M:%S", time.gmtime(time.monotonic() - self.since))
        self.console.print(f"[dim]{clock}[/dim] {line}", highlight=False, soft_wrap=True)

    def draw(self) -> None:
        if self.live:
            self.live.update(self.picture())

    def picture(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for task, since, progress in self.running.values():
            how_far = f"{progress['done']}/{progress['total']} {progress['unit']}" if progress else ""
            table.add_row(Text("▸", style="cyan"), task.label, how_far, f"{time.monotonic() - since:.0f} s")
        head = Text(f"{self.finished}/{self.total} tasks, {time.monotonic() - self.since:.0f} s", style="bold")
        return Group(head, table)


def stderr_console() -> Console:
    return Console(file=sys.stderr)
