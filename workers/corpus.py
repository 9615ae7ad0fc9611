"""Where text comes from, and how it is split: documents in, four disjoint roles out. Imports no tensor library.

A document is a passage that stands for itself: a topic of Python's language reference, the prose of a module's
docstrings, a passage of a file, consecutive rows of a data set. Its split is drawn from a hash of its id alone, so a
document stays in its split when others are added or taken away, and no document is in two.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

SPLITS = ("train", "validation", "selection", "test")
SHORTEST_DOCUMENT = 300
"""Characters below which a document of docstrings or of the language reference is left out."""
PASSAGE = 1000
"""Characters that short pieces of a text file or a data set are joined to, at least."""
ENOUGH = 20
"""Documents below which a text file is cut at the next finer separator, and at last refused."""
LARGEST_SPLIT = 20_000_000
"""Characters that are read of each split of a data set, from its start."""

NO_TEMPLATE = (
    "data.rows=chat: the model's tokenizer has no chat template to render conversations with. Take an instruction-tuned model, "
    "put a chat_template.jinja beside its tokenizer_config.json (model=hf model.path=DIRECTORY), or read the rows as text: "
    "data.rows=text data.column=COLUMN"
)


class SourceError(ValueError):
    """A model or text that cannot be used. `setting` names the config key to change."""

    def __init__(self, message: str, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


@dataclass(frozen=True)
class Document:
    id: str
    """Unique in the corpus; says where the text comes from."""

    text: str
    """Paragraphs, separated by a blank line."""

    among: tuple[str, ...] = SPLITS
    """The splits that the document may fall into: fewer where the source itself keeps train and test apart."""

    messages: tuple[dict[str, str], ...] = ()
    """Of a chat: `role` and `content` of each message, which a model's chat template renders. `text` has the contents only."""


# --- splits -----------------------------------------------------------------------------------------------------------


def check_fractions(fractions: Mapping[str, float]) -> None:
    """Raises `SourceError` unless there is a positive fraction for each split and their sum is 1."""
    allowed = f"a fraction in (0, 1) for each of {', '.join(SPLITS)}, of sum 1"
    got = dict(fractions)
    numbers = all(isinstance(v, int | float) and v > 0 for v in got.values())
    if set(got) != set(SPLITS) or not numbers or abs(sum(got.values()) - 1) > 1e-6:
        raise SourceError(
            f"data.fractions must be {allowed}, got {got}. "
            "Try: 'data.fractions={train: 0.8, validation: 0.05, selection: 0.05, test: 0.1}'",
            "data.fractions",
        )


def position(document_id: str, salt: str) -> float:
    """A number in [0, 1) that depends on nothing but the id and the salt."""
    return int.from_bytes(blake3(f"{salt}\n{document_id}".encode()).digest(7), "big") / 2**56


def split_of(document: Document, fractions: Mapping[str, float], seed: int) -> str:
    """The split a document belongs to."""
    at = position(document.id, f"split {seed}") * sum(fractions[name] for name in document.among)
    for name in document.among[:-1]:
        if at < fractions[name]:
            return name
        at -= fractions[name]
    return document.among[-1]


def split_documents(documents: Iterable[Document], fractions: Mapping[str, float], seed: int) -> dict[str, list[Document]]:
    """Documents by split, each sorted by id.

    Raises:
        SourceError: a split comes out empty.
    """
    check_fractions(fractions)
    splits: dict[str, list[Document]] = {name: [] for name in SPLITS}
    for document in sorted(documents, key=lambda d: d.id):
        splits[split_of(document, fractions, seed)].append(document)
    n = sum(map(len, splits.values()))
    for name, members in splits.items():
        if not members:
            raise SourceError(
                f"split {name!r} (fraction {fractions[name]}) is empty: there are only {n} documents. "
                f"Use a longer text, a larger data.fractions.{name}, or another data.seed (it is {seed})",
                f"data.fractions.{name}",
            )
    return splits


def write_split(corpus: Path, split: str, documents: Iterable[Document]) -> None:
    """Writes the documents of one split of a corpus artifact, one JSON object a line."""
    with open(corpus / f"{split}.jsonl", "w", encoding="utf-8") as f:
        for d in documents:
            chat = {"messages": d.messages} if d.messages else {}
            f.write(json.dumps({"id": d.id, "text": d.text, **chat}, ensure_ascii=False) + "\n")


def read_split(corpus: Path, split: str) -> list[Document]:
    """The documents of one split of a corpus artifact."""
    with open(corpus / f"{split}.jsonl", encoding="utf-8") as f:
        return [Document(row["id"], row["text"], messages=tuple(row.get("messages", ()))) for row in map(json.loads, f)]


# --- pydoc ------------------------------------------------------------------------------------------------------------

NOT_READ = {"test", "tests", "idlelib", "idle_test", "lib2to3", "turtledemo", "ensurepip", "pydoc_data", "__pycache__"}
NOT_READ |= {"site-packages", "dist-packages"}


def standard_library() -> list[tuple[str, Path]]:
    """(dotted module name, source file) of the standard library, sorted by name; tests and tools are left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [f for f in folders if f not in NOT_READ and f.isidentifier()]
        for file in files:
            if file.endswith(".py"):
                path = Path(folder, file)
                parts = path.relative_to(root).with_suffix("").parts
                found.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return sorted(found)


def topics() -> dict[str, str]:
    """Python's language reference as `pydoc` shows it: topic -> text."""
    return importlib.import_module("pydoc_data.topics").topics


def pydoc_digest() -> str:
    """Digest of all that `pydoc_documents` reads, without parsing any of it."""
    digest = blake3()
    for name, text in sorted(topics().items()):
        digest.update(f"topic {name} {len(text)}\n{text}".encode())
    for name, path in standard_library():
        source = path.read_bytes()
        digest.update(f"module {name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def pydoc_documents() -> list[Document]:
    """English prose of every Python install: a document per topic of the language reference and per module.

    Docstrings are read by parsing the source, so no module is imported. Topics contain one another (`compound` holds
    `if`, `for`, ...): a paragraph stays only in the first document that has it, the shorter documents coming first.
    """
    modules = {f"module/{name}": prose("\n\n".join(docstrings(path.read_bytes()))) for name, path in standard_library()}
    pages = topic_documents()
    pages += distinct(modules, seen={p for page in pages for p in page.text.split("\n\n")})
    return pages


def topic_documents() -> list[Document]:
    """The documents of `pydoc_documents` that need no parsing: the topics."""
    return distinct({f"topic/{name}": prose(text) for name, text in topics().items()}, seen=set())


def distinct(found: Mapping[str, list[str]], seen: set[str]) -> list[Document]:
    """id -> paragraphs to documents without the paragraphs in `seen` or in a shorter document."""
    documents = []
    for name, paragraphs in sorted(found.items(), key=lambda item: (sum(map(len, item[1])), item[0])):
        fresh = [p for p in dict.fromkeys(paragraphs) if p not in seen]
        seen.update(fresh)
        text = "\n\n".join(fresh)
        if len(text) >= SHORTEST_DOCUMENT:
            documents.append(Document(name, text))
    return documents


def docstrings(source: bytes) -> Iterator[str]:
    """Docstrings of a module, its classes and their functions, in the order of the source."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            pending += reversed([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


# --- a text file ------------------------------------------------------------------------------------------------------

SEPARATORS = (re.compile(r"\n(?:[ \t]*\n){2,}"), re.compile(r"\n[ \t]*\n"), re.compile(r"\n"), re.compile(r"(?<=[.!?]) "))


def text_documents(path: Path) -> list[Document]:
    """The passages of a UTF-8 text file.

    A document is what stands between two or more blank lines. Where that gives fewer than `ENOUGH` documents, it is
    what stands between single blank lines, then a line, then a sentence; consecutive pieces are joined until they have
    `PASSAGE` characters. The id is a digest of the text, so that a passage stays in its split when the file grows.

    Raises:
        SourceError: no such file, empty, not text, or too short.
    """
    where = f"data.path={path}"
    if not path.is_file():
        kind = "is a directory, not a file" if path.is_dir() else "no such file"
        raise SourceError(f"{where}: {kind}. Give a plain text file: data=text data.path=FILE", "data.path")
    content = path.read_bytes()
    if not content.strip():
        raise SourceError(f"{where}: the file is empty", "data.path")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise SourceError(f"{where}: is not UTF-8 text (byte {e.start} is {content[e.start]:#04x})", "data.path") from None
    if "\0" in text:
        raise SourceError(f"{where}: is not text (it holds zero bytes)", "data.path")
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    passages: list[str] = []
    for separator in SEPARATORS:
        passages = joined(separator.split(text), " " if separator is SEPARATORS[-1] else "\n\n")
        if len(passages) >= ENOUGH:
            return passage_documents(passages)
    raise SourceError(
        f"{where}: has {len(text)} characters, which make {len(passages)} passages of {PASSAGE}; at least {ENOUGH} are needed "
        "to split it. Use a longer text, or data=pydoc",
        "data.path",
    )


def joined(pieces: Iterable[str], by: str = "\n\n") -> list[str]:
    """Consecutive pieces joined until each passage has `PASSAGE` characters; a short rest goes to the last one."""
    passages: list[str] = []
    for piece in pieces:
        piece = piece.strip()
        if piece and passages and len(passages[-1]) < PASSAGE:
            passages[-1] += by + piece
        elif piece:
            passages.append(piece)
    if len(passages) > 1 and len(passages[-1]) < PASSAGE:
        rest = passages.pop()
        passages[-1] += by + rest
    return passages


def passage_documents(passages: Iterable[str], among: tuple[str, ...] = SPLITS) -> list[Document]:
    """Documents named by a digest of their text; of equal ones the first stays."""
    found = {f"passage/{blake3(text.encode()).hexdigest()[:16]}": text for text in passages}
    return [Document(name, text, among) for name, text in found.items()]


# --- a data set in Hugging Face form ----------------------------------------------------------------------------------


def dataset_documents(
    path: Path | None, name: str | None, commit: str | None, config: str | None, column: str
) -> list[Document]:
    """The rows of a column; short rows are joined with the ones that follow them, up to `PASSAGE` characters.

    Of each split the first `LARGEST_SPLIT` characters are read. Where the data set has a `train` split, its `test` is
    the test split, its `validation` is shared out between validation and selection, and what is missing is drawn from
    `train`; other splits are left alone. Without a `train` split all rows are split like any other text.

    path: local directory: files that `datasets.load_dataset` reads, or what `save_to_disk` wrote.
    name, commit: the data set of the hub, where path is None.
    """
    try:
        import datasets
    except ImportError:
        raise SourceError("data.source=hf needs the package datasets. Type: pip install datasets", "data.source") from None
    if path and ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        loaded = datasets.load_from_disk(str(path))
    else:
        try:
            loaded = datasets.load_dataset(str(path or name), config, revision=commit, streaming=True)
        except (ValueError, OSError, datasets.exceptions.DatasetsError) as e:
            key = f"data.{'path' if path else 'name'}"
            raise SourceError(f"{key}={path or name}: the package datasets cannot read it: {e}", key) from e
    splits = dict(loaded) if isinstance(loaded, dict) else {"all": loaded}
    found = {
        name: passage_documents(joined(column_text(splits[name], column)), among) for name, among in roles_of(splits).items()
    }
    return list({d.id: d for documents in found.values() for d in documents}.values())


def roles_of(splits: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Split of a data set -> the splits of ours that its documents may fall into (see `dataset_documents`)."""
    names = set(splits)
    if "train" not in names:
        return dict.fromkeys(sorted(names), SPLITS)
    own = {"validation": ("validation", "selection"), "test": ("test",)}
    roles = {name: among for name, among in own.items() if name in names}
    taken = [role for among in roles.values() for role in among]
    return {**roles, "train": tuple(role for role in SPLITS if role not in taken)}


def column_text(rows: Any, column: str) -> Iterator[str]:
    """The column's text, row by row, until `LARGEST_SPLIT` characters were read."""
    left = LARGEST_SPLIT
    for row in rows:
        if not isinstance(row.get(column, 0), str | None):
            columns = [key for key, value in row.items() if isinstance(value, str)]
            raise SourceError(
                f"data.column={column}: the data set has no text column of this name. Its text columns: {', '.join(columns)}",
                "data.column",
            )
        text = row[column] or ""
        yield text
        left -= len(text)
        if left <= 0:
            return


# --- prose ------------------------------------------------------------------------------------------------------------

# Words that English sentences are held together by; code, tables and lists of names have few of them.
GLUE = frozenset(
    re.findall(
        r"\w+",
        """a all an and any are as at be been but by can do does each for from has have if in into is it its may more must
        no not of on one only or other should so such than that the their then there these they this to used was when
        where which will with would you your""",
    )
)
MARKUP = [
    (re.compile(r":[\w:+-]+:`~?([^`]+)`"), r"\1"),  # :class:`name`
    (re.compile(r"``?([^`'\n]{1,80})``?"), r"\1"),  # ``code``
    (re.compile(r"(?<![\w*])\*{1,2}([A-Za-z_][^*\s]*)\*{1,2}(?![\w*])"), r"\1"),  # *emphasis*
    (re.compile(r"\s\[\d+\]"), ""),  # footnote mark
]
BULLET = re.compile(r"^\s*(?:[-*•+o]|\d+[.)]|\(\d+\)|[a-z][.)])\s+")
CODE = re.compile(r">>>|::|==|->|\.\. |[{}|\\<>]|\b\w+\s?=\s?\S|#|\.\.\.\s*\w+\(|_{3}|={3}|-{3}|~{3}|\*{3}")
SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"”')\]]))\s+(?=[\"“(']?[A-Z])")
NOT_AN_END = re.compile(r"(?:\b(?:e\.g|i\.e|cf|etc|vs|Mr|Dr|St|approx|resp|incl|Fig|No|pp|[A-Z])\.)$")


def prose(text: str) -> list[str]:
    """The English paragraphs of marked-up text, each on one line, without markup, code, tables and headings."""
    paragraphs = []
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        items: list[str] = []
        for line in block.splitlines():
            if BULLET.match(line) or not items:
                items.append(BULLET.sub("", line).strip())
            else:
                items[-1] += " " + line.strip()
        for item in items:
            for pattern, replacement in MARKUP:
                item = pattern.sub(replacement, item)
            item = " ".join(s for s in sentences(re.sub(r"\s+", " ", item).strip()) if s[-1] in '.!?"”)')
            if is_prose(item):
                paragraphs.append(item)
    return paragraphs


def is_prose(text: str) -> bool:
    """Whether a paragraph or sentence reads as English rather than as code, a signature or a list of names."""
    words = re.findall(r"[A-Za-z']+", text)
    if len(words) < 6 or not (text[0].isupper() or text[0] in "\"“'(") or CODE.search(text):
        return False
    glue = sum(word.lower() in GLUE for word in words) / len(words)
    letters = sum(c.isalpha() or c == " " for c in text) / len(text)
    return glue >= 0.25 and letters >= 0.9


def sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph that stands on one line.

    >>> sentences("Use a mapping, e.g. A. Then call it. It returns None.")
    ['Use a mapping, e.g. A. Then call it.', 'It returns None.']
    """
    found: list[str] = []
    for piece in SENTENCE_END.split(paragraph):
        if found and NOT_AN_END.search(found[-1]):
            found[-1] += " " + piece
        elif piece:
            found.append(piece)
    return found
