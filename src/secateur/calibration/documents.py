"""Texts of users as they come: text, JSON, JSONL, CSV and Parquet files, chats, data sets of the hub.

Nothing is guessed in silence: a file of records whose form is unknown is refused, with the record's number.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError
from secateur.runtime.messages import first_line
from secateur.storage.json_files import parse_json
from secateur.storage.paths import user_path

MAX_NAME = 255  # of a file, in all common file systems
RECORDS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}  # suffix -> builder of the datasets library
IN_FOLDERS = (".txt", ".jsonl", ".ndjson", ".json", *RECORDS)
TEXT_SUFFIXES = (*IN_FOLDERS, ".md")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bot": "assistant", "function_call": "assistant", "system": "system", "tool": "tool",
         "observation": "tool", "function_response": "tool"}  # fmt: skip
FORMS = "`text`, `messages` (OpenAI), `conversations` (ShareGPT) or `instruction` (Alpaca)"

# Short names of the data sets that the field uses: (path, configuration, split to evaluate on, text field).
DATASETS: dict[str, tuple[str, str | None, str, str]] = {
    "c4": ("allenai/c4", "en", "validation", "text"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}


@dataclass(frozen=True)
class Conversation:
    """A chat, for the tokenizer's chat template.

    Args:
        messages: with `role` and `content`, as templates take them.
        tools: descriptions of the tools that it may call.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None


Document = str | Conversation


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
        SecateurError: nothing there, or a record that can't be read, with its file and number.
    """
    if source is not None and not str(source).strip():
        raise SecateurError("the text's name is empty: give a file, a folder or a data set")
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
    elif is_dataset(source):
        yield from _stream_dataset(str(source), seed, evaluation, text_field)
    else:
        raise SecateurError(f"{source} is not a file, folder or data set name (short names: {', '.join(DATASETS)})")


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


def document_of(record: Any, place: str, text_field: str | None = None) -> Document:
    """The text or the conversation in a record, by the field that is asked for, or by the record's form.

    Args:
        record: of a file or data set.
        place: what messages call it.
        text_field: the field; None = found by the form.

    Raises:
        SecateurError: it has no such field, no form that is known, or something else in it than text.
    """
    if not isinstance(record, Mapping):
        raise SecateurError(f"{place}: {_shown(record)} is not a record with a {FORMS} field")
    if text_field is not None:
        if not isinstance(record.get(text_field), str):
            raise SecateurError(f"{place}: no text in the field {text_field!r}; its fields are {_fields(record)}")
        return record[text_field]
    if isinstance(record.get("messages"), list):
        messages = [_message(message, place) for message in record["messages"]]
        return Conversation(messages, _tools(record.get("tools"), place))
    if isinstance(record.get("conversations"), list):
        return _sharegpt(record, place)
    if isinstance(record.get("instruction"), str):
        return _alpaca(record, place)
    if isinstance(record.get("text"), str):
        return record["text"]
    if "text" in record:
        raise SecateurError(f"{place}: `text` is {_shown(record['text'])}, which is not text")
    raise SecateurError(
        f"{place}: neither of the fields {FORMS} is there, only {_fields(record)}: name the one that holds "
        f"the text with ‹text_field›"
    )


def _sharegpt(record: Mapping[str, Any], place: str) -> Conversation:
    """`conversations`: a list of turns with `from` and `value`, or with `role` and `content`."""
    messages = [{"role": "system", "content": record["system"]}] if isinstance(record.get("system"), str) else []
    for turn in record["conversations"]:
        if isinstance(turn, Mapping) and "from" in turn:
            turn = {"role": ROLES.get(str(turn["from"]).lower(), turn["from"]), "content": turn.get("value")}
        messages.append(_message(turn, place))
    return Conversation(messages, _tools(record.get("tools"), place))


def _alpaca(record: Mapping[str, Any], place: str) -> Conversation:
    """`instruction`, `input` and `output`: a question with its context, and the answer."""
    parts = [record.get(name) or "" for name in ("instruction", "input", "output")]
    if not all(isinstance(part, str) for part in parts):
        raise SecateurError(f"{place}: `instruction`, `input` and `output` must be text")
    instruction, context, output = parts
    question = f"{instruction}\n\n{context}" if context else instruction
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    answer = {"role": "assistant", "content": output}
    return Conversation([*system, {"role": "user", "content": question}, answer])


def _message(message: Any, place: str) -> dict[str, Any]:
    """A message whose content is text; parts of content are joined, what is empty is "", and calls have arguments.

    Raises:
        SecateurError: a message without a role, or content that is not text.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise SecateurError(f"{place}: a message needs a `role` and a `content`")
    content = message.get("content")
    parts = content if isinstance(content, list) else [content or ""]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    if len(found) < len(texts):
        raise SecateurError(f"{place}: the content of a message must be text, or a list of parts with `text`")
    calls = message.get("tool_calls")
    called = {"tool_calls": [_call(call) for call in calls]} if isinstance(calls, list) and calls else {}
    others = {name: value for name, value in message.items() if name != "tool_calls" and value is not None}
    return {**others, **called, "content": "".join(found)}


def _call(call: Any) -> Any:
    """A tool call whose arguments are data: OpenAI writes them as JSON text, templates want the values."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = parse_json(function["arguments"])
    except ValueError:
        return call  # the text that the model wrote
    return {**call, "function": {**function, "arguments": arguments}}


def _tools(tools: Any, place: str) -> list[Any] | None:
    """Descriptions of tools: a list, or its JSON text, as data sets with one schema have it."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise SecateurError(f"{place}: `tools` is not JSON ({error})") from error
    if tools and not isinstance(tools, list):
        raise SecateurError(f"{place}: `tools` must be a list of descriptions")
    return tools or None


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
        raise SecateurError(f"{path}: {_shown(found)} is neither a list of records nor a record")
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


def _stream_dataset(name: str, seed: int, evaluation: bool, text_field: str | None) -> Iterator[Document]:
    load_dataset = _datasets(name)
    path, configuration, test_split, own_field = DATASETS.get(name, (name, None, "test", None))
    try:
        stream = load_dataset(path, configuration, split=test_split if evaluation else "train", streaming=True)
        rows = stream if evaluation else stream.shuffle(seed=seed, buffer_size=1000)
        for number, record in enumerate(rows, 1):
            yield document_of(record, f"data set {name}, record {number}", text_field or own_field)
    except SecateurError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # network, not found; unknown configuration or split; a script
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
        raise SecateurError(f"{name} needs the `data` extra: pip install 'secateur[data]'") from error
    return load_dataset


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SecateurError(f"{path} can't be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SecateurError(f"{path} is not UTF-8 text (byte {error.start}): give a plain text file") from error


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(f"`{_shown(name)}`" for name in list(record)[:12]) or "none"


def _shown(value: Any) -> str:
    """The beginning of a value."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."


def check_is_name(source: Any) -> None:
    """Check that a source is a name, and not a text itself.

    Raises:
        SecateurError: it is a text.
    """
    if isinstance(source, str) and ("\n" in source or max(map(len, source.split("/"))) > MAX_NAME):
        raise SecateurError(
            f"a text itself was given ({source[:20]!r} ...): write it to a file, and give that file's name"
        )


def name_of(source: str | Path | None) -> str:
    """What messages call a source."""
    return "the shipped text" if source is None else str(source)


OWN_WORDS = "self"  # instead of a text: the model writes it


def is_own_words(source: str | Path | None) -> bool:
    """Whether a source stands for text that the model writes: `self`, or `self:PROMPTS`."""
    return str(source) == OWN_WORDS or str(source).startswith(f"{OWN_WORDS}:")


def has_no_text(source: str | Path | None) -> bool:
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


def is_dataset(source: str | Path | None) -> bool:
    """Whether a source names a data set: not a file, a short name or `owner/name` without a text file's suffix."""
    if source is None or user_path(source).exists():
        return False
    name = str(source)
    looks_like_one = re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None
    return name in DATASETS or (
        looks_like_one and Path(name).suffix not in TEXT_SUFFIXES and not Path(name).parent.is_dir()
    )
