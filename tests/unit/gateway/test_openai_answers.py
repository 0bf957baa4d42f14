"""Tokens and ends of runs in OpenAI's shapes."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from bucketserve.core.errors import OverloadedError
from bucketserve.v1 import common_pb2, inference_pb2
from bucketserve_gateway.detokenizer import Detokenizer, TokenBytes
from bucketserve_gateway.models import ModelCard, ServedModel
from bucketserve_gateway.openai.answers import Answer, gather
from bucketserve_gateway.openai.bodies import pieces_of
from bucketserve_gateway.openai.caller import caller_of
from bucketserve_gateway.openai.translation import chat_completion, completion
from tests.unit.gateway.builders import an_admission, byte_fallback_bpe, byte_level_bpe, metaspace_unigram

STARTED = inference_pb2.GenerateStarted(model="demo", prompt_tokens=3)
FINISHED = inference_pb2.GenerateFinished(
    reason=common_pb2.FINISH_REASON_STOP, usage=inference_pb2.Usage(cached_prompt_tokens=2)
)


def served(tokenizer: Any) -> ServedModel:
    card = ModelCard(
        name="demo",
        context_tokens=100,
        vocab_size=len(tokenizer),
        eos_token_ids=(0,),
        has_chat_template=False,
        default_max_tokens=32,
    )
    return ServedModel(card, tokenizer, TokenBytes(tokenizer.backend_tokenizer))


def answer(model: ServedModel, *, is_chat: bool = False, **members: Any) -> Answer:
    if is_chat:
        wanted = chat_completion({"messages": [{"role": "user", "content": "a"}], **members}, caller_of({}))
    else:
        wanted = completion({"prompt": "a", **members}, caller_of({}))
    return Answer(wanted, model, [STARTED] * wanted.num_choices)


def read(document: Any) -> Any:
    """Returns a document as its client reads it."""
    return orjson.loads(b"".join(pieces_of(document)))


def position(token_id: int, *top: tuple[int, float], logprob: float = -0.5) -> common_pb2.PositionLogprobs:
    return common_pb2.PositionLogprobs(
        chosen=common_pb2.TokenLogprob(token_id=token_id, logprob=logprob),
        top=[common_pb2.TokenLogprob(token_id=other, logprob=value) for other, value in top],
    )


def chunk(text: str, *positions: common_pb2.PositionLogprobs) -> inference_pb2.GenerateChunk:
    ids = [each.chosen.token_id for each in positions]
    return inference_pb2.GenerateChunk(text=text, token_ids=ids, logprobs=positions)


@pytest.mark.parametrize("make", [byte_level_bpe, byte_fallback_bpe, metaspace_unigram])
@pytest.mark.parametrize("text", [" the quick brown fox", " naïve", " 日本語"])
def test_tokens_put_together_are_the_text(make: Any, text: str) -> None:
    tokenizer = make()
    model = served(tokenizer)
    ids = tokenizer.encode("the" + text, add_special_tokens=False)[1:]
    expected = Detokenizer(model.token_bytes, tokenizer.encode("the", add_special_tokens=False)).put(ids, is_last=True)
    positions = [position(token_id) for token_id in ids]
    whole = answer(model, is_chat=True, logprobs=True).choices[0]
    # However they are split into deliveries.
    pieces = [whole.piece(chunk("", each)) for each in positions]
    entries = [entry for piece in pieces if piece for entry in piece["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == expected
    of_completion = answer(model, logprobs=0).choices[0].piece(chunk(expected, *positions))
    assert of_completion is not None
    logprobs = of_completion["logprobs"]
    raw = [entry["bytes"] for entry in entries]
    for token, own in zip(logprobs["tokens"], raw, strict=True):
        assert token == bytes(own).decode(errors="replace") or token.startswith("bytes:\\x")
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"][-1] < len(expected)


def test_parts_of_characters_special_tokens_and_what_is_impossible_can_be_written() -> None:
    tokenizer = byte_level_bpe()
    model = served(tokenizer)
    end = tokenizer.eos_token_id
    half = tokenizer.convert_tokens_to_ids("æ")  # byte 0xe6, as byte-level vocabularies write it
    positions = [position(half, (end, -math.inf), (half, -1.0)), position(end, (end, -0.25), (10**6, -3.0))]
    piece = answer(model, logprobs=2).choices[0].piece(chunk("x", *positions))
    assert piece is not None
    logprobs = orjson.loads(orjson.dumps(piece))["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe6", "<|end|>"]
    # The chosen one is there, though its name is the same as another's or it is not among the likeliest.
    assert logprobs["top_logprobs"][0] == {"<|end|>": -9999.0, "bytes:\\xe6": -1.0}
    assert logprobs["top_logprobs"][1] == {"<|end|>": -0.25, "": -3.0}
    chat = answer(model, is_chat=True, logprobs=True).choices[0].piece(chunk("x", *positions))
    assert chat is not None
    first, second = chat["logprobs"]["content"]
    assert (first["bytes"], second["token"], second["bytes"]) == ([0xE6], "<|end|>", None)


def test_a_piece_that_shows_nothing_is_none_and_the_role_comes_once() -> None:
    model = served(byte_level_bpe())
    choice = answer(model, is_chat=True).choices[0]
    quiet = inference_pb2.GenerateChunk(token_ids=[5])
    assert choice.piece(quiet) is None
    first, second = choice.piece(chunk("a")), choice.piece(chunk("b"))
    assert first is not None
    assert second is not None
    assert (first["delta"], second["delta"]) == ({"role": "assistant", "content": "a"}, {"content": "b"})
    assert choice.end(FINISHED) == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert choice.num_tokens == 1
    # One that says nothing at all has a role as well.
    empty = answer(model, is_chat=True).choices[0]
    assert empty.end(FINISHED)["delta"] == {"role": "assistant"}


TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}
CALLED = '{"name":"find","arguments":{"a": "}é"}}'


@pytest.mark.parametrize("size", [1, 3, 7, 100])
@pytest.mark.parametrize(
    ("cut", "arguments"), [(None, '{"a": "}é"}'), (-1, '{"a": "}é"}'), (-4, '{"a": "}'), (28, "{")]
)
def test_a_call_is_the_same_in_whatever_pieces_it_comes(size: int, cut: int | None, arguments: str) -> None:
    model = served(byte_level_bpe())
    members = {"is_chat": True, "tools": [TOOL], "tool_choice": "required"}
    text = CALLED[:cut]
    reason = common_pb2.FINISH_REASON_STOP if cut is None else common_pb2.FINISH_REASON_LENGTH
    finished = inference_pb2.GenerateFinished(reason=reason)
    streamed, whole = answer(model, **members).choices[0], answer(model, **members).choices[0]
    pieces = []
    for start in range(0, len(text), size):
        pieces.append(streamed.piece(chunk(text[start : start + size])))
        whole.gather(inference_pb2.GenerateResponse(chunk=chunk(text[start : start + size])))
    pieces.append(streamed.end(finished))
    whole.gather(inference_pb2.GenerateResponse(finished=finished))
    calls = [call for piece in pieces if piece for call in piece["delta"].get("tool_calls", ())]
    assert not any("content" in piece["delta"] for piece in pieces if piece)
    assert [call["function"].get("name") for call in calls] == ["find"] + [None] * (len(calls) - 1)
    assert ["id" in call for call in calls] == [True] + [False] * (len(calls) - 1)
    assert "".join(call["function"]["arguments"] for call in calls) == arguments
    shown = read({"choice": whole.whole})["choice"]
    assert shown["message"]["content"] is None
    assert shown["message"]["tool_calls"][0]["function"] == {"name": "find", "arguments": arguments}
    assert shown["finish_reason"] == pieces[-1]["finish_reason"] == ("tool_calls" if cut is None else "length")


def test_a_call_that_is_cut_before_it_says_whose_it_is_is_text() -> None:
    choice = answer(served(byte_level_bpe()), is_chat=True, tools=[TOOL], tool_choice="required").choices[0]
    choice.gather(inference_pb2.GenerateResponse(chunk=chunk('{"name":"fi')))
    end = inference_pb2.GenerateFinished(reason=common_pb2.FINISH_REASON_LENGTH)
    choice.gather(inference_pb2.GenerateResponse(finished=end))
    message = read({"choice": choice.whole})["choice"]["message"]
    assert message == {"role": "assistant", "content": '{"name":"fi', "refusal": None}


def test_an_answer_without_a_word_is_whole() -> None:
    model = served(byte_level_bpe())
    for members, text in (({}, ""), ({"echo": True}, "a")):
        whole = answer(model, **members)
        whole.choices[0].gather(inference_pb2.GenerateResponse(finished=FINISHED))
        document = read(whole.whole())
        assert document["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}]
        details = {"cached_tokens": 2}
        usage = {"prompt_tokens": 3, "completion_tokens": 0, "total_tokens": 3, "prompt_tokens_details": details}
        assert document["usage"] == usage
    chat = answer(model, is_chat=True, logprobs=True)
    chat.choices[0].gather(inference_pb2.GenerateResponse(finished=FINISHED))
    (shown,) = read(chat.whole())["choices"]
    assert shown["message"] == {"role": "assistant", "content": "", "refusal": None}
    assert shown["logprobs"] == {"content": []}


@pytest.mark.parametrize("is_chat", [True, False])
@pytest.mark.parametrize("size", [1, 3, 50])
def test_the_whole_is_what_a_stream_would_be_and_takes_as_much_as_it_says(is_chat: bool, size: int) -> None:
    model = served(byte_level_bpe())
    members: dict[str, Any] = {"logprobs": True, "top_logprobs": 3} if is_chat else {"logprobs": 3}
    whole, streamed = answer(model, is_chat=is_chat, **members), answer(model, is_chat=is_chat, **members)
    positions = [position(5 + i, *((5 + j, -1.0 - j) for j in range(i, i + 3))) for i in range(100)]
    text, entries = "", dict[str, list[Any]]()
    choice = whole.choices[0]
    for start in range(0, len(positions), size):
        some = chunk('"\\é\0' * start, *positions[start : start + size])
        before = choice.num_bytes
        choice.gather(inference_pb2.GenerateResponse(chunk=some))
        piece = streamed.choices[0].piece(some)
        assert piece is not None
        text += piece["delta"]["content"] if is_chat else piece["text"]
        for name, values in piece["logprobs"].items():
            entries.setdefault(name, []).extend(values)
        assert choice.num_bytes >= before
    as_pieces = choice.num_bytes
    choice.gather(inference_pb2.GenerateResponse(finished=FINISHED))
    (shown,) = read(whole.whole())["choices"]
    assert (shown["message"]["content"] if is_chat else shown["text"]) == text
    assert shown["logprobs"] == entries
    num_bytes = len(b"".join(choice.whole.pieces))
    # A buffer that grows has some room to spare.
    assert num_bytes < choice.num_bytes < as_pieces + 1000 < num_bytes * 1.2 + 2000


async def test_what_is_gathered_counts_until_there_is_no_room() -> None:
    model, admission = served(byte_level_bpe()), an_admission(max_bytes=10_000)
    whole = answer(model, is_chat=True, n=2, logprobs=True, top_logprobs=20)
    some = position(5, *((5 + i, -1.0) for i in range(20)))
    closed = []

    async def run(number: int) -> AsyncIterator[inference_pb2.GenerateResponse]:
        try:
            for _ in range(number):
                yield inference_pb2.GenerateResponse(chunk=chunk("a", some))
            yield inference_pb2.GenerateResponse(finished=FINISHED)
        finally:
            closed.append(number)

    with admission.room() as room:
        await gather(whole.choices[0], run(3), room)
        held = room.num_bytes
        assert held == admission.num_bytes > 3 * 21 * len('{"token":"","logprob":-1.0,"bytes":[1]}')
        with pytest.raises(OverloadedError) as caught:
            await gather(whole.choices[1], run(1000), room)
        assert (caught.value.reason, caught.value.retry_delay_s) == ("MAX_HELD_BYTES", 1.0)
        assert held < admission.num_bytes <= 10_000
    assert admission.num_bytes == 0


def test_usage_in_every_chunk_or_in_the_last() -> None:
    model = served(byte_level_bpe())
    options = {"include_usage": True}
    of_stream = answer(model, stream=True, stream_options=options)
    assert of_stream.chunk({})["usage"] is None
    assert of_stream.last_chunk()["usage"]["prompt_tokens"] == 3
    assert "usage" not in answer(model, stream=True).chunk({})
    always = answer(model, stream=True, stream_options={**options, "continuous_usage_stats": True})
    always.choices[0].piece(chunk("a", position(5)))
    assert always.chunk({})["usage"]["completion_tokens"] == 1


def test_a_prompt_counts_once_however_many_choices_it_has() -> None:
    whole = answer(served(byte_level_bpe()), prompt=["a", "b"], n=3)
    for choice in whole.choices:
        choice.gather(inference_pb2.GenerateResponse(finished=FINISHED))
    assert whole.usage()["prompt_tokens"] == 2 * 3
    assert whole.usage()["prompt_tokens_details"] == {"cached_tokens": 2 * 2}


@pytest.mark.parametrize(("tier", "shown"), [("flex", "flex"), ("auto", "default"), ("priority", "default")])
def test_the_tier_that_served_is_told_to_who_named_one(tier: str, shown: str) -> None:
    model = served(byte_level_bpe())
    assert answer(model, is_chat=True, service_tier=tier).chunk({})["service_tier"] == shown
    assert "service_tier" not in answer(model, is_chat=True).chunk({})
