"""The plan: every task of every trial, equal ones merged.

Two tasks are equal when their fingerprints are, so merging needs no comparison: a trial adds its tasks by what they
do, and finds them there if another trial has already asked for the same. A trial reads

    import_model -> [tokens -> calibrate] -> compress | [tokens ->] train -> ... -> export -> evaluate, speed
                                                                       \\-> score (in memory) --^
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any

from pare.methods.anatomy.describe import UnknownModel, family_of
from pare.methods.contract import METHODS, LayerMethod, Method, SettingsError
from pare.orchestrator import hardware
from pare.orchestrator.config import Experiment, Stage, Trial
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.fingerprint import digest, task_record
from pare.workers import sources
from pare.workers.store import Store


@dataclass
class Task:
    """A node of the plan."""

    fingerprint: str
    type: str
    label: str
    spec: dict[str, Any]
    where: dict[str, Any]
    """What a worker needs to know but cannot change the result (paths)."""
    inputs: dict[str, str]
    record: dict[str, Any]
    """The fingerprint's pre-image."""
    trials: list[str] = field(default_factory=list)
    """Names of the trials that need it, in the order of the sweep."""


@dataclass
class Goals:
    """The tasks that a trial is made of, by role."""

    artifact: str
    score: str
    export: str
    evaluate: str
    speed: str | None
    tasks: list[str] = field(default_factory=list)
    """Fingerprints of all its tasks, producers first."""


@dataclass
class Plan:
    tasks: dict[str, Task] = field(default_factory=dict)
    goals: dict[str, Goals] = field(default_factory=dict)
    """Trial name -> its tasks; a skipped trial has none."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprint of an imported model -> what is known of it before it is loaded."""

    @property
    def total_if_separate(self) -> int:
        """Tasks there would be if no two trials shared one."""
        return sum(len(goals.tasks) for goals in self.goals.values())

    def missing(self, store: Store) -> list[Task]:
        """Tasks that have to run, producers first.

        A task runs if its result is wanted and not in the store; an intermediate is wanted only by a task that runs.
        """
        wanted: set[str] = set()
        waiting = [fp for goals in self.goals.values() for fp in (goals.export, goals.evaluate, goals.speed) if fp]
        while waiting:
            fingerprint = waiting.pop()
            if fingerprint not in wanted and not store.has(fingerprint):
                wanted.add(fingerprint)
                waiting += self.tasks[fingerprint].inputs.values()
        return [task for fp, task in self.tasks.items() if fp in wanted]


def build_plan(experiment: Experiment, device: str, threads: int) -> Plan:
    """Merges the trials of an experiment into one graph. Reads identities of models and data, loads neither.

    Raises:
        ConfigError: a model or data set is missing, or a setting does not fit the model's shapes.
    """
    plan = Plan()
    builder = Builder(plan, device, threads)
    for trial in experiment.trials:
        if not trial.skipped:
            builder.add_trial(trial)
    return plan


class Builder:
    def __init__(self, plan: Plan, device: str, threads: int) -> None:
        self.plan, self.device, self.threads = plan, device, threads
        self._trial = ""
        self._own: list[str] = []
        self._identities: dict[str, dict[str, Any]] = {}

    def add(
        self,
        kind: str,
        label: str,
        spec: dict[str, Any],
        inputs: dict[str, str],
        also: tuple[str, ...] = (),
        where: dict[str, Any] | None = None,
    ) -> str:
        record = task_record(kind, spec, inputs, self.device, also)
        fingerprint = digest(record)
        if fingerprint not in self.plan.tasks:
            self.plan.tasks[fingerprint] = Task(fingerprint, kind, label, spec, where or {}, inputs, record)
        task = self.plan.tasks[fingerprint]
        if self._trial not in task.trials:
            task.trials.append(self._trial)
            self._own.append(fingerprint)
        return fingerprint

    def identify(self, resolve: Any, config: dict[str, Any]) -> dict[str, Any]:
        """`resolve(config)`, once per distinct config."""
        key = f"{resolve.__name__} {json.dumps(config, sort_keys=True)}"
        if key not in self._identities:
            try:
                self._identities[key] = resolve(config)
            except sources.SourceError as e:
                raise ConfigError(str(e)) from e
        return self._identities[key]

    def add_trial(self, trial: Trial) -> None:
        self._trial, self._own = trial.name, []
        model_config, data_config = dataclasses.asdict(trial.model), dataclasses.asdict(trial.data)
        windows = dataclasses.asdict(trial.evaluation.windows)
        questions = dataclasses.asdict(trial.evaluation.questions)
        speed = dataclasses.asdict(trial.evaluation.speed)

        model = self.add(
            "import_model",
            f"import {trial.model.name or trial.model.path}",
            {"model": {"dtype": trial.model.dtype}, "identity": self.identify(sources.resolve_model, model_config)},
            {},
            where=sources.locate_model(model_config),
        )
        if model not in self.plan.models:
            self.plan.models[model] = self.identify(sources.describe_model, model_config)
        split = {key: data_config[key] for key in ("source", "fractions", "seed")}
        corpus = self.add(
            "corpus",
            f"corpus {trial.data.name or trial.data.path}",
            {"data": split, "identity": self.identify(sources.resolve_data, data_config)},
            {},
            where=sources.locate_data(data_config),
        )

        def tokens(role: str, size: dict[str, int]) -> str:
            spec = {"role": role, **size, "seed": trial.data.seed}
            return self.add("tokens", f"{role} tokens", spec, {"model": model, "corpus": corpus})

        test = tokens("test", windows)
        teacher = self.add(
            "score", "score base", {"dtype": trial.evaluation.dtype, "keep_hidden": True}, {"model": model, "tokens": test}
        )
        artifact = model
        for stage in trial.stages:
            artifact = self.add_stage(trial, stage, model, artifact, tokens)
        score = teacher
        if trial.stages:
            spec = {"dtype": trial.evaluation.dtype, "keep_hidden": False}
            score = self.add("score", f"score {trial.name}", spec, {"model": artifact, "tokens": test, "teacher": teacher})
        export = self.add(
            "export", f"export {trial.name}", {"card": card(trial, self.plan.models[model]["license"])}, {"model": artifact}
        )
        inputs = {"export": export, "tokens": test, "teacher": teacher, "score": score}
        if questions["n"]:
            inputs["questions"] = self.add("questions", "questions", {**questions, "seed": trial.data.seed}, {"corpus": corpus})
        spec = {"dtype": trial.evaluation.dtype, "tolerance": trial.evaluation.tolerance, "task": trial.data.source}
        evaluate = self.add("evaluate", f"evaluate {trial.name}", spec, inputs)
        timing = None
        if speed["repeats"]:
            spec = {**speed, "threads": self.threads, "hardware": hardware.key(self.device)}
            timing = self.add("speed", f"speed {trial.name}", spec, {"export": export})
        self.plan.goals[trial.name] = Goals(artifact, score, export, evaluate, timing, self._own)

    def add_stage(self, trial: Trial, stage: Stage, model: str, artifact: str, tokens: Any) -> str:
        """The tasks of one stage; returns the fingerprint of its artifact."""
        cls = METHODS[stage.method]
        spec: dict[str, Any] = {"method": stage.method, "settings": settings_of(stage.settings)}
        if cls.draws_random_numbers:
            spec["seed"] = trial.seed
        inputs = {"model": artifact}
        also = (cls.__module__,)
        label = f"{stage.method} {trial.name}"
        self.check_shapes(stage, model)
        if isinstance(stage.settings, LayerMethod):
            try:
                family_of(self.plan.models[model]["architecture"])
            except UnknownModel as e:
                raise ConfigError(f"block {self._trial!r}: {stage.method} works on input groups, and {e}") from e
            if cls.needs:
                calibration = tokens("calibration", dataclasses.asdict(trial.data.calibration))
                spec["dtype"] = trial.dtype
                if getattr(stage.settings, "inputs", "dense") == "dense":
                    statistics = [{"module": s.__module__, "class": s.__qualname__} for s in cls.needs]
                    inputs["statistics"] = self.add(
                        "calibrate",
                        "calibrate " + ", ".join(s.name for s in cls.needs),
                        {"statistics": statistics, "dtype": trial.dtype},
                        {"model": artifact, "tokens": calibration},
                        tuple(s.__module__ for s in cls.needs),
                    )
                else:
                    inputs["tokens"] = calibration
            return self.add("compress", label, spec, inputs, also)
        inputs["tokens"] = tokens("train", dataclasses.asdict(trial.data.train))
        return self.add("train", label, {**spec, "dtype": trial.dtype}, inputs, also)

    def check_shapes(self, stage: Stage, model: str) -> None:
        try:
            stage.settings.check_shapes(self.plan.models[model]["linears"])
        except SettingsError as e:
            raise ConfigError(
                f"block {self._trial!r}: recipe.{stage.name}.{e.setting} must be {e.allowed}, got {e.got!r}"
            ) from e


def settings_of(settings: Method) -> dict[str, Any]:
    """A settings object as plain JSON."""
    return dataclasses.asdict(settings)  # type: ignore[call-overload]


def card(trial: Trial, licence: str) -> dict[str, Any]:
    """What the model card of an export says of how it was made. It enters the fingerprint of the export, so it is drawn from
    the settings themselves and not from how they were typed."""
    settings = {stage.name: {"method": stage.method, **settings_of(stage.settings)} for stage in trial.stages}
    choices = [
        f"recipe.{stage.name}.{f.name}={getattr(stage.settings, f.name)}"
        for stage in trial.stages
        for f in dataclasses.fields(stage.settings)  # type: ignore[arg-type]
        if getattr(stage.settings, f.name) != default_of(f)
    ]
    drawn = trial.seed if any(stage.settings.draws_random_numbers for stage in trial.stages) else None
    needed = any(stage.settings.needs for stage in trial.stages)
    start = ["pare run", f"model={trial.model.source}", f"data={trial.data.source}", f"recipe={trial.recipe}"]
    return {
        "recipe": trial.recipe,
        "settings": settings,
        "base": trial.model.name or "local model",
        "licence": licence,
        "data": trial.data.name or "local data",
        "calibration": dataclasses.asdict(trial.data.calibration) if needed else {},
        "seed": drawn,
        "command": " ".join([*start, *choices, *([f"seed={drawn}"] if drawn else [])]),
    }


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a settings field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
