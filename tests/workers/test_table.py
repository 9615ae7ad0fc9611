"""The user's own tables: every file form and every shape of rows, splits, identities, and mistakes with their place."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from pare.orchestrator import config
from pare.orchestrator.errors import ConfigError
from pare.orchestrator.plan import build_plan
from pare.workers.corpus import read_split
from pare.workers.models import load_tokenizer
from pare.workers.sources import SourceError, locate_data, resolve_data
from pare.workers.task import TaskError
from pare.workers.tasks import corpus, tokens

FRACTIONS = {"train": 0.4, "validation": 0.2, "selection": 0.2, "test": 0.2}
Run = Callable[..., tuple[Path, dict[str, Any]]]
TEXTS = [f"Row {i} says something, and says it well enough. " * 25 for i in range(60)]
CHATS = [[{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"A number: {i}."}] for i in range(60)]


def table(path: Any, **more: Any) -> dict[str, Any]:
    rows = {"rows": "text", "column": None, "label": "label", "template": "{text}\nLabel: {label}"}
    message = {"role": "role", "content": "content"}
    return {"source": "table", "path": path, "fractions": FRACTIONS, "seed": 0, **rows, "message": message, **more}


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def write_csv(file: Path, rows: list[dict[str, Any]]) -> str:
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return str(file)


def write_parquet(file: Path, rows: list[dict[str, Any]]) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file, row_group_size=7)
    return str(file)


WRITE = {".jsonl": write_jsonl, ".csv": write_csv, ".tsv": write_csv, ".parquet": write_parquet}


def documents(data: dict[str, Any], run_task: Run) -> dict[str, list[Any]]:
    """Split -> its documents, by way of the task."""
    out, _ = run_task(corpus, {"data": data, "identity": resolve_data(data), "where": locate_data(data)})
    return {split: read_split(out, split) for split in FRACTIONS}


def texts(found: dict[str, list[Any]]) -> list[str]:
    return sorted(d.text for members in found.values() for d in members)


# --- forms ---


@pytest.mark.parametrize("suffix", WRITE)
def test_every_form_of_file_gives_the_same_documents(tmp_path: Path, suffix: str, run_task: Run) -> None:
    path = WRITE[suffix](tmp_path / f"rows{suffix}", [{"id": i, "text": text} for i, text in enumerate(TEXTS)])

    found = documents(table(path), run_task)

    assert texts(found) == sorted(text.strip() for text in TEXTS)
    assert all(found.values())


@pytest.mark.parametrize("with_splits", [False, True])
def test_what_save_to_disk_wrote_is_read_without_the_package_datasets(
    tmp_path: Path, run_task: Run, with_splits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    rows = [datasets.Dataset.from_dict({"text": part}) for part in (TEXTS[:50], TEXTS[50:])]
    whole = datasets.DatasetDict(train=rows[0], test=rows[1]) if with_splits else datasets.concatenate_datasets(rows)
    whole.save_to_disk(tmp_path / "saved", **({} if with_splits else {"num_shards": 3}))
    monkeypatch.setitem(sys.modules, "datasets", None)

    found = documents(table(str(tmp_path / "saved")), run_task)

    assert texts(found) == sorted(text.strip() for text in TEXTS)
    assert (sorted(d.text for d in found["test"]) == sorted(t.strip() for t in TEXTS[50:])) == with_splits


def test_several_files_a_pattern_and_a_directory_are_read_together(tmp_path: Path, run_task: Run) -> None:
    rows = [{"text": text} for text in TEXTS]
    folder = tmp_path / "rows"
    folder.mkdir()
    first, second = write_jsonl(folder / "a.jsonl", rows[:30]), write_csv(folder / "b.csv", rows[30:])
    (folder / "README.md").write_text("no rows")

    ways = [[first, second], str(folder / "[ab].*"), str(folder)]
    found = [documents(table(way), run_task) for way in ways]

    assert texts(found[0]) == sorted(text.strip() for text in TEXTS)
    assert found[0] == found[1] == found[2]
    assert len({json.dumps(resolve_data(table(way))) for way in ways}) == 1


def test_files_named_by_their_split_keep_train_and_test_apart(tmp_path: Path, run_task: Run) -> None:
    (tmp_path / "rows").mkdir()
    for i, name in enumerate(("train-0", "train-1", "dev", "test")):
        write_jsonl(tmp_path / "rows" / f"{name}.jsonl", [{"text": text} for text in TEXTS[15 * i : 15 * i + 15]])

    found = documents(table(str(tmp_path / "rows")), run_task)

    assert sorted(d.text for d in found["train"]) == sorted(text.strip() for text in TEXTS[:30])
    assert sorted(d.text for d in found["test"]) == sorted(text.strip() for text in TEXTS[45:])
    assert all(found[split] for split in ("validation", "selection"))


def test_short_texts_are_joined_and_a_document_keeps_its_split_when_rows_are_added(tmp_path: Path, run_task: Run) -> None:
    short = [{"text": text[:300]} for text in TEXTS]
    before = documents(table(write_jsonl(tmp_path / "a.jsonl", short)), run_task)
    after = documents(table(write_jsonl(tmp_path / "a.jsonl", short + [{"text": t * 2} for t in TEXTS])), run_task)

    assert all(len(text) >= 1000 for text in texts(before))
    for split, members in before.items():
        assert {d.id for d in members} <= {d.id for d in after[split]}


# --- shapes ---


def test_a_label_is_written_behind_the_text_by_the_template(tmp_path: Path, run_task: Run) -> None:
    rows = [{"review": f"It was number {i}.", "stars": i % 5, "by": "me"} for i in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    data = table(path, rows="labelled", column="review", label="stars", template="{{{by}}} {text} -> {label}")

    assert texts(documents(data, run_task)) == sorted(f"{{me}} It was number {i}. -> {i % 5}" for i in range(60))


@pytest.mark.parametrize("shape", ["jsonl", "parquet", "text in csv", "other names"])
def test_a_chat_is_what_the_models_template_makes_of_it(
    tmp_path: Path, tiny_model_dir: Path, run_task: Run, shape: str
) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    template = "{{ date_string }}:{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}<|end|>\n"
    (model / "chat_template.jinja").write_text(template)
    rows: list[dict[str, Any]] = [{"messages": chat} for chat in CHATS]
    more: dict[str, Any] = {}
    if shape == "jsonl":
        path = write_jsonl(tmp_path / "a.jsonl", rows)
    elif shape == "parquet":
        path = write_parquet(tmp_path / "a.parquet", rows)
    elif shape == "text in csv":
        path = write_csv(tmp_path / "a.csv", [{"messages": json.dumps(row["messages"])} for row in rows])
    else:
        names = {"user": "human", "assistant": "gpt"}
        renamed = [{"talk": [{"from": names[m["role"]], "value": m["content"]} for m in chat]} for chat in CHATS]
        path = write_jsonl(tmp_path / "a.jsonl", renamed)
        more = {"column": "talk", "message": {"role": "from", "content": "value"}}
    data = table(path, rows="chat", **more)
    made, counts = run_task(corpus, {"data": data, "identity": resolve_data(data), "where": locate_data(data)})

    spec = {"role": "test", "sequences": 2, "length": 64, "seed": 0}
    out, _ = run_task(tokens, spec, model=model, corpus=made)

    ids = load_file(out / "tokens.safetensors")["input_ids"].flatten().tolist()
    said = load_tokenizer(model).decode(ids)
    assert sum(split["documents"] for split in counts.values()) == len(CHATS)
    first = next(d for d in read_split(made, "test") if said.startswith(expected(d.messages)))
    assert first.text == "\n\n".join(m["content"] for m in first.messages)
    assert [m["role"] for m in first.messages] == ["user", "assistant"]
    assert "<|end|><|end|>" not in said  # the template ends a conversation itself


def expected(messages: Any) -> str:
    return "26 Jul 2024:" + "".join(f"[{m['role']}]{m['content']}" for m in messages) + "<|end|>26 Jul"


def test_a_tokenizer_without_a_chat_template_is_refused_by_the_plan_and_by_the_task(
    tmp_path: Path, tiny_model_dir: Path, run_task: Run
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS])
    data = table(path, rows="chat")
    made, _ = run_task(corpus, {"data": data, "identity": resolve_data(data), "where": locate_data(data)})

    with pytest.raises(TaskError, match=r"no chat template .* chat_template.jinja"):
        run_task(tokens, {"role": "test", "sequences": 1, "length": 16, "seed": 0}, model=tiny_model_dir, corpus=made)
    fractions = "data.fractions={train: 0.4, validation: 0.2, selection: 0.2, test: 0.2}"
    words = ["model=tiny", "recipe=base", "data=table", f"data.path={path}", fractions]
    with pytest.raises(ConfigError, match=r"no chat template .* data.rows=text"):
        build_plan(config.load([*words, "data.rows=chat"]), "cpu", 1)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path, tiny_model_dir: Path, run_task: Run) -> None:
    model = Path(shutil.copytree(tiny_model_dir, tmp_path / "model"))
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    data = table(write_jsonl(tmp_path / "a.jsonl", [{"messages": chat} for chat in CHATS]), rows="chat")
    made, _ = run_task(corpus, {"data": data, "identity": resolve_data(data), "where": locate_data(data)})

    with pytest.raises(TaskError, match=r"refuses the conversation chat/\w+ \(roles: user, assistant\): roles must alternate"):
        run_task(tokens, {"role": "test", "sequences": 1, "length": 16, "seed": 0}, model=model, corpus=made)


# --- identity ---


def test_the_identity_is_the_content_and_how_rows_are_read(tmp_path: Path) -> None:
    rows = [{"text": text, "label": i} for i, text in enumerate(TEXTS)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "moved").mkdir()
    moved = write_jsonl(tmp_path / "moved" / "b.jsonl", rows)
    first = resolve_data(table(path))

    assert first == resolve_data(table(moved)) == resolve_data(table(path, column="text"))
    assert first == resolve_data(table(path, template="{label} {text}"))  # not read with rows=text
    assert first != resolve_data(table(path, rows="labelled"))
    assert str(tmp_path) not in json.dumps(first)
    assert locate_data(table(path)) == {"path": [path]}
    assert first != resolve_data(table(write_jsonl(tmp_path / "a.jsonl", [*rows, {"text": "more", "label": 0}])))


def test_a_table_that_changed_after_the_plan_fails_the_task(tmp_path: Path, run_task: Run) -> None:
    data = table(write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]))
    identity, where = resolve_data(data), locate_data(data)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS[1:]])

    with pytest.raises(TaskError, match="is not what it was when the plan was made"):
        run_task(corpus, {"data": data, "identity": identity, "where": where})


def test_the_options_of_a_table_reach_the_corpus_from_the_command_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": text, "b": "good"} for text in TEXTS])
    words = ["model=tiny", "recipe=base", "data=table", f"data.path=[{path}]", "data.rows=labelled", "data.column=a"]
    fractions = "data.fractions={train: 0.4, validation: 0.2, selection: 0.2, test: 0.2}"

    plan = build_plan(config.load([*words, "data.label=b", 'data.template="{text} is {label}"', fractions]), "cpu", 1)

    task = next(task for task in plan.tasks.values() if task.type == "corpus")
    assert task.spec["identity"]["template"] == "{text} is {label}"
    assert task.spec["identity"]["column"] == "a"
    assert path not in json.dumps(task.record)


# --- mistakes ---


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("\n\n", "no row has any text"),
        ('{"text": "a"}\n\n{"text": \n', r"a.jsonl, line 3: is not JSON"),
        ('{"text": "a"}\n["b"]\n', r"line 2: is a JSON list, not an object"),
        ('{"text": "a"}\n{"body": "b", "id": 1}\n', r"line 2: has no column 'text' \(data.column\). Its columns: body, id"),
        ('{"text": ["a"]}\n', r"line 1: column 'text' holds a list, not a text. Try: data.rows=chat"),
        ('{"text": "a"}\n', r"split '\w+' .* is empty: there are only 1 documents"),
    ],
)
def test_a_mistake_in_jsonl_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)

    with pytest.raises(SourceError, match=message):
        resolve_data(table(str(tmp_path / "a.jsonl")))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"text,id\na,1\nb\n", r"a.csv, line 3: has 1 values, and the first line names 2 columns"),
        (b'text,id\na,1\n"b"c,2\n', r"a.csv, line 3: "),
        (b"body,id\na,1\n", r"line 2: has no column 'text' .*body, id"),
        (b"text\n\xff\xfe\n", r"is not UTF-8 text"),
    ],
)
def test_a_mistake_in_csv_is_named_with_its_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)

    with pytest.raises(SourceError, match=message):
        resolve_data(table(str(tmp_path / "a.csv")))


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_columnar_file_that_is_not_one_is_refused(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a{suffix}").write_bytes(b"PAR1 is how one begins")

    with pytest.raises(SourceError, match=rf"is cut short or no \{suffix} file"):
        resolve_data(table(str(tmp_path / f"a{suffix}")))


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.jsonl", "no such file"), ("*.csv", "no file has such a name"), ("a.txt", r"read from .jsonl, .*not from 'a.txt'"),
     ("folder", "holds no file of rows .*save_to_disk")],
)  # fmt: skip
def test_a_path_without_rows_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "folder").mkdir()

    with pytest.raises(SourceError, match=message) as caught:
        resolve_data(table(str(tmp_path / name)))

    assert caught.value.setting == "data.path"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("Hello.", r"line 1: column 'messages' holds no list of messages"),
        ([], "holds no list of messages"),
        ([{"from": "user", "content": "x"}], r"no text under 'role' \(data.message.role\). It has: from, content"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"no text under 'content' \(data.message.content\)"),
    ],
)
def test_a_chat_that_is_none_is_refused(tmp_path: Path, messages: Any, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])

    with pytest.raises(SourceError, match=message):
        resolve_data(table(path, rows="chat"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text", r"data.template='{text': "),
        ("{text.upper}", "hold the name of a column and nothing else, got {text.upper}"),
        ("{}", "hold the name of a column"),
        ("text", "names no column"),
        ("{text} {star}", r"line 1: has no column 'star' \(data.template\). Its columns: text, label"),
    ],
)
def test_a_template_holds_columns_in_braces_and_nothing_else(tmp_path: Path, template: str, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 1}])

    with pytest.raises(SourceError, match=message):
        resolve_data(table(path, rows="labelled", template=template))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=table"], r"data.path must be files of rows for data=table"),
        (["data=table", "data.path=a.csv", "data.rows=chats"], "data.rows must be text, chat or labelled"),
        (["data=table", "data.path=a.csv", "data.message={speaker: x}"], "data.message must be a mapping of role and content"),
        (["data=text", "data.path=[a,b]"], "data.path must be a path"),
        (["data=table", "data.path=3"], "data.path must be a path"),
        (["data=table", "data.path=a.csv", "data.colum=x"], "unknown setting 'data.colum'"),
    ],
)
def test_wrong_settings_are_refused_before_a_file_is_opened(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.load(["model=tiny", "recipe=base", *words])
