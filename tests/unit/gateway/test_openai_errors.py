"""Who asks, by the headers of OpenAI's clients, and what errors look like to them."""

from __future__ import annotations

import pytest

from bucketserve.core.errors import (
    BucketServeError,
    DeadlineError,
    EngineError,
    FieldViolation,
    InvalidRequestError,
    OverloadedError,
    UnavailableError,
    UnknownModelError,
)
from bucketserve_gateway.openai.caller import caller_of
from bucketserve_gateway.openai.errors import ParameterError, body_of, headers_of, status_of
from bucketserve_gateway.openai.translation import completion
from tests.unit.gateway.test_openai_translation import UNSUPPORTED, chat, complete


def headers(**values: str) -> dict[str, str]:
    return {name.replace("_", "-"): value for name, value in values.items()}


def test_headers_are_who_asks() -> None:
    caller = caller_of(
        headers(x_request_id="mine", x_llm_d_inference_fairness_id="team", x_slo_tpot_ms="50", traceparent="00-1-2-01")
    )
    assert caller.metadata["traceparent"] == "00-1-2-01"
    request = next(completion({"prompt": "a", "user": "somebody"}, caller).requests())
    assert (request.request_id, request.tenant, request.slo.tpot_ms) == ("mine", "team", 50)
    assert not request.slo.HasField("ttft_ms")
    for name in ("x_slo_ttft_ms", "x_llm_d_slo_ttft_ms", "x_dynamo_slo_ttft_ms", "x_sgl_ttft_slo_ms"):
        assert caller_of(headers(**{name: "200"})).slo.ttft_ms == 200
    assert caller_of(headers(x_sgl_ttft_slo_ms="1", x_slo_ttft_ms="2")).slo.ttft_ms == 2


def test_a_user_is_the_label_unless_there_is_one_or_it_is_not_fit_for_that() -> None:
    assert complete(user="somebody").label == "somebody"
    for user in ("", "two words", "x" * 129, "naïve"):
        assert complete(user=user).label.startswith("cmpl-")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x_slo_ttft_ms", "0"),
        ("x_slo_ttft_ms", "-5"),
        ("x_slo_ttft_ms", "1.5"),
        ("x_slo_ttft_ms", "nan"),
        ("x_slo_ttft_ms", ""),
        ("x_slo_ttft_ms", "²"),
        ("x_slo_tpot_ms", str(2**32)),
        ("x_slo_tpot_ms", "9" * 5000),
        ("x_request_id", "two words"),
        ("x_request_id", "x" * 129),
        ("x_request_id", "é"),
    ],
)
def test_headers_without_sense_are_refused(name: str, value: str) -> None:
    with pytest.raises(ParameterError) as caught:
        caller_of(headers(**{name: value}))
    assert caught.value.violations[0].field == name.replace("_", "-")


def invalid(*fields: str) -> InvalidRequestError:
    return InvalidRequestError([FieldViolation(field, "wrong") for field in fields])


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param"),
    [
        (invalid("sampling.top_p"), 400, "invalid_request_error", None, "top_p"),
        (invalid("stopping.max_tokens"), 400, "invalid_request_error", None, "max_tokens"),
        (invalid("stopping.stop_strings[1]", "prompt"), 400, "invalid_request_error", None, "stop"),
        (invalid("token_ids.ids[3]"), 400, "invalid_request_error", None, "prompt"),
        (invalid("chat"), 400, "invalid_request_error", None, "messages"),
        (invalid("chat.messages[2].role"), 400, "invalid_request_error", None, "messages[2].role"),
        (invalid("response.num_logprobs"), 400, "invalid_request_error", None, "logprobs"),
        (invalid("tenant"), 400, "invalid_request_error", None, "x-llm-d-inference-fairness-id"),
        (invalid(""), 400, "invalid_request_error", None, None),
        (ParameterError("tools", "no", "unsupported_parameter"), 400, "invalid_request_error", UNSUPPORTED, "tools"),
        (UnknownModelError("x", ["demo"]), 404, "invalid_request_error", "model_not_found", "model"),
        (
            OverloadedError("full", reason="QUEUE_TOKENS", retry_delay_s=2),
            429,
            "rate_limit_error",
            "queue_tokens",
            None,
        ),
        (UnavailableError("gone", reason="NO_SCHEDULER"), 503, "server_error", "no_scheduler", None),
        (DeadlineError("late"), 504, "timeout_error", "deadline", None),
        (EngineError("secret"), 500, "server_error", None, None),
        (ValueError("secret"), 500, "server_error", None, None),
    ],
)
def test_errors_have_the_shape_of_openai(
    error: Exception, status: int, kind: str, code: str | None, param: str | None
) -> None:
    assert status_of(error) == status
    body = body_of(error, {})["error"]
    assert (body["type"], body["code"], body["param"]) == (kind, code, param)
    assert body["message"]
    assert "secret" not in str(body)


def test_errors_name_the_parameter_that_was_used() -> None:
    names = chat(max_completion_tokens=5, logprobs=True, top_logprobs=3).names
    assert body_of(invalid("stopping.max_tokens"), names)["error"]["param"] == "max_completion_tokens"
    assert body_of(invalid("response.num_logprobs"), names)["error"]["param"] == "top_logprobs"
    assert len(str(body_of(invalid("x" * 10_000), {}))) < 12_000


@pytest.mark.parametrize(
    ("delay_s", "after", "after_ms"), [(0.0, 1, 1), (0.25, 1, 250), (1.0, 1, 1000), (2.1, 3, 2100)]
)
def test_when_to_come_again_is_said_in_whole_seconds_and_in_milliseconds(
    delay_s: float, after: int, after_ms: int
) -> None:
    kinds: list[BucketServeError] = [
        OverloadedError("full", reason="QUEUE_TOKENS", retry_delay_s=delay_s),
        UnavailableError("gone", retry_delay_s=delay_s),
    ]
    for error in kinds:
        assert dict(headers_of(error)) == {b"retry-after": b"%d" % after, b"retry-after-ms": b"%d" % after_ms}
    assert headers_of(invalid("x")) == []
    # Nobody is to send again what can't be served, or what workers end of.
    for reason in ("TOO_LARGE", "ATTEMPTS_EXHAUSTED"):
        assert headers_of(UnavailableError("no", reason=reason)) == [(b"x-should-retry", b"false")]
    assert headers_of(EngineError("no")) == headers_of(ValueError()) == [(b"x-should-retry", b"false")]
