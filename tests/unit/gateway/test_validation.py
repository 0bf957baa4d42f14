from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bucketserve.core.errors import InvalidRequestError, UnknownModelError
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.models import ModelCatalog
from bucketserve_gateway.text_bound import bytes_per_token
from bucketserve_gateway.validation import check_length, validate
from tests.unit.gateway.builders import catalog

CATALOG = catalog()
CARD = CATALOG.get("demo").card


def a_request(**fields) -> inference_pb2.GenerateRequest:
    if not {"prompt", "chat", "token_ids"} & fields.keys():
        fields["prompt"] = "hello"
    return inference_pb2.GenerateRequest(**fields)


def sampling(**fields) -> inference_pb2.GenerateRequest:
    return a_request(sampling=common_pb2.SamplingParams(**fields))


def stopping(**fields) -> inference_pb2.GenerateRequest:
    return a_request(stopping=common_pb2.StoppingParams(**fields))


def structured(**fields) -> inference_pb2.GenerateRequest:
    return a_request(structured_output=common_pb2.StructuredOutput(**fields))


def ids(*token_ids: int) -> inference_pb2.GenerateRequest:
    return a_request(token_ids=inference_pb2.TokenIds(ids=token_ids))


BAD = {
    "no input": (inference_pb2.GenerateRequest(), "input"),
    "empty prompt": (a_request(prompt=""), "prompt"),
    "prompt of ten megabytes": (a_request(prompt="x" * 10_000_000), "prompt"),
    "long in bytes only": (a_request(prompt="é" * 600), "prompt"),
    "no ids": (ids(), "token_ids.ids"),
    "id outside the vocabulary": (ids(1, CARD.vocab_size), "token_ids.ids[1]"),
    "chat without template": (
        a_request(chat=inference_pb2.Chat(messages=[inference_pb2.ChatMessage(role="user", content="x")])),
        "chat",
    ),
    "empty chat": (a_request(chat=inference_pb2.Chat()), "chat.messages"),
    "more ids than the context": (ids(*[1] * CARD.context_tokens), "token_ids.ids"),
    "negative temperature": (sampling(temperature=-0.1), "sampling.temperature"),
    "NaN temperature": (sampling(temperature=math.nan), "sampling.temperature"),
    "infinite temperature": (sampling(temperature=math.inf), "sampling.temperature"),
    "top_p zero": (sampling(top_p=0.0), "sampling.top_p"),
    "top_p above one": (sampling(top_p=1.5), "sampling.top_p"),
    "NaN top_p": (sampling(top_p=math.nan), "sampling.top_p"),
    "negative min_p": (sampling(min_p=-1), "sampling.min_p"),
    "negative penalty": (sampling(repetition_penalty=-1), "sampling.repetition_penalty"),
    "NaN penalty": (sampling(repetition_penalty=math.nan), "sampling.repetition_penalty"),
    "NaN presence penalty": (sampling(presence_penalty=math.nan), "sampling.presence_penalty"),
    "bias outside the vocabulary": (
        sampling(logit_bias={CARD.vocab_size: 1}),
        f"sampling.logit_bias[{CARD.vocab_size}]",
    ),
    "large bias": (sampling(logit_bias={1: 1, 3: 100.1}), "sampling.logit_bias[3]"),
    "NaN bias": (sampling(logit_bias={3: math.nan}), "sampling.logit_bias[3]"),
    "large schema": (structured(json_schema="x" * 65_537), "structured_output.json_schema"),
    "schema large in bytes": (structured(json_schema="é" * 33_000), "structured_output.json_schema"),
    "empty schema": (structured(json_schema=""), "structured_output.json_schema"),
    "empty expression": (structured(regex=""), "structured_output.regex"),
    "no choices": (structured(choices=common_pb2.Choices()), "structured_output.choices.texts"),
    "many choices": (structured(choices=common_pb2.Choices(texts=["a"] * 1025)), "structured_output.choices.texts"),
    "empty choices": (structured(choices=common_pb2.Choices(texts=[""])), "structured_output.choices"),
    "large choices": (structured(choices=common_pb2.Choices(texts=["a" * 999] * 99)), "structured_output.choices"),
    "a tokenizer without grammars": (structured(grammar="x"), "structured_output.grammar"),
    "no tokens": (stopping(max_tokens=0), "stopping.max_tokens"),
    "empty stop string": (stopping(stop_strings=["a", ""]), "stopping.stop_strings[1]"),
    "long stop string": (stopping(stop_strings=["a" * 257]), "stopping.stop_strings[0]"),
    "many stop strings": (stopping(stop_strings=["a"] * 17), "stopping.stop_strings"),
    "special token within a stop string": (stopping(stop_strings=["a", "<|end|>\n"]), "stopping.stop_strings[1]"),
    "stop id outside": (stopping(stop_token_ids=[CARD.vocab_size]), "stopping.stop_token_ids[0]"),
    "many logprobs": (a_request(response=inference_pb2.ResponseOptions(num_logprobs=21)), "response.num_logprobs"),
    "unknown class": (a_request(request_class=9), "request_class"),
    "long tenant": (a_request(tenant="t" * 65), "tenant"),
    "tenant with control": (a_request(tenant="a\n"), "tenant"),
    "request id with space": (a_request(request_id="a b"), "request_id"),
    "long request id": (a_request(request_id="a" * 129), "request_id"),
    "zero TTFT": (a_request(slo=common_pb2.Slo(ttft_ms=0)), "slo.ttft_ms"),
}


@pytest.mark.parametrize(("request_", "field"), BAD.values(), ids=BAD)
def test_bad_fields_are_named(request_: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(request_, CATALOG, max_prompt_bytes=1000)
    assert field in [violation.field for violation in caught.value.violations]
    assert all(violation.description for violation in caught.value.violations)


RANGES = {
    "temperature": ([0.0, -0.0, 1e-45, 1e-38, 100.0], [-1e-45, 100.00001, math.inf]),
    "top_p": ([1e-45, 0.5, 1.0], [0.0, -0.0, -1e-45, 1.0000002]),
    "top_k": ([0, 1, CARD.vocab_size, 2**32 - 1], []),
    "min_p": ([0.0, 1e-45, 1.0], [-1e-45, 1.0000002, math.nan]),
    "repetition_penalty": ([1e-45, 1.0, 100.0], [0.0, -0.0, -1e-45, 100.00001, math.inf]),
    "presence_penalty": ([-2.0, 0.0, 2.0], [-2.000001, 2.000001, -math.inf]),
    "frequency_penalty": ([-2.0, 0.0, 2.0], [-2.000001, 2.000001, math.nan]),
    "seed": ([0, 1, 2**63, 2**64 - 1], []),
}
"""Of common.proto: what each end of the documented range is, and what lies just beyond."""


@pytest.mark.parametrize("name", RANGES)
def test_the_documented_range_is_what_is_accepted(name: str) -> None:
    inside, outside = RANGES[name]
    for value in inside:
        given = sampling(**{name: value})
        valid = validate(given, CATALOG, max_prompt_bytes=1000)
        assert getattr(valid.sampling, name) == getattr(given.sampling, name)
    for value in outside:
        with pytest.raises(InvalidRequestError, match=f"sampling.{name}"):
            validate(sampling(**{name: value}), CATALOG, max_prompt_bytes=1000)


def test_all_violations_are_reported_at_once() -> None:
    request = a_request(
        prompt="",
        tenant="t" * 65,
        sampling=common_pb2.SamplingParams(temperature=-1, top_p=math.nan),
        stopping=common_pb2.StoppingParams(max_tokens=0),
    )
    with pytest.raises(InvalidRequestError) as caught:
        validate(request, CATALOG, max_prompt_bytes=1000)
    assert {violation.field for violation in caught.value.violations} == {
        "prompt",
        "tenant",
        "sampling.temperature",
        "sampling.top_p",
        "stopping.max_tokens",
    }


def chat_of(turns: list[tuple[str, str]]) -> inference_pb2.GenerateRequest:
    return a_request(
        chat=inference_pb2.Chat(
            messages=[inference_pb2.ChatMessage(role=role, content=content) for role, content in turns]
        )
    )


HELLO = inference_pb2.ChatMessage(role="user", content="hi")
HUGE = {
    # Each says one thing about it, however large it is.
    "ids outside the vocabulary": (ids(*[10**6] * 99), "token_ids.ids[0]"),
    "a hundred thousand biases": (sampling(logit_bias=dict.fromkeys(range(100_000), 1e9)), "sampling.logit_bias"),
    "a million stop strings": (stopping(stop_strings=[""] * 1_000_000), "stopping.stop_strings"),
    "a million stop ids": (stopping(stop_token_ids=[10**6] * 1_000_000), "stopping.stop_token_ids"),
    "a million messages": (chat_of([("", "")] * 1_000_000), "chat.messages"),
    "a million tools": (
        a_request(chat=inference_pb2.Chat(messages=[HELLO], tools=[inference_pb2.Tool()] * 1_000_000)),
        "chat.tools",
    ),
    "a million tool calls": (
        a_request(
            chat=inference_pb2.Chat(
                messages=[inference_pb2.ChatMessage(role="user", tool_calls=[inference_pb2.ToolCall()] * 1_000)] * 1_000
            )
        ),
        "chat.messages",
    ),
    "a million choices": (
        a_request(
            prompt="x",
            structured_output=common_pb2.StructuredOutput(choices=common_pb2.Choices(texts=["x"] * 1_000_000)),
        ),
        "structured_output.choices.texts",
    ),
    "a role of a megabyte": (chat_of([("r" * 1_000_000, "hi")]), "chat.messages[0].role"),
}


@pytest.mark.parametrize(("request_", "field"), HUGE.values(), ids=HUGE)
def test_what_is_too_much_is_refused_as_a_whole(request_: inference_pb2.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        validate(request_, CATALOG, max_prompt_bytes=1000)
    assert [v.field for v in caught.value.violations if v.field != "chat"] == [field]


def test_a_text_is_bounded_by_what_the_context_can_hold() -> None:
    model = CATALOG.get("demo")
    served = ModelCatalog({"demo": replace(model, bytes_per_token=bytes_per_token(model.tokenizer))})
    longest = max(map(len, model.tokenizer.get_vocab()))
    # As long as a prompt that leaves room for a token of output can be, and one byte more.
    text = "x" * longest * (CARD.context_tokens - 1)
    assert validate(a_request(prompt=text), served, max_prompt_bytes=10**6).prompt == text
    with pytest.raises(InvalidRequestError, match="context of 100 tokens"):
        validate(a_request(prompt=text + "x"), served, max_prompt_bytes=10**6)


def test_unknown_model() -> None:
    with pytest.raises(UnknownModelError, match="served: demo"):
        validate(a_request(model="other"), CATALOG, max_prompt_bytes=1000)


def test_defaults_are_filled_in() -> None:
    valid = validate(a_request(), CATALOG, max_prompt_bytes=1000)
    assert valid.model.card is CARD
    assert (valid.tenant, valid.request_class) == ("default", common_pb2.REQUEST_CLASS_INTERACTIVE)
    assert len(valid.request_id) == 32
    assert valid.stop_token_ids == CARD.eos_token_ids
    given = valid.sampling
    assert (given.temperature, given.top_p, given.top_k, given.min_p, given.repetition_penalty) == (0, 1, 0, 0, 1)
    assert given.HasField("seed")
    ignoring = validate(stopping(ignore_eos=True, stop_token_ids=[7]), CATALOG, max_prompt_bytes=1000)
    assert ignoring.stop_token_ids == (7,)


def test_a_stop_string_that_is_a_special_token_matches_by_id() -> None:
    # By special tokens alone: the same characters of ordinary tokens are text like any other.
    valid = validate(stopping(ignore_eos=True, stop_strings=["<|end|>", "end"]), CATALOG, max_prompt_bytes=1000)
    assert valid.stop_token_ids == (CATALOG.get("demo").token_bytes.special_ids["<|end|>"],)
    assert valid.stop_strings == ("<|end|>", "end")


def test_length_against_the_context() -> None:
    assert check_length([1] * 90, None, CARD, "prompt") == 10
    assert check_length([1] * 10, None, CARD, "prompt") == 32
    assert check_length([1] * 90, 10, CARD, "prompt") == 10
    for prompt, max_tokens, field in (
        ([], 5, "prompt"),
        ([1] * 100, None, "prompt"),
        ([1] * 90, 11, "stopping.max_tokens"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            check_length(prompt, max_tokens, CARD, "prompt")
        assert caught.value.violations[0].field == field
