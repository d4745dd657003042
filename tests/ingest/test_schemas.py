from __future__ import annotations

import json
import pickle
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import Message
from raydpp.ingest.schemas import (
    SCHEMAS,
    ColumnNames,
    checked_roles,
    detect_schemas,
    is_row,
    schema_of,
    tools_of,
    without_tools,
)


def read(row: dict[str, Any], names: ColumnNames | None = None) -> list[list[Message]]:
    return schema_of(row, detect_schemas(row.keys(), names)).read(row)


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
        detect_schemas(["instruction", "input", "output"])[0].read({"instruction": "Q"})


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
    assert detect_schemas(columns)[0].name == name


def test_every_schema_can_be_detected_and_travels_to_workers() -> None:
    for schema in SCHEMAS:
        assert schema.name in [found.name for found in detect_schemas(schema.columns)]
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
        detect_schemas(["q", "a", "chat"], names)


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in pairs]


CHAT = turns(("user", "Q"), ("assistant", "A"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps(CHAT)},
        {"messages": " " + json.dumps(CHAT, indent=1)},
        {"conversations": json.dumps([{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}])},
        {"messages": str(CHAT)},  # as pandas writes lists into CSV
        {"messages": {"role": ["user", "assistant"], "content": ["Q", "A"]}},
        {"conversations": {"from": ["human", "gpt"], "value": ["Q", "A"], "weight": [None, None]}},
        {"messages": [{**turn, "from": None, "value": None} for turn in CHAT]},
        {
            "messages": [
                {"role": None, "content": None, "from": turn["role"], "value": turn["content"]} for turn in CHAT
            ]
        },
        {"prompt": CHAT[:1], "completion": CHAT[1:]},
        {"prompt": CHAT[:1], "completion": "A"},
        {"prompt": "Q", "completion": "A", "label": True},
        {"prompt": "Q", "completion": "A", "label": None},
        {"instruction": "Q", "input": float("nan"), "output": "A", "history": float("nan"), "system": float("nan")},
        {"instruction": "Q", "output": "A", "history": []},
        {"question": "Q", "answer": "A", "context": "", "passages": []},
    ],
)
def test_shapes_of_the_same_pair(row: dict[str, Any]) -> None:
    assert [pairs(messages) for messages in read(row)] == [PAIR]


@pytest.mark.parametrize("schema", [("question", "answer"), ("instruction", "output"), ("instruction", "response")])
@pytest.mark.parametrize("column", ["context", "contexts", "passage", "passages"])
def test_what_a_question_is_about_follows_it(schema: tuple[str, str], column: str) -> None:
    ask, answer = schema
    for value in ("Text one.", ["Text one."]):
        assert pairs(read({ask: "Q", answer: "A", column: value})[0]) == [
            ("user", "Q\n\nText one."),
            ("assistant", "A"),
        ]
    (two,) = read({ask: "Q", answer: "A", column: ["One.", "Two."]})
    assert pairs(two)[0] == ("user", "Q\n\nOne.\n\nTwo.")
    with pytest.raises(RowError, match=f"'{column}' is an object"):
        read({ask: "Q", answer: "A", column: {"text": "T"}})


@pytest.mark.parametrize(
    "history",
    [
        [["Q0", "A0"]],
        [("Q0", "A0")],
        json.dumps([["Q0", "A0"]]),
        turns(("user", "Q0"), ("assistant", "A0")),
        [{"from": "human", "value": "Q0"}, {"from": "gpt", "value": "A0"}],
    ],
)
def test_history_becomes_earlier_turns(history: Any) -> None:
    row = {"instruction": "Q", "input": "I", "output": "A", "system": "S", "history": history}
    expected = [("system", "S"), ("user", "Q0"), ("assistant", "A0"), ("user", "Q\n\nI"), ("assistant", "A")]
    assert pairs(read(row)[0]) == expected


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ("Q0", "'history' is text"),
        ([["Q0"]], "not a pair"),
        ([["Q0", None]], "not a pair"),
        (["Q0", "A0"], "not a pair"),
    ],
)
def test_history_that_is_none_is_a_reject(history: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        read({"instruction": "Q", "output": "A", "history": history})


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_of_a_turn_is_kept(key: str) -> None:
    turn = {"role": "assistant", "content": "4", key: "two and two"}
    (messages,) = read({"messages": [{"role": "user", "content": "2+2?", key: None}, turn]})
    assert messages == [
        CHAT[0] | {"content": "2+2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    ]
    (messages,) = read({"messages": [CHAT[0], {**turn, "content": None}]})
    assert messages[1] == {"role": "assistant", "content": "", "reasoning_content": "two and two"}


def test_reasoning_beside_an_answer_is_kept() -> None:
    (messages,) = read({"question": "Q", "answer": "A", "reasoning_content": "R"})
    assert messages[1] == {"role": "assistant", "content": "A", "reasoning_content": "R"}


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}, {"training": "false"}]
)
def test_a_turn_can_be_marked_as_context(mark: dict[str, Any]) -> None:
    (messages,) = read({"messages": [CHAT[0], {**CHAT[1], **mark}, CHAT[0], {**CHAT[1], "weight": 1, "train": True}]})
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


def test_assistant_turns_of_a_prompt_are_context() -> None:
    (messages,) = read({"prompt": [*CHAT, CHAT[0]], "completion": [CHAT[1]]})
    assert [message.get("weight") for message in messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("role", "means"),
    [
        *((name, "user") for name in ("User", "USER", " human", "prompter", "Human")),
        *((name, "assistant") for name in ("Assistant", "model", "ai", "AI", "bot", "Chatbot", "bing", "gpt")),
        *((name, "system") for name in ("System", "developer")),
        *((name, "tool") for name in ("Tool", "ipython", "function_response", "observation")),
    ],
)
def test_roles_by_other_names(role: str, means: str) -> None:
    (messages,) = read({"messages": [{"role": role, "content": "x"}, *CHAT]})
    assert messages[0]["role"] == means


def test_roles_that_the_user_names() -> None:
    row = {"conversations": [{"from": "Patient", "value": "Q"}, {"from": "DOCTOR", "value": "A"}]}
    with pytest.raises(RowError, match=r"unknown role 'Patient' \(--role NAME=ROLE\)"):
        read(row)
    roles = checked_roles(["patient=user", "Doctor=assistant", "gpt=user"])
    assert pairs(read(row, ColumnNames(roles=roles))[0]) == PAIR
    assert read({"messages": [{"role": "gpt", "content": "x"}]}, ColumnNames(roles=roles))[0][0]["role"] == "user"
    for wrong in ("patient", "=user", "patient=doctor"):
        with pytest.raises(UserError, match=f"--role {wrong}: write NAME=ROLE"):
            checked_roles([wrong])


def test_kto_rows_that_are_marked_as_bad_are_rejects() -> None:
    for bad in (False, "false", "False", 0):
        with pytest.raises(RowError, match=r"'label' is false.*\(KTO\)"):
            read({"prompt": "Q", "completion": "A", "label": bad})
    assert pairs(read({"instruction": "Q", "output": "A", "label": False})[0]) == PAIR  # some other label


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CHAT, "rejected": CHAT},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
        {"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
        {"prompt": "another", "chosen": CHAT, "rejected": CHAT, "messages": CHAT[:1]},
        {"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"}, "rejected": {}},
        {"question": "Q", "chosen": "A", "rejected": "B"},
    ],
)
def test_the_answer_that_was_preferred_is_taken_where_it_is_asked_for(row: dict[str, Any]) -> None:
    assert pairs(read(row, ColumnNames(take="chosen"))[0]) == PAIR


def test_preferences_are_refused_with_what_to_do() -> None:
    with pytest.raises(UserError, match="--take chosen reads the preferred answer"):
        detect_schemas(["prompt", "chosen", "rejected"])
    (messages,) = read({"prompt": "Q", "chosen": "A", "rejected": "B"}, ColumnNames(take="rejected"))
    assert pairs(messages) == [("user", "Q"), ("assistant", "B")]


@pytest.mark.parametrize("tools", ["null", "[]", " ", "", None, [], {}, float("nan")])
def test_no_tools_are_none(tools: Any) -> None:
    assert pairs(read({"messages": CHAT, "tools": tools})[0]) == PAIR


def test_tools_are_shown_once() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    for text in (json.dumps(tools), json.dumps(tools, indent=2), json.dumps(tools, separators=(",", ":"))):
        own = f"You call functions. <tools>{text}</tools>"
        assert pairs(read({"messages": [*turns(("system", own)), *CHAT], "tools": tools})[0])[0] == ("system", own)
    assert pairs(read({"messages": [*turns(("system", "S")), *CHAT], "system": "S"})[0])[0] == ("system", "S")


@settings(max_examples=50, deadline=None)
@given(
    system=st.sampled_from(["", "S", "S [", "ends in []", "x\n\n"]),
    tools=st.sampled_from([None, [], [{"name": "f"}], json.dumps([{"name": "f"}], indent=2), "null"]),
)
def test_tools_can_be_taken_out_of_the_system_prompt_again(system: str, tools: Any) -> None:
    own = [*(turns(("system", system)) if system else []), *CHAT]
    (messages,) = read({"messages": own, "tools": tools})
    assert without_tools(messages, tools_of({"tools": tools})) == own


def test_keys_of_a_turn_that_nothing_is_made_of_come_with_it() -> None:
    turn = {"role": "tool", "content": "rain", "name": "weather", "tool_call_id": "c1", "empty": None}
    (messages,) = read({"messages": [CHAT[0], turn, CHAT[1]]})
    assert messages[1] == {"role": "tool", "content": "rain", "rest": {"name": "weather", "tool_call_id": "c1"}}
    (messages,) = read({"messages": [{"role": "system", "content": "S", "name": "n"}, *CHAT], "tools": [{"name": "f"}]})
    assert messages[0]["rest"] == {"name": "n"}


def test_every_row_is_read_by_the_schema_that_it_has_values_for() -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": "Q", "output": "A", "prompt": None, "completion": None, "messages": None},
        {"instruction": None, "output": None, "prompt": "Q", "completion": "A", "messages": None},
        {"instruction": None, "output": None, "prompt": None, "completion": None, "messages": CHAT},
        {"instruction": "", "output": "", "prompt": "Q", "completion": "A", "messages": ""},  # CSV
        {"instruction": float("nan"), "output": float("nan"), "question": "Q", "answer": "A"},
    ]
    schemas = detect_schemas({name for row in rows for name in row})
    assert [pairs(schema_of(row, schemas).read(row)[0]) for row in rows] == [PAIR] * 5
    row = {"instruction": "Q", "output": None}
    schema = schema_of(row, schemas)
    with pytest.raises(RowError, match="'output' is null"):
        schema.read(row)


def test_the_keys_of_a_row_are_told_from_those_of_what_holds_rows() -> None:
    assert is_row(["messages", "tools"])
    assert not is_row(["data", "version"])
    assert not is_row(["chat"])
    assert is_row(["chat"], ColumnNames(messages="chat"))
