"""KServe requests as they will run, and all that is wrong with them at once."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bucketserve.core.errors import InvalidRequestError, UnknownModelError
from bucketserve.facades import kserve_pb2
from bucketserve.v1 import common_pb2
from bucketserve_gateway import kserve_tensors

Tensor = kserve_pb2.ModelInferRequest.InferInputTensor
Output = kserve_pb2.ModelInferRequest.InferRequestedOutputTensor


def inference_of(request: kserve_pb2.ModelInferRequest) -> kserve_tensors.Inference:
    return kserve_tensors.inference_of(request, 100_000)


def text(value: bytes = b"hello", name: str = "text_input", **more) -> Tensor:
    fields = {"datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [value]}, **more}
    return Tensor(name=name, **fields)


def truth(value: bool = True, name: str = "stream", **more) -> Tensor:
    return Tensor(name=name, **{"datatype": "BOOL", "shape": [1], "contents": {"bool_contents": [value]}, **more})


def settings(value: object) -> Tensor:
    return text(value if isinstance(value, bytes) else json.dumps(value).encode(), "sampling_parameters")


def a_request(*more: Tensor, raw: list[bytes] | None = None, **fields) -> kserve_pb2.ModelInferRequest:
    """A request with a prompt and more inputs; with raw, of inputs whose elements are there."""
    inputs = list(more) if fields.pop("alone", False) else [text(), *more]
    parameters = fields.pop("parameters", {})
    if raw is not None:
        for tensor in inputs:
            tensor.ClearField("contents")
    request = kserve_pb2.ModelInferRequest(inputs=inputs, raw_input_contents=raw or [], **fields)
    for name, value in parameters.items():
        kind = {bool: "bool", int: "int64", float: "double", str: "string", type(None): None}[type(value)]
        if kind is None:
            request.parameters[name].SetInParent()
        else:
            setattr(request.parameters[name], f"{kind}_param", value)
    return request


def prefixed(element: bytes, size: int | None = None) -> bytes:
    return (len(element) if size is None else size).to_bytes(4, "little") + element


def violations(request: kserve_pb2.ModelInferRequest) -> set[str]:
    with pytest.raises(InvalidRequestError) as caught:
        inference_of(request)
    assert all(violation.description for violation in caught.value.violations)
    return {violation.field for violation in caught.value.violations}


BAD: dict[str, tuple[kserve_pb2.ModelInferRequest, set[str]]] = {
    "nothing": (kserve_pb2.ModelInferRequest(), {"inputs"}),
    "no prompt": (a_request(truth(), alone=True), {"inputs"}),
    "unknown input": (a_request(text(name="image")), {"inputs[1].name"}),
    "prompt twice": (a_request(text()), {"inputs[1].name"}),
    "stream by both its names": (a_request(truth(), truth(name="streaming")), {"inputs[2].name"}),
    "many inputs": (a_request(*[text()] * 100_000), {"inputs"}),
    "prompt of numbers": (a_request(text(datatype="INT32"), alone=True), {"inputs[0].datatype"}),
    "stream of bytes": (a_request(truth(datatype="BYTES")), {"inputs[1].datatype"}),
    "no shape": (a_request(text(shape=[]), alone=True), {"inputs[0].shape"}),
    "two prompts": (a_request(text(shape=[2]), alone=True), {"inputs[0].shape"}),
    "no prompts": (a_request(text(shape=[0]), alone=True), {"inputs[0].shape"}),
    "negative shape": (a_request(text(shape=[-1]), alone=True), {"inputs[0].shape"}),
    "a shape beyond all numbers": (a_request(text(shape=[2**62, 2**62]), alone=True), {"inputs[0].shape"}),
    "a shape of many ones": (a_request(text(shape=[1] * 100), alone=True), {"inputs[0].shape"}),
    "two elements for a shape of one": (
        a_request(text(contents={"bytes_contents": [b"a", b"b"]}), alone=True),
        {"inputs[0]"},
    ),
    "no elements": (a_request(text(contents={}), alone=True), {"inputs[0]"}),
    "no truth values": (a_request(truth(contents={})), {"inputs[1]"}),
    "many truth values": (a_request(truth(contents={"bool_contents": [True] * 9})), {"inputs[1]"}),
    "a prompt that is no UTF-8": (a_request(text(b"\xff"), alone=True), {"inputs[0]"}),
    "a long prompt": (a_request(text(b"x" * 100_001), alone=True), {"inputs[0]"}),
    "a long raw prompt": (a_request(raw=[prefixed(b"x" * 100_001)]), {"inputs[0]"}),
    "shared memory": (
        a_request(text(parameters={"shared_memory_region": {"string_param": "x"}}), alone=True),
        {"inputs[0].parameters"},
    ),
    "raw contents of another number": (a_request(raw=[prefixed(b"a"), b"x"]), {"raw_input_contents"}),
    "raw contents beside contents": (
        kserve_pb2.ModelInferRequest(inputs=[text()], raw_input_contents=[prefixed(b"a")]),
        {"inputs[0].contents"},
    ),
    "raw without a length": (a_request(raw=[b"ab"]), {"inputs[0]"}),
    "raw of nothing": (a_request(raw=[b""]), {"inputs[0]"}),
    "raw that says more than there is": (a_request(raw=[prefixed(b"ab", 2**32 - 1)]), {"inputs[0]"}),
    "raw that says less than there is": (a_request(raw=[prefixed(b"ab", 1)]), {"inputs[0]"}),
    "raw of two elements": (a_request(raw=[prefixed(b"a") * 2]), {"inputs[0]"}),
    "raw that is no UTF-8": (a_request(raw=[prefixed(b"\xc3")]), {"inputs[0]"}),
    "raw truth value of two bytes": (a_request(truth(), raw=[prefixed(b"a"), b"\1\1"]), {"inputs[1]"}),
    "raw truth value of none": (a_request(truth(), raw=[prefixed(b"a"), b""]), {"inputs[1]"}),
    "raw truth value of two": (a_request(truth(), raw=[prefixed(b"a"), b"\2"]), {"inputs[1]"}),
    "unknown output": (a_request(outputs=[Output(name="logits")]), {"outputs[0].name"}),
    "many outputs": (a_request(outputs=[Output(name="text_output")] * 100_000), {"outputs"}),
    "classes of an output": (
        a_request(outputs=[Output(name="text_output", parameters={"classification": {"int64_param": 1}})]),
        {"outputs[0].parameters"},
    ),
    "many parameters": (a_request(parameters={f"p{i}": 1 for i in range(1000)}), {"parameters"}),
    "a parameter that nobody knows": (a_request(parameters={"max_token": 1}), {"parameters.max_token"}),
    "a parameter without a value": (a_request(parameters={"seed": None}), {"parameters.seed"}),
    "negative max_tokens": (a_request(parameters={"max_tokens": -1}), {"parameters.max_tokens"}),
    "max_tokens beyond its field": (a_request(parameters={"max_tokens": 2**32}), {"parameters.max_tokens"}),
    "half of a token": (a_request(parameters={"max_tokens": 1.5}), {"parameters.max_tokens"}),
    "infinitely many tokens": (a_request(parameters={"max_tokens": math.inf}), {"parameters.max_tokens"}),
    "max_tokens as a truth value": (a_request(parameters={"max_tokens": True}), {"parameters.max_tokens"}),
    "max_tokens as a word": (a_request(parameters={"max_tokens": "many"}), {"parameters.max_tokens"}),
    "digits without end": (a_request(parameters={"max_tokens": "1" * 100_000}), {"parameters.max_tokens"}),
    "temperature as a word": (a_request(parameters={"temperature": "hot"}), {"parameters.temperature"}),
    "temperature without end": (a_request(parameters={"temperature": "1" * 100_000}), {"parameters.temperature"}),
    "negative seed": (a_request(parameters={"seed": -1}), {"parameters.seed"}),
    "negative priority": (a_request(parameters={"priority": -1}), {"parameters.priority"}),
    "negative timeout": (a_request(parameters={"timeout": -1}), {"parameters.timeout"}),
    "endless timeout": (a_request(parameters={"timeout": 2**63 - 1}), {"parameters.timeout"}),
    "a flag that is a number": (
        a_request(parameters={"triton_enable_empty_final_response": 1}),
        {"parameters.triton_enable_empty_final_response"},
    ),
    "settings that are no JSON": (a_request(settings(b"{")), {"sampling_parameters"}),
    "settings that are a list": (a_request(settings([1])), {"sampling_parameters"}),
    "settings within settings within": (a_request(settings(b"[" * 60_000)), {"sampling_parameters"}),
    "settings of 70 KB": (a_request(settings({"stop": "x" * 70_000})), {"sampling_parameters"}),
    "many settings": (a_request(settings({f"p{i}": 1 for i in range(1000)})), {"sampling_parameters"}),
    "a number that Python would not read": (
        a_request(settings(b'{"seed": ' + b"9" * 5000 + b"}")),
        {"sampling_parameters"},
    ),
    "a number beyond all floats": (
        a_request(settings(b'{"top_p": ' + b"9" * 400 + b"}")),
        {"sampling_parameters.top_p"},
    ),
    "half a character": (a_request(settings(b'{"stop": ["\\ud800"]}')), {"sampling_parameters.stop"}),
    "a stop that is a number": (a_request(settings({"stop": [1]})), {"sampling_parameters.stop"}),
    "stop ids that are text": (a_request(settings({"stop_token_ids": ["a"]})), {"sampling_parameters.stop_token_ids"}),
    "biases that are a list": (a_request(settings({"logit_bias": [[5, 1]]})), {"sampling_parameters.logit_bias"}),
    "a bias of a word": (a_request(settings({"logit_bias": {"king": 1}})), {"sampling_parameters.logit_bias"}),
    "a bias of null": (a_request(settings({"logit_bias": {"5": None}})), {"sampling_parameters.logit_bias"}),
    "many biases": (
        a_request(settings({"logit_bias": {i: 1 for i in range(1025)}})),
        {"sampling_parameters.logit_bias"},
    ),
    "null": (a_request(settings({"temperature": None})), {"sampling_parameters.temperature"}),
    "several things": (
        a_request(settings({"top_k": -1}), parameters={"seed": -1}, outputs=[Output(name="x")]),
        {"sampling_parameters.top_k", "parameters.seed", "outputs[0].name"},
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_told_by_field(name: str) -> None:
    request, fields = BAD[name]
    assert violations(request) == fields


def test_contents_and_raw_contents_mean_the_same() -> None:
    given_as = [
        a_request(text("é".encode()), truth(), settings({"max_tokens": 3}), alone=True, id="a", model_name="demo"),
        a_request(
            *(text(), truth(), settings({})),
            alone=True,
            raw=[prefixed("é".encode()), b"\1", prefixed(b'{"max_tokens": 3}')],
            id="a",
            model_name="demo",
        ),
    ]
    plain, raw = map(inference_of, given_as)
    assert plain.request == raw.request
    assert (plain.request.prompt, plain.request.request_id, plain.request.model) == ("é", "a", "demo")
    assert (plain.is_streamed, raw.is_streamed, plain.is_raw, raw.is_raw) == (True, True, False, True)


def test_biases_are_a_setting() -> None:
    asked = inference_of(a_request(settings({"logit_bias": {"5": -100, "7": 0.5}})))
    assert dict(asked.request.sampling.logit_bias) == {5: -100, 7: 0.5}


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("name", "value", "kind", "wanted"),
    [
        ("guided_json", SCHEMA, "json_schema", SCHEMA),
        ("guided_regex", "[0-9]{2}", "regex", "[0-9]{2}"),
        ("guided_grammar", 'start: "a"', "grammar", 'start: "a"'),
        ("guided_choice", ["yes", "no"], "choices", ["yes", "no"]),
        ("guided_decoding", {"choice": ["yes", "no"]}, "choices", ["yes", "no"]),
        ("guided_decoding", {"json": SCHEMA}, "json_schema", SCHEMA),
        ("structured_outputs", {"regex": "a"}, "regex", "a"),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, "json_schema",
         SCHEMA),
        ("response_format", {"type": "json_object"}, "json_schema", {"type": "object"}),
    ],
)  # fmt: skip
def test_what_the_output_must_be_is_a_setting_or_a_parameter(name: str, value: object, kind: str, wanted: Any) -> None:
    as_text = value if isinstance(value, str) else json.dumps(value)
    for request in (
        a_request(settings({name: value})),
        a_request(settings({name: as_text})),
        a_request(parameters={name: as_text}),
    ):
        found = inference_of(request).request.structured_output
        assert found.WhichOneof("constraint") == kind
        said = list(found.choices.texts) if kind == "choices" else getattr(found, kind)
        assert (json.loads(said) if kind == "json_schema" else said) == wanted


def test_no_structure_leaves_the_output_free() -> None:
    for value in ({"response_format": {"type": "text"}}, {"guided_json": None}):
        assert not inference_of(a_request(settings(value))).request.HasField("structured_output")


@pytest.mark.parametrize(
    ("request_", "fields"),
    [
        (a_request(parameters={"guided_choice": "yes"}), {"parameters.guided_choice"}),
        (a_request(parameters={"guided_choice": "[1]"}), {"parameters.guided_choice"}),
        (a_request(parameters={"guided_choice": "[" * 70_000}), {"parameters.guided_choice"}),
        (a_request(parameters={"guided_choice": "[" * 60_000}), {"parameters.guided_choice"}),
        (a_request(parameters={"guided_json": 5}), {"parameters.guided_json"}),
        (a_request(parameters={"guided_regex": True}), {"parameters.guided_regex"}),
        (a_request(parameters={"response_format": "null"}), {"parameters.response_format"}),
        (a_request(parameters={"response_format": "5"}), {"parameters.response_format"}),
        (a_request(settings({"response_format": {"type": "xml"}})), {"sampling_parameters.response_format.type"}),
        (a_request(settings({"guided_decoding": {}})), {"sampling_parameters.guided_decoding"}),
        (
            a_request(settings({"guided_decoding": {"backend": "x", "regex": "a"}})),
            {"sampling_parameters.guided_decoding.backend"},
        ),
        (a_request(settings({"guided_regex": "\ud800"})), {"sampling_parameters.guided_regex"}),
        (a_request(settings({"guided_json": {"a": "\ud800"}})), {"sampling_parameters.guided_json"}),
        (a_request(settings({"guided_choice": ["a"] * 5000})), {"sampling_parameters.guided_choice"}),
        (a_request(settings({"guided_regex": "a"}), parameters={"guided_choice": "[]"}), {"parameters.guided_choice"}),
        (
            a_request(settings({"guided_decoding": {"regex": "a"}, "structured_outputs": {"regex": "b"}})),
            {"sampling_parameters.guided_decoding"},
        ),
    ],
)  # fmt: skip
def test_structures_that_are_none_are_refused_by_name(request_: kserve_pb2.ModelInferRequest, fields: set[str]) -> None:
    assert violations(request_) == fields


@pytest.mark.parametrize(
    ("name", "value", "part", "field", "wanted"),
    [
        ("max_tokens", 7, "stopping", "max_tokens", 7),
        ("max_tokens", "7", "stopping", "max_tokens", 7),
        ("max_tokens", 7.0, "stopping", "max_tokens", 7),
        ("temperature", 0.5, "sampling", "temperature", 0.5),
        ("temperature", "0.5", "sampling", "temperature", 0.5),
        ("temperature", 1, "sampling", "temperature", 1.0),
        ("top_p", 0.25, "sampling", "top_p", 0.25),
        ("top_k", 5, "sampling", "top_k", 5),
        ("min_p", 0.25, "sampling", "min_p", 0.25),
        ("repetition_penalty", 1.5, "sampling", "repetition_penalty", 1.5),
        ("presence_penalty", -0.5, "sampling", "presence_penalty", -0.5),
        ("frequency_penalty", "2", "sampling", "frequency_penalty", 2.0),
        ("seed", 2**63 - 1, "sampling", "seed", 2**63 - 1),
        ("stop", "end", "stopping", "stop_strings", ["end"]),
        ("ignore_eos", True, "stopping", "ignore_eos", True),
    ],
)
def test_a_parameter_of_the_request_and_of_the_settings_sets_its_field(
    name: str, value: object, part: str, field: str, wanted: object
) -> None:
    for request in (a_request(parameters={name: value}), a_request(settings({name: value}))):
        assert getattr(getattr(inference_of(request).request, part), field) == wanted


def test_lists_and_the_largest_seed() -> None:
    both = inference_of(a_request(settings({"stop": ["a", "b"], "stop_token_ids": [1, 2], "seed": 2**64 - 1}))).request
    assert list(both.stopping.stop_strings) == ["a", "b"]
    assert list(both.stopping.stop_token_ids) == [1, 2]
    assert both.sampling.seed == 2**64 - 1
    request = a_request()
    request.parameters["seed"].uint64_param = 2**64 - 1
    assert inference_of(request).request.sampling.seed == 2**64 - 1


def test_the_request_counts_more_than_the_settings() -> None:
    request = a_request(settings({"max_tokens": 3, "top_k": 4}), parameters={"max_tokens": 5})
    assert inference_of(request).request.stopping.max_tokens == 5
    assert inference_of(request).request.sampling.top_k == 4


@pytest.mark.parametrize("priority", [0, 1, 2, 9])
def test_the_first_two_priorities_are_interactive(priority: int) -> None:
    found = inference_of(a_request(parameters={"priority": priority})).request.request_class
    assert (found == common_pb2.REQUEST_CLASS_BATCH) == (priority > 1)


def test_timeouts_are_microseconds_and_none_is_none() -> None:
    assert inference_of(a_request(parameters={"timeout": 1_500_000})).timeout_s == 1.5
    assert inference_of(a_request(parameters={"timeout": 0})).timeout_s is None
    assert inference_of(a_request()).timeout_s is None


def test_versions() -> None:
    assert inference_of(a_request(model_version="1")).request.prompt == "hello"
    with pytest.raises(UnknownModelError, match="version 1 only"):
        inference_of(a_request(model_version="2"))


@pytest.mark.parametrize("is_raw", [False, True])
def test_responses_are_as_the_request_was(is_raw: bool) -> None:
    asked = inference_of(a_request(id="a", raw=[prefixed(b"x")] if is_raw else None))
    some, last = asked.response("demo", "é"), asked.response("demo", "", "stop")
    assert (some.model_name, some.model_version, some.id) == ("demo", "1", "a")
    assert [tensor.name for tensor in some.outputs] == ["text_output"]
    assert [tensor.name for tensor in last.outputs] == ["text_output", "finish_reason"]
    assert not some.parameters["triton_final_response"].bool_param
    assert last.parameters["triton_final_response"].bool_param
    if is_raw:
        assert list(last.raw_output_contents) == [prefixed(b""), prefixed(b"stop")]
        assert list(some.raw_output_contents) == [prefixed("é".encode())]
    else:
        assert not last.raw_output_contents
        assert [list(tensor.contents.bytes_contents) for tensor in last.outputs] == [[b""], [b"stop"]]


def test_only_the_outputs_that_are_wanted() -> None:
    asked = inference_of(a_request(outputs=[Output(name="finish_reason")]))
    assert not asked.response("demo", "x").outputs
    assert [tensor.name for tensor in asked.response("demo", "x", "stop").outputs] == ["finish_reason"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(
    st.dictionaries(
        st.sampled_from(
            [
                *("max_tokens", "temperature", "top_k", "seed", "stop", "stop_token_ids", "ignore_eos", "x"),
                *kserve_tensors.STRUCTURES,
            ]
        ),
        JSON,
        max_size=4,
    )
)
def test_whatever_the_settings_are_they_are_taken_or_refused(found: dict[str, object]) -> None:
    try:
        asked = inference_of(a_request(settings(found)))
    except InvalidRequestError as error:
        fields = {".".join(violation.field.split(".")[:2]) for violation in error.violations}
        assert fields <= {f"sampling_parameters.{name}" for name in found}
    else:
        assert asked.request.IsInitialized() and "x" not in found
