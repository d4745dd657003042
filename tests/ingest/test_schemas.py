from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import Message
from raydpp.ingest.schemas import SCHEMAS, ColumnNames, detect_schema


def read(row: dict[str, Any], names: ColumnNames | None = None) -> list[list[Message]]:
    return detect_schema(row.keys(), names).read(row)


def pairs(messages: list[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


PAIR = [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Q"}]},
                {"from": "gpt", "value": "A"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "tools": "[]"},
        {
            "conversations": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}],
            "system": None,
        },
        {"instruction": "Q", "input": "", "output": "A"},
        {"instruction": "Q", "input": None, "output": "A", "text": "Below is an instruction ..."},
        {"instruction": "Q", "output": "A"},
        {"instruction": "Q", "context": " ", "response": "A", "category": "open_qa"},
        {"instruction": "Q", "input": "", "response": "A"},
        {"instruction": "Q", "response": "A"},
        {"prompt": "Q", "completion": "A"},
        {"question": "Q", "answer": "A"},
        {"instruction": "Q", "instances": [{"input": "", "output": "A"}], "id": "seed_task_0"},
    ],
    ids=lambda row: "+".join(row),
)
def test_every_schema_reads_the_same_pair(row: dict[str, Any]) -> None:
    assert [pairs(messages) for messages in read(row)] == [PAIR]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Do", "input": " this\n", "output": "A"},
        {"instruction": "Do", "context": " this\n", "response": "A"},
        {"instruction": "Do", "input": " this\n", "response": "A"},
        {"instruction": "Do", "instances": [{"input": " this\n", "output": "A"}]},
    ],
)
def test_an_input_follows_its_instruction_after_a_blank_line(row: dict[str, Any]) -> None:
    expected = [("user", "Do\n\n this\n"), ("assistant", "A")]
    assert pairs(read(row)[0]) == expected
    assert pairs(read({**row, "system": "Be kind."})[0]) == [("system", "Be kind."), *expected]


def test_a_seed_task_is_one_conversation_per_instance() -> None:
    instances = [{"input": "a", "output": "1"}, {"input": None, "output": "2"}, {"output": "3"}]
    contents = [
        [text for _, text in pairs(messages)] for messages in read({"instruction": "Do", "instances": instances})
    ]
    assert contents == [["Do\n\na", "1"], ["Do", "2"], ["Do", "3"]]


def test_sharegpt_with_tools() -> None:
    speakers = [
        "human",
        "function_call",
        "observation",
        "gpt",
        "user",
        "bing",
        "tool",
        "bard",
        "function",
        "chatgpt",
    ]
    turns = [{"from": "system", "value": "Own."}] + [{"from": name, "value": name} for name in speakers]
    (messages,) = read({"conversations": turns, "system": "Column.", "tools": '[{"name": "f"}]'})
    assert messages[0] == {"role": "system", "content": 'Column.\n\nOwn.\n\n[{"name": "f"}]'}
    roles = [
        "user",
        "assistant",
        "tool",
        "assistant",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert pairs(messages[1:]) == list(zip(roles, speakers, strict=True))


def test_openai_tool_calls_become_text() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": "é"}'}}
    turns = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "Q", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "function", "content": "R", "tool_calls": None},
        {"role": "assistant", "content": "Then:", "tool_calls": [{**call, "index": None}]},
    ]
    text = json.dumps([call], ensure_ascii=False)
    assert pairs(read({"messages": turns})[0]) == [
        ("system", "S"),
        ("user", "Q"),
        ("assistant", text),
        ("tool", "R"),
        ("assistant", "Then:\n\n" + text),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "Q", "output": None}, "'output' is null, not text"),
        ({"instruction": "Q", "output": 4}, "'output' is a number, not text"),
        ({"instruction": ["Q"], "output": "A"}, "'instruction' is a list, not text"),
        ({"instruction": "Q", "input": {}, "output": "A"}, "'input' is an object, not text"),
        ({"prompt": "Q", "completion": True}, "'completion' is a truth value, not text"),
        ({"prompt": "Q", "completion": b"A"}, "'completion' is bytes, not text"),
        ({"question": "Q", "answer": "A", "system": 1}, "'system' is a number"),
        ({"instruction": "Q", "instances": []}, "'instances' is an empty list"),
        ({"instruction": "Q", "instances": ["A"]}, "'instances' is a list"),
        ({"instruction": "Q", "instances": [{"input": "x"}]}, "'output' is missing"),
        ({"messages": "Q"}, "'messages' is text, not a list of turns"),
        ({"messages": ["Q"]}, "'messages' has a turn that is text"),
        (
            {"messages": [{"role": "narrator", "content": "Q"}]},
            "'messages' has a turn of the unknown role 'narrator'",
        ),
        ({"messages": [{"role": None, "content": "Q"}]}, "unknown role None"),
        ({"messages": [{"role": "assistant", "content": None}]}, "content is null, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, r"not text \(image_url\)"),
        ({"messages": [{"role": "user", "content": [None]}]}, r"not text \(null\)"),
        ({"conversations": [{"from": "human", "value": 1}]}, "content is a number"),
        ({"conversations": [], "tools": {1, 2}}, "'tools' holds what JSON cannot write"),
    ],
)
def test_wrong_values_are_rejected_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read(row)


def test_a_row_without_a_column_others_have_is_rejected() -> None:
    with pytest.raises(RowError, match="'output' is missing"):
        detect_schema(["instruction", "input", "output"]).read({"instruction": "Q"})


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "tool_calls", "input", "output"])
            | st.text(max_size=2),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=30, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
def test_no_value_crashes_a_schema(schema: Any, data: st.DataObject) -> None:
    columns = (*schema.columns, "input", "context", "system", "tools")
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(columns, VALUES)))
    try:
        conversations = schema.read(row)
    except RowError:
        return
    assert all(isinstance(text, str) for messages in conversations for turn in messages for text in turn.values())


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["prompt", "prompt_id", "messages"], "messages"),
        (["instruction", "input", "output", "text", "prompt", "completion"], "alpaca"),
        (["instruction", "instances", "output"], "self-instruct"),
        (["instruction", "context", "response"], "dolly"),
        (["instruction", "response"], "instruction/response"),
        (["prompt", "completion", "question", "answer"], "prompt/completion"),
    ],
)
def test_the_more_specific_schema_is_detected(columns: list[str], name: str) -> None:
    assert detect_schema(columns).name == name


def test_every_schema_can_be_detected_and_travels_to_workers() -> None:
    for schema in SCHEMAS:
        assert detect_schema(schema.columns) is schema
        assert pickle.loads(pickle.dumps(schema)).columns == schema.columns


def test_named_columns_win() -> None:
    row = {"messages": [], "q": "Q", "a": "A", "s": "S", "prompt": "P", "completion": "C", "system": "T"}
    assert pairs(read(row, ColumnNames(prompt="q", response="a"))[0]) == [("system", "T"), *PAIR]
    assert pairs(read(row, ColumnNames(prompt="q", response="a", system="s"))[0]) == [("system", "S"), *PAIR]
    turns = {
        "prompt": "P",
        "completion": "C",
        "chat": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
    }
    assert pairs(read(turns, ColumnNames(messages="chat"))[0]) == PAIR
    alpaca = {"instruction": "Q", "output": "A", "persona": "S", "system": "T"}
    assert pairs(read(alpaca, ColumnNames(system="persona"))[0]) == [("system", "S"), *PAIR]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ColumnNames(prompt="q", response="b"),
            "--response-column names 'b', but the columns are: a, chat, q",
        ),
        (ColumnNames(prompt="q"), "--prompt-column and --response-column go together"),
        (ColumnNames(response="a"), "--prompt-column and --response-column go together"),
        (ColumnNames(prompt="q", response="a", messages="chat"), "not both"),
        (ColumnNames(), "--messages-column.*--prompt-column.*--response-column.*--system-column"),
        (
            None,
            r"columns: a, chat, q\..*sharegpt \(conversations\); .*dolly \(instruction, context, response\)",
        ),
    ],
)
def test_columns_that_fit_no_schema_are_refused(names: ColumnNames | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        detect_schema(["q", "a", "chat"], names)
