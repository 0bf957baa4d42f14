"""What a body of OpenAI's API becomes, and what is refused, by which name."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import pytest
from google.protobuf.json_format import MessageToDict
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.errors import (
    InvalidRequestError,
    UnknownModelError,
)
from bucketserve.v1 import inference_pb2
from bucketserve_gateway.openai.caller import Caller, caller_of
from bucketserve_gateway.openai.errors import ParameterError, body_of
from bucketserve_gateway.openai.translation import MAX_CHOICES, Wanted, chat_completion, completion
from bucketserve_gateway.validation import validate
from tests.unit.gateway.builders import catalog

NOBODY = caller_of({})
USER = {"role": "user", "content": "hello"}
DEFAULTS = {"sampling": {"temperature": 1.0}, "requestClass": "REQUEST_CLASS_INTERACTIVE", "slo": {}, "response": {}}


def complete(**members: Any) -> Wanted:
    return completion({"prompt": "a", **members}, NOBODY)


def chat(**members: Any) -> Wanted:
    return chat_completion({"messages": [USER], **members}, NOBODY)


def shown(request: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """A request without what is drawn, as its fields are called in JSON."""
    return {name: value for name, value in MessageToDict(request).items() if name != "requestId"}


def only(wanted: Wanted) -> dict[str, Any]:
    (request,) = wanted.requests()
    return shown(request)


def refused(read: Any, **members: Any) -> ParameterError:
    with pytest.raises(ParameterError) as caught:
        read(**members)
    return caught.value


def test_what_is_not_given_has_the_defaults_of_openai() -> None:
    assert only(complete()) == {**DEFAULTS, "prompt": "a", "stopping": {"maxTokens": 16}}
    turns = {"messages": [{"role": "user", "content": "hello"}]}
    # How much a chat may say by default is the gateway's affair.
    assert only(chat()) == {**DEFAULTS, "chat": turns, "stopping": {}}
    for wanted in (complete(), chat()):
        assert not (wanted.is_stream or wanted.has_usage or wanted.is_echo)
        assert wanted.tier is None
        assert wanted.label == wanted.answer_id


@pytest.mark.parametrize(
    ("members", "field", "value"),
    [
        ({"model": "demo"}, "model", "demo"),
        ({"temperature": 0}, "sampling", {"temperature": 0.0}),
        ({"temperature": 0.5, "top_p": 0.25}, "sampling", {"temperature": 0.5, "topP": 0.25}),
        ({"seed": 7}, "sampling", {"temperature": 1.0, "seed": "7"}),
        ({"seed": -1}, "sampling", {"temperature": 1.0, "seed": str(2**64 - 1)}),
        ({"top_k": 5, "min_p": 0.5}, "sampling", {"temperature": 1.0, "topK": 5, "minP": 0.5}),
        ({"top_k": -1}, "sampling", {"temperature": 1.0, "topK": 0}),
        ({"repetition_penalty": 2}, "sampling", {"temperature": 1.0, "repetitionPenalty": 2.0}),
        ({"max_tokens": 3}, "stopping", {"maxTokens": 3}),
        ({"stop": "x", "max_tokens": 3}, "stopping", {"maxTokens": 3, "stopStrings": ["x"]}),
        ({"stop": ["x", "y"], "max_tokens": 3}, "stopping", {"maxTokens": 3, "stopStrings": ["x", "y"]}),
        ({"stop": None, "max_tokens": 3}, "stopping", {"maxTokens": 3}),
        ({"stop_token_ids": [1], "max_tokens": 3}, "stopping", {"maxTokens": 3, "stopTokenIds": [1]}),
        ({"ignore_eos": True, "max_tokens": 3}, "stopping", {"maxTokens": 3, "ignoreEos": True}),
        ({"service_tier": "flex"}, "requestClass", "REQUEST_CLASS_BATCH"),
        ({"service_tier": "priority"}, "requestClass", "REQUEST_CLASS_INTERACTIVE"),
        (
            {"frequency_penalty": 0.5, "presence_penalty": -1, "logit_bias": {"5": -100, "6": 0.5}},
            "sampling",
            {
                "temperature": 1.0,
                "frequencyPenalty": 0.5,
                "presencePenalty": -1.0,
                "logitBias": {"5": -100.0, "6": 0.5},
            },
        ),
        # Neutral values, in all their forms.
        (
            {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}},
            "sampling",
            {"temperature": 1.0, "frequencyPenalty": 0.0, "presencePenalty": 0.0},
        ),
        ({"frequency_penalty": None, "logit_bias": None, "anything": None}, "sampling", {"temperature": 1.0}),
        ({"n": 1, "user": "somebody"}, "sampling", {"temperature": 1.0}),
    ],
)
def test_parameters_of_both_kinds(members: dict[str, Any], field: str, value: object) -> None:
    for wanted in (complete(**members), chat(**members)):
        assert only(wanted)[field] == value


@pytest.mark.parametrize(
    ("prompt", "inputs"),
    [
        ("text", [{"prompt": "text"}]),
        (["one", "two"], [{"prompt": "one"}, {"prompt": "two"}]),
        ([1, 2], [{"tokenIds": {"ids": [1, 2]}}]),
        ([[1, 2], [3]], [{"tokenIds": {"ids": [1, 2]}}, {"tokenIds": {"ids": [3]}}]),
        # Empty ones are for the native API to refuse.
        ("", [{"prompt": ""}]),
        ([[]], [{"tokenIds": {}}]),
    ],
)
def test_prompts_in_all_forms(prompt: object, inputs: list[dict[str, Any]]) -> None:
    requests = [shown(request) for request in complete(prompt=prompt).requests()]
    assert [{k: v for k, v in each.items() if k in ("prompt", "tokenIds")} for each in requests] == inputs


def test_choices_of_a_prompt_follow_each_other_and_draw_differently() -> None:
    wanted = complete(prompt=["one", "two"], n=3, seed=2**63 - 2)
    requests = list(wanted.requests())
    assert wanted.num_choices == len(requests) == 6
    assert [request.prompt for request in requests] == ["one"] * 3 + ["two"] * 3
    seeds = [2**63 - 2, 2**63 - 1, 2**63]
    assert [request.sampling.seed for request in requests] == seeds * 2
    # What had no seed is given one for each by the gateway.
    assert not any(request.sampling.HasField("seed") for request in complete(n=3).requests())


def test_text_parts_are_lines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    system = {"role": "system", "content": "be brief"}
    past = {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": [], "annotations": []}
    wanted = chat_completion({"messages": [system, past, {"role": "user", "content": parts}]}, NOBODY)
    turns = [("system", "be brief"), ("assistant", "yes"), ("user", "one\ntwo")]
    assert [(turn.role, turn.content) for turn in wanted.prompts[0].chat.messages] == turns


def test_options_of_a_stream() -> None:
    wanted = chat(stream=True, stream_options={"include_usage": True})
    assert (wanted.is_stream, wanted.has_usage, wanted.has_usage_always) == (True, True, False)
    wanted = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert (wanted.is_stream, wanted.has_usage, wanted.has_usage_always) == (True, True, True)
    assert not chat(stream=True, stream_options={}).has_usage


def test_log_probabilities_of_both_kinds() -> None:
    def number(wanted: Wanted) -> int | None:
        response = wanted.prompts[0].response
        return response.num_logprobs if response.HasField("num_logprobs") else None

    assert number(complete()) is number(chat()) is number(chat(logprobs=False)) is None
    assert number(complete(logprobs=0)) == number(chat(logprobs=True)) == 0
    assert number(complete(logprobs=5)) == number(chat(logprobs=True, top_logprobs=5)) == 5


def test_lengths_of_a_chat_by_both_names() -> None:
    for members in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_completion_tokens": 5, "max_tokens": 5}):
        assert only(chat(**members))["stopping"] == {"maxTokens": 5}
    assert refused(chat, max_completion_tokens=5, max_tokens=6).violations[0].field == "max_tokens"


def test_neutral_values_of_a_chat_are_taken() -> None:
    chat(
        response_format={"type": "text"},
        tools=[],
        tool_choice="auto",
        parallel_tool_calls=True,
        functions=[],
        modalities=["text"],
        store=False,
        metadata={},
        safety_identifier="somebody",
        audio=None,
    )
    # Tools that must not be called change nothing of what is said.
    chat(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="none")


INVALID, UNSUPPORTED, UNKNOWN, VALUE = "invalid_type", "unsupported_parameter", "unknown_parameter", "invalid_value"


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("model", 5, INVALID),
        ("temperature", "hot", INVALID),
        ("temperature", True, INVALID),
        ("temperature", math.nan, INVALID),
        ("temperature", [], INVALID),
        ("top_p", {}, INVALID),
        ("seed", 1.5, INVALID),
        ("seed", 2**64, VALUE),
        ("seed", -(2**63) - 1, VALUE),
        ("max_tokens", -1, VALUE),
        ("max_tokens", 2**32, VALUE),
        ("max_tokens", 3.0, INVALID),
        ("max_tokens", True, INVALID),
        ("top_k", -2, VALUE),
        ("n", 0, VALUE),
        ("n", MAX_CHOICES + 1, VALUE),
        ("n", "2", INVALID),
        ("stop", 5, INVALID),
        ("stop", {}, INVALID),
        ("stop", [5], INVALID),
        ("stop", [None], INVALID),
        ("stop", ["a"] * 5, "array_above_max_length"),
        ("stop", [5] * 100, "array_above_max_length"),
        ("stop_token_ids", [-1], INVALID),
        ("stop_token_ids", "abc", INVALID),
        ("stream", "yes", INVALID),
        ("stream", 1, INVALID),
        ("stream_options", {"include_usage": True}, VALUE),
        ("service_tier", "gold", VALUE),
        ("service_tier", 5, INVALID),
        ("user", 5, INVALID),
        ("frequency_penalty", "0.5", INVALID),
        ("presence_penalty", False, INVALID),
        ("logit_bias", [5], INVALID),
        ("logit_bias", {"a": 1}, INVALID),
        ("logit_bias", {"-1": 1}, INVALID),
        ("logit_bias", {"٣": 1}, INVALID),
        ("logit_bias", {str(2**32): 1}, INVALID),
        ("logit_bias", {str(i): 1 for i in range(1025)}, "object_above_max_properties"),
        ("nonsense", 5, UNKNOWN),
        ("x" * 10_000, 5, UNKNOWN),
    ],
)
def test_what_is_wrong_is_named(name: str, value: object, code: str) -> None:
    for read in (complete, chat):
        error = refused(read, **{name: value})
        assert (error.violations[0].field, error.code) == (name[:64], code)


@pytest.mark.parametrize(
    ("members", "field", "code"),
    [
        ({"prompt": None}, "prompt", "missing_required_parameter"),
        ({"prompt": []}, "prompt", INVALID),
        ({"prompt": 5}, "prompt", INVALID),
        ({"prompt": {}}, "prompt", INVALID),
        ({"prompt": [1, "a"]}, "prompt", INVALID),
        ({"prompt": ["a", 1]}, "prompt", INVALID),
        ({"prompt": [[1], "a"]}, "prompt", INVALID),
        ({"prompt": [True]}, "prompt", INVALID),
        ({"prompt": [-1]}, "prompt", INVALID),
        ({"prompt": [2**32]}, "prompt", INVALID),
        ({"prompt": [[1], [1.5]]}, "prompt[1]", INVALID),
        ({"prompt": ["a"] * (MAX_CHOICES + 1)}, "prompt", "array_above_max_length"),
        ({"prompt": ["a"] * 100, "n": 2}, "n", None),
        ({"suffix": "end"}, "suffix", UNSUPPORTED),
        ({"best_of": 2}, "best_of", UNSUPPORTED),
        ({"echo": True, "logprobs": 0}, "logprobs", UNSUPPORTED),
        ({"logprobs": True}, "logprobs", INVALID),
        ({"logprobs": -1}, "logprobs", VALUE),
        ({"messages": [USER]}, "messages", UNKNOWN),
    ],
)
def test_what_is_wrong_with_a_completion(members: dict[str, Any], field: str, code: str | None) -> None:
    error = refused(complete, **members)
    assert (error.violations[0].field, error.code) == (field, code)


def tool(name: str, parameters: object = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"response_format": {"type": "json_object"}}, {"jsonSchema": '{"type":"object"}'}),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}, "strict": True}}},
            {"jsonSchema": '{"a":1}'},
        ),
        ({"guided_json": {"b": 2}}, {"jsonSchema": '{"b":2}'}),
        ({"guided_json": "{}"}, {"jsonSchema": "{}"}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_grammar": "start: x"}, {"grammar": "start: x"}),
        ({"guided_choice": ["a", "b"]}, {"choices": {"texts": ["a", "b"]}}),
        ({"structured_outputs": {"choice": ["a"]}}, {"choices": {"texts": ["a"]}}),
        ({"structured_outputs": {"json_object": True}}, {"jsonSchema": '{"type":"object"}'}),
    ],
)
def test_what_an_output_must_be_of_both_kinds(members: dict[str, Any], wanted: dict[str, Any]) -> None:
    for read in (complete, chat):
        found = read(**members)
        assert only(found)["structuredOutput"] == wanted
        assert set(found.names.values()) & {*members, "structured_outputs.choice", "structured_outputs.json_object"}


def test_tools_are_told_of_and_called() -> None:
    tools = [tool("f", {"type": "object"}), tool("g")]
    told = [{"name": "f", "parameters": '{"type":"object"}'}, {"name": "g"}]
    for choice in (None, "auto"):
        free = chat(tools=tools, tool_choice=choice)
        assert only(free)["chat"]["tools"] == told
        assert (free.call_reason, "structuredOutput" in only(free)) == (None, False)
    must = chat(tools=tools, tool_choice="required")
    assert only(must)["chat"]["tools"] == told
    assert must.call_reason == "tool_calls"
    grammar = only(must)["structuredOutput"]["grammar"]
    assert grammar.startswith("start: call_0 | call_1\n")
    named = chat(tools=tools, tool_choice={"type": "function", "function": {"name": "g"}})
    assert named.call_reason == "stop"
    assert only(named)["structuredOutput"]["grammar"].startswith("start: call_0\ncall_0: ")


def test_a_conversation_with_calls_is_taken_as_it_came() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    past = {"role": "assistant", "content": None, "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "yes"}
    turns = chat_completion({"messages": [past, answer]}, NOBODY).prompts[0].chat.messages
    assert [(each.id, each.name, each.arguments) for each in turns[0].tool_calls] == [("1", "f", '{"a":1}')]
    assert (turns[0].content, turns[1].content, turns[1].tool_call_id) == ("", "yes", "1")


def deep() -> dict[str, Any]:
    """What orjson reads but does not write."""
    inner: dict[str, Any] = {}
    for _ in range(400):
        inner = {"not": inner}
    return inner


def schema_of(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


def one_message(**members: Any) -> dict[str, Any]:
    return {"messages": [{**USER, **members}]}


@pytest.mark.parametrize(
    ("members", "field", "code"),
    [
        ({"messages": None}, "messages", "missing_required_parameter"),
        ({"messages": "hello"}, "messages", INVALID),
        ({"messages": {}}, "messages", INVALID),
        ({"messages": ["hello"]}, "messages", INVALID),
        ({"messages": [{}] * 5000}, "messages", "array_above_max_length"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "missing_required_parameter"),
        (one_message(role=5), "messages[0].role", INVALID),
        (one_message(content=None), "messages[0].content", INVALID),
        (one_message(content=5), "messages[0].content", INVALID),
        (one_message(content=[]), "messages[0].content", INVALID),
        (one_message(content=["x"]), "messages[0].content", INVALID),
        (one_message(content=[{"type": "image_url", "image_url": {}}]), "messages[0].content[0].type", UNSUPPORTED),
        (one_message(content=[{"type": "text"}]), "messages[0].content[0].text", "missing_required_parameter"),
        (one_message(content=[{"type": "text", "text": "x", "y": 1}]), "messages[0].content[0].y", UNKNOWN),
        (one_message(name="somebody"), "messages[0].name", UNSUPPORTED),
        (one_message(extra=1), "messages[0].extra", UNKNOWN),
        (one_message(tool_calls=[{}]), "messages[0].tool_calls[0].function", INVALID),
        (one_message(tool_calls=[5]), "messages[0].tool_calls", INVALID),
        (one_message(role="tool", tool_call_id=5), "messages[0].tool_call_id", INVALID),
        ({"tools": [{"type": "function"}]}, "tools[0].function", "missing_required_parameter"),
        ({"tools": [{"type": "web"}]}, "tools[0].type", UNSUPPORTED),
        ({"tools": [tool("a b")]}, "tools[0].function.name", VALUE),
        ({"tools": [tool("f", [])]}, "tools[0].function.parameters", INVALID),
        ({"tools": [tool("f", {"type": "string"})]}, "tools[0].function.parameters", VALUE),
        ({"tools": [tool("f", {"type": ["object", "null"]})]}, "tools[0].function.parameters", VALUE),
        ({"tools": [tool("f", deep())]}, "tools[0].function.parameters", VALUE),
        (schema_of(deep()), "response_format.json_schema.schema", VALUE),
        ({"guided_json": deep()}, "guided_json", VALUE),
        ({"structured_outputs": {"json": deep()}}, "structured_outputs.json", VALUE),
        ({"tools": [tool("f")] * 129}, "tools", "array_above_max_length"),
        ({"tools": {}}, "tools", INVALID),
        ({"tool_choice": "required"}, "tool_choice", VALUE),
        ({"tool_choice": "maybe"}, "tool_choice", VALUE),
        ({"tool_choice": 5}, "tool_choice", VALUE),
        ({"tool_choice": {"type": "function"}, "tools": [tool("f")]}, "tool_choice", INVALID),
        ({"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [tool("f")]}, "tool_choice", VALUE),
        ({"tool_choice": "required", "tools": [tool("f")], "guided_regex": "a"}, "guided_regex", VALUE),
        ({"response_format": "json"}, "response_format", INVALID),
        ({"response_format": {"type": "xml"}}, "response_format.type", VALUE),
        ({"response_format": {}}, "response_format.type", VALUE),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x", UNKNOWN),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing_required_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
            "missing_required_parameter",
        ),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, "guided_json", VALUE),
        ({"guided_choice": "a"}, "guided_choice", INVALID),
        ({"guided_choice": [1]}, "guided_choice", INVALID),
        ({"guided_choice": ["a"] * 1025}, "guided_choice", "array_above_max_length"),
        ({"guided_json": 5}, "guided_json", INVALID),
        ({"guided_regex": {}}, "guided_regex", INVALID),
        ({"structured_outputs": {}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", VALUE),
        ({"structured_outputs": {"whitespace": "a"}}, "structured_outputs.whitespace", UNKNOWN),
        ({"functions": [{}]}, "functions", UNSUPPORTED),
        ({"modalities": ["audio"]}, "modalities", UNSUPPORTED),
        ({"reasoning_effort": "high"}, "reasoning_effort", UNSUPPORTED),
        ({"store": True}, "store", UNSUPPORTED),
        ({"top_logprobs": 2}, "top_logprobs", VALUE),
        ({"logprobs": 2}, "logprobs", INVALID),
        ({"prompt": "a"}, "prompt", UNKNOWN),
        ({"echo": True}, "echo", UNKNOWN),
        ({"stream": True, "stream_options": []}, "stream_options", INVALID),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage", INVALID),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", UNKNOWN),
    ],
)
def test_what_is_wrong_with_a_chat(members: dict[str, Any], field: str, code: str | None) -> None:
    error = refused(chat, **members)
    assert (error.violations[0].field, error.code) == (field, code)


@pytest.mark.parametrize("members", [{}, {"n": 2, "seed": 5, "stop": ["a"], "logprobs": 3}, {"prompt": [1, 2]}])
def test_what_is_translated_is_valid(members: dict[str, Any]) -> None:
    for request in complete(**members).requests():
        validate(request, catalog(), max_prompt_bytes=1000)


def test_a_caller_may_say_nothing() -> None:
    assert Caller(metadata={}, tenant="", label="", slo=NOBODY.slo) == NOBODY


NAMES = st.sampled_from(
    [
        "model",
        "prompt",
        "messages",
        "role",
        "content",
        "type",
        "text",
        "n",
        "best_of",
        "echo",
        "logprobs",
        "top_logprobs",
        "stop",
        "seed",
        "temperature",
        "top_p",
        "top_k",
        "max_tokens",
        "max_completion_tokens",
        "stream",
        "stream_options",
        "include_usage",
        "user",
        "service_tier",
        "tools",
        "tool_choice",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_choice",
        "json_schema",
        "schema",
        "function",
        "type",
        "logit_bias",
        "frequency_penalty",
        "suffix",
        "stop_token_ids",
        "ignore_eos",
        "metadata",
    ]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["user", "text"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES | st.text(max_size=3), inner, max_size=5),
    max_leaves=12,
)


@given(members=st.dictionaries(NAMES | st.text(max_size=3), ANYTHING, max_size=8))
def test_whatever_is_sent_is_translated_or_refused(members: dict[str, Any]) -> None:
    for read in (completion, chat_completion):
        try:
            wanted = read(members, NOBODY)
        except ParameterError as error:
            assert len(body_of(error, {})["error"]["message"] or "") > 0
            continue
        for request in wanted.requests():
            assert inference_pb2.GenerateRequest.FromString(request.SerializeToString()) is not None
            with contextlib.suppress(InvalidRequestError, UnknownModelError):
                validate(request, catalog_once(), max_prompt_bytes=1000)


@functools.cache
def catalog_once() -> Any:
    return catalog()
