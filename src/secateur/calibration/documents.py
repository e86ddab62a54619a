"""Texts of users as they come: text, JSON, JSONL, CSV and Parquet files, chats, data sets of the hub.

Nothing is guessed in silence: a file of records whose form is unknown is refused, with the record's number.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from secateur.calibration.records import Document, document_of, shown
from secateur.errors import SecateurError
from secateur.runtime.hub_errors import download_errors
from secateur.runtime.messages import first_line
from secateur.storage.json_files import parse_json
from secateur.storage.paths import user_path

MAX_NAME = 255  # of a file, in all common file systems
RECORDS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # suffix -> builder of the datasets library
WITH_FIELDS = (".jsonl", ".ndjson", ".json", *RECORDS)
IN_FOLDERS = (".txt", *WITH_FIELDS)
TEXT_SUFFIXES = (*IN_FOLDERS, ".md")


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub.

    Args:
        path: on the hub.
        configuration: its name.
        test_split: to evaluate on.
        text_field: of a row; None = found by its form.
        separator: joins the rows to one text to evaluate on, as GPTQ and SparseGPT do; None = each is a text.
        test_rows: of the test split, from the front; None = all.
        is_one_text: whether the rows of the training split are lines of one text too.
    """

    path: str
    configuration: str | None = None
    test_split: str = "test"
    text_field: str | None = None
    separator: str | None = None
    test_rows: int | None = None
    is_one_text: bool = False


# Short names of those that the field evaluates on.
DATASETS = {
    "c4": DataSet("allenai/c4", "en", "validation", "text", " ", test_rows=1100),
    "wikitext2": DataSet("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text", "\n\n", is_one_text=True),
    "ptb": DataSet("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence", " ", is_one_text=True),
}


def shipped_text(name: str) -> str:
    """A text that the package carries: `calibration` or `evaluation`."""
    return (files("secateur") / "data" / f"{name}.txt").read_text(encoding="utf-8")


def read_documents(
    source: str | Path | None, seed: int = 0, evaluation: bool = False, text_field: str | None = None
) -> Iterator[Document]:
    """Documents of a file, of a folder's files by name, or of a data set.

    Args:
        source: file, folder or data set name; None is the shipped text.
        seed: of the order in which a data set's training split is streamed.
        evaluation: the shipped evaluation text or a data set's test split, in order, instead of what to calibrate on.
        text_field: field or column that holds the text; None = found by the record's form.

    Raises:
        SecateurError: nothing there, a record that can't be read, with its file and number, or a field of plain text.
    """
    check_text(source)
    if text_field is not None and not has_fields(source):
        raise SecateurError(
            f"‹text_field› is {text_field!r}, and {name_of(source)} is plain text, which has no fields: leave it out"
        )
    if source is None:
        yield shipped_text("evaluation" if evaluation else "calibration")
        return
    path = user_path(source)
    if path.is_dir():
        members = sorted(member for member in path.iterdir() if member.suffix.lower() in IN_FOLDERS)
        if not members:
            raise SecateurError(f"{path} holds no text: no file ends in {', '.join(IN_FOLDERS)}")
        for member in members:
            yield from _read_file(member, text_field)
    elif path.is_file():
        yield from _read_file(path, text_field)
    else:
        yield from _read_dataset(str(source), seed, evaluation, text_field)


def _read_file(path: Path, text_field: str | None) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path, text_field)
    elif suffix == ".json":
        yield from _read_json(path, text_field)
    elif suffix in RECORDS:
        yield from _read_table(path, text_field)
    else:
        yield _read_text(path)


def _read_jsonl(path: Path, text_field: str | None) -> Iterator[Document]:
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = parse_json(line)
        except ValueError as error:
            raise SecateurError(f"{place}: not JSON ({error})") from error
        yield document_of(record, place, text_field)


def _read_json(path: Path, text_field: str | None) -> Iterator[Document]:
    """Records of a list, of the only list of records in an object, or the one record that the file is."""
    try:
        found = parse_json(_read_text(path))
    except ValueError as error:
        if isinstance(error, SecateurError) and error.raw.startswith(str(path)):
            raise
        raise SecateurError(f"{path}: not JSON ({error}). A file of JSON lines ends in .jsonl") from error
    if isinstance(found, dict):
        lists = [each for each in found.values() if isinstance(each, list) and each and isinstance(each[0], dict)]
        known = {"messages", "conversations", "instruction", "text", text_field} & {*found}
        found = [found] if known or len(lists) != 1 else lists[0]
    if not isinstance(found, list):
        raise SecateurError(f"{path}: {shown(found)} is neither a list of records nor a record")
    for number, record in enumerate(found, 1):
        yield document_of(record, f"{path}, record {number}", text_field)


def _read_table(path: Path, text_field: str | None) -> Iterator[Document]:
    load_dataset = _datasets(str(path))
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    builder = RECORDS[path.suffix.lower()]
    if builder == "csv":
        options["keep_default_na"] = False  # "NA" and empty cells are text
    named = glob.escape(str(path))  # the library takes a name for a pattern
    try:
        rows = load_dataset(builder, data_files=named, split="train", streaming=True, **options)
        for number, record in enumerate(rows, 1):
            yield document_of(record, f"{path}, row {number}", text_field)
    except SecateurError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise SecateurError(f"{path} can't be read as {builder} ({first_line(error)})") from error


def _read_dataset(name: str, seed: int, evaluation: bool, text_field: str | None) -> Iterator[Document]:
    data = DATASETS.get(name) or DataSet(name)
    in_order = evaluation or data.is_one_text
    rows = _rows_of(name, data, None if in_order else seed, evaluation, text_field or data.text_field)
    if in_order and data.separator is not None:
        yield data.separator.join(map(str, islice(rows, data.test_rows if evaluation else None)))
    else:
        yield from rows


def _rows_of(
    name: str, data: DataSet, seed: int | None, evaluation: bool, text_field: str | None
) -> Iterator[Document]:
    """The rows of a data set one by one, shuffled by a seed; None = in order."""
    load_dataset = _datasets(name)
    split = data.test_split if evaluation else "train"
    try:
        stream = load_dataset(data.path, data.configuration, split=split, streaming=True)
        rows = stream if seed is None else stream.shuffle(seed=seed, buffer_size=1000)
        for number, record in enumerate(rows, 1):
            yield document_of(record, f"data set {name}, record {number}", text_field)
    except SecateurError:
        raise
    except (*download_errors(), ValueError, RuntimeError) as error:  # also: unknown configuration or split; a script
        raise SecateurError(
            f"data set {name} could not be read ({first_line(error)}): check the name and the connection"
        ) from error


def _datasets(name: str) -> Any:
    """The function `load_dataset`.

    Raises:
        SecateurError: the library is not installed.
    """
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports] - an extra
    except ImportError as error:
        raise SecateurError(f"{name} needs secateur's `data` extra, or `pip install datasets`") from error
    return load_dataset


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SecateurError(f"{path} can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error


def check_is_name(source: Any) -> None:
    """Check that a source is a name, and not a text itself.

    Raises:
        SecateurError: it is a text, or `self:` without the prompts' name.
    """
    if source == f"{OWN_WORDS}:":
        raise SecateurError("‹calibration=self:› names no prompts: write self:PROMPTS, or self alone for none")
    if isinstance(source, str) and ("\n" in source or max(map(len, source.split("/"))) > MAX_NAME):
        raise SecateurError(
            f"a text itself was given ({source[:20]!r} ...): write it to a file, and give that file's name"
        )


def check_text(source: str | Path | None) -> None:
    """Check that a source leads to a text: a file, a folder, or what may be a data set. Costs nothing.

    Raises:
        SecateurError: it does not, or is a text itself.
    """
    check_is_name(source)
    named = text_of(source)
    if named is None:
        return
    if not str(named).strip():
        raise SecateurError("the text's name is empty: give a file, a folder or a data set")
    if not user_path(named).exists() and not is_dataset(named):
        raise SecateurError(f"{named} is not a file, folder or data set name (short names: {', '.join(DATASETS)})")


def name_of(source: str | Path | None) -> str:
    """What messages call a source."""
    return "the shipped text" if source is None else str(source)


OWN_WORDS = "self"  # instead of a text: the model writes it


def is_own_words(source: str | Path | None) -> bool:
    """Whether a source stands for text that the model writes: `self`, or `self:PROMPTS`."""
    return str(source) == OWN_WORDS or str(source).startswith(f"{OWN_WORDS}:")


def is_self_alone(source: str | Path | None) -> bool:
    """Whether a source is `self` alone: the model begins from nothing."""
    return str(source) == OWN_WORDS


def text_of(source: str | Path | None) -> str | Path | None:
    """The text that a source names, of `self:PROMPTS` the prompts; None for the shipped text, and for `self`."""
    return str(source).partition(":")[2] or None if is_own_words(source) else source


def text_place(source: str | Path) -> Path | None:
    """The file or folder that a source names, if it does."""
    named = text_of(source)
    place = None if named is None else user_path(named)
    return place if place is not None and place.exists() else None


def has_fields(source: str | Path | None) -> bool:
    """Whether a source may hold records, with fields. Plain text files, the shipped text and `self` alone don't."""
    if source is None or is_self_alone(source):
        return False
    place = text_place(source)
    return place is None or place.is_dir() or place.suffix.lower() in WITH_FIELDS


def is_stream(source: str | Path | None) -> bool:
    """Whether a source names a data set that is drawn from row by row, as it may have no end."""
    return is_dataset(source) and not (str(source) in DATASETS and DATASETS[str(source)].is_one_text)


def is_dataset(source: str | Path | None) -> bool:
    """Whether a source names a data set: not a file, a short name or `owner/name` without a text file's suffix."""
    if source is None or user_path(source).exists():
        return False
    name = str(source)
    looks_like_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return name in DATASETS or (
        looks_like_one and Path(name).suffix not in TEXT_SUFFIXES and not Path(name).parent.is_dir()
    )
