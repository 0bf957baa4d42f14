"""Deliveries to text, stop strings and reasons, in the one request that takes them."""

from __future__ import annotations

import pytest

from bucketserve.v1 import common_pb2, delivery_pb2, inference_pb2, scheduler_pb2
from bucketserve_gateway.requests import OpenRequest
from bucketserve_gateway.validation import validate
from tests.unit.gateway.builders import an_open_request, catalog

CATALOG = catalog()
TOKENIZER = CATALOG.get("demo").tokenizer


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def opened(stops: list[str], prompt_ids: list[int]) -> OpenRequest:
    request = inference_pb2.GenerateRequest(prompt="the", stopping=common_pb2.StoppingParams(stop_strings=stops))
    valid = validate(request, CATALOG, max_prompt_bytes=1000)

    def again(request: OpenRequest, former: str) -> None:
        assert request.attempt == 2

    return an_open_request(valid, prompt_ids, 90, again)


def delivery(
    request: OpenRequest, index: int, token_ids: list[int], finished: delivery_pb2.DeliveryFinished | None = None
) -> delivery_pb2.TokenDelivery:
    return delivery_pb2.TokenDelivery(
        run_id=request.run_id,
        first_index=index,
        token_ids=token_ids,
        finished=finished,
    )


def deliver(request: OpenRequest, output: delivery_pb2.TokenDelivery, worker: str = "w", weights: str = "f") -> bool:
    return request.deliver(output, worker, weights)


async def text_of(request: OpenRequest) -> str:
    return "".join([chunk.text async for chunk in request.chunks()])


@pytest.mark.parametrize("size", [1, 2, 5, 17, 100])
@pytest.mark.parametrize(
    ("stop", "sent"), [("😀!", "the quick 😀 "), ("the", ""), ("fox", None), ("k 😀 😀", "the quic")]
)
async def test_a_stop_string_ends_the_output_whatever_the_deliveries(size: int, stop: str, sent: str | None) -> None:
    text = "the quick 😀 😀! and 😀"
    request, token_ids = opened([stop], encode("a ")), encode(text)
    for start in range(0, len(token_ids), size):
        if not deliver(request, delivery(request, start, token_ids[start : start + size])):
            break
    else:
        end = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH)
        deliver(request, delivery(request, len(token_ids), [], end))
    assert await text_of(request) == (text if sent is None else sent)
    assert request.finished is not None
    assert request.finished.matched_stop == ("" if sent is None else stop)
    # The output ends with the token that completes the stop string.
    if sent is not None:
        assert stop in TOKENIZER.decode(request.tokens)
        assert stop not in TOKENIZER.decode(request.tokens[:-1])


async def test_a_character_over_two_attempts_is_whole() -> None:
    token_ids = encode("x😀y")
    for cut in range(1, len(token_ids)):
        request = opened([], encode("a "))
        deliver(request, delivery(request, 0, token_ids[:cut]))
        request.restart("its worker was lost")
        end = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH)
        deliver(request, delivery(request, 0, token_ids[cut:], end))
        assert await text_of(request) == "x😀y"


async def test_a_special_token_as_stop_string_is_named_at_the_end() -> None:
    special_id = CATALOG.get("demo").token_bytes.special_ids["<|end|>"]
    for stops, matched in ((["fox", "<|end|>"], "<|end|>"), (["fox"], "")):
        request = opened(stops, encode("a "))
        end = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_STOP, matched_stop_token_id=special_id)
        deliver(request, delivery(request, 0, encode("the"), end))
        assert await text_of(request) == "the"
        assert request.finished is not None
        assert (request.finished.matched_stop, request.finished.matched_stop_token_id) == (matched, special_id)


async def test_output_that_is_here_before_the_scheduler_s_word_of_it_is_whole() -> None:
    # The two come from different peers: which is first is chance.
    for says_first in (True, False):
        request = opened([], encode("a "))
        batch = common_pb2.BatchInfo(batch_id="w/1", bucket_low_tokens=1, bucket_high_tokens=8)
        if says_first:
            request.on_dispatched(scheduler_pb2.RunDispatched(run_id=request.run_id, worker_id="w", waited_us=2500))
        first = delivery(request, 0, encode("the"))
        first.batch.CopyFrom(batch)
        deliver(request, first)
        assert request.worker_id == "w"
        end = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH)
        deliver(request, delivery(request, len(encode("the")), [], end))
        assert request.finished is not None
        assert request.finished.batch == batch
        assert request.finished.timings.queue_ms >= 0
        assert request.finished.timings.queue_ms == 2.5 or not says_first


async def test_an_attempt_that_runs_twice_with_different_weights_is_not_put_together_of_both() -> None:
    # The scheduler lost the attempt and gave it to a second worker, beside the first that still delivers.
    former: list[str] = []
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), CATALOG, max_prompt_bytes=1000)
    request = an_open_request(valid, [5, 6], 90, lambda _, run_id: former.append(run_id))
    first_id = request.run_id
    assert deliver(request, delivery(request, 0, [7, 8]), "old", "weights-1")
    # A second worker with the same weights says the same.
    assert deliver(request, delivery(request, 0, [7, 8, 9]), "twin", "weights-1")
    assert not deliver(request, delivery(request, 0, [1, 2, 3, 4]), "new", "weights-2")
    assert request.tokens == [7, 8, 9]
    assert former == [first_id]
    ticket = request.submission().ticket
    assert (ticket.fingerprint, ticket.prompt_tokens, request.attempt) == ("weights-1", 5, 2)
    # Nobody is at fault who has the right weights.
    assert list(ticket.avoid_worker_ids) == []
    # The next attempt has weights of its own until its first token; what comes late of the former is nobody's.
    late = delivery_pb2.TokenDelivery(run_id=first_id, first_index=3, token_ids=[9])
    assert not deliver(request, late, "new", "weights-2")
    assert request.tokens == [7, 8, 9]


async def test_an_attempt_that_broke_before_its_first_token_goes_to_any_weights() -> None:
    request = opened([], encode("a "))
    request.on_dispatched(scheduler_pb2.RunDispatched(run_id=request.run_id, worker_id="w"))
    request.restart("its worker was lost")
    ticket = request.submission().ticket
    assert (ticket.fingerprint, list(ticket.avoid_worker_ids)) == ("", ["w"])


async def test_an_attempt_has_an_age_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("bucketserve_gateway.requests.time.monotonic", lambda: now_s)
    request = opened([], encode("a "))
    now_s = 103.0
    assert request.submission().attempt_age_us == 3_000_000
    request.restart("its worker was lost")
    now_s = 105.0
    assert (request.submission().age_us, request.submission().attempt_age_us) == (5_000_000, 2_000_000)


async def test_output_is_word_enough_that_a_request_was_queued() -> None:
    # The scheduler dispatched it and died before it said so.
    request = opened([], encode("a "))
    deliver(request, delivery(request, 0, encode("the")))
    await request.accepted(0.0, str)
    request.restart("its worker was lost")
    assert request.submission().is_admitted


async def test_only_faults_count_towards_giving_up() -> None:
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), CATALOG, max_prompt_bytes=1000)
    request = an_open_request(valid, [5, 6], 90, lambda _, former: None)
    for _ in range(10):
        request.restart("it was stopped while its gateway was away", is_fault=False)
    assert not request.is_over
    for _ in range(3):
        request.restart("its worker was lost")
    assert request.error is not None
    assert request.error.reason == "ATTEMPTS_EXHAUSTED"


async def test_a_preempted_attempt_goes_on_where_it_was_and_is_nobody_s_fault() -> None:
    former: list[str] = []
    valid = validate(inference_pb2.GenerateRequest(prompt="the"), CATALOG, max_prompt_bytes=1000)
    request = an_open_request(valid, [5, 6], 8, lambda _, run_id: former.append(run_id))
    let_go = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_PREEMPTED)
    # The first has generated something, the second nothing.
    for tokens in ([7, 8, 9], []):
        first_id = request.run_id
        request.on_dispatched(scheduler_pb2.RunDispatched(run_id=first_id, worker_id="w"))
        deliver(request, delivery(request, 0, tokens, let_go), "w", "weights")
        assert (former[-1], request.is_over) == (first_id, False)
        late = delivery_pb2.TokenDelivery(run_id=first_id, first_index=3, token_ids=[1])
        assert not deliver(request, late)
    submission = request.submission()
    ticket, spec = submission.ticket, scheduler_pb2.RunSpec.FromString(submission.spec)
    assert (request.attempt, ticket.run_id.rpartition(".")[2], ticket.is_resumed) == (3, "3", True)
    assert (ticket.num_preemptions, spec.num_preemptions) == (2, 2)
    assert (list(spec.token_ids), spec.num_resumed_tokens, spec.max_new_tokens) == ([5, 6, 7, 8, 9], 3, 5)
    assert (ticket.prompt_tokens, ticket.max_new_tokens) == (5, 5)
    # Its worker may have it again, and only it and its likes.
    assert (list(ticket.avoid_worker_ids), ticket.fingerprint) == ([], "weights")
    assert submission.is_admitted
    for _ in range(2):
        request.restart("its worker was lost")
    assert not request.is_over
    end = delivery_pb2.DeliveryFinished(reason=common_pb2.FINISH_REASON_LENGTH)
    deliver(request, delivery(request, 0, [1, 2, 3, 4, 5], end))
    ids = [token_id async for chunk in request.chunks() for token_id in chunk.token_ids]
    assert ids == [7, 8, 9, 1, 2, 3, 4, 5]
    assert request.finished is not None
    assert (request.finished.reason, request.finished.attempts) == (common_pb2.FINISH_REASON_LENGTH, 5)
