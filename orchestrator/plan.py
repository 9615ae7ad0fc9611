"""The plan: every task of every trial, equal ones merged.

Two tasks are equal when their fingerprints are, so merging needs no comparison: a trial adds its tasks by what they
do, and finds them there if another trial has already asked for the same. A trial reads

    import_model -> [tokens -> calibrate, gradients] -> compress | [tokens -> teach] train -> ... -> export -> evaluate, speed
                                                                       \\-> score (in memory) --^

A stage of kind allocate is a search over levels, each of which is an ordinary compress task that plain trials share:

    compress (one per level) -> levels -> allocate -> assemble

A stage of kind merge takes trials in place of one model. Which ones is a query, answered when every candidate has been
scored on the selection split: until then the trial is *late*. Its tasks stand in the plan as if all candidates were
chosen, and `Plan.resolve` puts the true ones in their place. Members may also lie in directories: each is brought in by a
task `member`, as what it adds to the base, and scored like a trial.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pare.methods.anatomy.apart import SEES_ACROSS
from pare.methods.anatomy.describe import UnknownModel, family_of
from pare.methods.contract import METHODS, LayerMethod, Method, SettingsError, TrainMethod, family
from pare.methods.ops.statistics import Gram
from pare.orchestrator import hardware
from pare.orchestrator.config import Experiment, Stage, Trial
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.fingerprint import digest, task_record
from pare.orchestrator.schema import Evaluation, Model
from pare.orchestrator.trials import BASE, is_imported
from pare.orchestrator.widths import with_widths
from pare.orchestrator.zero_config import own_config
from pare.workers import lm_tasks, sources
from pare.workers.corpus import NO_TEMPLATE
from pare.workers.hub import Memory, remembering
from pare.workers.imported import locate_import, resolve_import
from pare.workers.members import locate_member, resolve_member
from pare.workers.metric_function import resolve_metric, source_of_metric
from pare.workers.pairs import resolve_pairs
from pare.workers.store import Store
from pare.workers.zero import objection


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
    late: bool = False
    """Whether it only stands for what a query will choose."""


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
    members: list[str] = field(default_factory=list)
    """Names of the trials that were merged into this one."""

    @property
    def ends(self) -> list[str]:
        """Tasks without which the trial is not done."""
        return [self.export, self.evaluate]


@dataclass
class Late:
    """A trial that waits for the answer to a query."""

    trial: Trial
    candidates: dict[str, str]
    """Trial -> the task that scores what it made on the selection split."""


AS_EVER = {"packing": "concatenated", "predict": "all"}
"""Settings of windows that are left out of a fingerprint where they have these values."""

Members = list[tuple[str, float | None]]
"""Trials to be merged, best first, with their scores; None where a candidate only stands for what will be chosen."""


@dataclass
class Plan:
    tasks: dict[str, Task] = field(default_factory=dict)
    goals: dict[str, Goals] = field(default_factory=dict)
    """Trial name -> its tasks; a skipped trial has none."""
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprint of an imported model -> what is known of it before it is loaded."""
    late: dict[str, Late] = field(default_factory=dict)
    """Trial name -> the query that it waits for."""
    names: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What names of the hub stand for (see `workers.hub.Memory`)."""
    builder: Builder | None = None
    """Adds the tasks of a late trial."""

    @property
    def total_if_separate(self) -> int:
        """Tasks there would be if no two trials shared one."""
        return sum(len(goals.tasks) for goals in self.goals.values())

    def missing(self, store: Store, trials: Iterable[str] | None = None, again: Collection[str] = ()) -> list[Task]:
        """Tasks that have to run for `trials` (None: all), producers first.

        A task runs if its result is wanted and not in the store, or if it is to run `again`; an intermediate is wanted only
        by a task that runs, and then with its files, which may have been dropped.
        """
        wanted: set[str] = set()
        there = store.present(self.tasks)
        waiting = [(fp, False) for trial in (self.goals if trials is None else trials) for fp in self.wanted_of(trial)]
        waiting += [(fp, False) for fp in again]
        while waiting:
            fingerprint, is_read = waiting.pop()
            if fingerprint in wanted:
                continue
            if fingerprint not in there or fingerprint in again or (is_read and not store.held(fingerprint)):
                wanted.add(fingerprint)
                waiting += [(fp, True) for fp in self.tasks[fingerprint].inputs.values()]
        return [task for fp, task in self.tasks.items() if fp in wanted]

    def wanted_of(self, trial: str) -> list[str]:
        """The tasks that a trial is run for, as far as they are known: of a late one the scores of its candidates."""
        if trial in self.late:
            return list(self.late[trial].candidates.values())
        goals = self.goals[trial]
        return [*goals.ends, *([goals.speed] if goals.speed else [])]

    def expected(self) -> list[Task]:
        """The tasks that stand for what queries will choose, behind the scores by which it is chosen."""
        found = []
        for trial, late in self.late.items():
            own = {fp: self.tasks[fp] for fp in self.goals[trial].tasks if self.tasks[fp].late}
            for task in own.values():
                asked = (
                    {}
                    if own.keys() & set(task.inputs.values())
                    else {f"select.{name}": fp for name, fp in late.candidates.items()}
                )
                found.append(dataclasses.replace(task, inputs={**task.inputs, **asked}))
        return list({task.fingerprint: task for task in found}.values())

    def answer(self, store: Store) -> dict[str, str]:
        """Answers the queries of late trials whose candidates have all been scored before. Trial -> why there is no answer."""
        refused = {}
        for trial, late in list(self.late.items()):
            fingerprints = list(late.candidates.values())
            if store.present(fingerprints) == set(fingerprints):
                try:
                    self.resolve(trial, {fp: store.manifest(fp)["result"] for fp in fingerprints})
                except NoMembersError as e:
                    refused[trial] = str(e)
        return refused

    def resolve(self, trial: str, results: Mapping[str, Mapping[str, Any] | None]) -> list[Task]:
        """Answers a late trial's query and puts its true tasks in place of those that stood for them. Returns the new ones.

        results: fingerprint of a candidate's score -> its result, None where the candidate failed.

        Raises:
            NoMembersError: no candidate is left.
        """
        late = self.late[trial]
        scored = {name: results[fp]["quality/ppl"] for name, fp in late.candidates.items() if results[fp] is not None}  # type: ignore[index]
        query = late.trial.stages[0].members
        members: Members = [*select(scored, query.top if query else None)]
        if not members:
            what = "has a finite score" if scored else "has finished"
            raise NoMembersError(f"none of the trials to be merged {what}: {', '.join(late.candidates)}")
        del self.late[trial]
        kept = []
        for fingerprint in self.goals[trial].tasks:
            task = self.tasks[fingerprint]
            if not task.late:
                kept.append(fingerprint)
                continue
            task.trials.remove(trial)
            if not task.trials:
                del self.tasks[fingerprint]
        self.goals[trial].tasks = kept
        assert self.builder is not None
        known = set(self.tasks)
        self.builder.add_trial(late.trial, members, kept)
        return [task for fp, task in self.tasks.items() if fp not in known]


def ranks_of(task: Task) -> int:
    """Processes that work on the task together."""
    return int(task.spec.get("ranks", 1))


class NoMembersError(Exception):
    """A query has no answer: every candidate failed or has no finite score."""


def select(scored: Mapping[str, float], top: int | None) -> list[tuple[str, float]]:
    """The query: (trial, mean loss in nats on the selection split) of the best, best first, ties by name.

    scored: trial -> perplexity on the selection split.
    """
    finite = sorted((math.log(ppl), name) for name, ppl in scored.items() if math.isfinite(ppl) and ppl > 0)
    return [(name, nll) for nll, name in finite[:top]]


def build_plan(experiment: Experiment, device: str, threads: int, memory: Memory | None = None) -> Plan:
    """Merges the trials of an experiment into one graph. Reads identities of models and data, loads neither.

    memory: what names of the hub are known to stand for.

    Raises:
        ConfigError: a model or data set is missing, or a setting does not fit the model's shapes.
    """
    with remembering(memory or Memory()) as learning:
        plan = merged_plan(experiment, device, threads)
    plan.names = learning.learnt
    return plan


def merged_plan(experiment: Experiment, device: str, threads: int) -> Plan:
    plan = Plan()
    plan.builder = builder = Builder(plan, device, threads)
    runnable = [trial for trial in experiment.trials if not trial.skipped]
    waiting = {trial.name: trial for trial in runnable}
    builder.order = list(waiting)
    while waiting:
        # A trial that merges others comes after them; their artifacts must be known.
        ready = [t for t in waiting.values() if not any(name in waiting for name in candidates_of(t, waiting.values()))]
        if not ready:
            raise ConfigError(f"trials that merge each other: {', '.join(waiting)}")
        for trial in ready:
            del waiting[trial.name]
            members = candidates_of(trial, runnable)
            if trial.stages and trial.stages[0].members and not members:
                raise ConfigError(f"block {trial.block!r}: its members query finds no trial")
            builder.add_trial(trial, [(name, None) for name in members] if members else None)
    plan.goals = {name: plan.goals[name] for name in builder.order}
    return plan


def candidates_of(trial: Trial, trials: Any) -> list[str]:
    """Names of the trials and of the directories that a merging trial's query asks about."""
    query = trial.stages[0].members if trial.stages else None
    if query is None:
        return []
    own = [t.name for t in trials if t.name != trial.name and any(fnmatchcase(t.block, b) for b in query.blocks)]
    return [*own, *query.foreign]


class Builder:
    """Adds the tasks of one trial after another. What trials share, they share by holding the same config objects."""

    def __init__(self, plan: Plan, device: str, threads: int) -> None:
        self.plan, self.device, self.threads = plan, device, threads
        self.order: list[str] = []
        self._trial = ""
        self._late = False
        self._own: dict[str, None] = {}
        self._stages: dict[str, str] = {}
        """Of the trial at hand: what a recipe calls a model (`model`, a stage) -> the artifact."""
        self._plain: dict[int, tuple[Any, dict[str, Any]]] = {}
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
        task = self.plan.tasks.get(fingerprint)
        if task is None:
            task = self.plan.tasks[fingerprint] = Task(
                fingerprint, kind, label, spec, where or {}, inputs, record, late=self._late
            )
        task.late = task.late and self._late
        if fingerprint not in self._own:
            task.trials.append(self._trial)
            self._own[fingerprint] = None
        return fingerprint

    def plain(self, config: Any) -> dict[str, Any]:
        """A config object as plain JSON, worked out once for all trials that hold the same object."""
        known = self._plain.get(id(config))
        if known is None:
            known = self._plain[id(config)] = (config, dataclasses.asdict(config))  # holding the object keeps its id its own
        return known[1]

    def identify(self, resolve: Any, config: dict[str, Any]) -> dict[str, Any]:
        """`resolve(config)`, once per distinct config."""
        key = f"{resolve.__name__} {json.dumps(config, sort_keys=True)}"
        if key not in self._identities:
            try:
                self._identities[key] = resolve(config)
            except sources.SourceError as e:
                raise ConfigError(str(e)) from e
        return self._identities[key]

    def add_trial(self, trial: Trial, members: Members | None = None, own: list[str] | None = None) -> None:
        """Adds a trial; one that merges others with its members, or with all candidates in their place.

        own: tasks that are the trial's already.
        """
        self._trial, self._own, self._late = trial.name, dict.fromkeys(own or []), False
        data_config = self.plain(trial.data)
        evaluation = self.plain(trial.evaluation)

        model = self.add_model(trial.model)
        if trial.data.rows == "chat" and self.plan.models[model]["chat_template"] is False:
            raise ConfigError(NO_TEMPLATE)
        split = {key: data_config[key] for key in ("source", "fractions", "seed")}
        corpus = self.add(
            "corpus",
            f"corpus {trial.data.name or trial.data.path}",
            {"data": split, "identity": self.identify(sources.resolve_data, data_config)},
            {},
            where=sources.locate_data(data_config),
        )

        def tokens(role: str) -> str:
            size = evaluation["windows"] if role == "test" else data_config[role]
            size = {key: value for key, value in size.items() if AS_EVER.get(key) != value}
            self.check_length("evaluation.windows" if role == "test" else f"data.{role}", size["length"], trial, model)
            if role == "train" and size.get("packing") == "separate":
                self.check_apart(model)
            spec = {"role": role, **size, "seed": trial.data.seed}
            return self.add("tokens", f"{role} tokens", spec, {"model": model, "corpus": corpus})

        def score(label: str, artifact: str, windows: str, teacher: str | None = None, keep_hidden: bool = False) -> str:
            spec = {"dtype": trial.evaluation.dtype, "keep_hidden": keep_hidden}
            inputs = {"model": artifact, "tokens": windows, **({"teacher": teacher} if teacher else {})}
            return self.add("score", label, spec, inputs, where=memory_of(trial.evaluation))

        test = tokens("test")
        teacher = score("score base", model, test, keep_hidden=True)
        artifact, stages = model, trial.stages
        self._stages = {BASE: model}
        if members is not None:
            selection = tokens("selection")
            artifacts = {name: self.artifact_of(trial, name, model) for name, _ in members}
            if any(nll is None for _, nll in members):
                check_lineages(self.plan, stages[0], artifacts)
                scores = {name: score(f"select by {name}", artifacts[name], selection) for name in artifacts}
                self.plan.late[trial.name] = Late(trial, scores)
                self._late = True
            artifact = self.add_merge(trial, stages[0], model, selection, artifacts, members)
            self._stages[stages[0].name] = artifact
            stages = stages[1:]
        for stage in stages:
            if METHODS[stage.method].kind == "import":
                artifact = self.add_import(stage, model)
            elif METHODS[stage.method].kind == "allocate":
                search = tokens("validation")
                search_teacher = score("score base (search)", model, search, keep_hidden=True)
                artifact = self.add_search(trial, stage, model, artifact, tokens, search, search_teacher)
            else:
                artifact = self.add_stage(trial, stage, model, artifact, tokens)
            self._stages[stage.name] = artifact
        own_score, export = teacher, artifact
        inputs = {"export": export, "tokens": test, "teacher": teacher}
        if not is_imported(trial):
            if trial.stages:
                own_score = score(f"score {trial.name}", artifact, test, teacher)
            spec: dict[str, Any] = {"card": card(trial, self.plan.models[model]["license"])}
            if trial.export.format != "auto":
                spec["format"] = trial.export.format
            export = self.add("export", f"export {trial.name}", spec, {"model": artifact})
            inputs |= {"export": export, "score": own_score}
        elif trial.export.format != "auto":
            raise ConfigError(
                f"export.format={trial.export.format}: {trial.name!r} was made elsewhere and is measured as it is. Try: "
                "export.format=auto"
            )
        if evaluation["questions"]["n"]:
            spec = {**evaluation["questions"], "seed": trial.data.seed}
            inputs["questions"] = self.add("questions", "questions", spec, {"corpus": corpus})
        spec = {"dtype": trial.evaluation.dtype, "tolerance": trial.evaluation.tolerance, "task": trial.data.source}
        inputs |= self.asked(trial.evaluation)
        spec |= self.asks(trial.evaluation)
        evaluate = self.add("evaluate", f"evaluate {trial.name}", spec, inputs, where=where_to_measure(trial.evaluation))
        timing = None
        if evaluation["speed"]["repeats"]:
            spec = {**evaluation["speed"], "threads": self.threads, "hardware": hardware.key(self.device)}
            timing = self.add("speed", f"speed {trial.name}", spec, {"export": export})
        chosen = [name for name, _ in members or []]
        self.plan.goals[trial.name] = Goals(artifact, own_score, export, evaluate, timing, list(self._own), chosen)

    def add_model(self, model: Model) -> str:
        """The import of a model, and what is known of it before it is loaded."""
        config = self.plain(model)
        fingerprint = self.add(
            "import_model",
            f"import {model.name or model.path}",
            {"model": {"dtype": model.dtype}, "identity": self.identify(sources.resolve_model, config)},
            {},
            where=sources.locate_model(config),
        )
        if fingerprint not in self.plan.models:
            self.plan.models[fingerprint] = with_widths(self.identify(sources.describe_model, config))
        return fingerprint

    def asked(self, evaluation: Evaluation) -> dict[str, str]:
        """What the user has an export asked: role of the evaluation -> task that brings it into the store."""
        found = {}
        for name in evaluation.tasks:
            where = {"name": name, "include_path": evaluation.include_path, "start": str(Path.cwd())}
            identity = self.identify(lm_tasks.resolve_benchmark, where)
            found[f"benchmark.{name}"] = self.add("benchmark", f"benchmark {name}", {"identity": identity}, {}, where=where)
        if evaluation.pairs.path is not None:
            pairs = self.plain(evaluation.pairs)
            columns = {key: pairs[key] for key in ("good", "bad", "group")}
            spec = {"columns": columns, "identity": self.identify(resolve_pairs, pairs)}
            found["pairs"] = self.add("pairs", "minimal pairs", spec, {}, where={"path": str(Path(pairs["path"]).resolve())})
        return found

    def asks(self, evaluation: Evaluation) -> dict[str, Any]:
        """What of the user's questions belongs to the evaluation itself. Empty where there is none."""
        spec: dict[str, Any] = {}
        if evaluation.tasks:
            spec |= {"num_fewshot": evaluation.num_fewshot, "limit": evaluation.limit}
        if evaluation.metrics:
            plain = [self.plain(metric) for metric in evaluation.metrics]
            spec["metrics"] = [{**metric, "identity": self.identify(resolve_metric, metric)} for metric in plain]
        return spec

    def add_stage(self, trial: Trial, stage: Stage, model: str, artifact: str, tokens: Callable[[str], str]) -> str:
        """The tasks of one stage; returns the fingerprint of its artifact."""
        cls = METHODS[stage.method]
        spec = self.spec_of(trial, stage)
        inputs = {"model": artifact}
        label = f"{stage.method} {trial.name}"
        self.check_shapes(stage, model)
        if isinstance(stage.settings, LayerMethod):
            self.need_anatomy(stage, model)
            if cls.needs:
                spec["dtype"] = trial.dtype
                if getattr(stage.settings, "inputs", "dense") == "dense":
                    inputs["statistics"] = self.statistics(trial, artifact, cls.needs, tokens)
                else:
                    inputs["tokens"] = tokens("calibration")
            if cls.needs_gradients:
                inputs["gradients"] = self.statistics(trial, artifact, cls.needs_gradients, tokens, "gradients")
            return self.add("compress", label, spec, inputs, (cls.__module__,))
        check_decoding(trial, stage)
        inputs["tokens"] = tokens("train")
        spec["dtype"] = trial.dtype
        if stage.teachers:
            spec["teachers"] = list(stage.teachers.values())
            for i, name in enumerate(stage.teachers):
                inputs[f"teacher.{i}"] = self.add_teacher(trial, stage, name, model, inputs["tokens"])
        spec |= self.engine_of(trial, stage)
        return self.add("train", label, spec, inputs, (cls.__module__,))

    def add_teacher(self, trial: Trial, stage: Stage, name: str, model: str, tokens: str) -> str:
        """What a teacher makes of the training data. It is one task for all students that learn from it."""
        artifact = self._stages.get(name)
        if artifact is None:
            path, known = (name, None) if is_local(name) else (None, name)
            artifact = self.add_model(Model("hf", known, path=path, dtype=trial.model.dtype))
            own, others = (self.plan.models[fp]["vocab_size"] for fp in (model, artifact))
            if own != others:
                raise ConfigError(
                    f"block {trial.block!r}: recipe.{stage.name}.teachers: {name!r} has a vocabulary of {others} tokens, the "
                    f"student one of {own}. A teacher must have the student's tokenizer"
                )
        return self.add(
            "teach", f"teacher {name}", {"dtype": trial.dtype}, {"model": artifact, "tokens": tokens},
            where=memory_of(trial.evaluation),
        )  # fmt: skip

    def add_import(self, stage: Stage, model: str) -> str:
        """The task that takes a checkpoint made elsewhere into the store, as the export that it is."""
        settings = settings_of(stage.settings)
        spec = {"identity": self.identify(resolve_import, settings)}
        return self.add("adopt", f"import {settings['path']}", spec, {"model": model}, where=locate_import(settings))

    def engine_of(self, trial: Trial, stage: Stage) -> dict[str, Any]:
        """What a training is told of its engine; nothing where that is one rank of plain torch."""
        engine, settings = trial.engine, stage.settings
        spec: dict[str, Any] = {}
        assert isinstance(settings, TrainMethod)
        if engine.ranks > 1:
            check_ranks(stage, settings, engine.ranks)
            spec["ranks"] = engine.ranks
        if engine.kind == "deepspeed":
            if reason := objection(settings, engine.stage):
                other = "torch" if objection(settings, 2) else "deepspeed_zero2"
                raise ConfigError(
                    f"engine.stage={engine.stage}: {stage.method} (recipe.{stage.name}) cannot be trained by "
                    f"ZeRO-{engine.stage}: {reason}. Try: engine={other}"
                )
            config = own_config(engine.config, stage.name, settings, engine.ranks, trial.dtype)
            spec["zero"] = {"stage": engine.stage, "offload": engine.offload, "config": config}
        return spec

    def artifact_of(self, trial: Trial, name: str, model: str) -> str:
        """What a member is merged from: what a trial has made, or what a directory adds to the base."""
        stage = trial.stages[0]
        path = stage.members.foreign.get(name) if stage.members else None
        if path is None:
            return self.plan.goals[name].artifact
        spec = {"path": path, "key": f"recipe.{stage.name}.members.paths", "model": self.plain(trial.model)}
        identity = self.identify(resolve_member, spec)
        return self.add("member", f"member {path}", {"identity": identity}, {"model": model}, where=locate_member(spec))

    def add_merge(
        self, trial: Trial, stage: Stage, model: str, selection: str, artifacts: dict[str, str], members: Members
    ) -> str:
        """The merge of the members, best first."""
        inputs = {f"member.{i:03d}": artifacts[name] for i, (name, _) in enumerate(members)}
        spec = {
            **self.spec_of(trial, stage),
            "dtype": trial.evaluation.dtype,
            "members": [{"name": name, "score": nll} for name, nll in members],
        }
        return self.add(
            "merge",
            f"{stage.method} {trial.name}",
            spec,
            {"model": model, "tokens": selection, **inputs},
            (METHODS[stage.method].__module__,),
        )

    def add_search(
        self, trial: Trial, stage: Stage, model: str, artifact: str, tokens: Callable[[str], str], search: str, teacher: str
    ) -> str:
        """Levels, the search over them, and the model that its answer means."""
        builder = stage.levels
        assert builder is not None
        (setting, values), *_ = stage.vary.items()
        levels = {}
        for value in values:
            settings = dataclasses.replace(builder.settings, **{setting: value})  # type: ignore[type-var]
            one = Stage(f"{stage.name}.levels", builder.method, settings)
            levels[f"level.{value}"] = self.add_stage(
                dataclasses.replace(trial, name=f"{setting}={value}"), one, model, artifact, tokens
            )
        statistics = self.statistics(trial, artifact, (Gram,), tokens)  # errors are weighted by it, whoever made the levels
        table = self.add(
            "levels",
            f"levels {trial.name}",
            {"vary": setting, "values": values},
            {"model": artifact, "statistics": statistics, **levels},
        )
        cls = METHODS[stage.method]
        spec = {**self.spec_of(trial, stage), "dtype": trial.evaluation.dtype, "values": values}
        inputs = {"model": artifact, "levels": table, "tokens": search, "teacher": teacher, **levels}
        allocation = self.add("allocate", f"{stage.method} {trial.name}", spec, inputs, (cls.__module__,))
        return self.add(
            "assemble",
            f"assemble {trial.name}",
            {"values": values},
            {"model": artifact, "allocation": allocation, **levels},
        )

    def spec_of(self, trial: Trial, stage: Stage) -> dict[str, Any]:
        cls = METHODS[stage.method]
        spec: dict[str, Any] = {"method": stage.method, "settings": settings_of(stage.settings)}
        return {**spec, "seed": trial.seed} if cls.draws_random_numbers else spec

    def statistics(self, trial: Trial, artifact: str, needs: Any, tokens: Callable[[str], str], kind: str = "calibrate") -> str:
        """The task that collects statistics over the inputs of a model's linears, or (`gradients`) over their gradients."""
        statistics = [{"module": s.__module__, "class": s.__qualname__} for s in needs]
        return self.add(
            kind,
            f"{kind} " + ", ".join(s.name for s in needs),
            {"statistics": statistics, "dtype": trial.dtype},
            {"model": artifact, "tokens": tokens("calibration")},
            tuple(s.__module__ for s in needs),
        )

    def check_apart(self, model: str) -> None:
        """Refuses documents that share a row for a model whose documents would see each other."""
        architecture = self.plan.models[model]["architecture"]
        if reason := SEES_ACROSS.get(architecture):
            raise ConfigError(
                f"data.train.packing=separate: {architecture} cannot keep the documents of a row apart: {reason}. "
                "Try: data.train.packing=padded"
            )

    def check_length(self, where: str, length: int, trial: Trial, model: str) -> None:
        """Refuses rows that are longer than what the model has positions for."""
        config = self.plan.models[model]["config"]
        text_config = config.get("text_config", config)
        positions = text_config.get("max_position_embeddings", text_config.get("n_positions"))
        before = max((getattr(stage.settings, "virtual_tokens", 0) for stage in trial.stages), default=0)
        if positions and length + before > positions:
            prompt = f" behind {before} of a prompt" if before else ""
            raise ConfigError(
                f"{where}.length={length}{prompt} is more than the {positions} tokens that the model has positions for. "
                f"Try: {where}.length={positions - before}"
            )

    def need_anatomy(self, stage: Stage, model: str) -> None:
        try:
            family_of(self.plan.models[model]["architecture"])
        except UnknownModel as e:
            raise ConfigError(f"block {self._trial!r}: {stage.method} works on input groups, and {e}") from e
        if reason := self.plan.models[model].get("unknown"):
            raise ConfigError(f"block {self._trial!r}: {stage.method} works on input groups, and {reason}")

    def check_shapes(self, stage: Stage, model: str) -> None:
        try:
            stage.settings.check_shapes(self.plan.models[model]["linears"])
        except SettingsError as e:
            raise ConfigError(
                f"block {self._trial!r}: recipe.{stage.name}.{e.setting} must be {e.allowed}, got {e.got!r}"
            ) from e


def check_lineages(plan: Plan, stage: Stage, artifacts: Mapping[str, str]) -> None:
    """Refuses members that cannot be merged because of what was done to each of them above the base that they share. Where not
    all candidates become members, the merge itself finds out."""
    query = stage.members
    lines = {name: lineage(plan, artifact) for name, artifact in artifacts.items()}
    if len(set(artifacts.values())) == 1 or (query and query.top and query.top < len(artifacts)):
        return
    shared = set.intersection(*(set(line) for line in lines.values()))
    for name, line in lines.items():
        for task in (plan.tasks[fp] for fp in line if fp not in shared):
            cls = METHODS.get(task.spec.get("method", ""))
            why = None
            if isinstance(cls, type) and issubclass(cls, LayerMethod) and cls.folds:
                why = "folds factors into its weights, and those of other members are on other scales"
            elif task.type == "assemble" or (cls and cls.kind == "layer" and family(cls) in ("quantize", "prune")):
                why = "leaves codes or zeros of its own in it, and the average of quantised or pruned weights is neither"
            if why:
                raise ConfigError(
                    f"recipe.{stage.name}.members: {name!r} cannot be merged: {task.label.split()[0]} {why}. Merge first and "
                    "compress what comes out, or merge members that were trained on one and the same compressed model"
                )


def lineage(plan: Plan, artifact: str) -> list[str]:
    """A model, what it stands on, and so on down to the import."""
    line = [artifact]
    while "model" in plan.tasks[line[-1]].inputs:
        line.append(plan.tasks[line[-1]].inputs["model"])
    return line


def check_decoding(trial: Trial, stage: Stage) -> None:
    """Refuses to train weights themselves that an earlier stage makes codes of. What else has to be made dense first is seen
    when there are weights."""
    if getattr(stage.settings, "decode", True) or getattr(stage.settings, "parameters", "") not in ("all", "linear"):
        return
    for earlier in trial.stages[: trial.stages.index(stage)]:
        settings = (earlier.levels or earlier).settings
        is_code = hasattr(settings, "quant_type") or (
            hasattr(settings, "bits_per_weight") and not getattr(settings, "scale_only", False)
        )
        if is_code:
            key = f"recipe.{stage.name}"
            raise ConfigError(
                f"block {trial.block!r}: {key}.decode must be true where weights are trained that have been made codes by "
                f"recipe.{earlier.name} ({settings.name}): they become dense again. Try: lora, qlora or distill_lora, which "
                f"leave them codes; or {key}.decode=true {key}.store=bfloat16"
            )


def check_ranks(stage: Stage, settings: TrainMethod, ranks: int) -> None:
    """Refuses what several ranks cannot share."""
    if settings.shards == "none":
        raise ConfigError(f"engine.ranks={ranks}: {stage.method} trains on one rank only. Try: engine.ranks=1")
    if settings.batch_size % ranks:
        raise ConfigError(
            f"recipe.{stage.name}.batch_size must be a multiple of engine.ranks={ranks}, got {settings.batch_size}. "
            f"Try: recipe.{stage.name}.batch_size={ranks * max(1, settings.batch_size // ranks)}"
        )


def where_to_measure(evaluation: Evaluation) -> dict[str, Any]:
    """What an evaluation needs to know of this place: files of the user's functions, and how much memory it may take."""
    files = {m.name: str(source_of_metric(dataclasses.asdict(m))) for m in evaluation.metrics}
    return {**({"metrics": files} if files else {}), **memory_of(evaluation)}


def memory_of(evaluation: Evaluation) -> dict[str, Any]:
    return {} if evaluation.memory_gb is None else {"memory_bytes": int(evaluation.memory_gb * 1e9)}


def settings_of(settings: Method) -> dict[str, Any]:
    """A settings object as plain JSON."""
    return dataclasses.asdict(settings)  # type: ignore[call-overload]


def card(trial: Trial, licence: str) -> dict[str, Any]:
    """What the model card of an export says of how it was made. It enters the fingerprint of the export, so it is drawn from
    the settings themselves and not from how they were typed."""
    stages = {name: stage for stage in trial.stages for name, stage in described(stage).items()}
    settings = {
        name: {"method": stage.method, **settings_of(stage.settings), **beside(stage)} for name, stage in stages.items()
    }
    choices = [
        f"recipe.{name}.{f.name}={getattr(stage.settings, f.name)}"
        for name, stage in stages.items()
        for f in dataclasses.fields(stage.settings)  # type: ignore[arg-type]
        if getattr(stage.settings, f.name) != default_of(f)
    ]
    choices += [
        f"recipe.{name}.teachers={{{','.join(f'{teacher}:{weight:g}' for teacher, weight in stage.teachers.items())}}}"
        for name, stage in stages.items()
        if stage.teachers not in ({}, {BASE: 1.0}) and not any(map(is_local, stage.teachers))
    ]
    drawn = trial.seed if any(stage.settings.draws_random_numbers for stage in trial.stages) else None
    needed = any(stage.settings.needs or stage.settings.needs_gradients for stage in stages.values())
    form = [f"export.format={trial.export.format}"] if trial.export.format != "auto" else []
    start = ["pare run", f"model={trial.model.source}", f"data={trial.data.source}", f"recipe={trial.recipe}"]
    return {
        "recipe": trial.recipe,
        "settings": settings,
        "base": trial.model.name or "local model",
        "licence": licence,
        "data": trial.data.name or "local data",
        "calibration": dataclasses.asdict(trial.data.calibration) if needed else {},
        "seed": drawn,
        "command": " ".join([*start, *choices, *form, *([f"seed={drawn}"] if drawn else [])]),
    }


def described(stage: Stage) -> dict[str, Stage]:
    """The stage, and the one that builds its levels, by their names in the recipe."""
    return {stage.name: stage, **({f"{stage.name}.levels": stage.levels} if stage.levels else {})}


def beside(stage: Stage) -> dict[str, Any]:
    """What a stage says besides its method's settings, without places."""
    teachers = {"local model" if is_local(name) else name: weight for name, weight in stage.teachers.items()}
    return {key: value for key, value in (("vary", stage.vary), ("teachers", teachers)) if value}


def is_local(teacher: str) -> bool:
    """Whether a teacher that is no stage is a directory, and not a name of the hub."""
    return teacher.startswith(("/", ".", "~"))


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a settings field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
