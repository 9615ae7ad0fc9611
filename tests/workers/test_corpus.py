import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pare.workers import corpus as text
from pare.workers.corpus import Document, SourceError, read_split, split_documents
from pare.workers.sources import locate_data, resolve_data
from pare.workers.task import TaskError
from pare.workers.tasks import corpus

FRACTIONS = {"train": 0.8, "validation": 0.05, "selection": 0.05, "test": 0.1}
Run = Callable[..., tuple[Path, dict[str, Any]]]


def made_up(n: int) -> list[Document]:
    return [Document(f"document/{i}", f"Text {i}.") for i in range(n)]


def where_each_is(splits: dict[str, list[Document]]) -> dict[str, str]:
    return {d.id: name for name, members in splits.items() for d in members}


def spec_of(data: dict[str, Any]) -> dict[str, Any]:
    return {"data": data, "identity": resolve_data(data), "where": locate_data(data)}


@pytest.fixture(scope="module")
def pydoc() -> list[Document]:
    return text.pydoc_documents()


# --- splits ---


def test_every_document_is_in_exactly_one_split_of_about_its_fraction() -> None:
    splits = split_documents(made_up(4000), FRACTIONS, seed=0)

    assert sum(map(len, splits.values())) == 4000 == len(where_each_is(splits))
    for name, fraction in FRACTIONS.items():
        # Four standard deviations of a binomial draw of 4000.
        assert abs(len(splits[name]) / 4000 - fraction) < 4 * (fraction * (1 - fraction) / 4000) ** 0.5


def test_documents_keep_their_split_when_others_are_added_or_reordered() -> None:
    few = where_each_is(split_documents(made_up(300), FRACTIONS, seed=0))
    more = made_up(900)
    random.Random(1).shuffle(more)

    many = where_each_is(split_documents(more, FRACTIONS, seed=0))

    assert few.items() <= many.items()


def test_another_seed_is_another_split() -> None:
    first, second = (where_each_is(split_documents(made_up(300), FRACTIONS, seed)) for seed in (0, 1))

    assert first != second


def test_an_empty_split_is_named_with_the_number_of_documents() -> None:
    with pytest.raises(SourceError, match=r"split '\w+' \(fraction 0\.\d+\) is empty: there are only 5 documents") as caught:
        split_documents(made_up(5), FRACTIONS, seed=0)

    assert caught.value.setting.startswith("data.fractions.")


def test_a_document_with_splits_of_its_own_stays_among_them() -> None:
    pool = [Document(f"d/{i}", "", ("validation", "selection")) for i in range(400)] + made_up(400)

    splits = split_documents(pool, {"train": 0.5, "validation": 0.3, "selection": 0.1, "test": 0.1}, seed=0)

    own = {name: sum(d.id.startswith("d/") for d in members) for name, members in splits.items()}
    assert own["train"] == own["test"] == 0
    assert own["validation"] == pytest.approx(300, abs=40)  # 3 : 1, as their fractions


# --- prose ---


def test_prose_keeps_sentences_and_drops_markup_code_and_tables() -> None:
    marked_up = """
    The "with" statement
    ********************

    The :class:`Counter` class is a *subclass* of ``dict`` that is used to
    count things. [3] For example:

    >>> Counter("abcdeabcdabcaba") is not in the text that is to be read

       with_stmt ::= "with" ( "(" with_stmt_contents ","? ")" )

    +-----------+----------------+
    | Operation | is a table     |
    +-----------+----------------+

    - The first of the items in this list is a sentence.
    - short
    - It is followed by a second one that
      goes on in the next line.
    """

    assert text.prose(marked_up) == [
        "The Counter class is a subclass of dict that is used to count things.",
        "The first of the items in this list is a sentence.",
        "It is followed by a second one that goes on in the next line.",
    ]


def test_sentences_end_at_stops_and_not_at_abbreviations() -> None:
    paragraph = 'See the docs, e.g. The Tutorial. It says "no." Then (perhaps!) it ends? Yes. A. Turing agrees.'

    assert text.sentences(paragraph) == [
        "See the docs, e.g. The Tutorial.",
        'It says "no."',
        "Then (perhaps!) it ends?",
        "Yes.",
        "A. Turing agrees.",
    ]


def test_docstrings_are_read_in_order_without_running_the_module() -> None:
    source = b'''"""Of the module."""
raise RuntimeError("imported")
class A:
    """Of the class."""
    def f(self):
        """Of the method."""
        def inner():
            """Of no interest."""
if True:
    async def g():
        """Of the function."""
'''

    assert list(text.docstrings(source)) == ["Of the module.", "Of the class.", "Of the method.", "Of the function."]


# --- pydoc ---


def test_pydoc_gives_hundreds_of_documents_of_english(pydoc: list[Document]) -> None:
    assert len(pydoc) > 250
    assert sum(len(d.text) for d in pydoc) > 800_000
    assert {d.id.split("/")[0] for d in pydoc} == {"topic", "module"}
    assert len({d.id for d in pydoc}) == len(pydoc)
    paragraphs = [p for d in pydoc for p in d.text.split("\n\n")]
    assert not any(">>>" in p or "::" in p or "\n" in p for p in paragraphs)
    # "the" is about every 16th word of running English, and absent from code and tables.
    words = " ".join(paragraphs).lower().split()
    assert words.count("the") / len(words) > 0.05


def test_no_paragraph_of_pydoc_is_in_two_documents(pydoc: list[Document]) -> None:
    paragraphs = [p for d in pydoc for p in d.text.split("\n\n")]

    assert len(set(paragraphs)) == len(paragraphs)


def test_pydoc_leaves_out_tests_and_what_is_installed_beside_it() -> None:
    parts = {part for name, _ in text.standard_library() for part in name.split(".")}

    assert {"json", "decoder", "collections"} <= parts
    assert not parts & {"test", "tests", "idlelib", "lib2to3", "site-packages", "pytest", "torch"}


def test_the_default_splits_of_pydoc_hold_what_the_default_config_asks_for(pydoc: list[Document]) -> None:
    splits = split_documents(pydoc, FRACTIONS, seed=0)

    # At 4 to 5 characters a token: 8 windows of 512 tokens for each of the three, and 272 for train and calibration.
    assert all(sum(len(d.text) for d in splits[name]) > 8 * 512 * 5 for name in ("validation", "selection", "test"))
    assert sum(len(d.text) for d in splits["train"]) > 272 * 512 * 5


# --- a text file ---


def passages_of(path: Path, content: str) -> list[str]:
    path.write_text(content)
    return [d.text for d in text.text_documents(path)]


def test_two_blank_lines_part_documents_where_there_are_enough_of_them(tmp_path: Path) -> None:
    chapters = [f"Chapter {i}\n\n" + "One more line of it.\n" * 60 for i in range(25)]

    found = passages_of(tmp_path / "book.txt", "\n\n\n".join(chapters))

    assert found == [chapter.strip() for chapter in chapters]


def test_else_paragraphs_are_joined_to_passages(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "It says something. " * 20 for i in range(100)]

    found = passages_of(tmp_path / "text.txt", "\n\n".join(paragraphs))

    assert all(1000 <= len(passage) <= 2500 for passage in found)
    assert "\n\n".join(found) == "\n\n".join(p.strip() for p in paragraphs)  # nothing is lost, nothing is torn


@pytest.mark.parametrize("by", ["\n", " "])
def test_a_text_without_blank_lines_is_cut_at_lines_or_sentences(tmp_path: Path, by: str) -> None:
    content = by.join(f"This is the sentence number {i} of many." for i in range(1000))

    found = passages_of(tmp_path / "text.txt", content)

    assert len(found) > 20
    assert all(passage.startswith("This is") and passage.endswith("many.") for passage in found)
    assert " ".join(" ".join(found).split()) == " ".join(content.split())


def test_a_growing_file_keeps_its_documents(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {i}. " + "It says something. " * 60 for i in range(60)]
    passages_of(tmp_path / "text.txt", "\n\n".join(paragraphs))
    before = {d.id for d in text.text_documents(tmp_path / "text.txt")}
    passages_of(tmp_path / "text.txt", "\n\n".join([*paragraphs, *(f"New {p}" for p in paragraphs)]))

    assert before <= {d.id for d in text.text_documents(tmp_path / "text.txt")}


def test_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path: Path) -> None:
    content = "\n\n".join("A paragraph that says something. " * 40 + str(i) for i in range(30))
    (tmp_path / "unix.txt").write_text(content)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())

    assert text.text_documents(tmp_path / "unix.txt") == text.text_documents(tmp_path / "windows.txt")


# --- a data set ---


def rows(directory: Path, file: str, contents: list[str], column: str = "text") -> None:
    (directory / file).write_text("".join(json.dumps({column: c, "n": 1}) + "\n" for c in contents))


def read(directory: Path, column: str = "text") -> list[Document]:
    return text.dataset_documents(directory, None, None, None, column)


def test_short_rows_are_joined_and_long_ones_stand_alone(tmp_path: Path) -> None:
    long, another = ("long " * 250).strip(), ("another " * 300).strip()
    rows(tmp_path, "data.jsonl", ["short", "short", long, another])

    assert [d.text for d in read(tmp_path)] == [f"short\n\nshort\n\n{long}", another]


def test_a_data_set_keeps_its_own_train_and_test_apart(tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        rows(tmp_path, f"{name}.jsonl", [f"{name} {i} " * 200 for i in range(100)])

    splits = split_documents(read(tmp_path), FRACTIONS, seed=0)

    kinds = {name: {d.text.split()[0] for d in members} for name, members in splits.items()}
    assert kinds == {"train": {"train"}, "validation": {"validation"}, "selection": {"validation"}, "test": {"test"}}


def test_what_a_data_set_lacks_is_drawn_from_its_train_split(tmp_path: Path) -> None:
    for name in ("train", "test"):
        rows(tmp_path, f"{name}.jsonl", [f"{name} {i} " * 200 for i in range(200)])

    splits = split_documents(read(tmp_path), FRACTIONS, seed=0)

    kinds = {name: {d.text.split()[0] for d in members} for name, members in splits.items()}
    assert kinds == {"train": {"train"}, "validation": {"train"}, "selection": {"train"}, "test": {"test"}}


def test_what_save_to_disk_wrote_is_read(tmp_path: Path) -> None:
    import datasets

    contents = [f"row {i} " * 200 for i in range(5)]
    datasets.Dataset.from_dict({"text": contents}).save_to_disk(tmp_path / "saved")

    assert [d.text for d in read(tmp_path / "saved")] == [c.strip() for c in contents]


def test_a_wrong_column_names_the_text_columns(tmp_path: Path) -> None:
    rows(tmp_path, "data.jsonl", ["content"], column="body")

    with pytest.raises(SourceError, match=r"data.column=text: .* Its text columns: body") as caught:
        read(tmp_path)

    assert caught.value.setting == "data.column"


def test_a_directory_without_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("nothing")

    with pytest.raises(SourceError, match=rf"data.path={tmp_path}: the package datasets cannot read it"):
        read(tmp_path)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)

    with pytest.raises(SourceError, match="pip install datasets"):
        read(tmp_path)


# --- the task ---


def test_the_task_writes_the_four_splits_and_counts_them(tmp_path: Path, run_task: Run) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(f"Größe {i}: " + "it says something. " * 60 for i in range(200)))
    data = {"source": "text", "path": str(tmp_path / "text.txt"), "fractions": FRACTIONS, "seed": 0}

    out, result = run_task(corpus, spec_of(data))

    assert sorted(p.name for p in out.iterdir()) == ["selection.jsonl", "test.jsonl", "train.jsonl", "validation.jsonl"]
    splits = {name: read_split(out, name) for name in FRACTIONS}
    assert {d.text for members in splits.values() for d in members} == {
        d.text for d in text.text_documents(tmp_path / "text.txt")
    }
    assert all("Größe" in d.text for d in splits["test"])
    for name, members in splits.items():
        assert result[name] == {"documents": len(members), "characters": sum(len(d.text) for d in members)}


def test_the_task_reads_a_data_set(tmp_path: Path, run_task: Run) -> None:
    (tmp_path / "data").mkdir()
    rows(tmp_path / "data", "all.jsonl", [f"row {i} " * 200 for i in range(200)], column="body")
    data = {"source": "hf", "path": str(tmp_path / "data"), "column": "body", "fractions": FRACTIONS, "seed": 0}

    _, result = run_task(corpus, spec_of(data))

    assert sum(split["documents"] for split in result.values()) == 200


def test_text_that_changed_after_the_plan_fails_the_task(tmp_path: Path, run_task: Run) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join("It says something. " * 60 + str(i) for i in range(200)))
    spec = spec_of({"source": "text", "path": str(file), "fractions": FRACTIONS, "seed": 0})
    file.write_text(file.read_text() + "!")

    with pytest.raises(TaskError, match=r"text.txt is not what it was when the plan was made"):
        run_task(corpus, spec)


def test_another_python_than_that_of_the_plan_fails_the_task(run_task: Run) -> None:
    spec = spec_of({"source": "pydoc", "fractions": FRACTIONS, "seed": 0})
    spec["identity"]["digest"] = "0" * 64

    with pytest.raises(TaskError, match="the standard library of this worker's Python is not what it was"):
        run_task(corpus, spec)


def test_a_file_that_vanished_fails_the_task(tmp_path: Path, run_task: Run) -> None:
    file = tmp_path / "data" / "text.txt"
    file.parent.mkdir()
    file.write_text("\n\n".join("It says something. " * 60 + str(i) for i in range(200)))
    spec = spec_of({"source": "text", "path": str(file), "fractions": FRACTIONS, "seed": 0})
    shutil.rmtree(file.parent)

    with pytest.raises(TaskError, match="no such file"):
        run_task(corpus, spec)
