"""Directories that are no export, or no longer the one that was written: each is refused in one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pare.workers.export.files import digests, write_weights
from pare.workers.export.reader import BadExport, open_export
from pare.workers.tasks import export


@pytest.fixture
def exported(workshop: Any, codes: Callable[..., Any]) -> Path:
    out: Path
    out, _ = workshop.run(export, "export", {"card": {}}, model=workshop.artifact("made", lambda name, w: codes(w, 4, 32)))
    return out


def cut_off(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_in_its_header(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])


def emptied(out: Path) -> None:
    (out / "model.safetensors").write_bytes(b"")


def flipped(out: Path) -> None:
    file = out / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lost(out: Path) -> None:
    (out / "model.safetensors").unlink()


def pickled(out: Path) -> None:
    torch.save(load_file(out / "model.safetensors"), out / "pytorch_model.bin")
    lost(out)


def doubled(out: Path) -> None:
    shutil.copyfile(out / "model.safetensors", out / "more.safetensors")


def foreign(out: Path) -> None:
    (out / "export.json").unlink()


def unreadable(out: Path) -> None:
    (out / "export.json").write_text("{")


def of_a_later_pare(out: Path) -> None:
    rewrite(out / "export.json", format="holographic")


def remote(out: Path) -> None:
    rewrite(out / "config.json", auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})


def remote_tokenizer(out: Path) -> None:
    rewrite(out / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_evil.Evil", None]})


def rewrite(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_off, r"model\.safetensors holds \d+ bytes, its header says \d+: it is cut off or was overwritten; export the"),
        (cut_in_its_header, r"model\.safetensors is no safetensors file or is cut off in its header \(200 bytes\)"),
        (emptied, r"model\.safetensors is no safetensors file or is cut off in its header \(0 bytes\)"),
        (flipped, r"model\.safetensors is not what was written: its digest is \w{12}, not \w{12}; export the trial again"),
        (lost, r"lacks the weight file model\.safetensors; export the trial again: pare export"),
        (pickled, r"lacks the weight file model\.safetensors"),
        (doubled, r"more\.safetensors does not belong to this export; take it away"),
        (foreign, r"is no export of Pare, for it has no export\.json; recipe=imported opens what others made"),
        (unreadable, r"export\.json is no JSON"),
        (of_a_later_pare, r"names format 'holographic', opened 'plain', which this version of Pare does not know"),
        (remote, r"config\.json asks for code of its own \(auto_map\), which Pare never runs"),
        (remote_tokenizer, r"tokenizer_config\.json asks for code of its own"),
    ],
)
def test_what_is_not_the_export_is_refused_in_one_sentence(exported: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(exported)

    with pytest.raises(BadExport, match=said) as caught:
        open_export(exported, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_missing_shard_is_named(exported: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    (exported / "model.safetensors").unlink()
    write_weights(weights.items(), exported, shard_bytes=20_000)
    said = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps(said | {"digests": digests(exported)}))
    open_export(exported, torch.float32)
    shard = sorted(exported.glob("model-00002-*"))[0]
    shard.unlink()

    with pytest.raises(BadExport, match=f"lacks the weight file {shard.name}"):
        open_export(exported, torch.float32)


def test_a_spoilt_gguf_file_is_known_by_its_digest(workshop: Any) -> None:
    out, _ = workshop.run(export, "export", {"card": {}, "format": "gguf"}, model=workshop.base)
    file = out / "model.gguf"
    file.write_bytes(file.read_bytes()[:-32])

    with pytest.raises(BadExport, match=r"model\.gguf is not what was written"):
        open_export(out, torch.float32)


@pytest.mark.parametrize("form", ["auto", "dense", "compressed-tensors", "gguf", "pare"])
def test_every_form_carries_card_tokenizer_and_generation_config(workshop: Any, codes: Callable[..., Any], form: str) -> None:
    workshop.base = shutil.copytree(workshop.base, workshop.root / "base")
    (workshop.base / "chat_template.jinja").write_text("{{ messages }}")
    artifact = workshop.artifact("made", lambda name, weight: codes(weight, 4, 32))

    out, result = workshop.run(export, "export", {"card": {"recipe": "rtn"}, "format": form}, model=artifact)

    carried = {"README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert carried | {"config.json", "export.json"} <= {file.name for file in out.iterdir()}
    assert result["format"] == ("compressed-tensors" if form == "auto" else form)
    assert "recipe `rtn`" in (out / "README.md").read_text()
    assert open_export(out, torch.float32).tokenizer("ab").input_ids == [97, 98]
