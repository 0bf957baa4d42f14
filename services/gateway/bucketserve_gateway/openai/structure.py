"""What a body says of the form of the output: response_format, vLLM's fields, and tools that are to be called."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import orjson

from bucketserve.engine.grammars import WHITESPACE
from bucketserve.engine.schemas import prepared
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.conversation import MAX_TOOLS, TOOL_NAME
from bucketserve_gateway.openai.errors import ParameterError
from bucketserve_gateway.openai.fields import Fields
from bucketserve_gateway.validation import MAX_CHOICES

__all__ = ["CALL", "Form", "Toolbox", "structure_of", "toolbox_of"]

CALL = re.compile(r'\{"name":"([^"]*)","arguments":')
"""How the text of a call begins; a brace ends it."""
ANY_OBJECT = '{"type":"object"}'


@dataclass(frozen=True, slots=True)
class Form:
    """What the output must be, and the parameter that says so."""

    wanted: common_pb2.StructuredOutput
    param: str


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools that the model is told of, and whether it must call one."""

    tools: list[inference_pb2.Tool]
    form: Form | None = None
    reason: str = "stop"
    """Why an output that is a call ends, in OpenAI's words."""


def structure_of(fields: Fields) -> Form | None:
    """Returns what the output must be; None if it may be anything.

    Raises:
        ParameterError: a field is wrong, or there are two that say it.
    """
    found = [form for form in (_response_format(fields), _structured_outputs(fields), *_guided(fields)) if form]
    if len(found) > 1:
        raise ParameterError(found[1].param, f"{found[0].param} says already what the output must be", "invalid_value")
    return found[0] if found else None


def toolbox_of(fields: Fields) -> Toolbox:
    """Returns the tools; none where none may be called.

    Raises:
        ParameterError: one is wrong, or the one that is to be called is not among them.
    """
    tools = [_tool(tool) for tool in fields.objects("tools", MAX_TOOLS) or ()]
    choice = fields.take("tool_choice")
    if choice is not None and not isinstance(choice, dict):
        if choice not in ("none", "auto", "required"):
            raise ParameterError("tool_choice", "none, auto, required or a function's name", "invalid_value")
        if choice == "required" and not tools:
            raise ParameterError("tool_choice", "there are no tools", "invalid_value")
        if choice != "required":
            return Toolbox([] if choice == "none" else tools)
    if choice is None:
        return Toolbox(tools)
    if choice == "required":
        return Toolbox(tools, Form(_calls(tools), "tools"), "tool_calls")
    asked = fields.object("tool_choice")
    function = asked.object("function") if asked else None
    name = function.text("name") if function else None
    if asked is None or function is None or asked.text("type") != "function" or name is None:
        needed = "invalid type: {type: function, function: {name}} is needed"
        raise ParameterError("tool_choice", needed, "invalid_type")
    function.end()
    asked.end()
    named = [tool for tool in tools if tool.name == name]
    if not named:
        raise ParameterError("tool_choice", "there is no tool of that name", "invalid_value")
    return Toolbox(tools, Form(_calls(named), "tools"))


def _tool(tool: Fields) -> inference_pb2.Tool:
    if tool.text("type") != "function":
        raise ParameterError(tool.name("type"), "function is served", "unsupported_parameter")
    function = tool.object("function")
    if function is None:
        raise ParameterError(tool.name("function"), "you must provide it", "missing_required_parameter")
    name, description = function.text("name"), function.text("description")
    if name is None or not TOOL_NAME.fullmatch(name):
        description = "1 to 64 letters, digits, underscores or dashes"
        raise ParameterError(function.name("name"), description, "invalid_value")
    # A call that is forced keeps to the schema in any case.
    function.flag("strict")
    parameters = function.take("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise ParameterError(function.name("parameters"), "invalid type: an object is needed", "invalid_type")
    if parameters and parameters.get("type", "object") != "object":
        # Clients take arguments by their names.
        raise ParameterError(function.name("parameters"), 'a schema of type "object" is needed', "invalid_value")
    function.end()
    tool.end()
    text = _json(parameters, function.name("parameters")) if parameters else ""
    return inference_pb2.Tool(name=name, description=description, parameters=text)


def _calls(tools: list[inference_pb2.Tool]) -> common_pb2.StructuredOutput:
    """Returns the grammar of one call of one of the tools. Each schema is a document of its own."""
    lines = ["start: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, tool in enumerate(tools):
        # What a schema says of its own compilation does not count.
        options = {"x-guidance": {"whitespace_pattern": WHITESPACE}}
        schema = {"type": "object", **orjson.loads(prepared(tool.parameters or "{}")), **options}
        beginning = json.dumps(f'{{"name":"{tool.name}","arguments":')
        lines += [f'call_{i}: {beginning} arguments_{i} "}}"', f"arguments_{i}: %json {_json(schema, 'tools')}"]
    return common_pb2.StructuredOutput(grammar="\n".join(lines))


def _response_format(fields: Fields) -> Form | None:
    asked = fields.object("response_format")
    if asked is None:
        return None
    kind, form = asked.text("type"), None
    match kind:
        case "text":
            pass
        case "json_object":
            form = Form(common_pb2.StructuredOutput(json_schema=ANY_OBJECT), "response_format")
        case "json_schema":
            inner = asked.object("json_schema")
            schema = inner.take("schema") if inner is not None else None
            if inner is None or not isinstance(schema, dict | bool):
                name = "response_format.json_schema" + ("" if inner is None else ".schema")
                raise ParameterError(name, "you must provide it, as an object", "missing_required_parameter")
            for name in ("name", "description"):
                inner.text(name)
            # Whatever it says: the output is valid.
            inner.flag("strict")
            inner.end()
            text = _json(schema, "response_format.json_schema.schema")
            form = Form(common_pb2.StructuredOutput(json_schema=text), "response_format")
        case _:
            raise ParameterError("response_format.type", "text, json_object or json_schema", "invalid_value")
    asked.end()
    return form


def _structured_outputs(fields: Fields) -> Form | None:
    asked = fields.object("structured_outputs")
    if asked is None:
        return None
    found = [form for form in _vllm(asked, "") if form]
    if asked.flag("json_object"):
        found.append(Form(common_pb2.StructuredOutput(json_schema=ANY_OBJECT), asked.name("json_object")))
    asked.end()
    if len(found) != 1:
        raise ParameterError("structured_outputs", "exactly one of its members says it", "invalid_value")
    return found[0]


def _guided(fields: Fields) -> list[Form | None]:
    return _vllm(fields, "guided_")


def _vllm(fields: Fields, prefix: str) -> list[Form | None]:
    """Returns what vLLM's fields of that prefix say."""
    found: list[Form | None] = []
    schema = fields.take(f"{prefix}json")
    if schema is not None:
        if not isinstance(schema, dict | str | bool):
            raise ParameterError(fields.name(f"{prefix}json"), "invalid type: an object is needed", "invalid_type")
        text = schema if isinstance(schema, str) else _json(schema, fields.name(f"{prefix}json"))
        found.append(Form(common_pb2.StructuredOutput(json_schema=text), fields.name(f"{prefix}json")))
    if (regex := fields.text(f"{prefix}regex")) is not None:
        found.append(Form(common_pb2.StructuredOutput(regex=regex), fields.name(f"{prefix}regex")))
    if (grammar := fields.text(f"{prefix}grammar")) is not None:
        found.append(Form(common_pb2.StructuredOutput(grammar=grammar), fields.name(f"{prefix}grammar")))
    choices = fields.take(f"{prefix}choice")
    if choices is not None:
        name = fields.name(f"{prefix}choice")
        if not isinstance(choices, list) or not all(isinstance(text, str) for text in choices):
            raise ParameterError(name, "invalid type: an array of strings is needed", "invalid_type")
        if len(choices) > MAX_CHOICES:
            raise ParameterError(name, f"at most {MAX_CHOICES}", "array_above_max_length")
        found.append(Form(common_pb2.StructuredOutput(choices=common_pb2.Choices(texts=choices)), name))
    return found


def _json(value: Any, name: str) -> str:
    """Returns a parameter as text.

    Raises:
        ParameterError: it is too deep: what can be read may be deeper than what can be written.
    """
    try:
        return orjson.dumps(value).decode()
    except orjson.JSONEncodeError:
        raise ParameterError(name, "nested too deeply", "invalid_value") from None
