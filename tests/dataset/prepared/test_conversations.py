"""Tests of reading conversations in the formats that people have."""

import json

import pytest

from gptj8.dataset.prepared.conversations import (
    Conversation,
    content_of,
    dialogue,
    read_conversation,
    read_trained,
)

ASKED = {"role": "user", "content": "Add 1."}
ANSWER = {"role": "assistant", "content": "2"}
CALL = {"name": "add", "arguments": {"a": 1}}


def roles(conversation):
    return [message["role"] for message in conversation.messages]


@pytest.mark.parametrize("as_json", [False, True])
def test_openai_and_sharegpt(as_json):
    shared = [{"from": "human", "value": " Hi "}, {"from": "gpt", "value": "\n Hello."}]
    openai = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "\n Hello."}]
    cells = [json.dumps(cell) if as_json else cell for cell in (shared, openai)]
    assert read_conversation(cells[0]) == read_conversation(cells[1])
    assert dialogue(read_conversation(cells[0]).messages) == "user:  Hi \nassistant: \n Hello."


def test_roles():
    names = ["developer", "User", "model", "observation", "function", "bot", "ipython"]
    found = read_conversation([{"role": name, "content": "a"} for name in names])
    assert roles(found) == ["developer", "user", "assistant", "tool", "tool", "assistant", "tool"]


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, "b", {"type": "input_text", "text": "c"}]
    found = read_conversation([{"role": "user", "content": parts}])
    assert found.messages[0]["content"] == "a\nb\nc"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": CALL}]},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "function_call": CALL},
        {
            "role": "assistant",
            "tool_calls": [{"function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}],
        },
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "function_call", "value": json.dumps([CALL])},
    ],
)
def test_tool_calls(message):
    found = read_conversation([ASKED, message]).messages[1]
    (call,) = found["tool_calls"]
    assert (found["role"], found["content"]) == ("assistant", "")
    assert call["type"] == "function" and call["function"] == CALL
    assert json.loads(content_of(found))["function"] == CALL


def test_tools():
    bare, whole = {"name": "add"}, {"type": "function", "function": {"name": "add"}}
    for tools in ([bare], [whole], json.dumps([bare])):
        assert read_conversation([ASKED], tools).tools == (whole,)
    for tools in (None, "", " ", [], "[]"):
        assert read_conversation([ASKED], tools).tools == ()
    for tools in ("add", "{}", ["add"]):
        with pytest.raises(ValueError, match="has tools that are not a list of functions"):
            read_conversation([ASKED], tools)


def test_system_column():
    assert roles(read_conversation([ASKED], None, "Be brief.")) == ["system", "user"]
    assert roles(read_conversation([ASKED], None, " ")) == ["user"]
    given = [{"role": "system", "content": "Be brief."}, ASKED]
    assert read_conversation(given, None, "Be brief.") == read_conversation(given)
    with pytest.raises(ValueError, match="differs from the system column"):
        read_conversation(given, None, "Be long.")
    # An empty system message says nothing.
    assert roles(read_conversation([{"from": "system", "value": ""}, ASKED])) == ["user"]


def test_weights_choose_the_answers_to_learn():
    messages = [ASKED, {**ANSWER, "weight": 0}, ASKED, {**ANSWER, "weight": 1}, ASKED, ANSWER]
    assert read_trained(messages).answers == [3, 5]
    with pytest.raises(ValueError, match="each has the weight 0"):
        read_trained([ASKED, {**ANSWER, "weight": 0}])
    with pytest.raises(ValueError, match=r"message 2 has the weight 0\.5; it can be 0 or 1"):
        read_trained([ASKED, {**ANSWER, "weight": 0.5}])


def test_fields_that_a_template_does_not_read():
    message = {**ANSWER, "reasoning_content": "1 + 1", "name": "", "weight": 1}
    found = read_conversation([ASKED, message], [{"name": "add"}])
    assert found.unread_fields(frozenset()) == ["reasoning_content", "tools"]
    assert found.unread_fields(frozenset({"reasoning_content", "tools"})) == []


def test_json_round_trip():
    found = read_conversation([ASKED, {**ANSWER, "tool_calls": [CALL]}], [{"name": "é"}], "Be.")
    copy = Conversation.from_json(found.to_json())
    assert copy.to_json() == found.to_json() and copy.answers == [2]
    assert copy.messages == found.messages and copy.without_last().messages == found.messages[:-1]


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ("[hello", "is not a list of messages"),
        ({"role": "user"}, "is not a list of messages"),
        ("[{'role': 'user', 'content': 'a'}]", "is a list as Python prints it"),
        ([], "has no answer from the assistant"),
        ([ASKED, ASKED], "has no answer from the assistant"),
        ([ANSWER, ANSWER], "has no message from the user"),
        ([ANSWER, ASKED], "has no answer after a message from the user"),
        (["a", "b"], "message 1 has no valid role (system, developer"),
        ([{"role": "robot", "content": "a"}], "message 1 has no valid role robot (system,"),
        ([{"role": 1, "content": "a"}], "message 1 has no valid role"),
        ([{"role": "user", "content": "\u200b"}], "message 1 is empty"),
        ([ASKED, {"role": "assistant"}], "message 2 has no text"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 has no text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "message 1 has a part of type image_url; only text is supported",
        ),
        ([ASKED, {**ANSWER, "tool_calls": "add"}], "message 2 has tool_calls that are not"),
    ],
)
def test_conversations_that_cannot_be_learned(messages, problem):
    cell = messages if isinstance(messages, str) else json.dumps(messages)
    with pytest.raises(ValueError) as error:
        read_trained(cell)
    assert problem in str(error.value)
