"""Rows of the user's own tables as documents: JSONL, CSV and Parquet files, and what `datasets` wrote with `save_to_disk`.

What a row is, the config `data` says (`rows`, `column`, `label`, `message`, `template`): a text; a chat, which keeps its
messages until there is a model whose chat template can render them; or a text with a label, put together by a template.
Parquet and Arrow files need pyarrow, which is imported where one is read.
"""

from __future__ import annotations

import csv
import glob
import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from pare.workers.corpus import LARGEST_SPLIT, Document, SourceError, joined, passage_documents, roles_of
from pare.workers.files import digest_file

Row = Mapping[str, Any]
Rows = Iterator[tuple[str, Row]]
"""(where the row stands, e.g. `line 3`; the row), one after another."""

ROWS = ("text", "chat", "labelled")
OTHER_NAMES = {"human": "user", "gpt": "assistant"}
"""Roles that some chat data sets have other words for."""
SPLIT_NAME = re.compile(r"(?:(?P<train>train)|(?P<validation>validation|valid|val|dev)|(?P<test>test))(?![a-zA-Z])")
"""What the name of a file begins with that is one split of a data set."""
ROWS_AT_ONCE = 1024


# --- files ------------------------------------------------------------------------------------------------------------


def table_place(path: Any) -> list[str]:
    """`data.path`, one path or pattern or a list of them, as absolute ones."""
    given = path if isinstance(path, list) else [path]
    if not given or not all(isinstance(p, str) and p for p in given):
        raise SourceError(
            f"data.source=table needs its files, got data.path={path}. Give a file, a pattern or a directory: "
            "data=table data.path='DIRECTORY/*.jsonl' (several: data.path=[FILE,FILE])",
            "data.path",
        )
    return [str(Path(p).expanduser().absolute()) for p in given]


def table_files(place: Iterable[str]) -> dict[str, list[Path]]:
    """Split -> its files in order; all under `all` where the names or the data set tell no splits apart.

    A directory may hold files of rows, some of which may be named by their split (`train-00000-of-00002.parquet`), or be one
    that `save_to_disk` wrote.
    """
    patterns, files = list(place), []
    if len(patterns) == 1 and (saved := saved_splits(Path(patterns[0]))):
        return saved
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in READERS and not p.name.startswith((".", "cache-")))
            kind = f"holds no file of rows ({', '.join(READERS)}) and no data set that save_to_disk wrote"
        elif path.exists():
            found, kind = [path], ""
        else:
            found = sorted(Path(p) for p in glob.glob(pattern, recursive=True))
            kind = "no file has such a name" if glob.has_magic(pattern) else "no such file"
        if not found:
            raise SourceError(f"data.path={pattern}: {kind}", "data.path")
        files += found
    for file in files:
        if file.suffix.lower() not in READERS:
            raise SourceError(f"data.path={file}: rows are read from {', '.join(READERS)}, not from {file.name!r}", "data.path")
    names = [str(match.lastgroup) if (match := SPLIT_NAME.match(file.name)) else "train" for file in files]
    splits: dict[str, list[Path]] = {}
    for name, file in zip(names, files, strict=True):
        splits.setdefault(name if len(set(names)) > 1 else "all", []).append(file)
    return splits


def saved_splits(directory: Path) -> dict[str, list[Path]]:
    """Split -> Arrow files of what `save_to_disk` wrote; nothing for another directory."""
    if (directory / "dataset_dict.json").exists():
        names = json.loads((directory / "dataset_dict.json").read_text())["splits"]
        return {name: saved_splits(directory / name)["all"] for name in names}
    if not (directory / "state.json").exists():
        return {}
    parts = json.loads((directory / "state.json").read_text())["_data_files"]
    return {"all": [directory / part["filename"] for part in parts]}


def digest_table(files: Mapping[str, Iterable[Path]]) -> str:
    """Digest of the content of all files in their order, of their kinds and splits; not of their names."""
    lines = [f"{split} {file.suffix.lower()} {digest_file(file)}" for split, own in files.items() for file in own]
    return blake3("\n".join(lines).encode()).hexdigest()


# --- rows -------------------------------------------------------------------------------------------------------------


def rows_of(file: Path) -> Rows:
    """The rows of a file. Raises `SourceError`, which says where, for one that cannot be read."""
    if not file.is_file():
        raise SourceError(f"data.path={file}: no such file", "data.path")
    if file.stat().st_size == 0:
        raise SourceError(f"data.path={file}: the file is empty", "data.path")
    try:
        yield from READERS[file.suffix.lower()](file)
    except UnicodeDecodeError as e:
        raise SourceError(f"data.path={file}: is not UTF-8 text ({e.reason}: {e.object[e.start]:#04x})", "data.path") from None


def json_lines(file: Path) -> Rows:
    """One JSON object on each line; blank lines are passed over."""
    with open(file, encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as e:
                raise SourceError(f"data.path={file}, line {number}: is not JSON ({e})", "data.path") from None
            if not isinstance(row, dict):
                what = f"a JSON {type(row).__name__}, not an object with a value for each column"
                raise SourceError(f"data.path={file}, line {number}: is {what}", "data.path")
            yield f"line {number}", row


def separated(file: Path) -> Rows:
    """CSV or TSV; the first row names the columns."""
    with open(file, encoding="utf-8-sig", newline="") as f:
        reader = csv.reader(f, delimiter="\t" if file.suffix.lower() == ".tsv" else ",", strict=True)
        try:
            columns = next(reader)
            for values in reader:
                if values and len(values) != len(columns):
                    what = f"has {len(values)} values, and the first line names {len(columns)} columns"
                    raise SourceError(f"data.path={file}, line {reader.line_num}: {what}", "data.path")
                if values:
                    yield f"line {reader.line_num}", dict(zip(columns, values, strict=True))
        except csv.Error as e:
            raise SourceError(f"data.path={file}, line {reader.line_num}: {e}", "data.path") from None


def columnar(file: Path) -> Rows:
    """Parquet, or the Arrow stream that `save_to_disk` writes."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        message = f"data.path={file}: {file.suffix} files are read by the package pyarrow. Type: pip install pyarrow"
        raise SourceError(message, "data.path") from None
    try:
        if file.suffix.lower() == ".arrow":
            batches: Iterable[Any] = pyarrow.ipc.open_stream(str(file))
        else:
            batches = pyarrow.parquet.ParquetFile(file).iter_batches(ROWS_AT_ONCE)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
    except pyarrow.ArrowInvalid as e:
        raise SourceError(f"data.path={file}: is cut short or no {file.suffix} file ({e})", "data.path") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".csv": separated,
    ".tsv": separated,
    ".parquet": columnar,
    ".arrow": columnar,
}
"""Suffix -> what reads the rows of such a file."""


# --- documents --------------------------------------------------------------------------------------------------------


def table_documents(files: Mapping[str, Iterable[Path]], data: Row) -> list[Document]:
    """The rows as documents. Of each split the first `LARGEST_SPLIT` characters are read.

    Short texts are joined with the ones that follow them, as in any data set; a chat or a labelled text stays for itself.

    data: as from `row_settings`.
    """
    make = {"text": text_of, "labelled": labelled_text, "chat": chat_of}[data["rows"]]
    found: dict[str, Document] = {}
    for split, among in roles_of(files).items():
        made = first_characters(make(file, where, row, data) for file in files[split] for where, row in rows_of(file))
        if data["rows"] == "text":
            documents = passage_documents(joined(d.text for d in made), among)
        else:
            documents = [Document(d.id, d.text, among, d.messages) for d in made]
        found |= {d.id: d for d in documents if d.text.strip()}
    if not found:
        first = next(file for own in files.values() for file in own)
        raise SourceError(f"data.path={first}: no row has any text", "data.path")
    return list(found.values())


def first_characters(documents: Iterable[Document]) -> Iterator[Document]:
    left = LARGEST_SPLIT
    for document in documents:
        yield document
        left -= len(document.text)
        if left <= 0:
            return


def row_settings(data: Row) -> dict[str, Any]:
    """The part of the config `data` that says how rows are read, and nothing that this reading does not look at."""
    own = {"text": (), "chat": ("message",), "labelled": ("label", "template")}[data["rows"]]
    column = data["column"] or ("messages" if data["rows"] == "chat" else "text")
    return {"rows": data["rows"], "column": column, **{key: data[key] for key in own}}


def value_of(file: Path, where: str, row: Row, column: str, setting: str) -> Any:
    """A row's value in a column; empty where the row has none."""
    if column not in row:
        there = ", ".join(map(str, row)) or "none"
        raise SourceError(f"data.path={file}, {where}: has no column {column!r} ({setting}). Its columns: {there}", setting)
    return "" if row[column] is None else row[column]


def text_of(file: Path, where: str, row: Row, data: Row) -> Document:
    column = data["column"]
    text = value_of(file, where, row, column, "data.column")
    if not isinstance(text, str):
        hint = " Try: data.rows=chat" if isinstance(text, list) else ""
        what = f"column {column!r} holds a {type(text).__name__}, not a text.{hint}"
        raise SourceError(f"data.path={file}, {where}: {what}", "data.column")
    return Document("", text)


def labelled_text(file: Path, where: str, row: Row, data: Row) -> Document:
    """`data.template` filled in: `{text}` and `{label}` are the columns that `data.column` and `data.label` name, another
    word in braces is a column of its own."""
    named = {"text": (data["column"], "data.column"), "label": (data["label"], "data.label")}
    pieces = []
    for literal, word in template_pieces(data["template"]):
        column, setting = named.get(word, (word, "data.template"))
        pieces += [literal, str(value_of(file, where, row, column, setting)) if word else ""]
    return labelled("row", "".join(pieces))


def template_pieces(template: str) -> list[tuple[str, str]]:
    """(text, word in braces behind it; empty at the end). Raises `SourceError` for anything but plain words in braces."""
    try:
        pieces = [(literal, word, spec, how) for literal, word, spec, how in string.Formatter().parse(template)]
    except ValueError as e:
        raise SourceError(f"data.template={template!r}: {e}. A brace itself is written twice: {{{{", "data.template") from None
    for _, word, spec, how in pieces:
        if word is not None and (spec or how or not word or set(word) & set(".[]")):
            raise SourceError(
                f"data.template={template!r}: braces hold the name of a column and nothing else, got {{{word}}}. "
                'Try: data.template="{text}\\nLabel: {label}"',
                "data.template",
            )
    if not any(word for _, word, _, _ in pieces):
        raise SourceError(f"data.template={template!r}: names no column. Try: data.template={{text}}", "data.template")
    return [(literal, word or "") for literal, word, _, _ in pieces]


def chat_of(file: Path, where: str, row: Row, data: Row) -> Document:
    """The messages of a row, each with its role and content; a string is read as the JSON of them."""
    column, names = data["column"], data["message"]
    place = f"data.path={file}, {where}"
    given = value_of(file, where, row, column, "data.column")
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            given = None
    if not isinstance(given, list) or not given:
        raise SourceError(f"{place}: column {column!r} holds no list of messages. Plain text is data.rows=text", "data.column")
    messages: list[dict[str, str]] = []
    for message in given:
        said = {key: message.get(names[key]) if isinstance(message, dict) else None for key in ("role", "content")}
        missing = next((key for key, value in said.items() if not isinstance(value, str)), None)
        if missing:
            there = ", ".join(map(str, message)) if isinstance(message, dict) else type(message).__name__
            raise SourceError(
                f"{place}: a message has no text under {names[missing]!r} (data.message.{missing}). It has: {there}",
                f"data.message.{missing}",
            )
        role, content = str(said["role"]), str(said["content"])
        messages.append({"role": OTHER_NAMES.get(role, role), "content": content})
    identity = json.dumps(messages, ensure_ascii=False)
    document = labelled("chat", "\n\n".join(m["content"] for m in messages), identity)
    return Document(document.id, document.text, messages=tuple(messages))


def labelled(kind: str, text: str, identity: str | None = None) -> Document:
    """A document named by a digest of what it says."""
    return Document(f"{kind}/{blake3((identity or text).encode()).hexdigest()[:16]}", text)
