"""Tools and their calls in a conversation: from messages to what chat templates take, or every violation at once."""

from __future__ import annotations

import re
from typing import Any

import orjson

from bucketserve.core.errors import FieldViolation
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.tokenization import Tools, Turn

__all__ = ["MAX_CHAT_MESSAGES", "MAX_TOOLS", "MAX_TOOL_BYTES", "MAX_TOOL_CALLS", "TOOL_NAME", "turns_of"]

MAX_CHAT_MESSAGES = 4096
MAX_TOOLS = 128
MAX_TOOL_CALLS = 4096
MAX_TOOL_BYTES = 64 * 1024
"""Of all tools, and of all calls of a conversation."""
TOOL_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


def turns_of(chat: inference_pb2.Chat, bad: list[FieldViolation]) -> tuple[tuple[Turn, ...], Tools]:
    """Returns turns and tools; what is wrong with tools and calls is added to `bad`."""
    if len(chat.messages) > MAX_CHAT_MESSAGES:
        bad.append(FieldViolation("chat.messages", f"at most {MAX_CHAT_MESSAGES} messages"))
        return (), ()
    # Numbers before contents: to look at millions of empty ones would take seconds.
    before = len(bad)
    if len(chat.tools) > MAX_TOOLS:
        bad.append(FieldViolation("chat.tools", f"at most {MAX_TOOLS}"))
    elif sum(tool.ByteSize() for tool in chat.tools) > MAX_TOOL_BYTES:
        bad.append(FieldViolation("chat.tools", f"at most {MAX_TOOL_BYTES} bytes"))
    if sum(len(turn.tool_calls) for turn in chat.messages) > MAX_TOOL_CALLS:
        bad.append(FieldViolation("chat.messages", f"at most {MAX_TOOL_CALLS} tool calls"))
    elif sum(call.ByteSize() for turn in chat.messages for call in turn.tool_calls) > MAX_TOOL_BYTES:
        bad.append(FieldViolation("chat.messages", f"at most {MAX_TOOL_BYTES} bytes of tool calls"))
    if len(bad) > before:
        return (), ()
    tools = [_tool(tool, f"chat.tools[{i}]", bad) for i, tool in enumerate(chat.tools)]
    turns = []
    for i, turn in enumerate(chat.messages):
        calls = [_call(call, f"chat.messages[{i}].tool_calls[{j}]", bad) for j, call in enumerate(turn.tool_calls)]
        turns.append(Turn(turn.role, turn.content, tuple(calls), turn.tool_call_id))
    return tuple(turns), tuple(tools)


def _tool(tool: inference_pb2.Tool, field: str, bad: list[FieldViolation]) -> dict[str, Any]:
    _check_name(tool.name, field, bad)
    parameters = _object(tool.parameters or "{}", f"{field}.parameters", bad)
    function = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": function}


def _call(call: inference_pb2.ToolCall, field: str, bad: list[FieldViolation]) -> dict[str, Any]:
    _check_name(call.name, field, bad)
    arguments = _object(call.arguments or "{}", f"{field}.arguments", bad)
    return {"type": "function", "id": call.id, "function": {"name": call.name, "arguments": arguments}}


def _check_name(name: str, field: str, bad: list[FieldViolation]) -> None:
    if not TOOL_NAME.fullmatch(name):
        bad.append(FieldViolation(f"{field}.name", "1 to 64 letters, digits, underscores or dashes"))


def _object(text: str, field: str, bad: list[FieldViolation]) -> dict[str, Any]:
    try:
        found = orjson.loads(text)
    except orjson.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        bad.append(FieldViolation(field, "must be a JSON object"))
        return {}
    return found
