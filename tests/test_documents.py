"""Users' data in the forms that it comes in, and what is refused with its place."""

from __future__ import annotations

import json

import pytest
from models import character_tokenizer

from secateur.calibration.documents import read_documents
from secateur.calibration.records import Conversation
from secateur.calibration.texts import encode, encode_chat
from secateur.errors import SecateurError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def documents(path, content, **options):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return list(read_documents(path, **options))


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "abc"}, "abc"),
        ({"messages": [USER, ANSWER]}, Conversation([USER, ANSWER])),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
            Conversation([USER, ANSWER]),
        ),
        (
            {"system": "Be kind", "conversations": [{"role": "user", "content": "Hi"}]},
            Conversation([{"role": "system", "content": "Be kind"}, USER]),
        ),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, Conversation([USER, ANSWER])),
        (
            {"instruction": "Sum", "input": "1 2", "output": "3"},
            Conversation([{"role": "user", "content": "Sum\n\n1 2"}, {"role": "assistant", "content": "3"}]),
        ),
        ({"instruction": "Hi", "context": None, "response": "Hello", "category": "qa"}, Conversation([USER, ANSWER])),
        ({"instruction": "Hi"}, Conversation([USER])),
        ({"messages": json.dumps([USER, ANSWER])}, Conversation([USER, ANSWER])),
        ({"messages": "none", "text": "abc"}, "abc"),
        ({"messages": [USER], "tools": [TOOL]}, Conversation([USER], [TOOL])),
        ({"messages": [USER], "tools": json.dumps([TOOL])}, Conversation([USER], [TOOL])),
    ],
)
def test_records_of_the_usual_forms(tmp_path, record, expected):
    assert documents(tmp_path / "a.jsonl", json.dumps(record)) == [expected]
    assert documents(tmp_path / "list.json", [record, record]) == [expected, expected]
    assert documents(tmp_path / "one.json", record) == [expected]
    assert documents(tmp_path / "named.json", {"version": 1, "data": [record]}) == [expected]


def test_a_chat_with_tools_null_content_and_parts(tmp_path):
    """As OpenAI's API logs it: no content next to a call, whose arguments are JSON text."""
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Wea"}, {"type": "text", "text": "ther?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    (found,) = documents(tmp_path / "a.jsonl", json.dumps({"messages": messages, "tools": [TOOL]}))
    assert found.messages[0] == {"role": "user", "content": "Weather?"}
    assert found.messages[1]["content"] == ""
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Bern"}
    assert "refusal" not in found.messages[1]
    tokenizer = character_tokenizer(chat=True)
    tokenizer.chat_template = (
        "{% for tool in tools %}{{ tool.function.name }}{% endfor %}{% for message in messages %}{{ message.content }}"
        "{% for call in message.tool_calls %}{{ call.function.arguments.city }}{% endfor %}{% endfor %}"
    )
    assert tokenizer.decode(encode([found], tokenizer)) == "weatherWeather?Bernsunny"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet"])
def test_columns_of_tables(tmp_path, name):
    pyarrow = pytest.importorskip("pyarrow", reason="tables need the `data` extra")
    pytest.importorskip("datasets", reason="tables need the `data` extra")
    path = tmp_path / name
    if name.endswith("parquet"):
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2], "body": ["one", "two"]}), path)
    else:
        separator = "," if name.endswith("csv") else "\t"
        path.write_text(f"id{separator}body\n1{separator}one\n2{separator}two\n")
    assert list(read_documents(path, text_field="body")) == ["one", "two"]
    with pytest.raises(SecateurError, match=r"row 1: .*only `id`, `body`: name the one"):
        list(read_documents(path))
    with pytest.raises(SecateurError, match="no text in the field 'id'"):
        list(read_documents(path, text_field="id"))


def test_a_name_with_brackets_is_not_a_pattern(tmp_path):
    pytest.importorskip("datasets", reason="tables need the `data` extra")
    (tmp_path / "data[1].csv").write_text("text\nright\n\nNA\n")
    (tmp_path / "data1.csv").write_text("text\nwrong\n")
    assert list(read_documents(tmp_path / "data[1].csv")) == ["right", "NA"]


def test_a_damaged_table_is_named(tmp_path):
    pytest.importorskip("datasets", reason="tables need the `data` extra")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(SecateurError, match=r"a.parquet can't be read as parquet"):
        list(read_documents(tmp_path / "a.parquet", text_field="text"))


def test_plain_text_has_no_field(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    for source in (tmp_path / "a.txt", None):
        with pytest.raises(SecateurError, match="text_field is 'body', and .* is plain text"):
            list(read_documents(source, text_field="body"))
    (tmp_path / "b.jsonl").write_text('{"body": "two"}')
    assert list(read_documents(tmp_path, text_field="body")) == ["one", "two"]


def test_a_field_of_json_lines(tmp_path):
    lines = '{"body": "one", "text": "other"}\n{"body": "two", "text": "other"}\n'
    assert documents(tmp_path / "a.jsonl", lines, text_field="body") == ["one", "two"]
    with pytest.raises(SecateurError, match=r"a.jsonl, line 1: no text in the field 'nosuch'; its fields are `body`"):
        documents(tmp_path / "a.jsonl", lines, text_field="nosuch")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": 5}\n', "line 2: `text` is 5, which is not text"),
        ("a.jsonl", '{"text": "x"}\n\nnot json\n', "line 3: not JSON"),
        ("a.jsonl", '"text"\n', "line 1: text is not a record"),
        ("a.jsonl", '{"messages": [{"role": "user", "content": {"a": 1}}]}', "line 1: the content of a message"),
        ("a.jsonl", '{"conversations": [{"from": "human"}, 5]}', "line 1: a message needs a `role`"),
        ("a.jsonl", '{"instruction": "a", "input": 5}', "line 1: `instruction`, `input` must be text"),
        ("a.jsonl", '{"instruction": "a", "answer": "b"}', "no `output` or `response` next to it, but `answer`"),
        ("a.jsonl", '{"messages": "[1"}', "line 1: `messages` is not JSON"),
        ("a.jsonl", '{"messages": "hello"}', "line 1: `messages` is hello, which is not a chat"),
        ("a.jsonl", '{"messages": []}', "line 1: the chat has no messages"),
        ("a.jsonl", '{"instruction": null}', "line 1: `instruction` is None, which is not text"),
        ("a.jsonl", '{"messages": [{"role": "user"}], "tools": "{"}', "line 1: `tools` is not JSON"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user"}], "tools": "[" * 100_000}), "`tools` is not JSON"),
        ("a.json", "plain words", "not JSON .* ends in .jsonl"),
        ("a.json", '{"text": "a"}\n{"text": "b"}', "not JSON .* ends in .jsonl"),
        ("a.json", "[5]", "record 1: 5 is not a record"),
        ("a.json", '"words"', "words is neither a list"),
        ("a.json", '{"a": 1, "b": 2}', "record 1: neither of the fields"),
    ],
)
def test_what_can_not_be_read_is_named_with_its_place(tmp_path, name, content, message):
    with pytest.raises(SecateurError, match=message):
        documents(tmp_path / name, content)


def test_a_long_line_makes_a_short_message(tmp_path):
    long = "x" * 5_000_000
    for content in (f'{{"body": "{long}"}}', f'{{"{long}": 1}}', f'"{long}"', f'{{"text": "{long}'):
        with pytest.raises(SecateurError) as caught:
            documents(tmp_path / "a.jsonl", content)
        assert len(str(caught.value)) < 1000
    assert documents(tmp_path / "a.jsonl", json.dumps({"text": long})) == [long]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": []}, "line 1: the chat has no messages"),
        ({"conversations": []}, "line 1: the chat has no messages"),
        ({"messages": [{"role": "user", "content": "a"}], "tools": ["search"]}, "line 1: `tools` must be a list of"),
    ],
)
def test_a_chat_that_no_template_can_take_is_named_with_its_place(tmp_path, record, message):
    (tmp_path / "chats.jsonl").write_text(json.dumps(record))
    with pytest.raises(SecateurError, match=message):
        list(read_documents(tmp_path / "chats.jsonl"))


@pytest.mark.parametrize(
    "template", ["{{ 1 + messages[0]['content'] }}", {"one": "{{ messages }}", "two": "{{ messages }}"}]
)
def test_a_template_that_fails_is_told(template):
    tokenizer = character_tokenizer()
    tokenizer.chat_template = template
    chat = Conversation([{"role": "user", "content": "a"}])
    with pytest.raises(SecateurError, match="chat template refuses a conversation"):
        encode_chat(chat, tokenizer)


def test_a_damaged_tokenizer_is_told_of_chats_too(monkeypatch):
    """The tokenizers library raises a plain `Exception`."""
    tokenizer = character_tokenizer(chat=True)

    def damaged(*_, **__):
        raise Exception("index out of bounds")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", damaged)
    with pytest.raises(SecateurError, match="can't encode the text .index out of bounds"):
        encode_chat(Conversation([USER]), tokenizer)
