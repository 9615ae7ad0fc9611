"""What has to hold on a GPU (`make test-gpu`): the same results as on the CPU, up to the order of sums."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pare.methods.contract import Context, InputGroup, load_all

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU answers here")]


def compress(name: str, device: str, **settings: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=generator)
    x = torch.randn(512, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    gram = 2 * x.T @ x / len(x)
    group = InputGroup("g", {"w": weight.to(device)}, {}, {"gram": gram.to(device)})
    return load_all()[name](**settings).compress(group, Context(torch.device(device)))["w"].to("cpu").materialise()  # type: ignore[attr-defined]


def test_rounding_gives_the_same_codes_on_both_devices() -> None:
    assert torch.equal(compress("rtn", "cuda", bits=3), compress("rtn", "cpu", bits=3))


def test_gptq_agrees_on_nearly_all_weights() -> None:
    gpu, cpu = compress("gptq", "cuda", bits=4), compress("gptq", "cpu", bits=4)

    assert (gpu == cpu).float().mean() > 0.99


def test_a_score_is_the_same_on_both_devices(tiny_model_dir: Path, tmp_path: Path) -> None:
    from pare.workers.evaluation import predict, summary
    from pare.workers.models import load_dense

    ids = torch.randint(3, 250, (4, 64), generator=torch.Generator().manual_seed(0))
    found = {}
    for device in ("cpu", "cuda"):
        predictions, _ = predict(load_dense(tiny_model_dir, torch.float32, device), ids)
        found[device] = summary(predictions)["quality/ppl"]

    assert found["cuda"] == pytest.approx(found["cpu"], rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_training_learns_on_a_gpu(method: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    (tmp_path / "tokens").mkdir()
    rows = torch.randint(3, 250, (1, 64), generator=torch.Generator().manual_seed(0)).repeat(4, 1)
    save_file({"input_ids": rows}, tmp_path / "tokens" / "tokens.safetensors")
    from pare.workers.task import TaskContext
    from pare.workers.tasks import train

    (tmp_path / "out").mkdir()
    spec = {"method": method, "settings": {"steps": 30, "learning_rate": 5e-3}, "seed": 0, "dtype": "bfloat16"}
    inputs = {"model": tiny_model_dir, "tokens": tmp_path / "tokens"}

    result = train.run(
        TaskContext(spec, inputs, tmp_path / "out", torch.device("cuda"), fingerprint_of=dict.fromkeys(inputs, "f" * 64))
    )

    assert result["train/loss_last"] < result["train/loss_first"]
