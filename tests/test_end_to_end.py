"""Real runs through the installed command: real Ray, real MLflow on SQLite, real models. `make test-slow`."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.guide import guide

pytestmark = pytest.mark.slow

PARE = [sys.executable, "-m", "pare"]
SMALL = ["evaluation.windows={sequences: 4, length: 128}", "evaluation.questions.n=8", "evaluation.speed.repeats=0"]


def environment(home: Path) -> dict[str, str]:
    """Of a user who has set nothing but PARE_HOME."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_", "PARE_", "PYTEST"))}
    return {**kept, "PARE_HOME": str(home)}


def pare(home: Path, *arguments: str, cwd: Path | None = None, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*PARE, *arguments], capture_output=True, text=True, env=environment(home), cwd=cwd, timeout=800)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done


def report(home: Path) -> dict[str, Any]:
    return json.loads(pare(home, "report", "--json").stdout)


def labels(plan: dict[str, Any], state: str) -> set[str]:
    return {task["label"] for task in plan["plan"] if task["state"] == state}


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which the smoke experiment has run, started from a directory with folders named like Pare's own."""
    home = tmp_path_factory.mktemp("home")
    user = tmp_path_factory.mktemp("user")
    for folder in ("methods", "conf", "workers", "orchestrator", "tracking"):
        (user / folder).mkdir()
        (user / folder / "__init__.py").write_text("raise RuntimeError('the user\\'s own folder was imported')\n")
    (user / "conf" / "config.yaml").write_text("mine: true\n")
    pare(home, "run", "experiment=smoke", cwd=user)
    return home


def test_every_kind_of_method_runs_and_a_front_comes_out(smoke: Path) -> None:
    record = report(smoke)

    trials = {t["trial"]: t for t in record["trials"]}
    assert record["schema_version"] == 1
    assert {t["status"] for t in trials.values()} == {"done"}
    assert len(trials) == 12
    assert record["tasks"]["executed"] == record["tasks"]["unique"] < record["tasks"]["total_if_separate"]
    assert any(t["pareto"] for t in trials.values())
    for trial in trials.values():
        assert abs(trial["metrics"]["quality/ppl"] / trial["metrics"]["quality/ppl_in_memory"] - 1) < 0.005
        weights = list(Path(trial["export_path"]).rglob("*.safetensors"))
        assert trial["metrics"]["size/bytes"] == sum(f.stat().st_size for f in weights)
    assert trials["rtn-bits=3"]["metrics"]["size/bytes"] < trials["rtn-bits=4"]["metrics"]["size/bytes"]
    assert trials["base"]["metrics"]["quality/kl"] == pytest.approx(0, abs=1e-6)


def test_the_same_again_executes_nothing_and_starts_no_ray(smoke: Path) -> None:
    before = time.monotonic()
    done = pare(smoke, "run", "experiment=smoke", "--json")

    record = json.loads(done.stdout)
    assert record["tasks"]["executed"] == 0
    assert record["tasks"]["cached"] == record["tasks"]["unique"]
    assert time.monotonic() - before < 60
    assert pare(smoke, "plan", "experiment=smoke", "--check").returncode == 0


def test_one_more_bit_width_runs_only_what_the_plan_said(smoke: Path) -> None:
    wider = ["experiment=smoke", "blocks.gptq.recipe.quantize.bits=4,3,2"]
    planned = labels(json.loads(pare(smoke, "plan", *wider, "--json").stdout), "new")

    record = json.loads(pare(smoke, "run", *wider, "--json").stdout)

    assert planned == {f"{what} gptq-bits=2" for what in ("score", "export", "evaluate")}, "the search has made it as a level"
    assert record["tasks"]["executed"] == len(planned)


def test_mlflow_holds_one_parent_and_one_child_for_each_trial(smoke: Path) -> None:
    pare(smoke, "run", "experiment=smoke")
    db = sqlite3.connect(smoke / "mlflow.db")
    tags = {(r, k): v for r, k, v in db.execute("SELECT run_uuid, key, value FROM tags")}
    parents = {r for (r, k), v in tags.items() if k == "pare.sweep" and (r, "mlflow.parentRunId") not in tags}
    smoke_parent = [r for r in parents if tags[r, "pare.sweep"] == report(smoke)["sweep"]]

    assert len(smoke_parent) == 1
    children = {r for (r, k), v in tags.items() if k == "mlflow.parentRunId" and v == smoke_parent[0]}
    assert len(children) == 12
    logged = {r for r, k in db.execute("SELECT run_uuid, key FROM latest_metrics") if k == "quality/ppl"}
    assert children <= logged
    assert {s for r, s in db.execute("SELECT run_uuid, status FROM runs") if r in children} == {"FINISHED"}


def test_an_export_opens_where_there_is_no_pare(smoke: Path, tmp_path: Path) -> None:
    pare(smoke, "export", "gptq-bits=4", "--to", str(tmp_path / "model"))
    program = (
        "import sys; sys.modules['pare'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        f"t = AutoTokenizer.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(m(**t('The file object', return_tensors='pt')).logits.isfinite().all().item())"
    )

    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path).stdout

    assert out.strip() == "True"
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| `quality/ppl` |" in card
    assert "| licence | psf-2.0 |" in card


def test_an_adapter_export_opens_from_where_it_was_put(smoke: Path, tmp_path: Path) -> None:
    pare(smoke, "export", "lora-rank=2", "--to", str(tmp_path / "model"))
    program = (
        "import sys; sys.modules['pare'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'model')!r})\n"
        "print(any('lora' in n for n, _ in m.named_parameters()))"
    )

    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd="/").stdout

    assert out.strip() == "True"


def test_two_ranks_come_to_the_model_of_one(tmp_path: Path) -> None:
    tuned = ["recipe=lora", "model=tiny", "recipe.tune.batch_size=4", "recipe.tune.steps=20", "engine.ranks=1,2"]

    record = json.loads(pare(tmp_path, "run", *tuned, *SMALL, "cluster.slots=2", "--json").stdout)

    one, two = (trial["metrics"] for trial in record["trials"])
    assert two["quality/ppl"] == pytest.approx(one["quality/ppl"], rel=1e-3)
    assert record["tasks"]["executed"] == record["tasks"]["unique"] == 14


def test_a_driver_killed_three_times_comes_to_the_table_of_an_undisturbed_one(smoke: Path, tmp_path: Path) -> None:
    """Three times in one sweep: with its models being made, with its exports being measured, and with its search under way."""
    command = ["run", "experiment=smoke", "tracking.enabled=false"]
    for published in (8, 25, 45):
        with (tmp_path / "driver.log").open("w") as log:
            driver = subprocess.Popen([*PARE, *command], env=environment(tmp_path), stdout=log, stderr=log)
        deadline = time.monotonic() + 300
        while finished(tmp_path) < published:
            assert driver.poll() is None, (tmp_path / "driver.log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "driver.log").read_text()
            time.sleep(0.1)
        assert len(processes_of(tmp_path)) > 3, "the driver, Ray and its workers"
        driver.kill()
        driver.wait()
        wait_until_gone(tmp_path)

    pare(tmp_path, *command)

    attempts = sqlite3.connect(tmp_path / "ledger.db").execute(
        "SELECT SUM(status = 'done'), SUM(status = 'lost') FROM attempt GROUP BY fingerprint"
    )
    done, lost = zip(*attempts.fetchall(), strict=True)
    assert set(done) <= {0, 1}, "none was done twice; what was published as its driver died counts as lost, and is there"
    assert sum(lost) > 0
    assert table(tmp_path) == table(smoke)
    wait_until_gone(tmp_path)


def table(home: Path) -> str:
    """What does not depend on time or place, as text."""
    rows = [
        [trial["trial"], trial["status"], trial["pareto"], trial["windows"]]
        + [[name, value] for name, value in sorted(trial["metrics"].items()) if name.startswith(("quality/", "size/"))]
        for trial in report(home)["trials"]
    ]
    return json.dumps(rows)


def finished(home: Path) -> int:
    return len(list((home / "store" / "objects").glob("*/*/manifest.json")))


def processes_of(home: Path) -> list[str]:
    """Every process that was started for this home, Ray's included: they inherit PARE_HOME from the driver."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("PARE_HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
        except psutil.Error:  # it ended while we looked
            continue
    return found


def wait_until_gone(home: Path) -> None:
    """Nothing that was started for this home is left, a minute after its driver has ended."""
    deadline = time.monotonic() + 60
    while left := processes_of(home):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.5)


def test_an_interrupted_driver_says_how_to_go_on(tmp_path: Path) -> None:
    command = ["run", "recipe=rtn", "model=tiny", *SMALL, "tracking.enabled=false"]
    driver = subprocess.Popen([*PARE, *command], env=environment(tmp_path), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while finished(tmp_path) < 1 and time.monotonic() < deadline:
        time.sleep(0.1)
    driver.send_signal(signal.SIGINT)
    _, error = driver.communicate(timeout=60)

    assert driver.returncode == 130
    assert "Go on with:" in error
    assert "recipe=rtn" in error
    assert json.loads(pare(tmp_path, "status", "--json").stdout)["status"] == "interrupted"
    wait_until_gone(tmp_path)


def test_on_a_real_model_gptq_is_better_than_rtn_at_three_bits(tmp_path: Path) -> None:
    """SmolLM2-135M, 3 bits, groups of 64: the comparison of the demo at a quarter of its size."""
    pare(
        tmp_path,
        "run",
        "recipe=rtn,gptq",
        "recipe.quantize.bits=3",
        "data.calibration={sequences: 8, length: 512}",
        "evaluation.windows={sequences: 4, length: 512}",
        "evaluation.questions.n=0",
        "evaluation.speed={prompt_tokens: 32, new_tokens: 4, repeats: 1}",
        "tracking.enabled=false",
    )

    trials = {t["recipe"]: t["metrics"] for t in report(tmp_path)["trials"]}
    assert trials["gptq"]["quality/ppl"] < trials["rtn"]["quality/ppl"]
    assert trials["gptq"]["quality/kl"] < trials["rtn"]["quality/kl"]
    for metrics in trials.values():
        assert abs(metrics["quality/ppl"] / metrics["quality/ppl_in_memory"] - 1) < 0.005
        assert any(name.startswith("speed/") for name in metrics)


def test_a_tracking_server_that_is_down_costs_no_result(tmp_path: Path) -> None:
    command = [*PARE, "run", "recipe=rtn", "model=tiny", *SMALL]
    env = {
        **environment(tmp_path),
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "2",
    }

    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)

    assert done.returncode == 6, done.stderr[-3000:]
    assert "tracking is behind" in done.stderr
    assert {t["status"] for t in report(tmp_path)["trials"]} == {"done"}


def test_the_command_of_the_guide_runs_its_method_from_a_file_outside_the_repository(tmp_path: Path) -> None:
    code, _, command = guide()
    (tmp_path / "sign.py").write_text(code)
    few = ["data.calibration={sequences: 4, length: 64}", "tracking.enabled=false", "model=tiny"]
    pare(tmp_path / "home", *command.split()[1:], *few, *SMALL, cwd=tmp_path)

    trials = report(tmp_path / "home")["trials"]
    assert len(trials) == 2
    for trial in trials:
        # A bit for each weight, and a bf16 scale for each row of some hundred.
        assert 1 < trial["metrics"]["size/linear_bits_per_weight"] < 1.5, trial
        assert trial["metrics"]["quality/ppl"] > 1


def test_stages_on_stages_run_from_one_override_and_ship_the_bytes_they_say(tmp_path: Path) -> None:
    few = ["data.calibration={sequences: 4, length: 64}", "tracking.enabled=false", "model=tiny", "recipe.repair.rank=8"]
    pare(tmp_path / "home", "run", "recipe=base,sparse_gptq_eora,awq_gptq", *few, *SMALL)

    trials = {trial["recipe"]: trial for trial in report(tmp_path / "home")["trials"]}
    assert {trial["status"] for trial in trials.values()} == {"done"}
    pruned = trials["sparse_gptq_eora"]["metrics"]
    # 2:4 in 3 bits of 4 weights, half of the codes of 4 bits, a bf16 scale for 64 columns; the repair comes on top.
    assert 3 / 4 + 4 / 2 + 16 / 64 < pruned["size/linear_bits_per_weight"] < 8
    assert pruned["quality/ppl"] == pytest.approx(pruned["quality/ppl_in_memory"], rel=1e-6)
    out = tmp_path / "taken-away"
    pare(tmp_path / "home", "export", trials["sparse_gptq_eora"]["trial"], "--to", str(out))
    assert sum(file.stat().st_size for file in out.rglob("*.safetensors")) == pruned["size/bytes"]
    opening = f"import pare; print(type(pare.load({str(out)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", opening], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LlamaForCausalLM"
