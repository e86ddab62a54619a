"""The text or the chat in a record of a user's file, by the forms that the field uses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError
from secateur.storage.json_files import parse_json

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
         "model": "assistant", "bot": "assistant", "function_call": "assistant", "system": "system", "tool": "tool",
         "observation": "tool", "function_response": "tool"}  # fmt: skip
# Fields of a question with its answer: Alpaca's names, then those of Dolly.
ALPACA = {"system": ("system",), "question": ("instruction",), "context": ("input", "context"),
          "answer": ("output", "response")}  # fmt: skip
FORMS = "`text`, `messages` (OpenAI), `conversations` (ShareGPT) or `instruction` (Alpaca)"


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
        raise SecateurError(f"{place}: {shown(record)} is not a record with a {FORMS} field")
    if text_field is not None:
        if not isinstance(record.get(text_field), str):
            raise SecateurError(f"{place}: no text in the field {text_field!r}; its fields are {_fields(record)}")
        return record[text_field]
    if turns := _turns(record, "messages", place):
        return _conversation(turns, record, place)
    if turns := _turns(record, "conversations", place):
        return _sharegpt(turns, record, place)
    if isinstance(record.get("instruction"), str):
        return _alpaca(record, place)
    if isinstance(record.get("text"), str):
        return record["text"]
    for name, kind in (("messages", "a chat"), ("conversations", "a chat"), ("instruction", "text"), ("text", "text")):
        if name in record:
            raise SecateurError(f"{place}: `{name}` is {shown(record[name])}, which is not {kind}")
    raise SecateurError(
        f"{place}: neither of the fields {FORMS} is there, only {_fields(record)}: name the one that holds "
        f"the text with ‹text_field›"
    )


def _turns(record: Mapping[str, Any], name: str, place: str) -> list[Any] | None:
    """The turns of a chat: a list, or its JSON text, as a table has it; None where there are none."""
    turns = record.get(name)
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        turns = _parsed(turns, name, place)
    if turns == []:
        raise SecateurError(f"{place}: the chat has no messages: leave it out")
    return turns if isinstance(turns, list) else None


def _parsed(text: str, name: str, place: str) -> Any:
    """The data of a field with JSON text."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise SecateurError(f"{place}: `{name}` is not JSON ({error})") from error


def _sharegpt(turns: list[Any], record: Mapping[str, Any], place: str) -> Conversation:
    """`conversations`: a list of turns with `from` and `value`, or with `role` and `content`."""
    messages: list[Any] = []
    if isinstance(record.get("system"), str):
        messages.append({"role": "system", "content": record["system"]})
    for turn in turns:
        if isinstance(turn, Mapping) and "from" in turn:
            turn = {"role": ROLES.get(str(turn["from"]).lower(), turn["from"]), "content": turn.get("value")}
        messages.append(turn)
    return _conversation(messages, record, place)


def _conversation(messages: list[Any], record: Mapping[str, Any], place: str) -> Conversation:
    """A chat of messages with `role` and `content`, and the record's tools.

    Raises:
        SecateurError: something else in it than messages.
    """
    return Conversation([_message(message, place) for message in messages], _tools(record.get("tools"), place))


def _alpaca(record: Mapping[str, Any], place: str) -> Conversation:
    """A question (`instruction`), its context (`input`, or Dolly's `context`) and the answer (`output` or `response`).

    Raises:
        SecateurError: one that is not text, or no answer where another field may be it.
    """
    found = {role: next((record[name] for name in names if record.get(name)), "") for role, names in ALPACA.items()}
    if not all(isinstance(part, str) for part in found.values()):
        fields = ", ".join(f"`{name}`" for names in ALPACA.values() for name in names if name in record)
        raise SecateurError(f"{place}: {fields} must be text")
    known = {name for names in ALPACA.values() for name in names}
    has_answer = any(name in record for name in ALPACA["answer"])
    if not has_answer and (other := [name for name in record if name not in known and isinstance(record[name], str)]):
        raise SecateurError(
            f"{place}: `instruction` has no `output` or `response` next to it, but `{shown(other[0])}`: name the "
            f"answer's field `output`, or leave that field out"
        )
    question = "\n\n".join(part for part in (found["question"], found["context"]) if part)
    turns = {"system": found["system"], "user": question, "assistant": found["answer"]}
    messages = [{"role": role, "content": content} for role, content in turns.items() if content or role == "user"]
    return Conversation(messages)


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
        tools = _parsed(tools, "tools", place)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, Mapping) for tool in tools)):
        raise SecateurError(f"{place}: `tools` must be a list of descriptions, each an object")
    return tools or None


def _fields(record: Mapping[str, Any]) -> str:
    return ", ".join(f"`{shown(name)}`" for name in list(record)[:12]) or "none"


def shown(value: Any) -> str:
    """The beginning of a value."""
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 40 else f"{text[:40]} ..."
