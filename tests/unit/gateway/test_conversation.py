"""Tools and calls of a conversation: as chat templates take them, or refused by name."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import FieldViolation
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.conversation import turns_of
from bucketserve_gateway.tokenization import Turn

Chat, Message, Tool, Call = (
    inference_pb2.Chat,
    inference_pb2.ChatMessage,
    inference_pb2.Tool,
    inference_pb2.ToolCall,
)


def calls(*each: inference_pb2.ToolCall) -> inference_pb2.Chat:
    return Chat(messages=[Message(role="assistant", tool_calls=each)])


def test_what_templates_take() -> None:
    call = Call(id="1", name="f", arguments='{"a": [1]}')
    turns = [Message(role="user", content="x"), *calls(call).messages, Message(role="tool", tool_call_id="1")]
    bad: list[FieldViolation] = []
    found, tools = turns_of(Chat(messages=turns, tools=[Tool(name="f", description="d", parameters='{"b": {}}')]), bad)
    assert not bad
    shown = {"type": "function", "id": "1", "function": {"name": "f", "arguments": {"a": [1]}}}
    assert found == (Turn("user", "x"), Turn("assistant", "", (shown,)), Turn("tool", "", (), "1"))
    assert found[0].message() == {"role": "user", "content": "x"}
    assert found[1].message() == {"role": "assistant", "content": "", "tool_calls": [shown]}
    assert found[2].message() == {"role": "tool", "content": "", "tool_call_id": "1"}
    assert tools == ({"type": "function", "function": {"name": "f", "description": "d", "parameters": {"b": {}}}},)


@pytest.mark.parametrize(
    ("chat", "field"),
    [
        (Chat(tools=[Tool()]), "chat.tools[0].name"),
        (Chat(tools=[Tool(name="a"), Tool(name="é")]), "chat.tools[1].name"),
        (Chat(tools=[Tool(name="a", parameters="[]")]), "chat.tools[0].parameters"),
        (Chat(tools=[Tool(name="a", parameters="{" * 1000)]), "chat.tools[0].parameters"),
        (Chat(tools=[Tool(name="a", parameters='{"a":' * 5000)]), "chat.tools[0].parameters"),
        (Chat(tools=[Tool(name="a", parameters='{"a": NaN}')]), "chat.tools[0].parameters"),
        (Chat(tools=[Tool(name="a")] * 129), "chat.tools"),
        (Chat(tools=[Tool(name="a", description="x" * 70_000)]), "chat.tools"),
        (calls(Call(id="1")), "chat.messages[0].tool_calls[0].name"),
        (calls(Call(name="a", arguments="x")), "chat.messages[0].tool_calls[0].arguments"),
        (calls(*[Call(name="a", arguments='"' * 1000)] * 100), "chat.messages"),
    ],
)
def test_what_is_wrong_is_named(chat: inference_pb2.Chat, field: str) -> None:
    bad: list[FieldViolation] = []
    turns_of(chat, bad)
    assert [violation.field for violation in bad] == [field]
