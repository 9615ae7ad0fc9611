"""The command line: exit codes, one-paragraph errors, nothing half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pare.orchestrator import cli


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PARE_HOME", raising=False)
    return tmp_path


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom pare.orchestrator import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'mlflow', 'hydra', 'transformers', 'rich') if m in sys.modules])"
    )

    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout

    assert "pare run experiment=demo" in out
    assert out.strip().endswith("[]")


@pytest.mark.parametrize(
    "verb",
    [
        *("plan", "run", "resume", "retry-failed", "rerun", "explain", "status", "report", "logs", "methods", "export", "ui"),
        *("doctor", "sync", "stop", "gc", "fsck"),
    ],
)
def test_every_verb_has_help_with_an_example(verb: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])

    assert end.value.code == 0
    assert f"example: pare {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["run", "experiment=nope"], 2, "unknown experiment 'nope'"),
        (["run", "recipe=rtn", "method@recipe.quantize=gtpq"], 2, "Did you mean 'gptq'"),
        (["run", "recipe=rtn", "recipe.quantize.bitz=3"], 2, "recipe.quantize.bits"),
        (["run", "recipe=rtn", "+typo=1"], 2, "unknown setting 'typo'"),
        (["run", "recipe=rtn", "recipe.quantize.bits=0"], 2, "must be in [2, 8], got 0"),
        (["run", "recipe=rtn", "model=tiny", "recipe.quantize.group_size=96"], 2, "group_size"),
        (["run", "recipe=rtn", "model=hf", "model.path=/no/such/model"], 2, "model.path"),
        (["run", "recipe=rtn", "data=text", "data.path=/no/such/file"], 2, "data.path"),
        (["run", "recipe=rtn", "model=tiny", "cluster.memory_gb=0.01"], 4, "not enough memory"),
        (
            [
                "run",
                "recipe=lora",
                "model=tiny",
                "recipe.tune.batch_size=4096",
                "recipe.tune.micro_batch_size=4096",
                "cluster.memory_gb=1",
            ],
            4,
            "Try: micro_batch_size=2048 (it is 4096; the batch of a step stays), gradient_checkpointing=true. Or: ",
        ),
        (["run", "recipe=rtn", "model=tiny", "cluster.disk_gb=0.0001"], 4, "not enough disk"),
        (["plan", "recipe=rtn", "model=tiny", "cluster.device=cuda"], 4, "no GPU answers"),
        (["report"], 2, "no sweep"),
        (["status", "--json"], 2, "no sweep"),
        (["export", "x"], 2, "no sweep"),
        (["ui"], 2, "nothing is tracked"),
    ],
)
def test_bad_input_is_one_paragraph_with_its_exit_code_and_leaves_nothing(
    here: Path, capsys: pytest.CaptureFixture, arguments: list[str], code: int, words: str
) -> None:
    if arguments[-1] == "cluster.device=cuda":
        from pare.orchestrator import hardware

        if hardware.gpus():
            pytest.skip("this machine has a GPU")

    assert cli.main(arguments) == code

    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not list(here.iterdir())


def test_an_empty_text_file_is_refused_by_its_name(here: Path, capsys: pytest.CaptureFixture) -> None:
    (here / "empty.txt").touch()

    assert cli.main(["run", "recipe=rtn", "model=tiny", "data=text", "data.path=empty.txt"]) == 2

    assert "empty.txt" in capsys.readouterr().err
    assert [p.name for p in here.iterdir()] == ["empty.txt"]


def test_a_model_of_an_unknown_family_is_refused_while_planning(
    here: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture
) -> None:
    import shutil

    shutil.copytree(tiny_model_dir, here / "model")
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["StrangeForCausalLM"]}))

    assert cli.main(["plan", "recipe=rtn", "model=hf", f"model.path={here / 'model'}"]) == 2

    assert "the anatomy of StrangeForCausalLM is not known" in capsys.readouterr().err


def test_a_disk_that_is_really_full_is_refused_before_anything_is_written(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))

    assert cli.main(["run", "recipe=rtn", "model=tiny"]) == 4

    assert "not enough disk" in capsys.readouterr().err
    assert not list(here.iterdir())


def test_methods_as_json_name_kind_family_needs_settings_and_source(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["methods", "--json"]) == 0

    found = {m["name"]: m for m in json.loads(capsys.readouterr().out)}
    assert set(found) >= {"rtn", "gptq", "lora", "qlora"}
    assert found["gptq"]["kind"] == "layer"
    assert found["gptq"]["family"] == "quantize"
    assert found["gptq"]["needs"] == ["gram"]
    assert all(s["doc"] for m in found.values() for s in m["settings"])
    assert all(m["source"] and m["summary"] for m in found.values())


def test_a_plan_is_readable_and_its_check_tells_whether_there_is_work(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "experiment=smoke", "--json", "--check"]) == 10

    plan = json.loads(capsys.readouterr().out)
    states = [task["state"] for task in plan["plan"]]
    assert plan["tasks"]["unique"] == plan["tasks"]["new"] + plan["tasks"]["late"] == len(states)
    assert plan["tasks"]["total_if_separate"] > plan["tasks"]["unique"]
    labels = [task["label"] for task in plan["plan"]]
    assert len([label for label in labels if label.startswith("calibrate")]) == 1
    assert len([label for label in labels if label.startswith("import")]) == 1
    assert not list(here.iterdir())


def test_the_composed_config_can_be_printed(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "experiment=demo", "seed=7", "--cfg", "job"]) == 0

    assert "seed: 7" in capsys.readouterr().out


def test_an_option_may_stand_between_overrides(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["plan", "recipe=rtn", "--json", "model=tiny", "recipe.quantize.bits=3,4"]) == 0

    assert len(json.loads(capsys.readouterr().out)["trials"]) == 2


def test_doctor_names_every_library_and_a_remedy_for_what_is_wrong(here: Path, capsys: pytest.CaptureFixture) -> None:
    cli.main(["doctor", "--json"])

    findings = json.loads(capsys.readouterr().out)["findings"]
    assert {f["what"] for f in findings} >= {"python", "torch", "ray", "mlflow", "GPU", "free memory", "free disk", "PARE_HOME"}
    assert all(f["remedy"] for f in findings if f["state"] != "ok")


def test_doctor_reports_a_cpu_build_of_torch_on_a_machine_with_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from pare.orchestrator import doctor, hardware

    monkeypatch.setattr(hardware, "gpus", lambda: ("NVIDIA H100",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)

    found = doctor.torch_build()

    assert found["state"] == "fail"
    assert "CPU-only" in found["found"]
    assert found["remedy"] == "make setup TORCH=cuda"


def test_doctor_shows_what_a_model_is_made_of_and_whether_it_holds(
    here: Path, capsys: pytest.CaptureFixture, tiny_model_dir: Path
) -> None:
    assert cli.main(["doctor", "--model", str(tiny_model_dir)]) == 0
    shown = capsys.readouterr().out
    assert "self_attn.qkv: self_attn.q_proj.weight 64x64, self_attn.k_proj.weight" in shown
    assert "folds into input_layernorm.weight" in shown
    assert "model.layers.0 and 1 more like it, norms: rms" in shown
    assert "✓ blocks run one at a time: holds" in shown

    assert cli.main(["doctor", "--model", str(tiny_model_dir), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["anatomy"]["blocks"][1]["groups"][3]["name"] == "model.layers.1.mlp.down"
    assert [f["state"] for f in said["findings"]] == ["ok"] * 4


def test_doctor_builds_a_model_of_a_class_and_refuses_what_is_none(here: Path, capsys: pytest.CaptureFixture) -> None:
    from pare.orchestrator.model_doctor import skeleton_of

    assert len(skeleton_of("GPT2LMHeadModel").transformer.h) == 2
    for what in ("NoSuchForCausalLM", "LlamaConfig", "no/such/directory"):
        assert cli.main(["doctor", "--model", what]) == 2
        assert "neither a directory with a config.json nor a class of transformers" in capsys.readouterr().err


def test_doctor_gives_the_anatomy_to_write_for_a_model_it_does_not_know(
    here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pare.methods.anatomy import describe, structure, types

    families = dict(types.FAMILIES)
    (here / "mine.py").write_text(
        "from pare.methods.anatomy.types import Anatomy, Block, Group, family\n"
        "@family('OlmoeForCausalLM')\n"
        "def wrong(model):\n"
        "    blocks = [Block(f'model.layers.{i}', ()) for i in range(2)]\n"
        "    return Anatomy.of(model, blocks, 'model.embed_tokens', 'model.norm', 'lm_head')\n"
    )
    from transformers import OlmoeConfig

    small = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_experts": 4,
        "vocab_size": 64,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
    }
    (here / "model").mkdir()
    OlmoeConfig(**small, num_hidden_layers=2, pad_token_id=0, eos_token_id=1).save_pretrained(here / "model")
    config = json.loads((here / "model" / "config.json").read_text())
    (here / "model" / "config.json").write_text(json.dumps({**config, "architectures": ["OlmoeForCausalLM"]}))
    try:
        assert cli.main(["doctor", "--model", "model"]) == 4
        shown = capsys.readouterr().out
        assert "experts.gate_up_proj is a stack of matrices" in shown
        assert '@family("OlmoeForCausalLM")' in shown
        assert cli.main(["doctor", "--model", "model", "--plugin", "mine.py"]) == 4
        assert "✗ every weight is in one group or left out: the weights of model.layers.0" in capsys.readouterr().out
    finally:
        types.FAMILIES.clear()
        types.FAMILIES.update(families)
    assert describe.FAMILIES is types.FAMILIES
    assert structure.FAMILIES is types.FAMILIES
